"""The benchmarks compare like with like."""

import sys
from pathlib import Path

import numpy as np
import pytest

SUITE = Path(__file__).parents[1] / "asv_benchmarks"


@pytest.fixture
def common(monkeypatch):
    if not SUITE.is_dir():
        pytest.skip("not in this copy of the tests")
    monkeypatch.syspath_prepend(str(SUITE))
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    from benchmarks import common

    return common


def test_workloads(common):
    sizes = {
        name: (len(shapes), sum(int(np.prod(shape)) for shape in shapes))
        for name, shapes in common.WORKLOADS.items()
    }
    assert sizes == {
        "micro": (9, 4_192),
        "mlp": (6, 269_322),
        "many": (1_000, 1_024_000),
        "gpt2": (148, 124_439_808),
    }


def test_large_workload_skips_itself(common, monkeypatch):
    monkeypatch.delenv("FASTADAM_ASV_LARGE", raising=False)
    with pytest.raises(NotImplementedError, match="FASTADAM_ASV_LARGE"):
        common.workload("gpt2")


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("backend", ["numpy", "torch_fused"])
def test_backends_take_the_same_steps(common, optional, backend, options):
    if backend == "torch_fused":
        optional("torch")
    shapes = common.WORKLOADS["micro"]
    results = {}
    for name in ("fastadam", backend):
        params, grads = common.draw(shapes, "float64")
        step = common.make(name, params, **options)
        other = [0.5 * grad for grad in grads]  # other arrays, and a smaller second moment
        for given in (grads, grads, other):
            step(given)
        step(other, zero_grad=True)
        assert not any(grad.any() for grad in other)
        results[name] = params
    for ours, theirs in zip(results["fastadam"], results[backend], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=0)
