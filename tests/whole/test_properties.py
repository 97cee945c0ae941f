"""Any options, shapes, cuts and absences, drawn by hypothesis, against the reference."""

import math

import numpy as np
import pytest
from oracle import Reference, clip_coefficient, global_norm, ulps
from tools import flat, picture

import fastadam

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st

SHAPES = st.lists(
    st.sampled_from([(), (0,), (1,), (3,), (2, 3), (17,), (65,), (4, 1, 5), (130,)]), max_size=5
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.floats(0.0, 0.5),
        "betas": st.tuples(st.floats(0.0, 0.999), st.floats(0.0, 0.9999)),
        "eps": st.sampled_from([1e-12, 1e-8, 1e-3, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
        "decoupled_weight_decay": st.booleans(),
        "maximize": st.booleans(),
    },
)
# For the optimizer, each on its own or with any of the others.
TAIL = st.fixed_dictionaries(
    {},
    optional={
        "amsgrad": st.booleans(),
        "max_grad_norm": st.sampled_from([None, 1e-3, 0.7, 1e6, math.inf]),
        "nonfinite": st.sampled_from(["propagate", "skip", "raise"]),
        "ema_decay": st.sampled_from([None, 0.0, 0.5, 0.999]),
    },
)
# Of a step: grad_scale, how many gradients are None, what one element of one is made.
STEPS = st.lists(
    st.tuples(
        st.sampled_from([1.0, 0.5, 3.0, 1024.0]),
        st.sampled_from([0.0, 0.2, 1.0]),
        st.sampled_from([None, None, None, math.nan, math.inf, -math.inf]),
    ),
    min_size=1,
    max_size=6,
)
KINDS = ("list", "own", "in turn")


def draw_grads(rng, params, absent, bad):
    """Gradients by group, one element of one array made ``bad`` unless that is None."""
    grads = [
        [
            None
            if rng.random() < absent
            else np.asarray(rng.standard_normal(p.shape)).astype(p.dtype)
            for p in group
        ]
        for group in params
    ]
    choice = [g for g in flat(grads) if g is not None and g.size]
    if bad is not None and choice:
        victim = choice[rng.integers(len(choice))]
        victim[np.unravel_index(rng.integers(victim.size), victim.shape)] = bad
    return grads


def take(opt, grads, own, options):
    """Take a step, with the gradients as they are or, if each is there, in ``opt.grads``."""
    if not own or any(grad is None for grad in flat(grads)):
        return opt.step(grads, **options)
    for place, grad in zip(flat(opt.grads), flat(grads), strict=True):
        place[...] = grad
    result = opt.step(**options)
    for place, grad in zip(flat(opt.grads), flat(grads), strict=True):
        grad[...] = place  # zeros, where zeros were asked for
    return result


@given(
    st.lists(st.tuples(SHAPES, OPTIONS), min_size=1, max_size=3),
    TAIL,
    STEPS,
    st.booleans(),
    st.sampled_from(KINDS),
    st.integers(0, 2**32),
)
@example(
    [([(65,), (2, 3)], {"weight_decay": 0.5}), ([(), (17,)], {"maximize": True})],
    {"amsgrad": True, "max_grad_norm": 0.7, "nonfinite": "skip", "ema_decay": 0.5},
    [(3.0, 0.0, None), (1.0, 0.0, math.nan), (1.0, 0.2, None), (0.5, 0.0, None)],
    True,
    "in turn",
    1,
)
@settings(max_examples=120)
def test_any_groups_over_any_steps(groups, tail, steps, zero_grad, kind, seed):
    rng = np.random.default_rng(seed)
    params = [[np.asarray(rng.standard_normal(s)) for s in shapes] for shapes, _ in groups]
    per_array = {name: tail[name] for name in ("amsgrad", "ema_decay") if name in tail}
    references = [
        [Reference(p, **per_array, **options) for p in group]
        for group, (_, options) in zip(params, groups, strict=True)
    ]
    opt = fastadam.Adam(
        [{"params": p, **options} for p, (_, options) in zip(params, groups, strict=True)], **tail
    )
    nonfinite, taken = tail.get("nonfinite", "propagate"), 0
    for k, (scale, absent, bad) in enumerate(steps):
        # What is computed with NaN and infinity is not compared: tests/test_tail.py does.
        grads = draw_grads(rng, params, absent, None if nonfinite == "propagate" else bad)
        if flat(grads) and all(grad is None for grad in flat(grads)):
            before = picture(opt, flat(params))
            with pytest.raises(ValueError, match=r"^at least one gradient must be given"):
                take(opt, grads, False, {"grad_scale": scale, "zero_grad": zero_grad})
            assert picture(opt, flat(params)) == before
            continue
        norm = global_norm(flat(grads)) / scale
        own = kind == "own" or (kind == "in turn" and k % 2 == 0)
        options = {"grad_scale": scale, "zero_grad": zero_grad}
        if not math.isfinite(norm):
            before = picture(opt, flat(params))
            if nonfinite == "raise":
                with pytest.raises(FloatingPointError, match=r"^grads\[\d\]\[\d\] must be finite"):
                    take(opt, grads, own, options)
                assert picture(opt, flat(params)) == before
                continue
            assert take(opt, grads, own, options).skipped
            assert picture(opt, flat(params)) == before
        else:
            coefficient = clip_coefficient(norm, tail.get("max_grad_norm"))
            for ref, grad in zip(flat(references), flat(grads), strict=True):
                ref.step(grad, scale, coefficient)
            result = take(opt, grads, own, options)
            assert (result.step, result.skipped) == (taken, False)
            if result.grad_norm is not None:
                assert result.grad_norm == pytest.approx(norm, rel=1e-14)
            taken += 1
        if zero_grad:
            assert not any(g.any() for g in flat(grads) if g is not None)
    assert opt.step_count == taken
    for param, ref, own in zip(flat(params), flat(references), opt.state.values(), strict=True):
        # Where beta1 is 0 a vanishing gradient's sign is all that is left of it.
        np.testing.assert_allclose(param, ref.param, rtol=1e-10, atol=1e-10)
        assert own["step"] == ref.updates
        for name, array in ref.arrays().items():
            atol = 1e-10 if name == "ema" else 1e-13
            np.testing.assert_allclose(own[name], array, rtol=1e-10, atol=atol)


@given(
    st.sampled_from([(), (1,), (3,), (31,), (2, 33), (300,)]),
    OPTIONS.filter(lambda options: options.get("eps", 1e-8) >= 1e-8),
    TAIL,
    st.sampled_from([1.0, 0.5, 1024.0]),
    st.sampled_from(KINDS),
    st.integers(0, 2**32),
)
@settings(max_examples=120)
def test_float32_steps_round_a_few_times_each(shape, options, tail, scale, kind, seed):
    """Each step, from the state that the one before left, is the float64 one within some ulps."""
    rng = np.random.default_rng(seed)
    param = np.asarray(rng.standard_normal(shape)).astype(np.float32)
    opt = fastadam.Adam([{"params": [param], **options}], **tail)
    per_array = {name: tail[name] for name in ("amsgrad", "ema_decay") if name in tail}
    for step in range(3):
        ref = Reference(param, **per_array, **options)
        before = param.astype(np.float64)
        for name, array in opt.state[0].items():
            if name != "step":
                setattr(ref, name, array.astype(np.float64))
        moments = {name: np.abs(a) for name, a in ref.arrays().items()}
        ref.updates = step
        grads = [[np.asarray(rng.standard_normal(shape)).astype(np.float32)]]
        coefficient = clip_coefficient(global_norm(flat(grads)) / scale, tail.get("max_grad_norm"))
        ref.step(grads[0][0], scale, coefficient)
        take(opt, grads, kind == "own" or (kind == "in turn" and step % 2), {"grad_scale": scale})

        # Sums of terms of opposite sign are measured in units of the larger term.
        grad = np.abs(grads[0][0].astype(np.float64)) / scale * coefficient
        if not options.get("decoupled_weight_decay"):
            grad = grad + options.get("weight_decay", 0.0) * np.abs(before)
        own = opt.state[0]
        beta1, beta2 = options.get("betas", (0.9, 0.95))
        term = np.maximum((1 - beta1) * grad, beta1 * moments["exp_avg"])
        assert ulps(own["exp_avg"], ref.exp_avg, term) <= 6
        square = np.maximum((1 - beta2) * grad**2, beta2 * moments["exp_avg_sq"])
        assert ulps(own["exp_avg_sq"], ref.exp_avg_sq, square) <= 8
        if "max_exp_avg_sq" in own:
            scale_of_max = np.maximum(square, moments["max_exp_avg_sq"])
            assert ulps(own["max_exp_avg_sq"], ref.max_exp_avg_sq, scale_of_max) <= 8
        # What cancels in exp_avg is not there to be divided: its terms are the scale.
        second = ref.exp_avg_sq if ref.max_exp_avg_sq is None else ref.max_exp_avg_sq
        root = np.sqrt(second / (1 - beta2**ref.updates)) + ref.eps
        lr = options.get("lr", 1e-2)
        move = lr / (1 - beta1**ref.updates) * np.maximum(term, np.abs(ref.exp_avg)) / root
        size = np.maximum(np.abs(before), move)
        assert ulps(param, ref.param, size) <= 10
        if "ema" in own:
            assert ulps(own["ema"], ref.ema, np.maximum(size, moments["ema"])) <= 10
