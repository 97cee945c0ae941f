"""``fastadam bench``: that it compares like with like, counts right, and fails in one line."""

import argparse
import contextlib
import dataclasses
import doctest
import importlib
import io
import json
import platform
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from bench_tools import GROUP, gone, python, stepped

from fastadam import cli, machine
from fastadam.bench import (
    contenders,
    measure,
    peers,
    report,
    session,
    tables,
    text,
    worker,
)
from fastadam.bench import workloads as w
from fastadam.cli import bench

CPU = w.DEFAULTS["cpu"]
MODULES = ["arrays", "load", "measure", "peers", "report", "roofline", "tables", "text"]
MODULES += ["worker", "workloads"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(f"fastadam.bench.{name}"))
    assert failed == 0


def test_imports_no_peer():
    code = """
        import sys
        from fastadam.bench import peers, workloads
        print(*{"torch", "jax", "sklearn", "thinc", "deepspeed", "numba"} & sys.modules.keys())
    """
    assert subprocess.run(python(code), check=True, capture_output=True).stdout.split() == []


# Workloads


def test_workloads():
    assert {name: (len(shapes), w.count(shapes)) for name, shapes in w.WORKLOADS.items()} == {
        "micro": (9, 4_192),
        "mlp": (6, 269_322),
        "many": (1_000, 1_024_000),
        "20M": (168, 20_206_848),
        "67M": (4, 67_108_864),
        "gpt2": (148, 124_439_808),
        "one-by-one": (500, 512_000),
    }
    assert {*CPU.step, *CPU.tail, *CPU.quick} == w.WORKLOADS.keys()
    assert CPU.sizes == (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_draw(dtype):
    shapes = [(3, 4), (), (0,), (2 * w.BLOCK + 5,)]
    params, grads = w.draw(shapes, dtype)
    for arrays in (params, grads):
        assert [array.shape for array in arrays] == shapes
        for array in arrays:
            assert array.dtype == dtype
            assert (np.abs(array) >= 0.0999).all()
            assert (np.abs(array) <= 1).all()
    assert not np.array_equal(params[3], grads[3])
    again = w.draw(shapes, dtype)
    for one, other in zip((*params, *grads), (*again[0], *again[1]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_clipping_happens_on_every_workload():
    smallest = min(w.count(shapes) for shapes in w.WORKLOADS.values())
    assert 0.1 * smallest**0.5 > contenders.TAIL["max_grad_norm"]


# Contenders


def taken(peer, dtype, tail):
    """Return the parameters after a few steps."""
    (params, _), contender = stepped(peer, dtype, tail, shapes=[(7, 3), (5,), (70_000,)])
    for param, value in zip(params, contender.values(), strict=True):
        assert param.shape == value.shape
        assert np.abs(param - value).max() > 1e-3  # moved, and these are copies
    assert contender.threads() is None or contender.threads() >= 1
    return contender.values()


@pytest.mark.parametrize("tail", [False, True], ids=["step", "tail"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "name", ["opt-grads", "torch-fused", "torch-foreach", "fastadam-torch", "optax"]
)
def test_the_same_update(optional, name, dtype, tail):
    """DeepSpeed is left out, which would compile for a minute."""
    x64 = contextlib.nullcontext()
    if name == "optax":
        x64 = optional("jax").enable_x64(dtype == "float64")
    with x64:
        check_same_update(optional, name, dtype, tail)


@pytest.mark.parametrize("name", ["thinc", "scikit-learn"])
def test_the_same_update_but_for_the_place_of_eps(optional, name):
    check_same_update(optional, name, "float32", tail=False)


def check_same_update(optional, name, dtype, tail):
    peer = peers.by_name(name)
    if peer.package:
        optional(peer.package)
    assert peer.why_not(dtype, tail) is None
    tolerance = 2e-6 if dtype == "float32" else 1e-12
    if name in ("thinc", "scikit-learn"):
        tolerance = 2e-5
    both = [taken(one, dtype, tail) for one in (peers.FASTADAM, peer)]
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "name", ["fastadam", "opt-grads", "roofline", "divider", "torch-fused", "fastadam-torch"]
)
def test_the_tail_clears_and_refill_restores(optional, name):
    peer = peers.by_name(name)
    if peer.package:
        optional(peer.package)
    contender = peer.make(*w.draw([(7, 3), (70_000,)], "float32"), True)
    assert contender.clears_grads
    assert len(contender.filled) == 2
    contender.step()
    assert not any(grad.any() for grad, _ in contender.filled)
    contender.refill()
    for grad, source in contender.filled:
        np.testing.assert_array_equal(grad, source)
        assert not np.shares_memory(grad, source)


@pytest.mark.parametrize("name", ["fastadam", "torch-fused", "optax", "thinc"])
def test_one_by_one_is_an_optimizer_for_each(optional, name):
    """Without the tail, whose norm is over all gradients, the bits are those of one for all."""
    peer = peers.by_name(name)
    if peer.package:
        optional(peer.package)
    given = (*w.draw([(1_024,), (7,), (1_024,)], "float32"), False)
    one, many = (peer.contender(workload, *given) for workload in ("many", "one-by-one"))
    assert type(one) is peer.make
    assert [type(each) for each in many.each] == [peer.make] * 3
    for contender in (one, many):
        for _ in range(3):
            contender.refill()
            contender.step()
        contender.wait()
    assert many.clears_grads == one.clears_grads
    assert many.threads() == one.threads()
    for own, expected in zip(many.values(), one.values(), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_who_is_slow_to_make_takes_no_part_one_by_one():
    with pytest.raises(NotImplementedError, match="takes it a second"):
        peers.by_name("deepspeed").contender("one-by-one", [], [], False)


def test_one_by_one_compiles_once(optional):
    optional("optax")
    given = (*w.draw([(5,)] * 4, "float32"), False)
    many = peers.by_name("optax").contender("one-by-one", *given)
    assert len({one._update for one in many.each}) == 1


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_divider_has_normal_numbers(dtype, tail):
    _, divider = stepped(peers.by_name("divider"), dtype, tail, shapes=[(70_001,)], steps=50)
    for values in divider.values():
        assert (values > 0.01).all()
        assert (values < 10).all()


def test_the_divider_divides_and_does_no_more():
    roofline = importlib.import_module("fastadam.bench.roofline")
    arrays = [np.full(100, value, np.float32) for value in (0.5, 0.25)]
    divider = roofline.Divider(arrays[:1], arrays[1:])
    divider.step()
    (assembly,) = divider._kernels[0].inspect_asm().values()
    if platform.machine() != "x86_64":
        pytest.skip("reads x86-64 machine code")
    found = re.findall(
        r"^\s*v?(add|sub|mul|div|sqrt|fn?m(?:add|sub)\w*)ps\s", assembly, re.MULTILINE
    )
    assert sorted(set(found)) == ["div", "sqrt"]


def test_what_cannot_take_part():
    assert peers.by_name("thinc").why_not("float32", True) == "it cannot clip by the global norm"
    assert peers.by_name("deepspeed").why_not("float64", False) == "it has no float64"
    absent = peers.Peer("x", "x", contenders.FastAdam, package="no_such_package", install="that")
    assert absent.why_not("float32", False) == "not installed: pip install that"
    assert peers.FASTADAM.why_not("float64", True) is None


# Statistics


class Clockwork:
    """A contender whose steps take a made-up time."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.steps, self.refills = clock, seconds, 0, 0

    def step(self):
        self.clock[0] += self.seconds
        self.steps += 1

    def wait(self):
        self.clock[0] += 0.5

    def refill(self):
        self.clock[0] += 100.0
        self.refills += 1


def test_burst():
    clock = [0.0]
    contender = Clockwork(clock, 2.0)
    assert measure.burst(contender, 5, clock=lambda: clock[0]) == (5 * 2.0 + 0.5) / 5
    assert (contender.steps, contender.refills) == (5, 0)
    assert measure.burst(contender, 4, refill=True, clock=lambda: clock[0]) == 2.5
    assert (contender.steps, contender.refills) == (9, 4)


class Steady:
    """A contender that notes when it was its turn."""

    clears_grads = False

    def __init__(self, name, log):
        self.name, self.log = name, log

    def step(self):
        if not self.log or self.log[-1] != self.name:
            self.log.append(self.name)
        time.sleep(0.001)

    def wait(self):
        pass

    refill = wait


@pytest.mark.parametrize("refill", [False, True])
def test_compare_takes_turns(refill):
    log, seen = [], []
    found = measure.compare(
        Steady("a", log),
        Steady("b", log),
        rounds=4,
        refill=refill,
        on_round=lambda *progress: seen.append(progress),
    )
    # Calibrated a b, then ab, ba, ab, ba: neighbours of one name show as one.
    assert "".join(log) == "abababa"
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(found.seconds) == len(found.other_seconds) == 4
    assert found.ratios == [b / a for a, b in zip(*found[:2], strict=True)]
    assert 1 <= found.number <= 5


class HeldUp(Steady):
    """One whose first steps are held up, as by a thread whose core is busy."""

    steps = 0

    def step(self):
        self.steps += 1
        time.sleep(0.005 if self.steps <= 6 else 0.0001)


def test_first_steps_that_are_held_up_do_not_make_bursts_short():
    """Such a burst is one step after a rest, as slow: in all rounds, which then agree."""
    found = measure.compare(HeldUp("a", []), HeldUp("b", []), rounds=3)
    assert found.number > 5
    assert found.other_number > 5


class SlowThroughout(Steady):
    """One that is held up until its third round."""

    steps = 0

    def __init__(self, log):
        self.log = log

    def step(self):
        time.sleep(0.0001 if len(self.log) > 2 else 0.02)


def test_bursts_are_as_long_as_the_fastest_asks():
    done = []
    found = measure.compare(
        SlowThroughout(done), Steady("b", []), rounds=6, on_round=lambda *_: done.append(1)
    )
    assert len(found.seconds) == 6
    assert found.number > 5


def test_compare_keeps_to_its_budget():
    found = measure.compare(Steady("a", []), Steady("b", []), rounds=50, budget=0.0)
    assert len(found.seconds) == measure.LEAST_ROUNDS


def test_spread(rng):
    values = rng.uniform(1, 2, 15)
    np.testing.assert_allclose(
        measure.spread(values.tolist()), np.quantile(values, [0.5, 0.25, 0.75]), rtol=1e-15
    )
    assert measure.spread([3.0]) == (3.0, 3.0, 3.0)


# Memory


@pytest.mark.parametrize(
    ("text", "number"),
    [("4G", 4 * 2**30), ("500M", 500 * 2**20), ("1.5 GiB", 3 * 2**29), ("12kb", 12288), ("7", 7)],
)
def test_parse_bytes(text, number):
    assert bench.byte_size(text) == number


@pytest.mark.parametrize("text", ["", "0", "4X", "-1G", "G", "1e9", "nan", "0.1"])
def test_parse_bytes_refuses(text):
    message = "must be a size in bytes such as 500M or 4G, got"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        bench.byte_size(text)


def test_too_large(monkeypatch):
    def why(elements, limit):
        spec = {"tail": False, "dtype": "float32", "max_memory": limit, "device": "cpu"}
        return worker._why_too_large(elements, peers.by_name("torch-fused"), spec)

    needed = 40 * 2**20  # bytes, of 2**20 elements
    monkeypatch.setattr(machine, "memory_available", lambda: needed)
    assert why(2**20, 2**25) == "needs 40.0 MiB, --max-memory is 32.0 MiB"
    assert why(2**20, None) == "needs 40.0 MiB, available are 40.0 MiB"
    assert why(2**19, needed) is None
    monkeypatch.setattr(machine, "memory_available", lambda: None)
    assert why(2**30, None) is None


def test_what_a_pair_needs():
    torch, optax = peers.by_name("torch-fused"), peers.by_name("optax")
    assert worker.needed_bytes(10, torch, "float32", tail=False) == 10 * 4 * (2 + 4 + 4)
    assert worker.needed_bytes(10, optax, "float64", tail=True) == 10 * 8 * (2 + 5 + 8)


def test_a_small_step_needs_one_thread():
    assert worker._threads_needed(65_535, [2, None]) == 1
    assert worker._threads_needed(65_536, [2, None]) == 2
    assert worker._threads_needed(10**6, [None, None]) == 1


# The child process


def worker_like(code):
    """A command in place of the worker: ``say`` emits an event, ``spec`` was read."""
    head = """
        import json, os, sys, time
        spec = json.loads(sys.stdin.readline())
        def say(event, **content):
            print(json.dumps({"event": event, **content}), flush=True)
        def result(name):
            say("result", workload=name, seconds=[1.0, 1.0], other_seconds=[2.0, 3.0],
                number=1, other_number=1)
        names = [name for name, _ in spec["workloads"]]
    """
    return python(head, code)


def measured(code, names="abc", **options):
    found = session.Session()
    session.measure(
        found,
        [peers.by_name("opt-grads")],
        {name: [(3,)] for name in names},
        tail=False,
        dtype="float32",
        rounds=2,
        max_memory=None,
        command=worker_like(code),
        **{"time_limit": 20.0} | options,
    )
    return found


def test_results():
    found = measured("""
        say("ready", threads={"fastadam": 2})
        for name in names:
            say("start", workload=name)
            say("skipped", workload=name, reason="large") if name == "b" else result(name)
        say("end")
    """)
    assert [one.workload for one in found.measured] == ["a", "c"]
    assert found.measured[0] == session.Measured(
        "opt-grads", "a", 2.5, (1.0, 1.0), measure.Spread(2.5, 2.25, 2.75), 2, 1, 1
    )
    assert found.measured[0].fastadam_seconds == 1.0
    assert not found.measured[0].noisy
    assert found.missing == [session.Missing("opt-grads", "b", "large")]
    assert found.threads == {"fastadam": 2}


def test_crash_costs_one_workload():
    found = measured("""
        for name in names:
            say("start", workload=name)
            if name == "b":
                print("no good", file=sys.stderr)
                sys.exit(3)
            result(name)
        say("end")
    """)
    assert [one.workload for one in found.measured] == ["a", "c"]
    assert found.missing == [
        session.Missing("opt-grads", "b", "its process ended with status 3: no good")
    ]


@GROUP
def test_crash_at_once():
    found = measured("import signal; os.kill(os.getpid(), signal.SIGILL)")
    assert found.measured == []
    (missing,) = found.missing
    assert missing.workload is None
    assert missing.reason == (
        "its process was ended by signal SIGILL (an instruction that this processor lacks)"
    )


def test_unavailable():
    found = measured("say('unavailable', reason='no compiler')")
    assert found.missing == [session.Missing("opt-grads", None, "no compiler")]


def test_hung_child_is_stopped():
    found = measured("say('start', workload='a'); time.sleep(60)", time_limit=1.0)
    (missing,) = found.missing
    assert missing.reason == "it hung: nothing for 1 s"


@GROUP
def test_interrupt_leaves_no_orphan():
    pids = []

    def on_event(_, event):
        pids.extend(event["pids"])
        raise KeyboardInterrupt

    code = """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        say("start", workload="a", pids=[os.getpid(), child.pid])
        time.sleep(60)
    """
    with pytest.raises(KeyboardInterrupt):
        measured(code, "a", on_event=on_event)
    assert len(pids) == 2
    assert gone(pids[0])


@GROUP
def test_worker_ends_with_its_parent():
    command = [sys.executable, "-m", "fastadam.bench.worker", "compare"]
    spec = {"contender": "opt-grads", "tail": False, "dtype": "float32", "max_memory": None}
    spec |= {
        "device": "cpu",
        "rounds": 10**6,
        "workloads": [["micro", [[4]]] for _ in range(1000)],
    }
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with child:
        child.stdin.write(json.dumps(spec).encode() + b"\n")
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["event"] == "ready"
        child.stdin.close()
        assert child.wait(timeout=20) == -signal.SIGKILL


def test_describe_names_the_cause():
    try:
        try:
            raise OSError("no g++\nat all")
        except OSError as error:
            raise RuntimeError("failed to build") from error
    except RuntimeError as error:
        text = worker.describe_error(error)
    assert text == "RuntimeError: failed to build; because of OSError: no g++"


# What is shown

TORCH = ("torch-fused", "torch-foreach", "fastadam-torch")
EVERYONE = [
    peers.by_name(name)
    for name in (
        *("opt-grads", "roofline", "divider", "torch-fused", "torch-foreach", "deepspeed"),
        *("optax", "thinc", "scikit-learn", "fastadam-torch"),
    )
]


@pytest.fixture
def made_up():
    """Results of every contender on two workloads."""
    found = session.Session(threads={"fastadam": 2, "optax": None})
    for k, peer in enumerate(EVERYONE):
        for name, seconds in (("micro", 2e-6), ("1000", 1e-6)):
            ratio = measure.Spread(1.5 + k, 1.4 + k, 1.6 + k)
            rounds = (seconds,) * 7
            one = session.Measured(peer.name, name, ratio[0] * seconds, rounds, ratio, 7, 10, 20)
            found.measured.append(one)
    found.missing += [
        session.Missing("thinc", "gpt2", "needs 9.0 GiB, available are 2.0 GiB"),
        session.Missing("optax", "gpt2", "needs 9.0 GiB, available are 2.0 GiB"),
    ]
    return found


SETTINGS = {"dtype": "float32"}
SHAPES = {"micro": w.WORKLOADS["micro"], "1000": [(1000,)], "gpt2": w.WORKLOADS["gpt2"]}


def shown(found, width, encoding="utf-8"):
    console = pytest.importorskip("rich.console", exc_type=ImportError)
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    target = console.Console(file=stream, width=width, highlight=False)
    tables.show_table(target, found.measured, SHAPES, first="workload", dtype="float32")
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [40, 80, 140, 250])
def test_table_fits(made_up, width):
    table = shown(made_up, width)
    assert max(map(len, table.splitlines())) <= width
    assert "…" not in table
    assert table.count("2.00 \N{MICRO SIGN}s") == (
        1 if width >= 140 else table.split().count("fastadam")
    )
    words = table.split()
    for ratio in ("4.50", "9.50", "250%", "350%"):  # torch fused, scikit-learn, the rooflines
        assert words.count(ratio) == 2
    assert ("(4.40 - 4.60)" in table) == (width >= 250)
    assert ("4,192" in words) == (width >= 140)
    assert "\x1b" not in table
    assert "gpt2" not in table


def replaced(found, contender, workload, **changes):
    """Change one result."""
    for place, one in enumerate(found.measured):
        if (one.contender, one.workload) == (contender, workload):
            found.measured[place] = dataclasses.replace(one, **changes)
    return found


NOISE = {
    "quartiles": {"ratio": measure.Spread(7.5, 5.5, 7.5)},
    "busy CPUs": {"ratio": measure.Spread(7.5, 7.5, 7.5), "crowded": True},
}


@pytest.mark.parametrize("noise", NOISE)
def test_noisy_in_table_json_and_picture(made_up, optional, monkeypatch, tmp_path, noise):
    optional("matplotlib")
    from fastadam.bench.plot import save_plot

    slow = {"fastadam_rounds": 5 * (5.0,), "seconds": 77.0}
    for workload in ("micro", "1000"):
        replaced(made_up, "optax", workload, **NOISE[noise], **slow)
    words = shown(made_up, 120).split()
    assert words.count("noisy") == 2
    assert "7.50" not in words
    # Of fastadam, only what was measured beside the others counts.
    assert (words.count("2.00"), words.count("1.00")) == (1, 1)
    assert ("noisy (5.50 - 7.50)" in shown(made_up, 250)) == (noise == "quartiles")
    assert "7.50 - 7.50" not in shown(made_up, 250)

    found = report.to_dict(made_up, SETTINGS, SHAPES)
    marked = [one["contender"] for one in found["results"] if one["noisy"]]
    assert marked == ["optax", "optax"]
    assert found["fastadam_seconds"]["micro"] == {
        **dict.fromkeys(("median", "q1", "q3"), 2e-06),
        "noisy": False,
    }
    json.dumps(found)

    texts = []
    axes = importlib.import_module("matplotlib.axes").Axes
    annotate = axes.annotate
    monkeypatch.setattr(
        axes, "annotate", lambda *a, **k: (texts.append(a[1]), annotate(*a, **k))[1]
    )
    path = tmp_path / "a.svg"
    save_plot(made_up.measured, path, names=["micro"], sizes=(1000,), title="made up")
    assert texts.count("noisy") == 2  # a bar, and a point of a line
    assert "7.50" not in texts


def test_all_noisy(made_up):
    for one in list(made_up.measured):
        replaced(made_up, one.contender, one.workload, crowded=True)
    words = shown(made_up, 120).split()
    assert words.count("noisy") == len(made_up.measured) + 2
    assert "\N{MICRO SIGN}s" not in words
    assert report.to_dict(made_up, SETTINGS, SHAPES)["fastadam_seconds"]["micro"]["noisy"]


def test_seconds_far_apart_are_noisy(made_up):
    for k, one in enumerate(list(made_up.measured)):
        replaced(made_up, one.contender, one.workload, fastadam_rounds=(1e-6 * (1 + k % 5),))
    assert shown(made_up, 120).split().count("noisy") == 2


def test_table_in_ascii(made_up):
    assert "2.00 us" in shown(made_up, 80, "ascii")


def test_not_measured(made_up):
    missing = [*made_up.missing, session.Missing("deepspeed", None, "no g++")]
    assert report.not_measured(missing, [report.Part(False, SHAPES)]) == [
        "thinc, optax (gpt2): needs 9.0 GiB, available are 2.0 GiB",
        "DeepSpeed CPUAdam: no g++",
    ]


def test_formats():
    seconds = [9.996e-4, 1.234, 99.96e-6, 4.5e-8]
    assert [text.format_seconds(s, "us") for s in seconds] == [
        "1.00 ms",
        "1.23 s",
        "100 us",
        "45.0 ns",
    ]


@pytest.mark.parametrize("sizes", [(), (1000,)])
@pytest.mark.parametrize("names", [(), ("micro", "gpt2")])
def test_plot(made_up, optional, tmp_path, names, sizes):
    optional("matplotlib")
    from fastadam.bench.plot import save_plot

    path = tmp_path / "bench.png"
    save_plot(made_up.measured, path, names=names, sizes=sizes, title="made up")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


# The command


@pytest.fixture
def _needs_rich(optional):
    optional("rich")


@pytest.mark.usefixtures("_needs_rich")
def test_command(capsys, tmp_path, optional):
    optional("matplotlib")
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["bench", "--workload", "micro", "--no-sizes", "--rounds", "2", "--peer", "none"]
    assert cli.main([*arguments, "--json", str(path), "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where nobody looks
    assert out.startswith(
        "Measuring the time of a step (float32) on 1 workload: fastadam alone. Use the machine"
    )
    assert "micro" in out
    assert out.count("roofline") >= 2
    assert "Not measured" not in out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")

    saved = json.loads(path.read_text("utf-8"))
    assert saved.keys() == {
        *("date", "machine", "versions", "settings", "workloads", "threads", "results"),
        *("other_cpus", "fastadam_seconds", "not_measured"),
    }
    assert saved["settings"] == {
        "tail": False,
        "dtype": "float32",
        "max_memory": None,
        "rounds": 2,
        "lr": 1e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
    }
    assert saved["workloads"] == {"micro": {"tensors": 9, "elements": 4192}}
    assert saved["not_measured"] == []
    assert {"fastadam", "python", "numba", "numpy"} == saved["versions"].keys()
    assert [one["contender"] for one in saved["results"]] == ["roofline", "divider", "opt-grads"]
    for one in saved["results"]:
        assert one["workload"] == "micro"
        assert one["rounds"] == 2
        assert one["ratio"]["q1"] <= one["ratio"]["median"] <= one["ratio"]["q3"]
        assert one["seconds"] > 0
        assert one["number"] >= 1


@pytest.mark.usefixtures("_needs_rich")
def test_who_is_not_installed_does_not_count(capsys, monkeypatch):
    asked = []

    def measure_nothing(found, chosen, shapes, **_):
        asked.extend(peer.name for peer in chosen)
        found.threads["fastadam"] = 2
        ratio = measure.Spread(1.0, 1.0, 1.0)
        for name in shapes:
            one = session.Measured("roofline", name, 1e-6, (1e-6,), ratio, 1, 1, 1)
            found.measured.append(one)

    monkeypatch.setattr(session, "measure", measure_nothing)
    there = {"torch": object()}
    monkeypatch.setattr(peers, "find_spec", there.get)
    assert cli.main(["bench", "--workload", "micro", "--workload", "mlp"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert asked == ["roofline", "divider", "opt-grads", *TORCH]
    assert (
        "on 2 workloads: fastadam beside 3 other optimizers (torch fused, torch foreach,"
        " fastadam.torch)." in out
    )
    assert "Not measured" not in out
    absent = "DeepSpeed CPUAdam, optax, thinc, scikit-learn"
    assert f"Not installed, so not compared: {absent}." in out
    # But who asks for one is told why there is none.
    asked.clear()
    assert cli.main(["bench", "--workload", "micro", "--peer", "optax"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert ": fastadam alone. Use" in out
    assert asked[-1] == "optax"


@pytest.mark.usefixtures("_needs_rich")
def test_nothing_fits(capsys, monkeypatch):
    """What the child process would say, said in this one."""

    def measure_here(found, chosen, shapes, *, on_event, **settings):
        for peer in chosen:
            spec = {"contender": peer.name, "workloads": list(shapes.items()), **settings}

            def emit(kind, **content):
                event = {"event": kind, **content}
                found.record(peer, False, event)  # noqa: B023
                on_event(peer, event)  # noqa: B023

            worker.serve(spec | {"device": "cpu"}, emit)

    monkeypatch.setattr(session, "measure", measure_here)
    monkeypatch.setattr(peers, "OWN", peers.OWN[:1])
    arguments = ["--workload", "mlp", "--max-memory", "1M", "--peer", "none", "--json", "-"]
    assert cli.main(["bench", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "fastadam bench: error: nothing could be measured: fastadam opt.grads: needs"
        " 10.3 MiB, --max-memory is 1.0 MiB\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workload gpt3", "argument --workload: invalid choice: 'gpt3'"),
        ("--peer keras", "argument --peer: invalid choice: 'keras'"),
        ("--peer none --peer optax", "--peer none must not be given with others, got optax"),
        ("--sizes 1e3,x", "must be whole numbers with commas between, such as 1000,1e6, got"),
        ("--sizes 0", "must be whole numbers with commas between"),
        ("--sizes 1e3 --no-sizes", "not allowed with argument"),
        ("--rounds 0", "argument --rounds: must be a whole number, at least 1, got '0'"),
        ("--max-memory 4X", "must be a size in bytes such as 500M or 4G, got '4X'"),
        ("--plot a.txt", "--plot must end in .png, .svg, .pdf, got"),
        ("--plot a.png --json a.png", "--json must not be the file of --plot, got"),
        ("--json no/such/folder", "must be in a folder that exists, got 'no/such/folder'"),
        ("--dtype float16", "argument --dtype: invalid choice: 'float16'"),
    ],
)
def test_bad_input(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastadam bench: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_absent_package(capsys, monkeypatch, tmp_path, package, optional):
    optional("rich")
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["bench", "--plot", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err == (
        f'fastadam bench: error: needs the package {package}: pip install "fastadam[bench]"\n'
    )


def test_which_workloads():
    def chosen(*arguments):
        (part,) = bench._parts(cli._build_parser().parse_args(["bench", *arguments]))
        assert part.tail == ("--tail" in arguments)
        return part.named, part.sizes

    assert chosen() == (list(CPU.step), CPU.sizes)
    assert chosen("--quick") == (list(CPU.quick), CPU.quick_sizes)
    assert chosen("--tail") == (list(CPU.tail), ())
    assert chosen("--no-sizes") == (list(CPU.step), ())
    assert chosen("--workload", "gpt2", "--workload", "gpt2") == (["gpt2"], ())
    assert chosen("--workload", "mlp", "--sizes", "1e3,7") == (["mlp"], (1_000, 7))
