"""Numbers, step counts and sizes at the ends of their ranges: what docs/numerics.md says."""

import ctypes
import decimal
import math
import mmap
import os
import sys
from itertools import pairwise

import numpy as np
import pytest
from oracle import Reference, clip_coefficient, global_norm, ulps
from tools import DTYPES, PATHS, WAYS, load, picture, way

import fastadam
from fastadam.cpu import backend
from fastadam.cpu.kernels import one_minus_power
from fastadam.schedules import chain, constant, cosine, exponential, linear, piecewise, warmup

EPS = (1e-8, 1e-12, 1e-30, 0.0)
BELOW_ONE = 1 - 2.0**-53
# Signs and sizes of a gradient from one step to the next.
PATTERNS = {
    "steady": lambda _, grad: grad,
    "signs": lambda step, grad: grad * (-1.0) ** step,
    "sizes": lambda step, grad: grad[::-1] if step % 2 else grad,
}


def debias(beta, t):
    """``1 - beta**t`` of 80 digits."""
    context = decimal.Context(80, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])
    with decimal.localcontext(context):
        return 1 - decimal.Decimal(beta) ** t


def change(exp_avg, exp_avg_sq, t, lr, betas, eps):
    """What step t takes from a parameter, from its moments, in float64."""
    m_hat = np.asarray(exp_avg, np.float64) / float(debias(betas[0], t))
    v_hat = np.asarray(exp_avg_sq, np.float64) / float(debias(betas[1], t))
    with np.errstate(all="ignore"):
        return lr * m_hat / (np.sqrt(v_hat) + eps)


def bits(opt, param, chosen=slice(None)):
    """Every bit of a parameter and its state, at some places."""
    arrays = [param, *(array for name, array in opt.state[0].items() if name != "step")]
    return [array[chosen].tobytes() for array in arrays]


# Sizes of gradients.

GRADS = np.logspace(-30, 30, 241)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("eps", EPS)
def test_float64_gradients_from_1e_30_to_1e30(eps, pattern):
    param = np.zeros(GRADS.size)
    opt, ref = fastadam.Adam(param, eps=eps), Reference(param, eps=eps)
    largest, moved = np.zeros(GRADS.size), np.zeros(GRADS.size)
    for step in range(20):
        before, grad = ref.param, PATTERNS[pattern](step, GRADS).copy()
        opt.step(grad)
        ref.step(grad)
        largest = np.maximum(largest, np.abs(grad))
        moved = np.maximum(moved, np.abs(ref.param - before))
        assert np.all(np.abs(opt.state[0]["exp_avg"] - ref.exp_avg) <= 1e-14 * largest)
        np.testing.assert_allclose(opt.state[0]["exp_avg_sq"], ref.exp_avg_sq, rtol=1e-14)
        assert np.all(np.abs(param - ref.param) <= 1e-13 * moved)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("eps", [*EPS, 2.0**-149])
def test_float32_gradients_from_1e_30_to_1e30(eps, pattern):
    """Moments as the reference's, the squares as far as float32 goes; the rest follows."""
    param, betas = np.zeros(GRADS.size, np.float32), (0.9, 0.95)
    opt, ref = fastadam.Adam(param, eps=eps), Reference(param, eps=eps)
    largest, frozen = np.zeros(GRADS.size), np.zeros(GRADS.size, bool)
    m, v = opt.state[0]["exp_avg"], opt.state[0]["exp_avg_sq"]
    for step in range(12):
        before, grad = param.copy(), PATTERNS[pattern](step, GRADS).astype(np.float32)
        opt.step(grad)
        with np.errstate(all="ignore"):
            ref.step(grad)
        largest = np.maximum(largest, np.abs(grad))
        assert np.all(np.abs(m - ref.exp_avg) <= 1e-6 * largest)
        frozen |= ref.exp_avg_sq > np.finfo(np.float32).max
        np.testing.assert_array_equal(np.isinf(v), frozen)
        error = np.abs(v[~frozen] - ref.exp_avg_sq[~frozen])
        # In each step one of the two may be 0, where the other is just above 2**-126.
        assert np.all(error <= 1e-6 * ref.exp_avg_sq[~frozen] + (step + 1) * 2.0**-126)
        with np.errstate(all="ignore"):
            moved = change(m, v, step + 1, 0.01, betas, eps)
            wanted = (before - moved).astype(np.float32)
        finite = np.isfinite(wanted)
        np.testing.assert_array_equal(param[~finite], wanted[~finite])
        terms = np.maximum(np.abs(before), np.abs(moved))[finite]
        assert ulps(param[finite], wanted[finite], terms) <= 4
        assert param[frozen].tobytes() == before[frozen].tobytes()
        assert finite.all() == (eps > 0.0)
    if pattern != "sizes":
        assert not v[GRADS <= 4.8e-19].any()
        assert v[GRADS >= 4.9e-19].all()
        assert frozen[GRADS > 2e19].all()
        assert not frozen[GRADS < 1.8e19].any()


