"""No moment is denormal after a step, and what that costs: no bit of another number."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from numba import njit
from oracle import Reference
from tools import DTYPES, WAYS, load, way

import fastadam
from fastadam.cpu import intrinsics
from fastadam.update import formula

TINY = {"f4": 2.0**-126, "f8": 2.0**-1022}
# Decimal exponents, past both ends of what each holds.
RANGE = {"f4": (-45.5, 38.5), "f8": (-324.0, 308.2)}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def magnitudes(rng, dtype, count, special=(0.0, math.nan, math.inf)):
    """Numbers of all sizes and both signs, and some that are none."""
    with np.errstate(over="ignore", under="ignore"):
        values = (10.0 ** rng.uniform(*RANGE[dtype], count)).astype(dtype)
    near = TINY[dtype] * np.array([0.25, 0.5, 1 - 2.0**-20, 1.0, 1.5, 2.0, 20.0], dtype)
    for k, value in enumerate([*special, *near]):
        values[k :: 5 * len([*special, *near])] = value
    rng.shuffle(values)
    return values * rng.choice(np.array([-1, 1], dtype), count)


def is_denormal(values, dtype):
    return (np.abs(values) < TINY[dtype]) & (values != 0)


OPTIONS = {
    "plain": {},
    "small betas": {"betas": (0.0, 0.01)},
    "large betas": {"betas": (0.9999, 1 - 2.0**-53)},
    "l2": {"weight_decay": 1e-3},
    "tiny l2": {"weight_decay": 1e-30, "maximize": True},
    "huge l2": {"weight_decay": 1e30},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "amsgrad": {"amsgrad": True, "maximize": True},
    "all": {"amsgrad": True, "weight_decay": 1e-5, "ema_decay": 0.5},
    "clipped": {"max_grad_norm": 1e-3},
    "skipped": {"max_grad_norm": 1e-30, "nonfinite": "skip", "amsgrad": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WAYS)
def test_no_moment_is_denormal_after_a_step(rng, name, dtype, options):
    """Whatever was loaded, in vectors and in what remains of them."""
    count = 4_003
    with way(name):
        for grad_scale in (1.0, 2.0**-20, 2.0**20):
            opt = fastadam.Adam(magnitudes(rng, dtype, count), **OPTIONS[options])
            own = {n: magnitudes(rng, dtype, count) for n in MOMENTS if n in opt.state[0]}
            load(opt, 3, **{n: v if n == "exp_avg" else np.abs(v) for n, v in own.items()})
            for k in range(3):
                finite = k and "max_grad_norm" in OPTIONS[options]
                grad = magnitudes(rng, dtype, count, special=() if finite else (math.nan, 0.0))
                if finite:  # so that the norm is no infinity, whose coefficient is 0
                    grad *= np.array(0.25 / count, dtype)
                if not opt.step(grad, grad_scale=grad_scale).skipped:
                    for n in own:
                        values = opt.state[0][n]
                        assert not is_denormal(values, dtype).any(), n
                        assert np.isnan(values).any(), n


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loaded_denormal_moments_are_0_after_one_step(dtype, name):
    small = {"f4": 1e-42, "f8": 1e-320}[dtype]
    param = np.linspace(-1, 1, 41, dtype=dtype)
    before = param.copy()
    with way(name):
        opt = fastadam.Adam(param, amsgrad=True)
        load(opt, 9, exp_avg=-small, exp_avg_sq=small, max_exp_avg_sq=small)
        assert all(opt.state[0][n].all() for n in MOMENTS)
        opt.step(np.zeros(41, dtype))
    for n in MOMENTS:
        assert opt.state[0][n].tobytes() == bytes(41 * param.itemsize)
    assert param.tobytes() == before.tobytes()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_becomes_0(dtype, sign):
    """At the very numbers, with scale, clipping, L2 decay and maximize."""
    tiny, least = TINY[dtype], np.array([1 - 2.0**-10, 1 + 2.0**-10])
    # A gradient, of which half goes into the moment.
    for options, scale in (({}, 1.0), ({"maximize": True}, 8.0)):
        opt = fastadam.Adam(np.ones(2, dtype), betas=(0.5, 0.95), **options)
        opt.step((sign * least * tiny * 2 * scale).astype(dtype), grad_scale=scale)
        assert (opt.state[0]["exp_avg"] != 0).tolist() == [False, True]
        assert not opt.state[0]["exp_avg_sq"].any()
    # A square, of which a quarter does.
    opt = fastadam.Adam(np.ones(2, dtype), betas=(0.5, 0.75))
    opt.step((sign * least * 2 * math.sqrt(tiny)).astype(dtype))
    assert (opt.state[0]["exp_avg_sq"] != 0).tolist() == [False, True]
    # Moments, of which half stays.
    opt = fastadam.Adam(np.ones(2, dtype), betas=(0.5, 0.5))
    load(opt, 5, exp_avg=sign * least * tiny * 2, exp_avg_sq=least * tiny * 2)
    opt.step(np.zeros(2, dtype))
    for name in ("exp_avg", "exp_avg_sq"):
        assert (opt.state[0][name] != 0).tolist() == [False, True]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_that_decay_follow_the_reference_to_0(rng, dtype, options):
    """Units that die, while others have tiny gradients."""
    betas = (0.9, 0.95) if dtype == "f4" else (0.3, 0.4)
    param = rng.standard_normal(300).astype(dtype)
    opt = fastadam.Adam(param, betas=betas, **options)
    ref = Reference(param, betas=betas, **options)
    grad = rng.standard_normal(300).astype(dtype)
    grad[200:] *= np.logspace(-10, RANGE[dtype][0] + 0.1, 100).astype(dtype)
    for step in range(1_000):
        opt.step(grad)
        ref.step(grad)
        if step == 3:
            grad[:200] = 0.0
    m, v = opt.state[0]["exp_avg"], opt.state[0]["exp_avg_sq"]
    tiny, rtol = TINY[dtype], 1_000 * float(np.finfo(dtype).eps)
    assert not m[:200].any()
    assert not ref.exp_avg[:200].any()
    assert m[200:].any()
    # One of the two may be 0 where the other is just above.
    assert np.all(np.abs(m - ref.exp_avg) <= rtol * np.abs(ref.exp_avg) + 2 * tiny)
    assert np.all(np.abs(v - ref.exp_avg_sq) <= rtol * ref.exp_avg_sq + 20 * tiny)
    np.testing.assert_allclose(param, ref.param, rtol=0, atol=10 * rtol)  # after moves of 0.01


class Watched:
    """A float32 that notes when arithmetic with it is given, or gives, a denormal number."""

    seen = 0

    def __init__(self, value):
        self.value = np.float32(value)

    def note(self, *others):
        for x in (self, *others):
            Watched.seen += bool(0 < abs(x.value) < TINY["f4"])
        return self

    def __mul__(self, other):
        return Watched(self.value * other.value).note(self, other)

    def __truediv__(self, other):
        return Watched(self.value / other.value).note(self, other)

    def __sub__(self, other):
        return Watched(self.value - other.value).note(self, other)

    def __neg__(self):
        return Watched(-self.value)

    def __abs__(self):
        return Watched(abs(self.value))

    def __lt__(self, other):  # which costs nothing
        return self.value < other.value

    def __ge__(self, other):
        return self.value >= other.value

    @staticmethod
    def fma(a, b, c):
        exact = float(a.value) * float(b.value) + float(c.value)
        return Watched(exact).note(a, b, c)

    @staticmethod
    def sqrt(x):
        return Watched(np.sqrt(x.value)).note(x)


@pytest.mark.parametrize("lr", [1e-2, 1e-6])
@pytest.mark.parametrize("start", [1.0, -1e-4, 1e-8])
def test_a_unit_that_dies_meets_few_denormal_numbers(start, lr):
    """Some steps, as each moment crosses, and none from then on."""
    update = formula.bind(formula.adam_update, fma=Watched.fma, math=Watched)
    p, m, v = Watched(1.0), Watched(start), Watched(start * start)
    met = []
    for step in range(1, 2_000):
        s = formula.step_scalars(lr, 0.9, 0.95, 1e-8, 0.0, 0.0, 1.0, 0.01, step, TINY["f4"])
        factor, _, *others = (Watched(value) for value in s)
        Watched.seen = 0
        p, m, v, _, _ = update(
            p, Watched(0.0), m, v, None, None, factor, None, *others, Watched(0.0)
        )
        if Watched.seen:
            met.append(step)
    assert m.value == v.value == 0.0
    assert 1 <= len(met) <= 10


# The power of 2 on both sides of the division.

update_exactly = intrinsics.inline(formula.bind(formula.adam_update, fma=intrinsics.fma))


@njit(**intrinsics.FLAGS)
def update_all(param, grad, exp_avg, exp_avg_sq, s):
    for i in range(param.size):
        p, m, v, _, _ = update_exactly(
            param[i], grad[i], exp_avg[i], exp_avg_sq[i], None, None,
            s[0], None, s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10],
            s[11], s[0] - s[0],
        )  # fmt: skip
        param[i], exp_avg[i], exp_avg_sq[i] = p, m, v


PLAIN = SimpleNamespace(sqrt=math.sqrt, frexp=math.frexp, ldexp=lambda *_: 1.0)
unscaled_scalars = formula.bind(formula.step_scalars, math=PLAIN)


@pytest.mark.parametrize("beta2", [0.0, 0.95, 0.999, 1 - 2.0**-24, 1 - 2.0**-53])
@pytest.mark.parametrize("eps", [0.0, 1e-40, 1e-8, 1.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_of_the_division_changes_no_bit(rng, dtype, eps, beta2):
    """But where one of its two sides, or the quotient, would be denormal without it."""
    count, differ = 2_000, 0
    scales = set()
    for lr in (0.0, 1e-300, 1e-40, 1e-30, *np.logspace(-12, 3, 16)):
        for step in (1, 7, 1000):
            with np.errstate(all="ignore"):
                grad, m = (magnitudes(rng, dtype, count) for _ in range(2))
                v = np.abs(magnitudes(rng, dtype, count))
                # A parameter of 0 shows every bit of what is taken from it.
                ours, theirs = ([np.zeros(count, dtype), grad, m.copy(), v.copy()] for _ in "ab")
                given = (lr, 0.9, beta2, eps, 0.0, 0.0, 1.0, 0.0, step, TINY[dtype])
                scaled, plain = (
                    np.array(make(*given)).astype(dtype)
                    for make in (formula.step_scalars, unscaled_scalars)
                )
                update_all(*ours, scaled)
                update_all(*theirs, plain)
                assert all(
                    a.tobytes() == b.tobytes() for a, b in zip(ours[1:], theirs[1:], strict=True)
                )
                m, v = ours[2:]
                product = np.abs(plain[7] * m)
                denom = np.sqrt(v) * plain[8] + plain[9]
                small = is_denormal(plain[7], dtype) | is_denormal(plain[9], dtype)
                small |= (product < 2 * TINY[dtype]) & (m != 0) & (lr > 0)
                small |= denom < 2 * TINY[dtype]
                small |= np.abs(theirs[0]) < 2 * TINY[dtype]
            same = (ours[0] == theirs[0]) | (np.isnan(ours[0]) & np.isnan(theirs[0]))
            assert np.all(same | small), (lr, step)
            differ += int((~same).sum())
            scales.add(
                float(np.array(formula.step_scalars(*given))[8] / unscaled_scalars(*given)[8])
            )
    assert max(scales) == (2.0**37 if eps <= 1 else 1.0)
    assert min(scales) == 1.0
    assert differ > 0 or eps > 1 or dtype == "f8"


@pytest.mark.parametrize("lr", [1e-30, 1e-12, 1e-3, 0.9999, 1.0, 1e3])
def test_a_small_step_of_a_small_moment_is_exact(lr):
    """As in float64, where product and quotient are normal."""
    m = np.float32(3.1) * np.float32(10.0) ** np.arange(-37, -20, dtype=np.float32)
    param = np.zeros(m.size, np.float32)
    opt = fastadam.Adam(param, lr=lr)
    load(opt, 999, exp_avg=m)
    opt.step(np.zeros(m.size, np.float32))
    wanted = -lr * opt.state[0]["exp_avg"].astype(np.float64) / 1e-8
    normal = np.abs(wanted) > 1e-37
    np.testing.assert_allclose(param[normal], wanted[normal], rtol=3e-7)
