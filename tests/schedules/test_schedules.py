"""Schedules against formulas written out here, their peers, and their promises."""

import decimal
import math
import pickle
import re
import warnings
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from fastadam import schedules
from fastadam.schedules import (
    chain,
    constant,
    cosine,
    cosine_restarts,
    exponential,
    inverse_sqrt,
    linear,
    one_cycle,
    piecewise,
    polynomial,
    warmup,
    warmup_stable_decay,
)
from fastadam.schedules.base import Base
from fastadam.schedules.exact import cos_pi, power

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

CLOSE = {"rel": 1e-13, "abs": 1e-15}

EXAMPLES = [
    constant(),
    constant(0.25),
    cosine(1000),
    cosine(7, 0.1),
    linear(10),
    linear(10, 0.1, 2.0),
    polynomial(10, 2.0),
    polynomial(10, 2.5, 0.5, 0.1),
    polynomial(10, 0.9),
    exponential(0.9),
    exponential(0.5, 10, 0.01, True),
    inverse_sqrt(10),
    one_cycle(100),
    one_cycle(3, 0.0, 1.0, 1.0),
    warmup_stable_decay(100, 10, 20),
    warmup_stable_decay(100, 0, 100, 0.1, "sqrt"),
    cosine_restarts(10),
    cosine_restarts(10, 2, 0.1, 3),
    piecewise([3, 5], [1, 0.5, 0.1]),
    piecewise((), (0.3,)),
    warmup(cosine(90), 10),
    chain((warmup(constant(), 5), 20), (linear(5), 5), exponential(0.9)),
    chain(cosine(3)),
]


def relative_cosine(x):
    return (1 + math.cos(math.pi * x)) / 2


# what each gives


def test_constant():
    assert [constant(0.3)(step) for step in (0, 1, 2**60)] == [0.3] * 3
    assert constant()(5) == 1.0


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0, 1.5])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_cosine(num_steps, final):
    schedule = cosine(num_steps, final)
    for step in range(num_steps):
        expected = final + (1 - final) * relative_cosine(step / num_steps)
        assert schedule(step) == pytest.approx(expected, **CLOSE)
    assert schedule(0) == 1.0
    assert {schedule(num_steps + k) for k in (0, 1, 2, num_steps, 2**60)} == {final}


def test_cosine_at_its_middle_is_exact():
    assert cosine(1000)(500) == 0.5


def test_linear():
    schedule = linear(8, 0.25, 2.0)
    assert [schedule(step) for step in (0, 4, 8, 9, 2**60)] == [0.25, 1.125, 2.0, 2.0, 2.0]
    assert linear(8, 0.1, 0.7)(0) == 0.1
    assert linear(8, 0.1, 0.7)(8) == 0.7


@pytest.mark.parametrize("exponent", [0.5, 0.9, 1, 1.5, 2, 2.5, 3, 20, 50.5, 1e300])
def test_polynomial(exponent):
    schedule = polynomial(50, exponent, 0.9, 0.1)
    for step in range(50):
        expected = 0.1 + (0.9 - 0.1) * (1 - step / 50) ** exponent
        assert schedule(step) == pytest.approx(expected, rel=1e-12)
    assert schedule(0) == 0.9
    assert schedule(50) == schedule(2**60) == 0.1


def test_polynomial_of_power_1_is_linear():
    for step in range(12):
        assert polynomial(10, 1, 0.2, 0.9)(step) == linear(10, 0.2, 0.9)(step)


