"""``fastadam bench --load``: the load runs and ends, turns alternate, and means are right."""

import json
import signal
import statistics
import subprocess
import textwrap
import time

import pytest
from bench_tools import GROUP, gone, python

from fastadam import cli
from fastadam.bench import child, load, measure, report, tables
from fastadam.cli import bench

# Few and short, so that a test is.
SHORT = {"sizes": (50, 70_000), "passes": 1, "rounds": 1, "steps": 3, "seconds": 0.0}


# Child processes


def answering(code):
    head = """
        import json, os, sys, time
        for line in sys.stdin:
            question = json.loads(line)
    """
    return python(textwrap.dedent(head) + textwrap.indent(textwrap.dedent(code), "    "))


def test_child_answers():
    with child.Child(
        answering("print(json.dumps([question, os.environ['A']]), flush=True)"), {"A": "b"}
    ) as one:
        assert one.ask({"x": 1}) == [{"x": 1}, "b"]
        assert one.ask(None) == [None, "b"]


def test_child_that_ends_says_why():
    one = child.Child(answering("sys.exit('no good')"))
    with one, pytest.raises(child.ChildError, match="ended with status 1: no good"):
        one.ask(1)


def test_child_that_hangs_is_ended():
    code = "print(os.getpid(), flush=True) if question == 1 else time.sleep(60)"
    with child.Child(answering(code), time_limit=2.0) as one:
        pid = one.ask(1)
        with pytest.raises(child.ChildError, match="it hung: nothing for 2 s"):
            one.ask(2)
    assert gone(pid)


# The load


@pytest.fixture
def pids(monkeypatch):
    """Note the processes that are started as children."""
    found = []
    enter = child.Child.__enter__

    def noting(self):
        entered = enter(self)
        found.append(self._process.pid)
        return entered

    monkeypatch.setattr(child.Child, "__enter__", noting)
    return found


def test_spinners_use_the_processor_and_end(pids):
    with load.Spinners(2) as spinners:
        before = spinners.cpu_seconds()
        while min(b - a for a, b in zip(before, spinners.cpu_seconds(), strict=True)) < 0.05:
            time.sleep(0.01)
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_spinners_end_with_any_error(pids, error):
    def fail():
        with load.Spinners(2):
            raise error

    with pytest.raises(error):
        fail()
    assert all(gone(pid) for pid in pids)


