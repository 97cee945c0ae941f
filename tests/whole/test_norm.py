"""The global norm: the same bits on any path, an independent tree of sums, hard magnitudes."""

import math

import numpy as np
import pytest
from oracle import clip_coefficient, global_norm
from tools import WAYS, way

import fastadam

CHUNK, LANES = 8192, 32
SIZES = [0, 1, 31, 32, 33, 8191, 8192, 8193, 100_003]
DTYPES = {"float32": ("f4",), "float64": ("f8",), "mixed": ("f8", "f4")}


def norm_of(grads, **step_options):
    """The norm as a step reports it, and no more: parameters are thrown away."""
    opt = fastadam.Adam([np.zeros_like(grad) for grad in grads], max_grad_norm=math.inf)
    return opt.step(list(grads), **step_options).grad_norm


def in_pairs(sums):
    sums, stride = list(sums), 1
    while stride < len(sums):
        for k in range(0, len(sums) - stride, 2 * stride):
            sums[k] += sums[k + stride]
        stride *= 2
    return sums[0] if sums else 0.0


def tree(grads):
    """The sum of squares in the order that is promised, from what NumPy adds one by one."""
    total = 0.0
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        sums = []
        for grad in grads:
            values = grad.ravel("K").astype(np.float64) if grad.dtype == dtype else grad[:0]
            for start in range(0, values.size, CHUNK):
                chunk = values[start : start + CHUNK]
                rows = np.zeros((-(-chunk.size // LANES), LANES))
                rows.reshape(-1)[: chunk.size] = chunk
                lanes = np.add.accumulate(rows * rows, axis=0)[-1]
                while lanes.size > 1:
                    lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
                sums.append(float(lanes[0]))
        total += in_pairs(sums)
    return total


def draw(rng, sizes, dtypes):
    grads = [rng.standard_normal(n) * 10.0 ** rng.uniform(-3, 3, n) for n in sizes]
    return [grad.astype(dtypes[k % len(dtypes)]) for k, grad in enumerate(grads)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", DTYPES)
def test_same_bits_on_every_path(rng, kind, size):
    grads = draw(rng, [size] * len(DTYPES[kind]), DTYPES[kind])
    found = set()
    for name in WAYS:
        with way(name):
            found.add(norm_of(grads))
    assert len(found) == 1
    (norm,) = found
    assert norm == pytest.approx(global_norm(grads), rel=1e-15, abs=0)
    if kind == "float32":  # whose squares are exact: no fma is needed to follow
        assert norm == math.sqrt(tree(grads))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", DTYPES)
def test_many_arrays_are_one_table(rng, kind, name):
    """Chunks are added in the order of the parameters, whatever their sizes; none for None."""
    grads = draw(rng, [*SIZES, 5, 20_000, 0, 64, 9_000], DTYPES[kind])
    with way(name):
        norm = norm_of(grads)
    assert norm == pytest.approx(global_norm(grads), rel=1e-15, abs=0)
    if kind == "float32":
        assert norm == math.sqrt(tree(grads))


def test_two_dtypes_are_added_in_order():
    """Integers, whose squares and sums are exact: the tree says how the last sum is rounded."""
    wide = np.array([2.0**27, 1.0, 3.0])
    narrow = np.array([5.0, 7.0], np.float32)
    for grads in ([wide, narrow], [narrow, wide]):
        assert norm_of(grads) == math.sqrt(tree(grads))


def test_absent_gradients_count_for_nothing(rng):
    grads = draw(rng, [9_000, 50, 9_000], ("f8",))
    opt = fastadam.Adam([np.zeros_like(grad) for grad in grads], max_grad_norm=math.inf)
    assert opt.step([None, grads[1], None]).grad_norm == pytest.approx(
        global_norm(grads[1:2]), rel=1e-15
    )
    assert fastadam.Adam([], max_grad_norm=1.0).step([]).grad_norm == 0.0


def test_layouts(rng):
    """Elements lie in memory as they lie: Fortran order, no dimension, views."""
    store = rng.standard_normal((6, 50))
    grads = [np.asfortranarray(store[:2, :7]), np.array(3.0), store[3], store[4:]]
    opt = fastadam.Adam([g.copy("K") for g in grads], max_grad_norm=math.inf)
    assert opt.step(grads).grad_norm == pytest.approx(global_norm(grads), rel=1e-15)
    assert opt.step([None, np.float64(-4.0), None, None]).grad_norm == 4.0


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("f8", [1e200, -3e200]),
        ("f8", [1e-200, 1e-200, 2e-200]),
        ("f8", [1e200, 1.0, 1e-200]),
        ("f8", [5e-324]),
        ("f8", [5e-324, 1e-323, 3e-310]),
        ("f8", [1.7e308]),
        ("f8", [1e-145, 1e-139]),
        ("f8", [1.5e150, 0.5e150]),
        ("f4", [1e38, 3e38]),
        ("f4", [1e-45]),
        ("f4", [1e-45, 1e-38]),
        ("f8", [0.0, -0.0]),
    ],
)
def test_magnitudes(dtype, values, name):
    """Squares that are infinite, subnormal or zero are not what the norm is made of."""
    grad = np.resize(np.array(values, dtype=dtype), 1000)
    grad[len(values) :] = 0
    with way(name):
        assert norm_of([grad]) == pytest.approx(global_norm([grad]), rel=1e-15, abs=0)


def test_magnitudes_of_two_dtypes():
    grads = [np.array([1e-200, 3e-200]), np.array([1e-45], np.float32)]
    assert norm_of(grads) == pytest.approx(global_norm(grads), rel=1e-15, abs=0)
    grads = [np.array([1e200, 3e200]), np.array([1e38], np.float32)]
    assert norm_of(grads) == pytest.approx(global_norm(grads), rel=1e-15, abs=0)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("size", [1, 33, 9_000])
@pytest.mark.parametrize(
    ("values", "norm"),
    [
        ([math.nan], math.nan),
        ([math.inf], math.inf),
        ([-math.inf], math.inf),
        ([math.inf, math.nan], math.nan),
    ],
)
def test_not_finite(values, norm, size, dtype, name):
    grad = np.ones(size, dtype)
    grad[-len(values) :] = values[:size]
    with way(name):
        found = norm_of([grad])
    wanted = norm if size > 1 else abs(values[0])
    assert found == wanted or (math.isnan(found) and math.isnan(wanted))


def test_norm_beyond_float64_is_infinite():
    assert norm_of([np.full(4, 1.7e308)]) == math.inf


@pytest.mark.parametrize("scale", [3.0, 1024.0, 1e-3])
def test_norm_is_of_the_gradients_divided_by_their_scale(rng, scale):
    grads = draw(rng, [77, 5], ("f8",))
    assert norm_of(grads, grad_scale=scale) == pytest.approx(global_norm(grads) / scale, rel=1e-15)


@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clips_as_torch_does(rng, optional, dtype, max_norm):
    """`torch.nn.utils.clip_grad_norm_` over the same arrays: its norm, and what it leaves.

    With betas of 0, exp_avg is the gradient that was used.
    """
    torch = optional("torch")
    shapes = [[(3, 5), (257,)], [(), (0,)], [(33, 9)]]
    params = [[np.zeros(s, dtype) for s in group] for group in shapes]
    grads = [[np.asarray(rng.standard_normal(s)).astype(dtype) for s in group] for group in shapes]
    tensors = [torch.zeros(s, dtype=getattr(torch, dtype)) for group in shapes for s in group]
    for tensor, grad in zip(tensors, (g for group in grads for g in group), strict=True):
        tensor.grad = torch.from_numpy(grad.copy())
    theirs = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
    groups = [{"params": group, "lr": 0.1 * k} for k, group in enumerate(params)]
    opt = fastadam.Adam(groups, betas=(0.0, 0.0), max_grad_norm=max_norm)
    result = opt.step(grads)
    rtol = 1e-6 if dtype == "float32" else 1e-14
    assert result.grad_norm == pytest.approx(theirs.item(), rel=rtol)
    for state, tensor in zip(opt.state.values(), tensors, strict=True):
        np.testing.assert_allclose(state["exp_avg"], tensor.grad.numpy(), rtol=rtol)


@pytest.mark.parametrize("max_norm", [None, 1.0, 5.0, 5.000001, 1e300, math.inf])
def test_coefficient(max_norm):
    """At most 1, and 1 as soon as the norm is under the limit by a millionth."""
    opt = fastadam.Adam(np.zeros(2), betas=(0.0, 0.0), max_grad_norm=max_norm, nonfinite="skip")
    assert opt.step(np.array([3.0, 4.0])).grad_norm == 5.0
    wanted = np.array([3.0, 4.0]) * clip_coefficient(5.0, max_norm)
    np.testing.assert_allclose(opt.state[0]["exp_avg"], wanted, rtol=1e-15)
    if max_norm is None or max_norm > 5.0:
        np.testing.assert_array_equal(opt.state[0]["exp_avg"], [3.0, 4.0])


def test_clipping_is_of_one_step_only():
    """The coefficient of one step is not left for the next, nor for one without clipping."""
    param, twin = np.zeros(2), np.zeros(2)
    opt, other = fastadam.Adam(param, max_grad_norm=1.0), fastadam.Adam(twin)
    for k, size in enumerate([100.0, 0.1, 10.0, 0.2]):
        grad = np.array([0.0, size])
        opt.max_grad_norm = None if k == 3 else 1.0
        assert opt.step(grad).grad_norm == (None if k == 3 else size)
        other.step(grad * (1.0 if k == 3 else clip_coefficient(size, 1.0)))
        np.testing.assert_allclose(param, twin, rtol=1e-15)


def test_norm_is_not_measured_where_nobody_asks(kernel_calls):
    opt = fastadam.Adam(np.zeros(3))
    assert opt.step(np.ones(3)).grad_norm is None
    assert kernel_calls == [("update", "float64")]
    opt.nonfinite = "skip"
    assert opt.step(np.ones(3)).grad_norm == math.sqrt(3.0)
    assert kernel_calls[1:] == [("sum", "float64"), ("update", "float64")]
