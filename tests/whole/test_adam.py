"""The numbers: fastadam against the tutorial's loop and a float64 reference."""

import math

import numpy as np
import pytest
from oracle import Reference, tutorial, ulps

import fastadam
from fastadam import schedules
from fastadam.cpu import kernels

SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (257,), (64, 33)]
MODES = {
    "plain": {},
    "l2": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "no-momentum": {"betas": (0.0, 0.0)},
    "pytorch-defaults": {"lr": 1e-3, "betas": (0.9, 0.999)},
    "all": {
        "weight_decay": 0.05,
        "decoupled_weight_decay": True,
        "amsgrad": True,
        "maximize": True,
        "schedule": schedules.cosine(60),
    },
}


def draw(rng, shapes, dtype):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def test_thousand_steps_of_the_tutorial(rng):
    """Float64, many tensors, 1,000 steps: 1e-12 relative of the loop in plain Python."""
    steps = 1000
    shapes = [(), (3,), (2, 4), (1, 1, 5)]
    params = draw(rng, shapes, np.float64)
    target = rng.standard_normal(sum(p.size for p in params))
    noise = rng.standard_normal((steps, target.size))

    def grads_of(step, values):
        return [2 * (x - t) + n for x, t, n in zip(values, target, noise[step], strict=True)]

    start = np.concatenate([p.ravel() for p in params]).tolist()
    expected = tutorial(start, grads_of, steps, steps)
    opt = fastadam.Adam(params, schedule=schedules.cosine(steps))
    for step in range(steps):
        values = np.concatenate([p.ravel() for p in params])
        flat = np.array(grads_of(step, values))
        cuts = np.split(flat, np.cumsum([p.size for p in params])[:-1])
        opt.step([c.reshape(p.shape) for c, p in zip(cuts, params, strict=True)])
        got = np.concatenate([p.ravel() for p in params])
        np.testing.assert_allclose(got, expected[step], rtol=1e-12, atol=1e-14)
    assert opt.step_count == steps