@pytest.mark.parametrize(
    ("dtype", "normal", "inf", "in_the_end"),
    [("f4", 4.85e-19, 8.25e19, 1.844e19), ("f8", 6.67e-154, 5.99e154, 1.34e154)],
)
@pytest.mark.parametrize("beta", [0.0, 0.95, 0.999])
def test_where_squares_leave_the_range(dtype, normal, inf, in_the_end, beta):
    """The limits that the page gives, for betas[1] of 0.95, to a hundredth."""
    scale = math.sqrt(0.05 / (1 - beta))
    limits = [x * scale for x in (normal, inf)]
    opt = fastadam.Adam(np.zeros(4, dtype), betas=(0.9, beta))
    opt.step(np.array([x * y for x in limits for y in (0.99, 1.01)], dtype))
    v, tiny = opt.state[0]["exp_avg_sq"], np.finfo(dtype).tiny
    assert v[0] == 0.0 < tiny <= v[1]
    assert np.isfinite(v[2])
    assert np.isinf(v[3])
    opt = fastadam.Adam(np.zeros(2, dtype), betas=(0.9, beta))
    for _ in range(5000):
        opt.step(np.array([0.99 * in_the_end, 1.01 * in_the_end], dtype))
    np.testing.assert_array_equal(np.isfinite(opt.state[0]["exp_avg_sq"]), [True, False])


