"""Any options, shapes, cuts and absences, drawn by hypothesis, against the reference."""

import numpy as np
import pytest
from oracle import Reference

import fastadam

pytest.importorskip("hypothesis")
from hypothesis import given, settings
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


@given(
    st.lists(st.tuples(SHAPES, OPTIONS), min_size=1, max_size=3),
    st.booleans(),
    st.lists(st.sampled_from([1.0, 0.5, 3.0, 1024.0]), min_size=1, max_size=6),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=80)
def test_any_groups_over_any_steps(groups, amsgrad, scales, zero_grad, seed):
    rng = np.random.default_rng(seed)
    params = [[rng.standard_normal(s) for s in shapes] for shapes, _ in groups]
    params = [[np.asarray(p) for p in group] for group in params]
    references = [
        [Reference(p, amsgrad=amsgrad, **options) for p in group]
        for group, (_, options) in zip(params, groups, strict=True)
    ]
    opt = fastadam.Adam(
        [{"params": p, **options} for p, (_, options) in zip(params, groups, strict=True)],
        amsgrad=amsgrad,
    )
    for scale in scales:
        grads = [
            [
                None if rng.random() < 0.2 else np.asarray(rng.standard_normal(p.shape))
                for p in group
            ]
            for group in params
        ]
        for refs, given_grads in zip(references, grads, strict=True):
            for ref, grad in zip(refs, given_grads, strict=True):
                ref.step(grad, scale)
        opt.step(grads, grad_scale=scale, zero_grad=zero_grad)
        if zero_grad:
            assert not any(g.any() for group in grads for g in group if g is not None)
    state = iter(opt.state.values())
    for group, refs in zip(params, references, strict=True):
        for param, ref in zip(group, refs, strict=True):
            own = next(state)
            # Where beta1 is 0 a vanishing gradient's sign is all that is left of it.
            np.testing.assert_allclose(param, ref.param, rtol=1e-10, atol=1e-10)
            assert own["step"] == ref.updates
            for name, array in ref.arrays().items():
                np.testing.assert_allclose(own[name], array, rtol=1e-10, atol=1e-13)