@pytest.mark.parametrize("decay_steps", [1, 7, 1000])
def test_exponential(decay_steps):
    smooth = exponential(0.9, decay_steps)
    stairs = exponential(0.9, decay_steps, staircase=True)
    for step in (0, 1, 6, 7, 8, 999, 1000, 6000):
        assert smooth(step) == pytest.approx(0.9 ** (step / decay_steps), rel=1e-12)
        assert stairs(step) == pytest.approx(0.9 ** (step // decay_steps), rel=1e-12)
        assert smooth(step * decay_steps) == stairs(step * decay_steps)
    assert smooth(0) == 1.0
    assert smooth(2**70 * decay_steps) == 0.0


def test_exponential_stops_at_final():
    schedule = exponential(0.5, final=0.1)
    assert [schedule(step) for step in (3, 4, 2**60)] == [0.125, 0.1, 0.1]
    assert exponential(1.0, 3)(2**60) == 1.0


@pytest.mark.parametrize("steps", [1, 2, 10, 4000])
def test_inverse_sqrt(steps):
    schedule = inverse_sqrt(steps)
    assert schedule(0) == 1 / steps
    assert schedule(steps - 1) == 1.0
    assert schedule(4 * steps - 1) == 0.5
    for step in range(3 * steps):  # the Noam formula, t counted from 1, over its peak
        t = step + 1
        noam = min(t**-0.5, t * steps**-1.5) * steps**0.5
        assert schedule(step) == pytest.approx(noam, rel=1e-13)


def test_one_cycle_ends_and_peak():
    schedule = one_cycle(10, 0.3, 25.0, 1e4)
    assert schedule(0) == 1 / 25
    assert schedule(2) == 1.0
    assert schedule(9) == schedule(10) == schedule(2**60) == 1 / 250_000
    assert one_cycle(10, 0.0)(0) == 1.0
    assert one_cycle(1)(0) == 1 / 250_000


@pytest.mark.parametrize("decay", ["linear", "cosine", "sqrt"])
def test_warmup_stable_decay(decay):
    schedule = warmup_stable_decay(100, 10, 40, 0.1, decay)
    assert [schedule(step) for step in range(10)] == [(step + 1) / 10 for step in range(10)]
    assert {schedule(step) for step in range(9, 61)} == {1.0}
    for step in range(60, 100):
        x = (step - 60) / 40
        shape = {"linear": 1 - x, "cosine": relative_cosine(x), "sqrt": 1 - x**0.5}[decay]
        assert schedule(step) == pytest.approx(0.1 + 0.9 * shape, **CLOSE)
    assert {schedule(step) for step in (100, 101, 2**60)} == {0.1}


def test_warmup_stable_decay_without_a_stable_part():
    schedule = warmup_stable_decay(5, 0, 5)
    assert [schedule(step) for step in range(6)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert warmup_stable_decay(5, 2, 3)(2) == 1.0


@pytest.mark.parametrize("multiplier", [1, 2, 3, 10])
@pytest.mark.parametrize("first", [1, 3, 10, 1000])
def test_cosine_restarts_at_every_border(first, multiplier):
    endless = cosine_restarts(first, multiplier, 0.1)
    start, length = 0, first
    for cycle in range(40):
        assert endless(start) == 1.0
        if length > 1:
            middle = length // 2
            assert endless(start + middle) == cosine(length, 0.1)(middle)
            assert endless(start + length - 1) == cosine(length, 0.1)(length - 1)
        ended = cosine_restarts(first, multiplier, 0.1, num_cycles=cycle + 1)
        assert ended(start) == 1.0
        start += length
        assert ended(start) == ended(start + 1) == ended(2**200) == 0.1
        length *= multiplier


def test_piecewise():
    schedule = piecewise([2, 5], [1.0, 0.5, 2.0])
    assert [schedule(step) for step in range(7)] == [1, 1, 0.5, 0.5, 0.5, 2, 2]
    assert schedule(2**60) == 2.0


def test_warmup():
    inner = linear(10, 0.8, 0.0)
    schedule = warmup(inner, 4)
    assert [schedule(step) for step in range(4)] == [0.25 * 0.8, 0.5 * 0.8, 0.75 * 0.8, 0.8]
    assert [schedule(step + 4) for step in range(12)] == [inner(step) for step in range(12)]
    assert warmup(inner, 1)(0) == 0.8


def test_chain_restarts_the_count_for_each_part():
    seen = []

    def second(step):
        seen.append(step)
        return 0.5

    schedule = chain((linear(4), 3), (second, 2), cosine(10))
    factors = [schedule(step) for step in range(15)]
    assert factors[:3] == [1.0, 0.75, 0.5]
    assert factors[3:5] == [0.5, 0.5]
    assert seen == [0, 1]
    assert factors[5:] == [cosine(10)(step) for step in range(10)]


def test_composition_nests():
    inner = chain((constant(0.5), 3), linear(10))
    schedule = chain((warmup(inner, 2), 6), warmup(inner, 1))
    expected = [0.25, 0.5, 0.5, 0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 0.9]
    assert [schedule(step) for step in range(12)] == expected


# what all of them promise


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_repr_pickle_equality_and_hash(schedule):
    names = {name: getattr(schedules, name) for name in schedules.__all__}
    for twin in (eval(repr(schedule), names), pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert repr(twin) == repr(schedule)
        assert [twin(step) for step in range(50)] == [schedule(step) for step in range(50)]
    assert sum(other == schedule for other in EXAMPLES) == 1


def test_pickles_and_messages_know_no_inner_module():
    for name in set(schedules.__all__) - {"Schedule"}:
        assert getattr(schedules, name).__module__ == "fastadam.schedules"


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_nothing_can_be_changed(schedule):
    with pytest.raises(AttributeError):
        setattr(schedule, type(schedule).__slots__[0], 1)


def test_arguments_become_plain_numbers():
    schedule = cosine(np.int64(10), np.float32(0.5))
    assert repr(schedule) == "cosine(num_steps=10, final=0.5)"
    assert repr(piecewise(np.array([1, 2]), [1, 0, np.float64(2)])) == (
        "piecewise(boundaries=(1, 2), factors=(1.0, 0.0, 2.0))"
    )
    assert linear(10, initial=Fraction(1, 2)).initial == 0.5
    assert repr(chain((constant(), 5), cosine(3))) == (
        "chain((constant(factor=1.0), 5), cosine(num_steps=3, final=0.0))"
    )


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
@pytest.mark.parametrize(
    ("step", "error"),
    [(-1, ValueError), (np.int64(-3), ValueError)]
    + [(step, TypeError) for step in (1.0, np.float32(1), True, None, "1", float("nan"))],
)
def test_bad_steps(schedule, step, error):
    rule = "an integer" if error is TypeError else ">= 0"
    with pytest.raises(error, match=f"^step must be {rule}, got {re.escape(repr(step))}$"):
        schedule(step)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_numpy_steps_and_plain_float_factors(schedule):
    for step in (0, 3, 100):
        for kind in (np.int32, np.uint8, np.int64):
            factor = schedule(kind(step))
            assert type(factor) is float
            assert factor == schedule(step)


NAN, INF = float("nan"), float("inf")
INTEGER, REAL = "must be an integer, got", "must be a real number, got"
POSITIVE, NON_NEGATIVE = "must be >= 1, got", "must be finite and >= 0, got"


@pytest.mark.parametrize("kind", [cosine, linear, polynomial, one_cycle])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-5, ValueError)]
    + [(value, TypeError) for value in (10.0, True, "10", None, cosine)],
)
def test_bad_num_steps(kind, value, error):
    rule = INTEGER if error is TypeError else POSITIVE
    with pytest.raises(error, match=f"^num_steps {rule} {re.escape(repr(value))}$"):
        kind(value)


@pytest.mark.parametrize("kind", [cosine, linear, cosine_restarts])
@pytest.mark.parametrize(
    ("value", "error"),
    [(value, ValueError) for value in (-0.1, NAN, INF, -INF, np.float32("nan"))]
    + [(value, TypeError) for value in ("0", False, 1j, None, [0.5])],
)
def test_bad_final(kind, value, error):
    rule = REAL if error is TypeError else NON_NEGATIVE
    with pytest.raises(error, match=f"^final {rule} {re.escape(repr(value))}$"):
        kind(5, final=value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: constant(10**400), ValueError, f"factor {NON_NEGATIVE} 1000"),
        (lambda: constant(-1), ValueError, f"factor {NON_NEGATIVE} -1"),
        (lambda: linear(5, initial=NAN), ValueError, f"initial {NON_NEGATIVE} nan"),
        (lambda: polynomial(5, 0), ValueError, "power must be finite and > 0, got 0"),
        (lambda: polynomial(5, INF), ValueError, "power must be finite and > 0, got inf"),
        (lambda: exponential(0), ValueError, r"decay_rate must be in \(0, 1\], got 0"),
        (
            lambda: exponential(1.1),
            ValueError,
            r"decay_rate must be in \(0, 1\], got 1.1",
        ),
        (lambda: exponential(0.9, 0), ValueError, f"decay_steps {POSITIVE} 0"),
        (
            lambda: exponential(0.9, staircase=1),
            TypeError,
            "staircase must be True or False, got 1",
        ),
        (lambda: inverse_sqrt(0), ValueError, f"warmup_steps {POSITIVE} 0"),
        (lambda: inverse_sqrt(1.5), TypeError, f"warmup_steps {INTEGER} 1.5"),
        (
            lambda: one_cycle(5, 1.0),
            ValueError,
            r"pct_start must be in \[0, 1\), got 1.0",
        ),
        (lambda: one_cycle(5, 0.3, 0.5), ValueError, "^div_factor must be finite and >= 1"),
        (lambda: one_cycle(5, final_div_factor=0), ValueError, "final_div_factor .* >= 1, got 0"),
        (lambda: warmup_stable_decay(9, 5, 5), ValueError, "at most num_steps, got 5 [+] 5 > 9"),
        (lambda: warmup_stable_decay(9, -1, 5), ValueError, "warmup_steps must be >= 0, got -1"),
        (lambda: warmup_stable_decay(9, 1, -2), ValueError, f"decay_steps {POSITIVE} -2"),
        (lambda: warmup_stable_decay(9, 1, 2, decay="exp"), ValueError, "one of .*, got 'exp'"),
        (lambda: warmup_stable_decay(9, 1, 2, decay=None), TypeError, "one of .*, got None"),
        (lambda: cosine_restarts(0), ValueError, f"first_cycle_steps {POSITIVE} 0"),
        (lambda: cosine_restarts(5, 1.5), TypeError, f"multiplier {INTEGER} 1.5"),
        (lambda: cosine_restarts(5, num_cycles=0), ValueError, f"num_cycles {POSITIVE} 0"),
        (lambda: piecewise(5, [1]), TypeError, "boundaries must be a sequence of numbers, got 5"),
        (lambda: piecewise([1], "ab"), TypeError, "factors must be a sequence of numbers"),
        (lambda: piecewise([0], [1, 2]), ValueError, rf"boundaries\[0\] {POSITIVE} 0"),
        (lambda: piecewise([1, 2.0], [1, 2]), TypeError, rf"boundaries\[1\] {INTEGER} 2.0"),
        (lambda: piecewise([2, 2], [1, 2, 3]), ValueError, "strictly increasing, got"),
        (lambda: piecewise([2], [1]), ValueError, "got 1 factors and 1 boundaries"),
        (lambda: piecewise([2], [1, NAN]), ValueError, rf"factors\[1\] {NON_NEGATIVE} nan"),
        (lambda: warmup(3, 5), TypeError, "schedule must be callable with a step, got 3"),
        (lambda: warmup(cosine, 5), TypeError, "schedule must be callable .*, got <class"),
        (lambda: warmup(cosine(5), 0), ValueError, f"steps {POSITIVE} 0"),
        (lambda: chain(), TypeError, "chain must end with a schedule"),
        (lambda: chain(cosine(5), cosine(5)), TypeError, r"parts\[0\] must be a pair"),
        (lambda: chain((cosine(5), 5)), TypeError, r"parts\[0\] must be callable"),
        (lambda: chain((5, 5), cosine(5)), TypeError, r"parts\[0\]\[0\] must be callable"),
        (lambda: chain((cosine(5), 0), cosine(5)), ValueError, rf"parts\[0\]\[1\] {POSITIVE} 0"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


counts = st.integers(1, 50) | st.integers(1, 2**60)
reals = st.floats(0.0, allow_infinity=False)
above_one = st.floats(1.0, allow_infinity=False)
rates = st.floats(0.0, 1.0, exclude_min=True)
boundaries = st.sets(counts, max_size=5).map(sorted)
simple = st.one_of(
    st.builds(constant, reals),
    st.builds(cosine, counts, reals),
    st.builds(linear, counts, reals, reals),
    st.builds(
        polynomial,
        counts,
        st.sampled_from([0.5, 1, 2, 2.5, 17]) | st.floats(1e-300, 1e300),
        reals,
        reals,
    ),
    st.builds(exponential, rates, counts, st.just(0.0) | reals, st.booleans()),
    st.builds(inverse_sqrt, counts),
    st.builds(one_cycle, counts, st.floats(0, 1, exclude_max=True), above_one, above_one),
    st.builds(
        lambda a, b, c, final, decay: warmup_stable_decay(a + b + c, a, b, final, decay),
        counts,
        counts,
        counts,
        reals,
        st.sampled_from(["linear", "cosine", "sqrt"]),
    ),
    st.builds(cosine_restarts, counts, st.integers(1, 5) | counts, reals, st.none() | counts),
    boundaries.flatmap(
        lambda b: st.builds(
            piecewise, st.just(b), st.lists(reals, min_size=len(b) + 1, max_size=len(b) + 1)
        )
    ),
)
any_schedule = st.recursive(
    simple,
    lambda inner: (
        st.builds(warmup, inner, counts)
        | st.builds(
            lambda pairs, last: chain(*pairs, last),
            st.lists(st.tuples(inner, counts), max_size=3),
            inner,
        )
    ),
    max_leaves=4,
)


@hypothesis.settings(max_examples=600)
@hypothesis.given(any_schedule, st.integers(0, 100) | st.integers(0, 2**64))
def test_every_factor_is_finite_and_not_negative(schedule, step):
    factor = schedule(step)
    assert type(factor) is float
    assert 0.0 <= factor < INF
    assert factor == schedule(step)


@hypothesis.given(counts, st.floats(0, 1), st.integers(0, 2**60), st.integers(0, 2**60))
def test_decays_do_not_rise(num_steps, final, a, b):
    first, second = sorted((a, b))
    for schedule in (
        cosine(num_steps, final),
        linear(num_steps, 1.0, final),
        polynomial(num_steps, 2, 1.0, final),
        exponential(0.9, num_steps, final),
        exponential(0.9, num_steps, final, staircase=True),
    ):
        assert schedule(second) <= schedule(first) + 2**-53
        assert final <= schedule(second) + 2**-53


# _exact


def test_cos_pi_where_it_is_exact():
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, -0.5, -1.0, 1e300]
    assert [cos_pi(x) for x in values] == [1, 0, -1, 0, 1, 0, -1, 0, -1, 1]


def test_cos_pi_symmetries(rng):
    for x in rng.integers(0, 2**40, 500) / 2.0**40:  # so that 1 - x and x + 2 are exact
        assert cos_pi(1 - x) == -cos_pi(x)
        assert cos_pi(-x) == cos_pi(x + 2) == cos_pi(x)


def test_cos_pi_against_libm(rng):
    for x in rng.random(2000) * 0.25:
        assert abs(cos_pi(x) - math.cos(math.pi * x)) <= 2 * math.ulp(cos_pi(x))


def test_cos_pi_against_mpmath(optional, rng):
    mpmath = optional("mpmath")
    near = 10.0 ** rng.uniform(-16, -1, 500)
    with mpmath.workprec(200):
        for x in (*rng.random(3000), *near, *(0.5 - near), *(0.5 + near), *(1 - near)):
            exact = mpmath.cospi(mpmath.mpf(float(x)))
            assert abs(cos_pi(float(x)) - exact) < math.ulp(float(exact))


def test_cos_pi_falls(rng):
    x = np.sort(rng.random(5000))
    values = [cos_pi(v) for v in x.tolist()]
    assert all(a >= b for a, b in pairwise(values))


def test_the_same_bits_as_ever():
    """From mpmath, rounded once per operation: every machine and C library must give these."""
    assert cosine(1000)(123).hex() == "0x1.ed1fc09408221p-1"
    assert cosine(1000)(777).hex() == "0x1.e25cbfee84ae0p-4"
    assert exponential(0.9, 7)(30).hex() == "0x1.45f62ae1bb880p-1"
    assert exponential(0.9999)(12345).hex() == "0x1.29f202617174dp-2"
    assert polynomial(10, 2.5)(3).hex() == "0x1.a3cd72ed9866dp-2"
    assert inverse_sqrt(100)(776).hex() == "0x1.6f5ba2daa9778p-2"


def test_power_of_small_exponents_is_rounded_once():
    for base in (0.1, 0.3, 0.999, 5e-324, 1 - 2**-53, 1.0):
        for exponent in range(30):
            assert power(base, exponent) == float(Fraction(base) ** exponent)


@pytest.mark.parametrize("root", [1, 2, 3, 1000, 2**60])
def test_power_against_mpmath(optional, rng, root):
    mpmath = optional("mpmath")
    with mpmath.workprec(300):
        for base in (*rng.random(20), *(1 - 10.0 ** rng.uniform(-16, -1, 20))):
            limit = -740 / math.log(base) * root
            for exponent in (int(limit * share) for share in rng.random(4)):
                exact = mpmath.mpf(float(base)) ** (mpmath.mpf(exponent) / root)
                ulp = math.ulp(float(exact))
                assert abs(power(float(base), exponent, root) - exact) <= ulp * 0.5000001


def test_power_that_lies_between_two_floats_is_rounded_to_even():
    for root in (1, 2, 3):  # 3**34 has 54 bits
        assert power(0.75**root, 34, root) == float(Fraction(3, 4) ** 34)
    assert power(0.5, 1075) == 0.0  # half of the least float


def test_power_in_a_program_with_a_decimal_context_of_its_own():
    expected = power(0.9, 12345, 7), power(0.3, 200)
    all_signals = list(decimal.getcontext().traps)
    with decimal.localcontext(decimal.Context(prec=3, traps=all_signals)):
        assert (power(0.9, 12345, 7), power(0.3, 200)) == expected


def test_power_ends():
    assert power(0.3, 0) == power(0.3, 0, 5) == power(1.0, 2**80, 3) == 1.0
    assert power(0.5, 1074) == 5e-324
    assert power(0.5, 1076) == power(0.5, 2**62) == power(1 - 2**-53, 2**100) == 0.0
    assert power(1 - 2**-53, 2**53) == pytest.approx(math.exp(-1), rel=1e-15)
    assert power(0.25, 1, 2) == power(0.25, 2**60, 2**61) == 0.5


# peers


def torch_factors(optional, make, count):
    torch = optional("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    factors = []
    for i in range(count):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if i + 1 < count:
            scheduler.step()
    return factors


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_torchs_lambda_lr_is_saved(optional, schedule):
    """LambdaLR saves the ``__dict__`` of whatever callable object it is given."""
    torch = optional("torch")
    schedulers = []
    for _ in range(2):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, schedule))
        optimizer.step()
    for _ in range(5):
        schedulers[0].step()
    schedulers[1].load_state_dict(schedulers[0].state_dict())
    for scheduler in schedulers:
        scheduler.step()
        assert scheduler.get_last_lr() == [schedule(6)]


