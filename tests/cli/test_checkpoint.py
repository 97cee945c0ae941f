"""``fastadam train --checkpoint`` and ``--resume``, and ``fastadam inspect``."""

import doctest
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import fastadam
from fastadam import cli, schedules
from fastadam.cli import inspect

STEPS = 12
NAMES = "ada\nbo\ncy\nabcdefghijklmnopqrs\ngrace\n"


@pytest.fixture(autouse=True)
def _needs_safetensors(optional):
    optional("safetensors")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.safetensors"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A list of the user's own, shorter than a run."""
    path = tmp_path_factory.mktemp("names") / "names.txt"
    path.write_text(NAMES)
    return path


def run(command, *arguments, status=0):
    assert cli.main([command, *map(str, arguments)]) == status


def train(*arguments, **options):
    pytest.importorskip("autograd", exc_type=ImportError)
    pytest.importorskip("rich", exc_type=ImportError)
    run("train", *arguments, **options)


def trained(tmp_path, *arguments):
    """Train; return what --json saved."""
    path = tmp_path / "out.json"
    train("--samples", 3, "--json", path, *arguments)
    return json.loads(path.read_text("utf-8"))


def error(capsys, command, *arguments, status):
    """Run; return the one line of the error."""
    capsys.readouterr()
    (train if command == "train" else lambda *a, **k: run(command, *a, **k))(
        *arguments, status=status
    )
    err = capsys.readouterr().err
    assert err.startswith(f"fastadam {command}: error: ")
    assert err.count("\n") == 1
    return err.partition("error: ")[2].rstrip("\n")


