"""``fastadam train`` as its user meets it: what it prints, what it saves, how it refuses."""

import doctest
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import fastadam
from fastadam import cli


@pytest.fixture(autouse=True)
def _needs_the_extra(optional):
    optional("autograd")
    optional("rich")


def refused(capsys, *arguments, status=2):
    """Run; return the one line on stderr, where nothing else was printed."""
    assert cli.main(["train", *map(str, arguments)]) == status
    out, err = capsys.readouterr()
    assert err.startswith("fastadam train: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    if status == 2:
        assert out == ""
    return err


def trained(tmp_path, *arguments):
    """Run a few steps; return what --json saved."""
    path = tmp_path / "out.json"
    assert cli.main(["train", "--steps", "5", "--json", str(path), *map(str, arguments)]) == 0
    return json.loads(path.read_text("utf-8"))


def test_what_it_prints(capsys):
    assert cli.main(["train", "--steps", "20"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where nobody looks
    assert out.startswith("Training 4,192 parameters (float64) on 5,163 names")
    assert ", one name per step.\n" in out
    assert "Mean loss: " in out
    assert "(a uniform guess: 3.296)" in out
    assert "s in all, " in out
    assert " microseconds." in out
    assert "⠀" in out
    names = out.partition("20 names it made up, ")[2].splitlines()[1:]
    assert [len(row.split()) for row in names] == [5, 5, 5, 5]


def test_progress_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the stream for a terminal
    assert cli.main(["train", "--steps", "3", "--samples", "0"]) == 0
    out, err = capsys.readouterr()
    assert "3/3" in err
    assert "loss 3." in err
    assert "names it made up" not in out


def test_ascii_terminal(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main(["train", "--steps", "4"]) == 0
    sys.stdout.flush()
    assert b" |*" in raw.getvalue()


def test_json(tmp_path):
    report = trained(tmp_path, "--seed", 7, "--dtype", "float32", "--samples", 3, "--lr", "0.02")
    assert report["settings"] == {
        "names": None,
        "num_names": 5163,
        "steps": 5,
        "lr": 0.02,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "schedule": "cosine",
        "dtype": "float32",
        "seed": 7,
    }
    assert report["versions"]["fastadam"] == fastadam.__version__
    assert set(report["versions"]) == {"fastadam", "python", "numba", "numpy", "autograd"}
    assert len(report["losses"]) == 5
    assert report["losses"][0] == pytest.approx(math.log(27), rel=0.05)
    expected = [0.01 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert report["lrs"] == pytest.approx(expected, rel=1e-12)
    assert len(report["samples"]) == 3


def test_same_seed_same_run(tmp_path):
    one = trained(tmp_path, "--seed", 3)
    two = trained(tmp_path, "--seed", 3)
    other = trained(tmp_path, "--seed", 4)
    fewer = trained(tmp_path, "--seed", 3, "--samples", 2)
    for key in ("losses", "lrs", "samples"):
        assert one[key] == two[key]
    assert one["losses"] != other["losses"]
    assert fewer["losses"] == one["losses"]
    assert fewer["samples"] == one["samples"][:2]


def test_plot(optional, tmp_path, capsys):
    optional("matplotlib")
    path = tmp_path / "loss.png"
    assert cli.main(["train", "--steps", "1", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"Saved {path}" in capsys.readouterr().out


def test_own_names_with_bom_crlf_capitals_and_blank_lines(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xef\xbb\xbfAda\r\n\r\n  Alan \r\nabcdefghijklmnopqrstuvwxyz\r\n")
    report = trained(tmp_path, "--names", path)
    assert report["settings"]["num_names"] == 3
    assert report["settings"]["names"] == str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no name"),
        (b"\n  \r\n\n", "holds no name"),
        (b"ada\nzo\xc3\xab\n", "line 2: character '\xeb' (U+00EB) cannot be encoded"),
        (b"ada\r\n\r\nanne-marie\r\n", "line 3: character '-' (U+002D) cannot be encoded"),
        (b"ada\rr2d2", "line 2: character '2' (U+0032) cannot be encoded"),
        (b"ada\0\n", r"line 1: character '\x00' (U+0000) cannot be encoded"),
        ("ada\nb\u2028o\n".encode(), r"line 2: character '\u2028' (U+2028) cannot be encoded"),
        (b"ada\nbob\nzo\xeb\n", "line 3: not UTF-8 text (byte 0xeb)"),
        ("ada\n".encode("utf-16"), "line 1: not UTF-8 text (byte 0xff)"),
    ],
)
def test_bad_names_file(tmp_path, capsys, content, message):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    err = refused(capsys, "--names", path)
    assert f"--names {path}" in err
    assert message in err


def test_names_file_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    missing = tmp_path / "missing.txt"
    err = refused(capsys, "--names", missing)
    assert err == f"fastadam train: error: --names {missing}: No such file or directory\n"
    assert f"--names {tmp_path}: " in refused(capsys, "--names", tmp_path)

    def deny(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert "Permission denied" in refused(capsys, "--names", missing)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "must be a whole number, at least 1, got '0'"),
        ("--steps", "-5", "must be a whole number, at least 1, got '-5'"),
        ("--steps", "1.5", "must be a whole number, at least 1, got '1.5'"),
        ("--lr", "0", "must be positive and finite, got '0'"),
        ("--lr", "-1e-2", "must be positive and finite, got '-1e-2'"),
        ("--lr", "nan", "must be positive and finite, got 'nan'"),
        ("--lr", "inf", "must be positive and finite, got 'inf'"),
        ("--lr", "fast", "must be positive and finite, got 'fast'"),
        ("--seed", "-1", "must be a whole number, at least 0, got '-1'"),
        ("--samples", "-1", "must be a whole number, at least 0, got '-1'"),
        ("--dtype", "float16", "invalid choice: 'float16'"),
        ("--plot", "loss.txt", "--plot must end in .png, .svg, .pdf, got "),
    ],
)
def test_bad_value(capsys, option, value, message):
    err = refused(capsys, f"{option}={value}")
    assert message in err
    assert option in err


@pytest.mark.parametrize("option", ["--plot", "--json"])
def test_output_is_checked_before_training(tmp_path, capsys, monkeypatch, option):
    assert "folder that exists" in refused(capsys, option, tmp_path / "missing" / "out.png")
    assert "must be a file, got the folder" in refused(capsys, option, tmp_path)
    assert "File name too long" in refused(capsys, option, tmp_path / ("x" * 300 + ".png"))
    monkeypatch.setattr("os.access", lambda _path, _mode: False)
    assert "must be writable" in refused(capsys, option, tmp_path / "out.png")


def test_no_file_is_used_twice(tmp_path, capsys):
    names = tmp_path / "names.png"
    names.write_text("ada\n")
    for option in ("--plot", "--json"):
        err = refused(capsys, "--names", names, option, names)
        assert f"{option} must not be the file of --names" in err
    same = tmp_path / "out.png"
    err = refused(capsys, "--plot", same, "--json", same)
    assert "--json must not be the file of --plot" in err
    assert names.read_text() == "ada\n"


def test_disk_that_fills_up(tmp_path, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    path = tmp_path / "out.json"
    assert cli.main(["train", "--steps", "1", "--json", str(path)]) == 1
    err = capsys.readouterr().err
    assert err == f"fastadam train: error: cannot write {path}: No space left on device\n"


@pytest.mark.parametrize(("dtype", "lr"), [("float32", "3e37"), ("float64", "1e307")])
def test_learning_rate_far_too_high(capsys, dtype, lr):
    err = refused(capsys, "--steps", 5, "--lr", lr, "--dtype", dtype, status=1)
    assert "must be finite" in err
    assert f"try a lower --lr than {float(lr):g}" in err


def test_learning_rate_beyond_the_dtype(capsys):
    err = refused(capsys, "--lr", "1e39", "--dtype", "float32")
    assert "--lr must not exceed 3.40282e+37, where steps become infinite in float32" in err


@pytest.mark.parametrize("package", ["autograd", "rich", "matplotlib"])
def test_missing_package(tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    err = refused(capsys, "--plot", tmp_path / "out.png")
    assert f'needs the package {package}: pip install "fastadam[demo]"' in err


def test_ctrl_c(capsys, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastadam.demo.train.loss_and_grads", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "fastadam train: interrupted\n"


def test_version_help_and_no_command(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastadam {fastadam.__version__}\n"
    assert cli.main(["train", "--help"]) == 0
    assert "--names FILE" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: fastadam [-h]")


def test_as_a_program(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "fastadam", "train", "--steps", "3"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.stderr == ""
    assert done.returncode == 0
    assert "20 names it made up, " in done.stdout


def test_examples():
    failed, tried = doctest.testmod(cli)
    assert failed == 0
    assert tried > 0


def test_names_longer_than_the_context_are_told(tmp_path, capsys):
    path = tmp_path / "names.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz\nada\n")
    assert cli.main(["train", "--names", str(path), "--steps", "2", "--samples", "1"]) == 0
    assert (
        "Of names of more than 16 letters, 1 here, the rest is not learnt."
        in capsys.readouterr().out
    )


def test_a_full_disk_under_the_output(monkeypatch, capsys):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastadam.cli.info.write", full)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "fastadam info: error: No space left on device\n"


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_the_curve_fits_the_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["train", "--steps", "3", "--samples", "0"]) == 0
    curve = capsys.readouterr().out.partition("over the steps:\n")[2].partition("\n\n")[0]
    assert max(map(len, curve.splitlines())) <= columns