def huge_then_small(dtype, **options):
    """An element whose square is infinite in the first step, and its neighbours."""
    param, grad = np.full(5, 2.0, dtype), np.ones(5, dtype)
    opt = fastadam.Adam(param, **options)
    grad[2] = 1e30 if dtype == "f4" else 1e200
    result = opt.step(grad)
    return opt, param, result


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_square_stops_its_element(dtype):
    """For good, without NaN; nobody skips it, since the gradient itself is finite."""
    opt, param, result = huge_then_small(dtype, nonfinite="skip")
    assert not result.skipped
    for _ in range(5):
        opt.step(np.ones(5, dtype))
    state = opt.state[0]
    assert (param[2], state["exp_avg_sq"][2]) == (2.0, math.inf)
    assert np.isfinite(state["exp_avg"]).all()
    np.testing.assert_allclose(np.delete(param, 2), 2.0 - 6 * 0.01, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_square_and_betas_of_0_give_nan(dtype):
    """0 times infinity, in the step after; so does the float64 reference."""
    opt, param, _ = huge_then_small(dtype, betas=(0.9, 0.0))
    assert param[2] == 2.0
    opt.step(np.ones(5, dtype))
    ref = Reference(np.full(5, 2.0), betas=(0.9, 0.0))
    with np.errstate(all="ignore"):
        ref.step(np.array([1, 1, 1e200, 1, 1]))
        ref.step(np.ones(5))
    np.testing.assert_array_equal(np.isnan(param), np.isnan(ref.param))
    assert math.isnan(param[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_keeps_squares_in_range(dtype):
    opt, param, result = huge_then_small(dtype, max_grad_norm=1.0)
    assert result.grad_norm == pytest.approx(1e30 if dtype == "f4" else 1e200, rel=1e-6)
    assert param[2] == pytest.approx(2.0 - 0.01)
    opt.step(np.ones(5, dtype))
    assert np.isfinite(opt.state[0]["exp_avg_sq"]).all()


def test_a_large_lr_and_a_huge_gradient_give_nan():
    """Where lr times the gradient is infinite as well."""
    for lr, nan in ((1.0, False), (100.0, True)):
        param = np.zeros(2, np.float32)
        fastadam.Adam(param, lr=lr).step(np.array([3e38, 1.0], np.float32))
        assert math.isnan(param[0]) == nan
        assert param[1] == pytest.approx(-lr)


# Zeros, and eps.


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_gradients(dtype):
    """Nothing moves, not a bit; without eps, 0/0 is NaN in the parameter alone."""
    start = np.array([0.0, -0.0, 1e-40, -3.0, 1e30], dtype)
    for eps in (*EPS, 2.0**-149):
        param = start.copy()
        opt = fastadam.Adam(param, eps=eps)
        for _ in range(3):
            opt.step(np.zeros(5, dtype))
        if eps:
            assert param.tobytes() == start.tobytes()
        else:
            assert np.isnan(param).all()
        assert not any(opt.state[0][name].any() for name in ("exp_avg", "exp_avg_sq"))
        assert opt.step_count == opt.state[0]["step"] == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_eps_a_vanished_square_divides_by_zero(dtype):
    """Infinity where the gradient is not 0, in the direction of the step."""
    small = 1e-25 if dtype == "f4" else 1e-170
    param = np.zeros(4, dtype)
    fastadam.Adam(param, eps=0.0).step(np.array([small, -small, 0.0, 1.0], dtype))
    np.testing.assert_array_equal(param[:3], [-math.inf, math.inf, math.nan])
    assert param[3] == pytest.approx(-0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vanished_square_leaves_eps_alone(dtype):
    """The step is lr * m_hat / eps: the reference's, if eps is large, and up to twice as much."""
    small, rtol = (1e-25, 1e-5) if dtype == "f4" else (1e-170, 1e-14)
    for eps in (1e-8, 100 * small, small, small / 100):
        param, ref = np.zeros(3, dtype), Reference(np.zeros(3), lr=0.5, eps=eps)
        fastadam.Adam(param, lr=0.5, eps=eps).step(np.full(3, small, dtype))
        np.testing.assert_allclose(param, -0.5 * small / eps, rtol=rtol)
        if dtype == "f4":  # whose squares float64 holds
            ref.step(np.full(3, small))
            np.testing.assert_allclose(param, ref.param * (1 + small / eps), rtol=rtol)


@pytest.mark.parametrize(("dtype", "least"), [("f4", 2.0**-149), ("f8", 2.0**-1074)])
def test_the_smallest_eps(dtype, least):
    param = np.ones(3, dtype)
    fastadam.Adam(param, eps=least).step(np.zeros(3, dtype))
    np.testing.assert_array_equal(param, 1.0)
    if dtype == "f4":
        for eps in (least / 2, 1e-46):
            with pytest.raises(ValueError, match="eps must not round to 0 in float32"):
                fastadam.Adam(param, eps=eps)
        assert fastadam.Adam(param, eps=math.nextafter(least / 2, 1.0)).step(param * 0).step == 0


# Denormal numbers: in moments and gradients, `test_denormals.py`.


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_denormal_parameters_stay(dtype, name):
    """By whole registers and one by one; an average of them, too."""
    least = np.finfo(dtype).smallest_subnormal
    count = np.arange(-20, 21, dtype=dtype) * 2
    with way(name):
        param = count * least
        opt = fastadam.AdamW(param, lr=0.5, weight_decay=1.0, ema_decay=0.5)
        opt.step(np.zeros(41, dtype))
        assert param.tobytes() == (count / 2 * least).tobytes()
        np.testing.assert_array_equal(opt.ema_params, count * least * 0.75)


# Betas, and step counts.

BETAS = [0.0, 5e-324, 1e-300, 0.9, 1 - 2.0**-31, BELOW_ONE]
COUNTS = [1, 2, 3, 2**31 - 1, 2**31, 2**32 + 1, 2**53 - 1, 2**53, 2**53 + 1, 2**62 - 1, 2**62]


@pytest.mark.parametrize("beta", BETAS)
def test_bias_corrections_to_the_last_place(beta):
    """Where they cancel to 2**-53, where beta**t underflows, where t is no float64."""
    for t in COUNTS:
        exact = debias(beta, t)
        error = abs(decimal.Decimal(one_minus_power(beta, t)) - exact)
        assert error <= decimal.Decimal(math.ulp(float(exact)))
        if beta < 1e-200 or t > 2**62 - 2:
            assert one_minus_power(beta, t) == 1.0


def test_bias_corrections_against_mpmath(optional, rng):
    mpmath = optional("mpmath")
    with mpmath.workprec(400):
        for beta in 1 - 10.0 ** rng.uniform(-15.9, -0.1, 30):
            for t in COUNTS:
                exact = 1 - mpmath.mpf(float(beta)) ** t
                assert abs(one_minus_power(float(beta), t) - exact) <= math.ulp(float(exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "betas",
    [
        (0.0, 0.0),
        (0.0, 0.95),
        (0.9, 0.0),
        (5e-324, 1e-300),
        (0.9, BELOW_ONE),
        (BELOW_ONE, 0.95),
        (BELOW_ONE, BELOW_ONE),
    ],
)
def test_betas_at_their_ends(rng, betas, dtype):
    param = np.zeros(50, dtype)
    opt, (b1, b2) = fastadam.Adam(param, betas=betas), betas
    own, (m, v, largest) = opt.state[0], np.zeros((3, 50))
    for t in range(1, 8):
        before, grad = param.copy(), rng.standard_normal(50).astype(dtype)
        opt.step(grad)
        g = grad.astype(np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        largest = np.maximum(largest, np.abs(g))
        rtol = t * np.finfo(dtype).eps
        assert np.all(np.abs(own["exp_avg"] - m) <= rtol * largest * (1 - b1) * t)
        np.testing.assert_allclose(own["exp_avg_sq"], v, rtol=rtol)
        if b1 == 0.0:
            assert own["exp_avg"].tobytes() == grad.tobytes()
        moved = change(own["exp_avg"], own["exp_avg_sq"], t, 0.01, betas, 1e-8)
        terms = np.maximum(np.abs(before), np.abs(moved))
        assert ulps(param, before - moved, terms) <= 4


def test_float32_rounds_betas():
    """From 1 - 2**-25 on, beta is 1 in float32, and what has been is never forgotten."""
    beta = 1 - 2.0**-25
    for dtype, forgets in (("f4", False), ("f8", True)):
        opt = fastadam.Adam(np.zeros(2, dtype), betas=(0.9, beta))
        load(opt, 1000, exp_avg_sq=1.0)
        for _ in range(100):
            opt.step(np.zeros(2, dtype))
        v = opt.state[0]["exp_avg_sq"]
        np.testing.assert_allclose(v, beta**100 if forgets else 1.0, rtol=1e-14)


STARTS = [2**31 - 2, 2**31 - 1, 2**31, 2**53 - 1, 2**53, 2**53 + 1, 2**62 - 2]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("start", STARTS)
def test_step_counts(rng, start, name):
    """Every step is counted, and counts: in results, state, schedule and bias corrections."""
    betas, asked = (1 - 2.0**-31, BELOW_ONE), []
    param = np.zeros(40)
    with way(name):
        opt = fastadam.Adam(param, betas=betas, schedule=lambda step: asked.append(step) or 1.0)
    m, v, wanted = rng.standard_normal(40), rng.random(40) + 1.0, np.zeros(40)
    load(opt, start, exp_avg=m, exp_avg_sq=v)
    for step in range(start, start + 3):
        grad = rng.standard_normal(40)
        assert opt.step(grad).step == step
        assert (opt.step_count, opt.state[0]["step"]) == (step + 1, step + 1)
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad * grad
        wanted = wanted - change(m, v, step + 1, 0.01, betas, 1e-8)
        np.testing.assert_allclose(param, wanted, rtol=1e-13)
    assert asked == [start, start + 1, start + 2]
    assert {type(step) for step in asked} == {int}


def test_old_and_new_parameters_in_one_group():
    params, count = [np.zeros(3), np.zeros(3)], 2**53 + 1
    opt = fastadam.Adam(params, betas=(0.5, BELOW_ONE), eps=0.0)
    state = opt.state_dict()
    state["state"][0]["step"] = count
    opt.load_state_dict(state)
    opt.step([np.ones(3), np.ones(3)])
    for param, t in zip(params, (count + 1, 1), strict=True):
        wanted = change(0.5, 2.0**-53, t, 0.01, (0.5, BELOW_ONE), 0.0)
        np.testing.assert_allclose(param, -wanted, rtol=1e-15)


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        (piecewise([2**53 + 1], [1.0, 0.5]), 2**53, 1.0),
        (piecewise([2**53 + 1], [1.0, 0.5]), 2**53 + 1, 0.5),
        (chain((constant(1.0), 2**53 + 1), constant(0.5)), 2**53, 1.0),
        (chain((constant(1.0), 2**53 + 1), constant(0.5)), 2**53 + 1, 0.5),
        (exponential(0.5, 2**53 + 1, staircase=True), 2**53, 1.0),
        (exponential(0.5, 2**53 + 1, staircase=True), 2**53 + 1, 0.5),
        (cosine(2**60), 2**59, 0.5),
        (cosine(2**60), 2**60 // 3, 0.75),
        (cosine(2**60), 2**61 // 3, 0.25),
        (cosine(2**60), 2**62 - 1, 0.0),
        (linear(2**60), 2**60 - 1, 2.0**-60),
        (warmup(constant(), 2**60), 2**53, 2.0**-7),
    ],
    ids=repr,
)
def test_schedules_past_2_to_the_53(schedule, step, factor):
    opt = fastadam.Adam(np.zeros(2), lr=1.0, schedule=schedule)
    load(opt, step)
    result = opt.step(np.ones(2))
    assert result.step == step
    assert result.lr == pytest.approx(factor, rel=1e-15, abs=0)


# NaN and infinity.

BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
TAIL = {"amsgrad": True, "ema_decay": 0.5}
PLACES = [0, 8191, 8192, 12_345, 20_000]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("dtype", "options"), [("f4", {}), ("f8", {}), ("f4", TAIL)], ids=str)
@BAD
def test_a_bad_gradient_spoils_its_own_element(rng, bad, dtype, options, name):
    """There as in the reference, then and later; not a bit elsewhere."""
    start = rng.standard_normal(20_001).astype(dtype)
    param, twin, ref = start.copy(), start.copy(), Reference(start[PLACES], **options)
    with way(name):
        opt, other = fastadam.Adam(param, **options), fastadam.Adam(twin, **options)
        for step in range(3):
            grad = rng.standard_normal(20_001).astype(dtype)
            other.step(grad)
            if step == 1:
                grad[PLACES] = bad
            opt.step(grad)
            with np.errstate(invalid="ignore"):
                ref.step(grad[PLACES])
    good = np.setdiff1d(np.arange(20_001), PLACES)
    assert bits(opt, param, good) == bits(other, twin, good)
    assert np.isnan(param[PLACES]).all()
    for key, wanted in ref.arrays().items():
        np.testing.assert_array_equal(opt.state[0][key][PLACES], wanted)
        assert not np.isfinite(wanted).any()


@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.0)}], ids=repr)
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_nan_in_a_loaded_moment_stays_in_its_element(rng, moment, options):
    """With betas of 0 too, for 0 times NaN is NaN."""
    params = [np.ones(9), np.ones(9)]
    opts = [fastadam.Adam(param, **options) for param in params]
    values = rng.random(9)
    load(opts[1], 5, **{moment: values})
    values[4] = math.nan
    load(opts[0], 5, **{moment: values})
    for _ in range(3):
        grad = rng.standard_normal(9)
        for opt in opts:
            opt.step(grad)
    good = np.arange(9) != 4
    assert bits(opts[0], params[0], good) == bits(opts[1], params[1], good)
    assert math.isnan(params[0][4])
    assert math.isnan(opts[0].state[0][moment][4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("options", "spoils"),
    [
        ({}, False),
        ({"weight_decay": 0.1, "decoupled_weight_decay": True}, False),
        ({"weight_decay": 0.1}, True),
    ],
    ids=["plain", "decoupled", "l2"],
)
def test_a_bad_parameter(rng, options, spoils, bad):
    """Its moments are not made of it, but by L2 decay: put right, it goes on as ever."""
    param, twin = np.ones(9), np.ones(9)
    opt, other = fastadam.Adam(param, **options), fastadam.Adam(twin, **options)
    for step in range(3):
        grad = rng.standard_normal(9)
        param[4] = bad if step == 1 else twin[4]
        opt.step(grad)
        other.step(grad)
        assert np.isfinite(param[4]) == (step == 0 or (step == 2 and not spoils))
    assert (picture(opt, [param]) == picture(other, [twin])) != spoils
    good = np.arange(9) != 4
    assert bits(opt, param, good) == bits(other, twin, good)


# Learning rates, scales and norms.


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_learning_rate_of_0(rng, dtype):
    """Parameters keep their bits, but for the sign of 0; moments move."""
    start = (10.0 ** rng.uniform(-20, 20, 241)).astype(dtype)
    param, twin = start.copy(), start.copy()
    opt, other = fastadam.Adam(param, lr=0.0), fastadam.Adam(twin)
    for step in range(3):
        grad = PATTERNS["sizes"](step, GRADS).astype(dtype)
        opt.step(grad)
        other.step(grad)
    assert param.tobytes() == start.tobytes() != twin.tobytes()
    assert bits(opt, param)[1:] == bits(other, twin)[1:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_learning_rate_of_0_and_negative_zeros(dtype):
    """-0.0 becomes 0.0 where exp_avg is negative, since -0.0 + 0.0 is 0.0."""
    param = np.full(3, -0.0, dtype)
    opt = fastadam.Adam(param, lr=0.0)
    opt.step(np.array([1.0, -1.0, 0.0], dtype))
    assert param.tobytes() == np.array([-0.0, 0.0, -0.0], dtype).tobytes()


@pytest.mark.parametrize(("dtype", "largest"), [("f4", 126), ("f8", 1022)])
def test_powers_of_two_as_grad_scale_cost_no_bit(rng, dtype, largest):
    """To the ends of what is accepted."""
    grad = rng.uniform(1.0, 1.9, 50).astype(dtype)
    for max_norm in (None, 1.0):
        twin = np.zeros(50, dtype)
        other = fastadam.Adam(twin, max_grad_norm=max_norm)
        result = other.step(grad)
        for k in (-largest, -40, 40, largest):
            param = np.zeros(50, dtype)
            opt = fastadam.Adam(param, max_grad_norm=max_norm)
            assert opt.step(np.ldexp(grad, k), grad_scale=2.0**k) == result
            # But where scale and clipping together are below the normal numbers.
            spared = max_norm is None or k != largest
            assert (bits(opt, param) == bits(other, twin)) == spared
    for beyond in (2.0 ** (largest + 1), 2.0 ** -(largest + 2)):
        with pytest.raises(ValueError, match=r"^1/grad_scale must be in"):
            opt.step(grad, grad_scale=beyond)


@pytest.mark.parametrize("max_norm", [5e-324, 1e-300, 1e-30, 1e30, 1e300, 1.7e308])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_float64_limits_of_the_norm(rng, size, max_norm):
    """With betas of 0, exp_avg is the gradient that was used."""
    grad = rng.uniform(1.0, 2.0, 30) * size
    opt = fastadam.Adam(np.zeros(30), betas=(0.0, 0.0), max_grad_norm=max_norm)
    norm = opt.step(grad).grad_norm
    assert norm == pytest.approx(global_norm([grad]), rel=1e-15, abs=0)
    used = clip_coefficient(norm, max_norm) * grad
    np.testing.assert_allclose(opt.state[0]["exp_avg"], used, rtol=1e-15)
    if max_norm > 1e-6 + norm:
        assert opt.state[0]["exp_avg"].tobytes() == grad.tobytes()


def test_the_factor_that_clips_is_of_the_parameters_dtype():
    """In float32, one below the normal numbers has few digits, and under 2**-150 it is 0."""
    for max_norm in (1e-3, 1e-14, 1e-20):
        param = np.zeros(2, np.float32)
        opt = fastadam.Adam(param, betas=(0.0, 0.0), max_grad_norm=max_norm)
        opt.step(np.array([3e30, 4e30], np.float32))
        used = float(np.float32(max_norm / 5e30)) * np.array([3e30, 4e30])
        np.testing.assert_allclose(opt.state[0]["exp_avg"], used, rtol=1e-6)
        right = np.isclose(np.linalg.norm(used), max_norm, rtol=1e-6, atol=0)
        assert (right, used.any()) == (max_norm == 1e-3, max_norm > 1e-20)
        assert param.any() == used.any()


# Arrays of more than 2**31 elements.

_LARGE = 2**31 + 1000
_PIECE, _PAGES = 2**22, 2**16
# Byte offsets at which integers of 32 bits end, with or without sign; elements, too.
_EDGES = (0, 2**31, 2**32, 2**33)


@pytest.fixture
def large_zeros():
    """Make float32 arrays of `_LARGE` zeros of which little is real memory.

    At the edges, each array has pages of its own; all the rest, of all arrays, is one
    piece of memory seen thousands of times. What is 0 and stays 0 may lie there.
    Returns a function that makes an array, and the piece.
    """
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        pytest.skip("needs Linux's mmap on a 64-bit machine")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size = -(-4 * _LARGE // _PAGES) * _PAGES
    both, fixed, no_reserve = mmap.PROT_READ | mmap.PROT_WRITE, 0x10, 0x4000
    piece = os.memfd_create("zeros")
    os.ftruncate(piece, _PIECE)
    mapped = []

    def map_at(where, length, flags, file):
        found = libc.mmap(where, length, both, flags, file, 0)
        if found in (None, ctypes.c_void_p(-1).value):
            pytest.skip(f"the system maps no more memory: {os.strerror(ctypes.get_errno())}")
        return found

    def make():
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        start = map_at(None, size, private, -1)
        mapped.append(start)
        for low, high in pairwise(_EDGES):
            low, high = start + low + _PAGES, start + high - _PAGES
            for where in range(low, high, _PIECE):
                map_at(where, min(_PIECE, high - where), mmap.MAP_SHARED | fixed, piece)
        memory = (ctypes.c_char * (4 * _LARGE)).from_address(start)
        return np.frombuffer(memory, dtype=np.float32)

    try:
        with mmap.mmap(piece, _PIECE) as shared:
            yield make, shared
    finally:
        for start in mapped:
            libc.munmap(start, size)
        os.close(piece)


def edges(array):
    """What of such an array is memory of its own."""
    count = _PAGES // 4
    return np.concatenate([array[max(e // 4 - count, 0) : e // 4 + count] for e in _EDGES])


def set_edges(array, values):
    count, done = _PAGES // 4, 0
    for edge in _EDGES:
        part = array[max(edge // 4 - count, 0) : edge // 4 + count]
        part[:] = values[done : done + part.size]
        done += part.size
    assert done == values.size


def test_more_than_2_to_the_31_elements(rng, large_zeros, monkeypatch):
    """Norm, clipping and update, bit for bit those of a small array of the same numbers.

    All are whole numbers, so that the norm is the same in any order.
    """
    make, shared = large_zeros
    param, grad, m, v = (make() for _ in range(4))
    numbers = rng.integers(-9, 10, (4, edges(param).size)).astype(np.float32)
    numbers[3] = np.abs(numbers[3])
    for name in PATHS:
        for array, values in zip((param, grad, m, v), numbers, strict=True):
            set_edges(array, values)
        small = numbers[0].copy()
        twin = fastadam.Adam(small, max_grad_norm=1.0)
        load(twin, 0, exp_avg=numbers[2], exp_avg_sq=numbers[3])
        wanted = twin.step(numbers[1])
        with monkeypatch.context() as patch, way(name):
            patch.setattr(backend, "allocate", lambda _: [m, v])
            opt = fastadam.Adam(param, max_grad_norm=1.0)
            assert opt.step(grad) == wanted
        found = [edges(array).view(np.int32) for array in (param, grad, m, v)]
        state = twin.state[0]
        for array, own in zip(
            found, (small, numbers[1], state["exp_avg"], state["exp_avg_sq"]), strict=True
        ):
            np.testing.assert_array_equal(array, own.view(np.int32))
        assert (small != numbers[0]).mean() > 0.9
        assert shared[:].count(0) == _PIECE  # nothing has been written anywhere else