@pytest.mark.parametrize(
    ("schedule", "make", "count"),
    [
        (cosine(40, 0.1), lambda m, o: m.CosineAnnealingLR(o, 40, 0.1), 41),
        (one_cycle(40), lambda m, o: m.OneCycleLR(o, 1.0, 40), 40),
        (
            one_cycle(37, 0.45, 10, 100),
            lambda m, o: m.OneCycleLR(
                o, 1.0, 37, None, None, 0.45, div_factor=10, final_div_factor=100
            ),
            37,
        ),
        (piecewise([3, 7], [1, 0.1, 0.01]), lambda m, o: m.MultiStepLR(o, [3, 7], 0.1), 12),
        (linear(20, 0.2, 0.9), lambda m, o: m.LinearLR(o, 0.2, 0.9, 20), 30),
        (polynomial(20, 2.5), lambda m, o: m.PolynomialLR(o, 20, 2.5), 30),
        (exponential(0.9), lambda m, o: m.ExponentialLR(o, 0.9), 30),
        (exponential(0.5, 7, staircase=True), lambda m, o: m.StepLR(o, 7, 0.5), 30),
        (cosine_restarts(5, 2, 0.1), lambda m, o: m.CosineAnnealingWarmRestarts(o, 5, 2, 0.1), 80),
        (
            chain((linear(9, 0.1, 1.0), 6), (constant(), 4), exponential(0.8)),
            lambda m, o: m.SequentialLR(
                o,
                [m.LinearLR(o, 0.1, 1.0, 9), m.ConstantLR(o, 1.0), m.ExponentialLR(o, 0.8)],
                [6, 10],
            ),
            20,
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, Base) else "",
)
def test_like_torch(optional, schedule, make, count):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its own calls inside SequentialLR
        expected = torch_factors(optional, make, count)
    assert [schedule(step) for step in range(count)] == pytest.approx(
        expected, rel=1e-11, abs=1e-14
    )


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (cosine(40, 0.1), lambda o: o.cosine_decay_schedule(1.0, 40, 0.1)),
        (linear(20, 0.2, 0.9), lambda o: o.linear_schedule(0.2, 0.9, 20)),
        (polynomial(20, 2.5, 1.0, 0.1), lambda o: o.polynomial_schedule(1.0, 0.1, 2.5, 20)),
        (exponential(0.5, 7), lambda o: o.exponential_decay(1.0, 7, 0.5)),
        (
            exponential(0.5, 7, 0.1, True),
            lambda o: o.exponential_decay(1.0, 7, 0.5, staircase=True, end_value=0.1),
        ),
        (
            piecewise([3, 7], [1, 0.5, 0.05]),
            lambda o: o.piecewise_constant_schedule(1.0, {3: 0.5, 7: 0.1}),
        ),
        (
            chain((linear(9, 0.1, 1.0), 6), (constant(0.3), 4), cosine(20)),
            lambda o: o.join_schedules(
                [
                    o.linear_schedule(0.1, 1.0, 9),
                    o.constant_schedule(0.3),
                    o.cosine_decay_schedule(1.0, 20),
                ],
                [6, 10],
            ),
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, Base) else "",
)
def test_like_optax(optional, schedule, make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = make(optional("optax"))
        expected = [float(peer(step)) for step in range(60)]  # in float32
    assert [schedule(step) for step in range(60)] == pytest.approx(expected, rel=2e-6, abs=2e-7)