@GROUP
def test_spinners_end_with_a_parent_that_is_killed():
    code = """
        import time
        from fastadam.bench.load import Spinners
        with Spinners(2) as spinners:
            print(*(child._process.pid for child in spinners._children), flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(python(code), stdout=subprocess.PIPE) as parent:
        pids = [int(text) for text in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_a_dead_spinner_is_noticed():
    with load.Spinners(1) as spinners:
        process = spinners._children[0]._process
        process.kill()
        process.wait()
        with pytest.raises(child.ChildError, match="its process"):
            spinners.cpu_seconds()


# What is timed


class Clock:
    """Nanoseconds, which pass as the steps say."""

    def __init__(self):
        self.now = self.steps = 0

    def __call__(self):
        self.now += 1_000
        return self.now

    def step(self):
        self.steps += 1
        # After the warm-up, one step in four waits long.
        late = self.steps > measure.UNTIMED_STEPS and self.steps % 4 == 0
        self.now += 50_000_000 if late else 9_999_000


@pytest.mark.parametrize("work", [0.0, 3e-3])
def test_every_step_counts_and_the_work_does_not(work):
    clock = Clock()
    times = measure.step_times(clock.step, work=work, steps=12, seconds=0.0, clock=clock)
    assert clock.steps == measure.UNTIMED_STEPS + 12
    assert sorted(times) == 9 * [10_000_000] + 3 * [50_001_000]


def test_a_slice_lasts_as_long_as_asked():
    clock = Clock()
    times = measure.step_times(clock.step, work=0.0, steps=1, seconds=1.0, clock=clock)
    assert sum(times) > 0.9e9
    assert len(times) == pytest.approx(50, abs=4)  # 20 ms, in the mean


def test_ratio_is_of_means():
    stalls = [[1, 1, 1, 97], [1, 1, 1, 97]]
    assert load.ratio_of_means(stalls, [[1] * 4] * 2).value == 25
    one = load.ratio_of_means([[2], [4], [6]], [[2], [2], [2]])
    assert one.value == 2
    # Of a mean, the jackknife's error is the usual one: here that of 1, 2, 3.
    assert one.error == pytest.approx(statistics.stdev([1, 2, 3]) / 3**0.5)
    assert one.noisy
    assert not load.Ratio(2.0, 0.19).noisy


def test_geometric_mean():
    ratios = [load.Ratio(1.0, 0.1), load.Ratio(4.0, 0.4)]
    total = load.geometric_mean(ratios)
    assert total.value == pytest.approx(2.0)
    assert total.error == pytest.approx(2.0 * 0.1 / 2**0.5)


def test_turns(pids):
    seen = []
    found = load.measure(
        1,
        beside=(),
        on_turn=lambda done, total, *turn: seen.append((done, total, *turn)),
        **SHORT | {"sizes": (70_000,), "passes": 2, "rounds": 2},
    )
    rows = load.rows((70_000,))
    assert len(rows) == 2 * 2
    assert [turn[0] for turn in seen] == list(range(32))
    assert {turn[1] for turn in seen} == {32}
    order = [row for row in (*rows, *reversed(rows)) for _ in range(4)]
    assert [turn[2] for turn in seen] == order
    a, b = load.OURS
    assert [turn[3] for turn in seen] == 8 * [a, b, b, a]
    assert found.threads["fastadam-1"] == 1
    assert found.load.keys() == set(rows)
    assert min(found.load.values()) > 0
    for row in rows:
        for name in load.OURS:
            times = found.nanoseconds(row, name)
            assert len(times) >= 4 * SHORT["steps"]
            assert 0 < statistics.median(times) < 1e9
    assert len(pids) == 3  # two contenders and a load
    assert all(gone(pid) for pid in pids)


def test_interrupt_ends_all(pids):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load.measure(1, beside=(), on_turn=interrupt, **SHORT)
    assert len(pids) == 3
    assert all(gone(pid) for pid in pids)


def test_torch_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr(load, "rows", lambda _: [load.Row(50, 0.0, False)])
    monkeypatch.setattr("fastadam.bench.peers.find_spec", lambda _: None)
    found = load.measure(0, **SHORT)
    assert [one.contender for one in found.missing] == list(load.TORCHS)
    assert {one.reason for one in found.missing} == {"not installed: pip install torch"}
    assert found.threads.keys() == set(load.OURS)


def test_torchs_take_part_where_nothing_is_clipped(monkeypatch, optional):
    optional("torch")
    plain, clipped = (load.Row(50, 0.0, clipped) for clipped in (False, True))
    monkeypatch.setattr(load, "rows", lambda _: [plain, clipped])
    found = load.measure(0, **SHORT)
    assert found.missing == []
    assert found.times.keys() == {
        *((plain, name) for name in load.CONTENDERS),
        *((clipped, name) for name in load.OURS),
    }
    assert found.ratio(plain, load.TORCHS).value > 0
    assert found.ratio(clipped, load.TORCHS) is None
    saved = report.load_to_dict(found, {"load": 0, "dtype": "float32"})
    assert "torch" in saved["versions"]
    for key in ("ratios", "geometric_means"):
        assert [(one["contender"], one["over"], one["clipped"]) for one in saved[key]] == [
            ("fastadam", "fastadam-1", False),
            ("torch-fused", "fastadam-torch", False),
            ("fastadam", "fastadam-1", True),
        ]


# The command


@pytest.fixture
def quick(monkeypatch, optional):
    """Measure for a moment, and without torch."""
    optional("rich")
    real = load.measure

    def short(number, **options):
        options |= {"beside": (), "on_turn": lambda *_: None}
        return real(number, **SHORT | options)

    monkeypatch.setattr(load, "measure", short)


@pytest.mark.usefixtures("quick")
def test_command(capsys, tmp_path):
    path = tmp_path / "load.json"
    arguments = ["bench", "--load", "1", "--sizes", "50,70000", "--json", str(path)]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "beside 1 busy process;" in " ".join(out.split())
    assert "Clipped steps, with 3 ms of other work between them\n" in out
    assert "70,000" in out.split()
    saved = json.loads(path.read_text("utf-8"))
    assert saved["settings"] | {"load": 1, "dtype": "float32"} == saved["settings"]
    assert len(saved["results"]) == 2 * 2 * 2 * 2
    assert {(one["kind"], one["device"]) for one in saved["results"]} == {("load", "cpu")}
    assert len(saved["ratios"]) == 8
    assert saved["load_cpus"] > 0
    for total in saved["geometric_means"]:
        own = [
            one["ratio"]
            for one in saved["ratios"]
            if one["work_seconds"] == total["work_seconds"] and one["clipped"] == total["clipped"]
        ]
        assert len(own) == 2
        assert total["ratio"] == pytest.approx(statistics.geometric_mean(own))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("peer", "beside"),
    [("", list(load.TORCHS)), ("--peer fastadam-torch", ["fastadam-torch"]), ("--peer none", [])],
)
def test_who_takes_part(monkeypatch, optional, peer, beside):
    optional("rich")
    asked = []

    def measure_nothing(_, **options):
        asked.append(options["beside"])
        raise child.ChildError("enough")

    monkeypatch.setattr(load, "measure", measure_nothing)
    assert cli.main(["bench", "--load", "1", *peer.split()]) == 1
    assert asked == [beside]


@pytest.mark.usefixtures("quick")
def test_command_prints_json(capsys):
    assert cli.main(["bench", "--load", "0", "--sizes", "50", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["load"] == 0


@pytest.mark.parametrize(
    "option",
    ["--tail", "--quick", "--workload mlp", "--rounds 3", "--no-sizes", "--device cuda",
     "--plot a.png", "--max-memory 4G", "--peer optax"],
)  # fmt: skip
def test_what_does_not_go_together(capsys, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--load", "2", *option.split()]) == 2
    shown = option if option.split()[0] in ("--device", "--peer") else option.split()[0]
    assert capsys.readouterr().err == (
        f"fastadam bench: error: --load must not be given with {shown}\n"
    )


@pytest.mark.usefixtures("quick")
def test_dead_child_is_one_line(capsys, monkeypatch):
    def fail(_):
        raise child.ChildError("its process ended with status 3: no good")

    monkeypatch.setattr(bench, "_measure_load", fail)
    assert cli.main(["bench", "--load", "2", "--json", "-"]) == 1
    assert capsys.readouterr().err == (
        "fastadam bench: error: could not be measured: its process ended with status 3: no good\n"
    )


def test_a_load_that_did_not_run_is_told(capsys, optional, monkeypatch):
    optional("rich")
    row = load.Row(50, 0.0, False)
    times = {(row, name): [[10, 12], [9, 11]] for name in load.OURS}
    found = load.UnderLoad(
        times, {"fastadam": 2, "fastadam-1": 1}, load={row: 0.1}, other_cpus=0.5
    )
    monkeypatch.setattr(load, "expected_cpus", lambda *_: 1.0)
    tables.show_load(report.load_to_dict(found, {"load": 2, "dtype": "float32"}))
    out = " ".join(capsys.readouterr().out.split())
    assert "Warning: their fair share would have been 1.00 CPUs." in out
    assert "Warning: other processes kept 0.5 CPUs busy besides." in out