@pytest.mark.parametrize("mode", MODES)
def test_float64_trajectory(rng, mode):
    params = draw(rng, SHAPES, np.float64)
    references = [Reference(p, **MODES[mode]) for p in params]
    opt = fastadam.Adam(params, **MODES[mode])
    for step in range(50):
        grads = [g * 10.0 ** (step % 5 - 2) for g in draw(rng, SHAPES, np.float64)]
        opt.step(grads)
        for k, (param, grad, ref) in enumerate(zip(params, grads, references, strict=True)):
            ref.step(grad)
            np.testing.assert_allclose(param, ref.param, rtol=1e-12, atol=1e-14)
            for name, array in ref.arrays().items():
                np.testing.assert_allclose(opt.state[k][name], array, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("start", [0, 1, 10, 1000, 10**6, 2**53 + 1])
@pytest.mark.parametrize("mode", MODES)
def test_float32_one_step_within_4_ulps(rng, mode, start):
    """From a mid-trajectory state, one step equals the float64 update rounded to float32.

    Sums of terms of opposite sign are measured in units of the larger term.
    """
    dtype = np.float32
    (param,), (grad,) = draw(rng, [(4097,)], dtype), draw(rng, [(4097,)], dtype)
    opt = fastadam.Adam(param, **MODES[mode])
    ref = Reference(param, **MODES[mode])
    state = opt.state_dict()
    moments = state["state"][0]
    if start:
        moments["exp_avg"] = rng.standard_normal(param.shape).astype(dtype)
        moments["exp_avg_sq"] = (rng.standard_normal(param.shape) ** 2).astype(dtype)
        if "max_exp_avg_sq" in moments:
            moments["max_exp_avg_sq"] = moments["exp_avg_sq"] + np.float32(0.01)
    moments["step"], state["step_count"] = start, 0
    opt.load_state_dict(state)
    before = param.copy()
    ref.exp_avg, ref.exp_avg_sq = (moments[n].astype(float) for n in ("exp_avg", "exp_avg_sq"))
    if ref.max_exp_avg_sq is not None:
        ref.max_exp_avg_sq = moments["max_exp_avg_sq"].astype(float)
    ref.updates = start
    ref.step(grad)
    opt.step(grad)
    assert opt.state[0]["step"] == start + 1
    term = np.maximum(np.abs(grad), np.abs(moments["exp_avg"]))
    if mode == "l2":
        term = np.maximum(term, 0.1 * np.abs(before))
    assert ulps(opt.state[0]["exp_avg"], ref.exp_avg, term) <= 4
    # The square of a gradient that is itself a sum has twice its relative error.
    square = np.square(0.1 * before).astype(dtype) if mode == "l2" else None
    assert ulps(opt.state[0]["exp_avg_sq"], ref.exp_avg_sq, square) <= 4
    update = np.abs(before.astype(float) - ref.param)
    assert ulps(param, ref.param, np.maximum(np.abs(before), update)) <= 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scale_zero_grad_and_layouts(rng, dtype):
    """Fortran order, views into a larger array, grad_scale, zero_grad."""
    store = rng.standard_normal((10, 40)).astype(dtype)
    params = [np.asfortranarray(rng.standard_normal((5, 6)).astype(dtype)), store[3], store[4:6]]
    untouched = store[6:].copy()
    grads = [np.asfortranarray(rng.standard_normal((5, 6)).astype(dtype))]
    grads += draw(rng, [(40,), (2, 40)], dtype)
    references = [Reference(p) for p in params]
    for ref, grad in zip(references, grads, strict=True):
        ref.step(grad, grad_scale=1024.0)
    opt = fastadam.Adam(params)
    opt.step(grads, grad_scale=1024.0, zero_grad=True)
    for param, ref in zip(params, references, strict=True):
        np.testing.assert_allclose(param, ref.param, rtol=3e-7 if dtype == np.float32 else 1e-13)
    assert all(not g.any() for g in grads)
    np.testing.assert_array_equal(store[6:], untouched)
    assert opt.state[0]["exp_avg"].flags.f_contiguous


def test_grads_are_left_alone_without_zero_grad(rng):
    param, grad = draw(rng, [(9,), (9,)], np.float64)
    kept = grad.copy()
    fastadam.AdamW(param, maximize=True).step(grad, grad_scale=3.0)
    np.testing.assert_array_equal(grad, kept)


def test_none_leaves_a_parameter_and_its_step_count(rng):
    """A parameter's bias correction counts its own steps; the schedule counts all."""
    params = draw(rng, [(5,), (6,)], np.float64)
    options = {"lr": 0.1, "schedule": schedules.cosine(10)}
    references = [Reference(p, **options) for p in params]
    opt = fastadam.Adam(params, **options)
    for step in range(10):
        grads = draw(rng, [(5,), (6,)], np.float64)
        if step % 3 == 1:
            grads[0] = None
        before = params[0].copy(), opt.state_dict()["state"][0]
        opt.step(grads)
        for ref, grad in zip(references, grads, strict=True):
            ref.step(grad)
        if grads[0] is None:
            np.testing.assert_array_equal(params[0], before[0])
            for name, value in before[1].items():
                np.testing.assert_array_equal(opt.state[0][name], value)
        for param, ref in zip(params, references, strict=True):
            np.testing.assert_allclose(param, ref.param, rtol=1e-12)
    assert [opt.state[k]["step"] for k in (0, 1)] == [7, 10]
    assert opt.step_count == 10


def test_none_after_a_gradient_that_has_been_freed():
    """A dead reference and a None look alike; the freed memory must not be read again."""
    first, second, kept = np.zeros(3), np.zeros(3), np.ones(3)
    opt = fastadam.Adam([first, second], lr=0.1)
    opt.step([kept, np.ones(3)])
    before = second.copy()
    opt.step([kept, None])
    np.testing.assert_array_equal(second, before)
    assert [opt.state[k]["step"] for k in (0, 1)] == [2, 1]


def test_none_counts_a_step_of_the_schedule_only():
    param = np.ones(3)
    opt = fastadam.Adam([param, np.ones(2)])
    assert opt.step([None, np.ones(2)]).step == 0
    assert (opt.step_count, opt.state[0]["step"]) == (1, 0)
    np.testing.assert_array_equal(param, 1.0)


def test_groups_have_their_own_hyperparameters(rng):
    own = [
        {"lr": 0.1},
        {"betas": (0.5, 0.7), "weight_decay": 0.2},
        {"eps": 1e-3, "weight_decay": 0.3, "decoupled_weight_decay": True},
        {"maximize": True},
    ]
    shapes = [[(3,), (2, 2)], [(5,)], [(4, 4), ()], [(6,)]]
    params = [draw(rng, shape, np.float64) for shape in shapes]
    references = [
        [Reference(p, **{"lr": 0.02, **options}) for p in group]
        for group, options in zip(params, own, strict=True)
    ]
    opt = fastadam.Adam(
        [{"params": group, **options} for group, options in zip(params, own, strict=True)],
        lr=0.02,
    )
    for _ in range(20):
        grads = [draw(rng, shape, np.float64) for shape in shapes]
        result = opt.step(grads)
        assert result.lr == 0.1
        for refs, arrays in zip(references, grads, strict=True):
            for ref, grad in zip(refs, arrays, strict=True):
                ref.step(grad)
    for group, refs in zip(params, references, strict=True):
        for param, ref in zip(group, refs, strict=True):
            np.testing.assert_allclose(param, ref.param, rtol=1e-12)


def test_one_kernel_call_for_all_groups_and_arrays(kernel_calls):
    params = [[np.zeros(3) for _ in range(20)] for _ in range(5)]
    opt = fastadam.Adam([{"params": group, "lr": k} for k, group in enumerate(params)])
    opt.step([[np.ones(3) for _ in group] for group in params])
    assert kernel_calls == [("update", "float64")]
    for k, group in enumerate(params):
        np.testing.assert_allclose(group, -float(k))


def test_dtypes_mixed_in_one_optimizer():
    params = {"a": np.ones(5, np.float32), "b": np.ones((2, 3)), "c": np.ones(4, np.float32)}
    opt = fastadam.Adam(params, lr=0.1)
    opt.step({"c": np.full(4, 2, np.float32), "a": None, "b": np.full((2, 3), -1.0)})
    np.testing.assert_array_equal(params["a"], 1.0)
    np.testing.assert_allclose(params["b"], 1.1, rtol=1e-7)
    np.testing.assert_allclose(params["c"], 0.9, rtol=1e-6)


def test_mixed_dtypes_are_updated_all_or_none(monkeypatch):
    """A kernel that fails to compile does so before another dtype's has written."""

    factory = kernels.update_kernel

    def compiled(dtype, **options):
        if dtype == np.float32:
            raise RuntimeError("no threads to be had")
        return factory(dtype, **options)

    monkeypatch.setattr(kernels, "update_kernel", compiled)
    params = [np.ones(2), np.ones(2, np.float32)]
    opt = fastadam.Adam(params)
    with pytest.raises(RuntimeError, match="no threads"):
        opt.step([np.ones(2), np.ones(2, np.float32)])
    for param in params:
        np.testing.assert_array_equal(param, 1.0)
    assert [opt.step_count, *(s["step"] for s in opt.state.values())] == [0, 0, 0]


def test_containers():
    """One array, a sequence, a tuple, an iterator, a mapping in any order of its keys."""
    for container, pack in [
        (lambda a: a[0], lambda g: g[0]),
        (list, tuple),
        (tuple, list),
        (iter, iter),
        (lambda a: {"x": a[0], "y": a[1]}, lambda g: {"y": g[1], "x": g[0]}),
        (lambda a: [{"params": a[0]}, {"params": {"y": a[1]}}], lambda g: (g[0], {"y": g[1]})),
    ]:
        arrays, grads = [np.zeros(2), np.zeros(3)], [np.ones(2), np.full(3, -1.0)]
        fastadam.Adam(container(arrays), lr=0.5).step(pack(grads))
        np.testing.assert_allclose(arrays[0], -0.5)
        if container([0, 1]) != 0:
            np.testing.assert_allclose(arrays[1], 0.5)


@pytest.mark.parametrize(
    "params", [[], {}, (), [{"params": []}], np.zeros((0, 3)), [np.array(1.0)]]
)
def test_empty_and_zero_dimensional(params):
    opt = fastadam.Adam(params)
    grads = (
        params if isinstance(params, np.ndarray) else [np.array(2.0)] if len(params) else params
    )
    if isinstance(params, list) and params and isinstance(params[0], dict):
        grads = [[]]
    elif isinstance(params, np.ndarray):
        grads = np.zeros((0, 3))
    assert opt.step(grads).step == 0
    assert opt.step_count == 1
    if isinstance(params, list) and params and isinstance(params[0], np.ndarray):
        assert params[0] == pytest.approx(0.99)


def test_numpy_scalars_are_gradients_of_0d_parameters():
    """Arithmetic on 0-d arrays gives NumPy scalars; each step's own is used."""
    param, same = np.array(1.0), np.array(1.0)
    first, second = fastadam.Adam(param), fastadam.Adam(same)
    for slope in (1.0, -3.0, 0.5, 0.5):
        first.step(np.float64(slope))
        second.step(np.array(slope))
    assert param == same
    with pytest.raises(
        ValueError, match=r"grads must be writable for zero_grad=True, got a NumPy"
    ):
        first.step(np.float64(1.0), zero_grad=True)


def test_new_arrays_every_step_and_the_same_arrays_agree(rng):
    same, fresh = np.ones(50), np.ones(50)
    grad = np.empty(50)
    first, second = fastadam.Adam(same), fastadam.Adam(fresh)
    for _ in range(10):
        grad[:] = rng.standard_normal(50)
        first.step(grad)
        second.step(grad.copy())
    np.testing.assert_array_equal(same, fresh)


def test_first_step_is_lr_whatever_the_gradient():
    """Bias correction: the first update has the size of lr, in the gradient's direction."""
    param = np.zeros(4)
    fastadam.Adam(param, lr=0.25).step(np.array([1e-3, -1.0, 1e3, 1e6]))
    np.testing.assert_allclose(param, [-0.25, 0.25, -0.25, -0.25], rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 1 - 2**-40])
def test_bias_correction_is_exact_to_the_last_place(beta):
    """The compiled 1 - beta**t against integers of as many digits as it takes."""
    from fractions import Fraction

    from fastadam.cpu.kernels import one_minus_power

    for t in (1, 2, 3, 10, 117, 1000, 4999):
        exact = float(1 - Fraction(beta) ** t)
        assert abs(one_minus_power(beta, t) - exact) <= math.ulp(exact)
    assert one_minus_power(0.9, 2**62) == 1.0