def stop_after(monkeypatch, calls):
    """Have Ctrl-C come in the gradient after so many steps."""
    from fastadam.demo import train as module

    true, left = module.loss_and_grads, [calls]

    def loss_and_grads(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return true(*arguments)

    monkeypatch.setattr(module, "loss_and_grads", loss_and_grads)


def held(path):
    """Return all that a file holds; the order in it is safetensors', and differs each time."""
    from safetensors.numpy import load_file

    arrays = {name: array.tobytes() for name, array in load_file(path).items()}
    return fastadam.checkpoint.inspect(path), arrays


@pytest.fixture(scope="module", params=["float64", "float32"])
def straight(request, tmp_path_factory, names):
    """A run that saved after every step, and what one that saved nothing gave."""
    folder = tmp_path_factory.mktemp("straight")
    options = ["--steps", STEPS, "--dtype", request.param, "--names", names, "--seed", 5]
    expected = trained(folder, *options)
    path = folder / "run.safetensors"
    again = trained(folder, *options, "--checkpoint", path, "--every", 1, "--keep", STEPS)
    assert again["losses"] == expected["losses"]
    return expected, [folder / f"run.{k}.safetensors" for k in range(STEPS - 1, 0, -1)] + [path]


class TestResume:
    @pytest.mark.parametrize("done", [1, 4, 5, 11])
    def test_same_bits(self, straight, tmp_path, names, done):
        expected, files = straight
        report = trained(tmp_path, "--resume", files[done - 1], "--names", names)
        assert report["first_step"] == done
        for key in ("losses", "lrs"):
            assert report[key] == expected[key][done:]
        assert report["samples"] == expected["samples"]
        assert report["settings"] == expected["settings"]
        assert expected["first_step"] == 0

    def test_again_and_again_in_one_file(self, straight, tmp_path, names, monkeypatch, capsys):
        expected, files = straight
        path = tmp_path / "run.safetensors"
        path.write_bytes(files[1].read_bytes())
        options = ["--resume", path, "--checkpoint", path, "--every", 3, "--names", names]
        with monkeypatch.context() as patch:
            stop_after(patch, 6)
            train(*options, status=130)
        err = capsys.readouterr().err
        assert err == f"fastadam train: interrupted; {path} goes on after step 6 of {STEPS}\n"
        report = trained(tmp_path, *options)
        assert report["losses"] == expected["losses"][6:]
        assert report["samples"] == expected["samples"]
        assert held(path) == held(files[-1])

    def test_in_a_new_process(self, tmp_path, file):
        options = ["--steps", 6, "--seed", 3]
        expected = trained(tmp_path, *options, "--checkpoint", file, "--every", 4, "--keep", 2)
        out = tmp_path / "again.json"
        older = tmp_path / "run.1.safetensors"
        command = [sys.executable, "-W", "error", "-m", "fastadam", "train", "--resume", older]
        done = subprocess.run(
            [*command, "--samples", "3", "--json", out], capture_output=True, encoding="utf-8"
        )
        assert (done.stderr, done.returncode) == ("", 0)
        assert done.stdout.startswith(f"{older} goes on after step 4 of 6.\nTraining 4,192 ")
        report = json.loads(out.read_text("utf-8"))
        for key in ("losses", "lrs"):
            assert report[key] == expected[key][4:]
        assert report["samples"] == expected["samples"]

    def test_curve(self, straight, names, capsys):
        """It shows the smoothed losses of the steps that were made, and which these are."""
        curves = []
        for done in (1, STEPS - 1):
            capsys.readouterr()
            train("--resume", straight[1][done - 1], "--names", names, "--samples", 0)
            out = capsys.readouterr().out
            curves.append(out.partition("Loss, smoothed, over ")[2].splitlines())
        assert [curve[0] for curve in curves] == ["steps 2 to 12:", "steps 12 to 12:"]
        # Both end with the same value.
        assert curves[0][6].split()[0] == curves[1][1].split()[0]
        assert [curve[8].split() for curve in curves] == [["2", "12"], ["12", "12"]]
        assert [curve[10].split(", ")[0].split()[-2:] for curve in curves] == [
            ["of", "these"],
            ["of", "these"],
        ]

    def test_progress_bar(self, straight, names, monkeypatch, capsys):
        monkeypatch.setenv("FORCE_COLOR", "1")
        train("--resume", straight[1][-2], "--names", names, "--samples", 0)
        assert f"{STEPS}/{STEPS}" in capsys.readouterr().err

    def test_plot(self, optional, straight, names, tmp_path, monkeypatch):
        optional("matplotlib")
        from matplotlib.axes import Axes

        limits = []
        true = Axes.set_xlim

        def set_xlim(self, *args, **kwargs):
            limits.append(args)
            return true(self, *args, **kwargs)

        monkeypatch.setattr(Axes, "set_xlim", set_xlim)
        path = tmp_path / "loss.png"
        train("--resume", straight[1][7], "--names", names, "--plot", path)
        assert (9, STEPS) in limits
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_finished(self, straight, names, tmp_path, capsys):
        expected, files = straight
        before = files[-1].read_bytes()
        options = ["--resume", files[-1], "--names", names]
        report = trained(
            tmp_path, *options, "--checkpoint", files[-1], "--plot", tmp_path / "x.png"
        )
        out = capsys.readouterr().out
        assert out.startswith(f"{files[-1]} holds the last step, {STEPS}: none is left to take.\n")
        assert "Training" not in out
        assert "3 names it made up" in out
        assert f"No step to draw: {tmp_path / 'x.png'} is not written." in out
        assert f"Saved {files[-1]}" not in out
        assert files[-1].read_bytes() == before
        assert report["losses"] == report["lrs"] == []
        assert report["first_step"] == STEPS
        assert report["samples"] == expected["samples"]
        other = tmp_path / "other.safetensors"
        train(*options, "--checkpoint", other)
        assert held(other) == held(files[-1])
        assert f"Saved {other}" in capsys.readouterr().out


class TestCheckpoint:
    def test_when_it_saves(self, file, capsys, tmp_path):
        train("--steps", 7, "--checkpoint", file, "--every", 3, "--keep", 9)
        assert f"Saved {file}" in capsys.readouterr().out
        found = {
            path.name: fastadam.checkpoint.inspect(path).step_count for path in tmp_path.iterdir()
        }
        assert found == {"run.safetensors": 7, "run.1.safetensors": 6, "run.2.safetensors": 3}
        train("--steps", 2, "--checkpoint", file)  # every 100 steps, and after the last
        assert fastadam.checkpoint.inspect(file).step_count == 2

    @pytest.mark.parametrize("option", ["--every", "--keep"])
    def test_options_of_checkpoint(self, file, capsys, option):
        message = error(capsys, "train", option, 5, status=2)
        assert message == f"{option} must come with --checkpoint, got 5 alone"
        message = error(capsys, "train", "--checkpoint", file, option, 0, status=2)
        assert "must be a whole number, at least 1, got '0'" in message

    def test_file_is_checked_before_training(self, tmp_path, capsys, monkeypatch):
        def message(path):
            return error(capsys, "train", "--checkpoint", path, status=2)

        assert "folder that exists" in message(tmp_path / "missing" / "x")
        assert "must be a file, got the folder" in message(tmp_path)
        if os.name == "posix":
            assert "must be a file, got '/dev/null'" in message("/dev/null")
        existing = tmp_path / "existing"
        existing.touch()
        monkeypatch.setattr("os.access", lambda path, _mode: path != tmp_path)
        assert f"must be in a folder that is writable, got '{existing}'" in message(existing)

    def test_no_other_file_is_used_twice(self, file, names, capsys):
        train("--steps", 1, "--checkpoint", file)
        for options, message in (
            (
                ["--json", file, "--checkpoint", file],
                "--json must not be the file of --checkpoint",
            ),
            (
                ["--names", names, "--checkpoint", names],
                "--checkpoint must not be the file of --n",
            ),
            (["--json", file, "--resume", file], "--json must not be the file of --resume"),
            (
                ["--json", file, "--resume", file, "--checkpoint", file],
                "--json must not be the file of --resume",
            ),
        ):
            assert message in error(capsys, "train", *options, status=2)

    def test_a_link_is_the_same_file(self, file, tmp_path):
        link = tmp_path / "link"
        try:
            link.symlink_to(file)
        except OSError:
            pytest.skip("no links here")
        train("--steps", 4, "--checkpoint", file, "--every", 3, "--keep", 2)
        link.unlink()
        link.symlink_to(tmp_path / "run.1.safetensors")
        train("--resume", link, "--checkpoint", tmp_path / "run.1.safetensors")
        assert fastadam.checkpoint.inspect(link).step_count == 4

    def test_disk_that_fills_up(self, file, capsys, monkeypatch):
        options = ["--steps", 4, "--checkpoint", file, "--every", 1]
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            train(*options, status=130)
        before = file.read_bytes()

        def full(path, *_arguments):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr("fastadam.checkpoint.file_format.write", full)
        message = error(capsys, "train", *options, "--resume", file, status=1)
        assert message == f"cannot write {file}: No space left on device"
        assert file.read_bytes() == before
        assert list(file.parent.iterdir()) == [file]

    def test_ctrl_c(self, file, capsys, monkeypatch):
        def interrupted(steps, *options):
            capsys.readouterr()
            with monkeypatch.context() as patch:
                stop_after(patch, steps)
                train("--steps", 9, "--checkpoint", file, *options, status=130)
            return capsys.readouterr().err

        nothing = f"fastadam train: interrupted; nothing is saved yet in {file}\n"
        assert interrupted(2) == nothing
        assert not file.exists()
        assert interrupted(5, "--every", 2).endswith(f"; {file} goes on after step 4 of 9\n")
        # What is there is another run's.
        assert interrupted(1, "--seed", 8) == nothing

        def stop(*_arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr("fastadam.demo.model.sample", stop)
        train("--steps", 2, "--checkpoint", file, status=130)
        assert f"; {file} holds the last step, 2: none is" in capsys.readouterr().err

    def test_ctrl_c_while_the_file_is_put_in_its_place(self, file, capsys, monkeypatch):
        from fastadam.checkpoint import atomic_file

        def stop(_folder):
            raise KeyboardInterrupt

        monkeypatch.setattr(atomic_file, "_flush_folder", stop)
        train("--steps", 5, "--checkpoint", file, "--every", 3, status=130)
        assert f"; {file} goes on after step 3 of 5\n" in capsys.readouterr().err


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "run.safetensors"
    train("--steps", 2, "--checkpoint", path, "--samples", 0)
    return path


class TestRefusals:
    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--steps", 3, "--steps must be 2, as in {}, got 3"),
            ("--lr", "2e-2", "--lr must be 0.01, as in {}, got 0.02"),
            ("--seed", 0, "--seed must be 42, as in {}, got 0"),
            ("--dtype", "float32", "--dtype must be float64, as in {}, got float32"),
        ],
    )
    def test_contradiction(self, saved, capsys, option, value, message):
        found = error(capsys, "train", "--resume", saved, option, value, status=2)
        assert found == message.format(saved)

    def test_what_is_said_twice_is_no_contradiction(self, saved):
        options = ["--steps", 2, "--lr", "0.01", "--seed", 42, "--dtype", "float64"]
        train("--resume", saved, *options, "--samples", 1)

    def test_names(self, saved, names, file, tmp_path, capsys):
        found = error(capsys, "train", "--resume", saved, "--names", names, status=2)
        assert found.startswith(f"--names must be the 5,163 names of {saved} (SHA-256 ")
        assert "), got 5 names (SHA-256 " in found
        train("--steps", 2, "--checkpoint", file, "--names", names, "--samples", 0)
        found = error(capsys, "train", "--resume", file, status=2)
        assert found.startswith(f"--names must be given: the 5 names of {file} (SHA-256 ")
        other = tmp_path / "other.txt"
        other.write_text("bo\nada\ncy\nabcdefghijklmnopqrs\ngrace\n")  # in another order
        found = error(capsys, "train", "--resume", file, "--names", other, status=2)
        assert found.startswith(f"--names must be the 5 names of {file} (SHA-256 ")
        other.write_text(NAMES.upper().replace("\n", "\r\n"))  # the same, as they are read
        train("--resume", file, "--names", other, "--samples", 0)

    def test_no_such_file(self, tmp_path, capsys):
        path = tmp_path / "missing"
        assert error(capsys, "train", "--resume", path, status=2).startswith(f"{path}: No such")
        assert "must be a file" in error(capsys, "train", "--resume", tmp_path, status=1)

    def test_damaged(self, saved, file, names, capsys):
        whole = saved.read_bytes()
        flipped = bytearray(whole)
        flipped[-1] ^= 1
        for content in (whole[:-8], whole[:100], bytes(flipped), b"", names.read_bytes()):
            file.write_bytes(content)
            assert str(file) in error(capsys, "train", "--resume", file, status=1)

    def test_of_another_program(self, file, capsys, saved):
        extra = fastadam.checkpoint.inspect(saved).extra
        settings = extra["settings"]
        opt = fastadam.Adam({"w": np.zeros(3)})
        for wrong in (
            None,
            {},
            {**extra, "program": "mine"},
            {**extra, "average": 1},
            {**extra, "settings": 3},
            {**extra, "settings": {**settings, "steps": 0}},
            {**extra, "settings": {**settings, "lr": -1.0}},
            {**extra, "settings": {**settings, "seed": -1}},
            {**extra, "settings": {**settings, "seed": True}},
            {**extra, "settings": {**settings, "dtype": "int8"}},
            {**extra, "settings": {**settings, "names": []}},
            {**extra, "settings": {**settings, "names": {"count": 3}}},
        ):
            fastadam.save(file, opt, extra=wrong)
            message = error(capsys, "train", "--resume", file, status=1)
            assert message == f"{file} was not saved by fastadam train"
        for _ in range(3):
            opt.step({"w": np.ones(3)})
        fastadam.save(file, opt, extra=extra)  # has had more steps than there are
        assert "was not saved by" in error(capsys, "train", "--resume", file, status=1)
        fastadam.save(file, fastadam.Adam({"\x1b[2J": np.zeros(3)}), extra=extra)
        message = error(capsys, "train", "--resume", file, status=1)
        assert f"{file} must fit the optimizer" in message
        assert message.isprintable()

    def test_missing_package(self, saved, file, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors", None)
        expected = 'needs the package safetensors: pip install "fastadam[checkpoint]"'
        assert error(capsys, "train", "--resume", saved, status=2) == expected
        assert error(capsys, "train", "--checkpoint", file, status=2) == expected
        assert error(capsys, "inspect", saved, status=2) == expected


SCHEDULES = {
    "constant": schedules.constant(),
    "cosine": schedules.cosine(9),
    "linear": schedules.linear(9),
    "polynomial": schedules.polynomial(9, power=1.5),
    "exponential": schedules.exponential(0.5),
    "inverse_sqrt": schedules.inverse_sqrt(4),
    "one_cycle": schedules.one_cycle(9),
    "warmup_stable_decay": schedules.warmup_stable_decay(9, 2, 3),
    "cosine_restarts": schedules.cosine_restarts(3, multiplier=2),
    "piecewise": schedules.piecewise([3], [1.0, 0.1]),
    "warmup": schedules.warmup(schedules.cosine(9), 3),
    "chain": schedules.chain((schedules.linear(3), 3), schedules.cosine(9)),
}


class TestInspect:
    def shown(self, capsys, path, *options):
        capsys.readouterr()
        run("inspect", path, *options)
        out, err = capsys.readouterr()
        assert err == ""
        return out

    def rows(self, text):
        """Return the rows above the table, by their key."""
        rows, key = {}, ""
        for line in text.partition("\n\n")[0].splitlines():
            key = line[:15].strip() or key
            rows.setdefault(key, []).append(line[15:])
        return rows

    def test_groups_and_limits(self, file, capsys):
        groups = [
            {"params": {"w": np.zeros((300, 2), np.float32), "b": np.zeros(())}},
            {"params": [np.zeros(3)], "lr": 0.5, "betas": (0.5, 0.75), "weight_decay": 0.1},
        ]
        opt = fastadam.AdamW(
            groups, max_grad_norm=1.5, nonfinite="skip", ema_decay=0.9, amsgrad=True
        )
        extra = {"epoch": 3, "note": "zo\xeb", "nested": {"a": [1, None]}}
        fastadam.save(file, opt, extra=extra)
        text = self.shown(capsys, file)
        rest = [
            f"eps=1e-08, weight_decay={decay}, decoupled_weight_decay=True, maximize=False"
            for decay in (0.01, 0.1)
        ]
        assert self.rows(text) == {
            "file": [f"{file}, {file.stat().st_size:,} bytes"],
            "fastadam": [fastadam.__version__],
            "step_count": ["0"],
            "schedule": ["None"],
            "max_grad_norm": ["1.5"],
            "nonfinite": ["skip"],
            "ema_decay": ["0.9"],
            "amsgrad": ["True"],
            "group 0": [f"lr=0.01, betas=(0.9, 0.95), {rest[0]}", "parameters: w, b"],
            "group 1": [f"lr=0.5, betas=(0.5, 0.75), {rest[1]}", "parameters: 2"],
            "extra": ["epoch: 3", 'note: "zo\xeb"', 'nested: {"a": [1, null]}'],
        }
        table = text.partition("\n\n")[2].splitlines()
        assert table[0].split() == ["tensor", "dtype", "shape", "bytes"]
        assert len({len(line) for line in table[:-2]}) == 1  # right-aligned
        assert "param/w" in text
        (line,) = (line for line in table if line.startswith("max_exp_avg_sq/w "))
        assert line.split("  ")[1:3] == ["float32", "(300, 2)"]
        assert line.endswith(" 2,400")
        assert table[-3].split() == ["total:", "15", f"{5 * (2400 + 8 + 24):,}"]
        assert table[-1] == "checksums: all right"

        facts = json.loads(self.shown(capsys, file, "--json"))
        assert facts["extra"] == extra
        assert facts["bytes"] == file.stat().st_size
        assert facts["steps"] == {"w": 0, "b": 0, "2": 0}
        assert facts["param_groups"][1]["params"] == [2]
        assert facts["tensors"]["param/b"] == {"dtype": "float64", "shape": [], "bytes": 8}
        assert facts["verified"] is True

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_schedules(self, file, capsys, name):
        assert set(SCHEDULES) == {key for key in schedules.__all__ if key != "Schedule"}
        schedule = SCHEDULES[name]
        fastadam.save(file, fastadam.Adam(np.zeros(3), schedule=schedule))
        assert self.rows(self.shown(capsys, file))["schedule"] == [repr(schedule)]
        assert json.loads(self.shown(capsys, file, "--json"))["schedule"] == repr(schedule)

    def test_another_callable_and_no_limit(self, file, capsys):
        class Mine:
            def __call__(self, _step):
                return 1.0

            def __repr__(self):
                return "mine\x1b[31m\n" + "x" * 300

        opt = fastadam.Adam(np.zeros(3), schedule=Mine(), max_grad_norm=np.inf)
        fastadam.save(file, opt, params=False)
        rows = self.rows(self.shown(capsys, file))
        assert rows["schedule"][0].startswith("mine\\x1b[31m\\nxx")
        assert rows["schedule"][0].endswith("x... (314 characters)")
        assert rows["max_grad_norm"] == ["inf"]
        assert rows["extra"] == ["none"]
        facts = json.loads(self.shown(capsys, file, "--json"), parse_constant=pytest.fail)
        assert facts["max_grad_norm"] == "inf"
        assert not any(name.startswith("param/") for name in facts["tensors"])

    def test_steps_that_differ(self, file, capsys):
        opt = fastadam.Adam({"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(2)})
        opt.step({name: np.ones(2) for name in "abc"})
        opt.step({"a": np.ones(2), "b": None, "c": np.ones(2)})
        fastadam.save(file, opt)
        rows = self.rows(self.shown(capsys, file))
        assert rows["step_count"] == ["2"]
        assert rows["steps"] == ["1 for b"]
        facts = json.loads(self.shown(capsys, file, "--json"))
        assert facts["steps"] == {"a": 2, "b": 1, "c": 2}

    def test_nothing_in_it(self, file, capsys):
        fastadam.save(file, fastadam.Adam([]))
        text = self.shown(capsys, file)
        assert "total: 0" in text
        assert self.rows(text)["group 0"][1] == "parameters: none"

    def test_hostile_text(self, file, capsys):
        evil = "\x1b]0;owned\x07\r\n\x9b2J\u202egnp.\u2028\x7f"
        names = [evil, "a  (3,)", "", " b", "c, d", "'e'", "back\\x1b", "\u540d", "f" * 1000]
        opt = fastadam.Adam({name: np.zeros(3) for name in names})
        fastadam.save(file, opt, extra={evil: [evil], "k: v": {evil: 1}, "long": "y" * 10**6})
        text = self.shown(capsys, file)
        assert all(line.isprintable() for line in text.split("\n"))
        for name in (*names[:4], "'e'", "back\\x1b"):
            assert repr(f"exp_avg/{name}") in text or name in ("", " b", "'e'")
        assert "(1,006 characters)" in text  # param/fff
        assert max(map(len, text.splitlines())) < 400
        text = self.shown(capsys, file, "--json")
        assert all(line.isprintable() for line in text.split("\n"))
        facts = json.loads(text)
        assert set(facts["steps"]) == set(names)
        assert facts["extra"][evil] == [evil]
        for content in (text.encode(), file.read_bytes()[:-1]):
            file.write_bytes(content)
            assert error(capsys, "inspect", file, status=1).isprintable()

    def test_verify(self, file, capsys):
        fastadam.save(file, fastadam.Adam({"\x1b[2J": np.zeros(3)}))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        message = error(capsys, "inspect", file, status=1)
        assert message.startswith(f"{file} is damaged: ")
        assert message.isprintable()
        assert self.shown(capsys, file, "--no-verify").endswith("\n\nchecksums: not verified\n")
        assert json.loads(self.shown(capsys, file, "--no-verify", "--json"))["verified"] is False

    def test_errors(self, tmp_path, file, capsys):
        assert error(capsys, "inspect", file, status=2).startswith(f"{file}: No such file")
        assert error(capsys, "inspect", tmp_path, status=1) == f"{tmp_path} must be a file"
        odd = tmp_path / "two\nlines"
        assert error(capsys, "inspect", odd, status=2).startswith(
            f"{tmp_path}{os.sep}two\\nlines:"
        )
        message = error(capsys, "inspect", tmp_path / ("x" * 300), status=2)
        assert message.endswith("File name too long")
        assert "the following arguments are required: FILE" in error(capsys, "inspect", status=2)

    def test_nan_in_extra(self, file, capsys):
        fastadam.save(file, fastadam.Adam(np.zeros(3)), extra={"loss": np.nan})
        assert np.isnan(fastadam.checkpoint.inspect(file).extra["loss"])
        assert "NaN" in self.shown(capsys, file)
        assert np.isnan(json.loads(self.shown(capsys, file, "--json"))["extra"]["loss"])

    @pytest.mark.skipif(os.name == "nt", reason="there is no head")
    def test_reader_that_leaves(self, file):
        opt = fastadam.Adam({f"{'w' * 150}{i}": np.zeros(1) for i in range(200)})
        fastadam.save(file, opt)  # to print it takes more than a pipe holds
        command = f'"{sys.executable}" -W error -m fastadam inspect "{file}" | head -1'
        done = subprocess.run(command, shell=True, capture_output=True, encoding="utf-8")
        assert done.stderr == ""
        assert done.stdout == f"file           {file}, {file.stat().st_size:,} bytes\n"


def test_help(capsys):
    run("train", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for default in ("1000", "0.01", "42", "float64", "20", "100", "1"):
        assert f"(default: {default})" in text
    run("inspect", "--help")
    assert "--no-verify" in capsys.readouterr().out


def test_examples():
    assert doctest.testmod(cli).failed == 0
    assert doctest.testmod(inspect).failed == 0


def test_every_public_function_has_a_docstring():
    for name in inspect.__all__:
        assert getattr(inspect, name).__doc__
