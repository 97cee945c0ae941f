"""The benchmarks for asv run, on what is small, and skip what they should."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

SUITE = Path(__file__).parents[2] / "asv_benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Import a module of the suite, as asv does."""
    if not SUITE.is_dir():
        pytest.skip("not in this copy of the tests")
    monkeypatch.syspath_prepend(str(SUITE))
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    return lambda name: import_module(f"benchmarks.{name}")


@pytest.mark.parametrize(
    "backend", ["fastadam", "opt-grads", "roofline", "torch-fused", "fastadam-torch"]
)
@pytest.mark.parametrize("tail", [False, True])
def test_backends_step(benchmarks, optional, backend, tail):
    if "torch" in backend:
        optional("torch")
    contender = benchmarks("common").make(backend, [(3, 2), (5,)], "float64", tail=tail)
    assert contender.clears_grads == tail
    assert all((grad == 0).all() == tail for grad, _ in contender.filled)


def test_large_workloads_skip_themselves(benchmarks, monkeypatch):
    monkeypatch.delenv("FASTADAM_ASV_LARGE", raising=False)
    with pytest.raises(NotImplementedError, match="FASTADAM_ASV_LARGE"):
        benchmarks("common").shapes_of("gpt2")
    monkeypatch.setenv("FASTADAM_ASV_LARGE", "1")
    assert len(benchmarks("common").shapes_of("gpt2")) == 148


def test_a_commit_without_the_bench_is_skipped(benchmarks, monkeypatch):
    common = benchmarks("common")
    monkeypatch.setattr(common, "workloads", None)
    monkeypatch.setattr(common, "peers", None)
    with pytest.raises(NotImplementedError, match=r"no fastadam\.bench"):
        common.shapes_of("micro")
    with pytest.raises(NotImplementedError, match=r"no fastadam\.bench"):
        common.make("fastadam", [(3,)])


def test_what_is_not_installed_is_skipped(benchmarks):
    with pytest.raises(NotImplementedError, match="no float64"):
        benchmarks("common").make("deepspeed", [(3,)], "float64")


def test_every_option_is_timed(benchmarks):
    step = benchmarks("step")
    for option in step.OPTIONS:
        bench = step.Options()
        bench.setup(option, "micro")
        count = bench.opt.step_count
        bench.time_step(option, "micro")
        assert bench.opt.step_count == count + 1


def test_both_ways_take_the_same_steps(benchmarks):
    ends = []
    for way in ("Adam.step", "functional"):
        for name in ("micro", "calls"):
            bench = benchmarks("step").Functional()
            bench.setup(way, name)
            bench.time_step(way, name)
            assert len(bench.calls) == (100 if name == "calls" else 1)
            step, arguments, _ = bench.calls[-1]
            opt = getattr(step, "__self__", None)
            params = opt.param_groups[0]["params"] if opt else arguments[0]
            ends.append(b"".join(param.tobytes() for param in params))
    assert ends[:2] == ends[2:]


def test_steps_with_denormal_numbers(benchmarks):
    step = benchmarks("step")
    for numbers in step.NUMBERS:
        bench = step.Denormal()
        bench.setup(numbers, 300)
        bench.time_step(numbers, 300)
        assert bench.opt.step_count == 3
        assert bench.opt.state[0]["exp_avg_sq"].any() == (numbers == "usual")


def test_tail_and_roofline(benchmarks):
    bench = benchmarks("tail").Tail()
    for _ in range(2):
        bench.setup("fastadam", "micro")
        assert any(grad.any() for grad, _ in bench.contender.filled)
        bench.time_tail("fastadam", "micro")
        assert not any(grad.any() for grad, _ in bench.contender.filled)
    for name in ("Roofline", "Divider"):
        bench = getattr(benchmarks("roofline"), name)()
        bench.setup("micro", "float32")
        assert bench.track_fraction_of_roofline("micro", "float32") > 0


def test_drop_in(benchmarks, optional, monkeypatch):
    """Both take the same steps, in as many optimizers and groups as there should be."""
    optional("torch")
    drop_in = benchmarks("drop_in")
    monkeypatch.setattr("fastadam.bench.workloads.WORKLOADS", {"one-by-one": [(8,)] * 3})
    found = []
    for bench, name in ((drop_in.Torch(), "one-by-one"), (drop_in.Groups(), "scheduled")):
        bench.setup(name)
        found.append(bench.contenders)
    for ours, theirs in found:
        for one, other in zip(ours.values(), theirs.values(), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    assert [len(each.each) for each in found[0]] == [3, 3]
    assert [len(each.opt.param_groups) for each in found[1]] == [465, 465]
    lrs = [[group["lr"] for group in each.opt.param_groups] for each in found[1]]
    assert lrs[0] == lrs[1]
    assert len(set(lrs[0])) == 24


@pytest.mark.parametrize(("option", "arrays"), [("none", 2), ("amsgrad", 3), ("both", 4)])
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float64", 8)])
def test_state_has_the_bytes_of_its_arrays(benchmarks, option, arrays, dtype, itemsize):
    found = benchmarks("memory").State().track_bytes_per_element(dtype, option, 1)
    assert arrays * itemsize <= found < arrays * itemsize + 1


def test_ranks(benchmarks):
    ranks = benchmarks("ranks")
    assert all(0 < ranks.mean_step(2, threads, 1000, seconds=0.05) < 0.05 for threads in (0, 2))
