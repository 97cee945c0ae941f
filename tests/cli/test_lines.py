"""Lines of 60, 80 and 120 columns: no command breaks a word at their end."""

import contextlib
import doctest
import io
import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest

import fastadam
from fastadam import cli, machine
from fastadam.bench import load, measure, peers, session
from fastadam.cli import common, info

WIDTHS = [60, 80, 120]
WIDE = 1_000
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    """What is printed, to a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def printed(monkeypatch):
    """Run a command on a terminal of some width; return what it prints."""
    monkeypatch.setenv("TERM", "xterm")

    def run(width, *arguments, status=0):
        monkeypatch.setenv("COLUMNS", str(width))
        out = Terminal()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            assert cli.main([*map(str, arguments)]) == status
        return ESCAPES.sub("", out.getvalue())

    return run


def words_of(text):
    """Return the words; numbers may differ from run to run."""
    return {re.sub(r"[\d.,]+", "0", word) for word in text.split() if re.search("[a-z]", word)}


def check(printed, width, *arguments, status=0):
    """Compare with a terminal on which all fits into one line."""
    text = printed(width, *arguments, status=status)
    for line in text.splitlines():
        # A word that is longer than a line, such as a path, is left whole.
        assert len(line) <= width or len(line.split()[-1]) > width - 16, line
        assert "…" not in line
    cut = words_of(text) - words_of(printed(WIDE, *arguments, status=status))
    assert cut == set()
    return text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", ["", "train", "bench", "info", "inspect"])
def test_help(printed, width, command):
    check(printed, width, *command.split(), "--help")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "arguments",
    [
        "bench --sizes 1e3,x",
        "bench --workload gpt3",
        "bench --load 2 --max-memory 4G",
        "train --steps 0",
        "train --every 3",
        "train --names no/such/file/in/any/folder.txt",
        "inspect no/such/file",
        "nothing",
    ],
)
def test_errors(printed, width, arguments):
    check(printed, width, *arguments.split(), status=2)


@pytest.mark.parametrize("width", WIDTHS)
def test_info(printed, monkeypatch, width):
    facts = info.gather()
    facts["machine"] |= {"cpus": 8, "cpus_allowed": 4, "busy_cpus": 5.5, "cpu_quota": 1.5}
    facts["threads"] |= {"count": 8, "used": 8, "rule": "NUMBA_NUM_THREADS=8", "layer": "omp"}
    facts["threads"] |= {"seen": 2, "on_cpus": 8, "error": None}
    facts["cache"] = {"folder": None, "writable": False}
    environ = {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4", "NUMBA_NUM_THREADS": "8"}
    facts["warnings"] = info._warnings(facts, environ)
    assert len(facts["warnings"]) > 5
    monkeypatch.setattr(info, "gather", lambda: facts)
    text = check(printed, width, "info")
    # What goes on in the next line stands below its beginning.
    assert {line[:10].strip() for line in text.splitlines()} <= {
        *("fastadam", "Python", "NumPy", "Numba", "optional", "system", "CPU", "SIMD", "CPUs"),
        *("threads", "layers", "GPU", "cache", "warning", ""),
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_inspect(printed, optional, tmp_path, width):
    optional("safetensors")
    path = tmp_path / "run.safetensors"
    params = {f"layer.{k}.attention.weight.of.a.long.name": np.zeros(3) for k in range(3)}
    opt = fastadam.Adam(params, schedule=fastadam.schedules.one_cycle(9), ema_decay=0.9)
    opt.step({name: np.ones(3) if name.startswith("layer.1") else None for name in params})
    fastadam.save(path, opt, extra={"note": "word " * 30})
    check(printed, width, "inspect", path)
    path.write_bytes(b"This is a plain text file, and a long one." * 50)
    text = " ".join(check(printed, width, "inspect", path, status=1).split())
    assert text.endswith(
        "is no checkpoint, or damaged: safetensors finds no header that it can read (header too "
        "large)"
    )


def test_json_is_not_broken(printed, optional, tmp_path):
    optional("safetensors")
    path = tmp_path / "run.safetensors"
    fastadam.save(path, fastadam.Adam(np.zeros(3)), extra={"note": "word " * 30})
    assert json.loads(printed(60, "inspect", path, "--json"))["extra"] == {"note": "word " * 30}


@pytest.mark.parametrize("width", WIDTHS)
def test_train(printed, optional, tmp_path, width):
    for package in ("autograd", "rich", "safetensors", "matplotlib"):
        optional(package)
    names = tmp_path / "names.txt"
    names.write_text("abcdefghijklmnopqrstuvwxyz\n")
    file = tmp_path / "run.safetensors"
    common = ["--steps", 2, "--samples", 7]
    text = check(printed, width, "train", "--names", names, *common, "--checkpoint", file)
    assert "on 1 name, one name per step" in " ".join(text.split())
    picture = ["--resume", file, "--names", names, "--plot", tmp_path / "a.png"]
    check(printed, width, "train", *picture, "--samples", 1)


def test_what_the_first_step_says_is_not_cut_by_the_bar(optional, monkeypatch):
    for package in ("autograd", "rich"):
        optional(package)
    from fastadam.cli import train

    terminal, own = Terminal(), []
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    def records():
        for _ in range(2):
            own.append(sys.stderr is terminal)  # and not rich's, which cuts lines
            yield types.SimpleNamespace(smoothed_loss=1.0, lr=0.1)

    assert len(list(train._progress(records(), 0, 2))) == 2
    assert own == [True, False]


@pytest.fixture
def found():
    """Results of every contender, some of them noisy."""
    made = session.Session(threads={"fastadam": 2}, other_cpus={"optax": 1.5})
    everyone = [peer for peer in (*peers.OWN, *peers.PEERS) if "cpu" in peer.devices]
    for k, peer in enumerate(everyone):
        made.threads[peer.name] = 1 + k % 2
        for name in ("micro", "1000"):
            ratio = measure.Spread(1.5 + k, 1.4 + k, 1.6 + k if k % 3 else 9.0 + 2 * k)
            one = session.Measured(peer.name, name, 3e-6, (2e-6,) * 7, ratio, 7, 10, 20)
            made.measured.append(one)
    reason = "needs 9.0 GiB, available are 2.0 GiB, and a reason that goes on and on and on"
    made.missing += [session.Missing(peer.name, "1000", reason) for peer in everyone[3:]]
    return made


@pytest.fixture
def _pretend(monkeypatch, found, optional):
    """Have `fastadam bench` find these results."""
    optional("rich")

    def measure_nothing(into, *_, **__):
        vars(into).update(vars(found))

    monkeypatch.setattr(session, "measure", measure_nothing)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("_pretend")
def test_bench(printed, monkeypatch, width, tmp_path):
    monkeypatch.setattr(peers, "find_spec", lambda name: name == "torch" or None)
    file = tmp_path / "bench.json"
    arguments = ["bench", "--workload", "micro", "--sizes", "1000", "--json", file]
    text = check(printed, width, *arguments)
    assert "DeepSpeed" in text
    assert "noisy" in text.split()
    assert "because their rounds differ by more than 25%" in " ".join(text.split())
    assert "because other" not in " ".join(text.split())


@pytest.mark.usefixtures("_pretend")
def test_bench_in_a_pipe(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["bench", "--workload", "micro", "--sizes", "1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for begin in ("Measuring the time of", "float32; medians of 7 rounds", "Warning: other"):
        (line,) = (line for line in lines if line.startswith(begin))
        assert len(line) > 100  # with no optimizer beside it, the first is 114 long
    assert max(len(line) for line in lines if line.startswith(("micro ", "1,000 "))) <= 60


@pytest.mark.parametrize("width", WIDTHS)
def test_bench_load(printed, optional, monkeypatch, width):
    optional("rich")
    made = load.UnderLoad(other_cpus=1.0, layer="workqueue")
    first = [pair[0] for pair in load.RATIOS]
    for row in load.rows():
        made.load[row] = 0.1
        for name in load.CONTENDERS:
            made.threads[name] = 2
            slices = [[row.size * 10, row.size * 30], [row.size, row.size]]
            # So that every ratio is noisy.
            made.times[row, name] = slices if name in first else slices[::-1]
    made.missing.append(session.Missing("torch-fused", None, "OSError: " + "a reason " * 20))
    monkeypatch.setattr(load, "measure", lambda *_, **__: made)
    text = check(printed, width, "bench", "--load", 2)
    assert text.split().count("all") == 4 * 3 or width > 60
    # Each ratio with its mark, and no table without a heading.
    assert len(re.findall(r"\d noisy", text)) == 4 * len(load.RATIOS) * (len(load.SIZES) + 1)
    assert not any(line.endswith(" ") for line in text.splitlines() if "mean" in line)


def test_no_terminal_no_breaks(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert cli.main(["train", "--every", "3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_words():
    assert common.wrapped("a scikit-learn b\n\nc", 8) == "a\nscikit-learn\nb\n\nc"
    assert common.wrapped("a b", None) == "a b"
    assert common.in_rows([("k", "aa bb"), ("", "c")], 5) == ["k  aa", "   bb", "   c"]
    for module in (cli, cli.bench, common):
        assert doctest.testmod(module).failed == 0


def test_order_of_inspect(printed, optional, tmp_path):
    optional("safetensors")
    path = tmp_path / "run.safetensors"
    groups = [{"params": {"z": np.zeros(1), "a/b": np.zeros(2)}}, {"params": {"m": np.zeros(3)}}]
    fastadam.save(path, fastadam.Adam(groups, amsgrad=True, ema_decay=0.5))
    text = printed(120, "inspect", path)
    names = [line.split()[0] for line in text.partition("bytes\n")[2].splitlines()[-18:] if line]
    kinds = ["param", "ema", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    expected = [f"{kind}/{name}" for name in ("z", "a/b", "m") for kind in kinds]
    assert names == [*expected, "total:", "checksums:"]
    facts = json.loads(printed(120, "inspect", path, "--json"))
    assert list(facts["tensors"]) == expected


def test_places_are_in_order(printed, optional, tmp_path):
    optional("safetensors")
    path = tmp_path / "run.safetensors"
    fastadam.save(path, fastadam.Adam([np.zeros(1) for _ in range(12)]), params=False)
    facts = json.loads(printed(120, "inspect", path, "--json"))
    places = [name.split("/")[1] for name in facts["tensors"]]
    assert places == [str(k // 2) for k in range(24)]


def test_busy_is_shown(printed, monkeypatch):
    monkeypatch.setattr(machine, "busy_cpus", lambda: 1.75)
    assert "about 1.8 kept busy by other processes" in printed(120, "info")
    assert json.loads(printed(120, "info", "--json"))["machine"]["busy_cpus"] == 1.75
    monkeypatch.setattr(machine, "busy_cpus", lambda: 0.01)
    assert " none kept busy by other processes" in printed(120, "info")


def test_info_of_one_thread_without_tbb(printed, monkeypatch):
    facts = info.gather()
    facts["threads"] |= {"count": 1, "used": 1, "seen": 1}
    facts["threads"]["layers"]["tbb"]["available"] = False
    facts["versions"]["optional"].pop("tbb", None)
    monkeypatch.setattr(info, "gather", lambda: facts)
    lines = [" ".join(line.split()) for line in printed(120, "info").splitlines()]
    assert {"threads 1 (tested: 1 worked)", "layers tbb: not installed"} <= {*lines}
    assert not any("elements on" in line for line in lines)
    facts["versions"]["optional"]["tbb"] = "2020.1"
    assert "tbb: Numba cannot load it" in printed(120, "info")


@pytest.mark.skipif(os.name != "posix", reason="a shell's >&-")
def test_output_that_was_closed_before():
    command = f"'{sys.executable}' -m fastadam inspect /dev/null >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "must be a file" in done.stderr
