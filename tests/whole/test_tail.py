"""The optimizer tail in the same pass: clipping, gradients that are not finite, averages."""

import contextlib
import copy
import math
import pickle
from collections.abc import Mapping

import numpy as np
import pytest
from digest_run import TAIL_DIGEST, TAIL_MODES, tail_digest, tail_trajectory
from oracle import Reference, clip_coefficient, global_norm
from tools import PATHS, WAYS, flat, picture, way

import fastadam

EVERYTHING = {"amsgrad": True, "max_grad_norm": 1.0, "nonfinite": "skip", "ema_decay": 0.5}
KINDS = pytest.mark.parametrize("dtypes", [("f4",), ("f8",), ("f8", "f4")], ids="+".join)


# The same bits.


@pytest.mark.parametrize("name", WAYS)
def test_stored_digest(name):
    with way(name):
        assert tail_digest() == TAIL_DIGEST


@pytest.mark.parametrize("mode", TAIL_MODES)
def test_same_bits_on_every_path(mode):
    """One thread, two, or none started; and, but for clipping, in one array or in 37."""
    options = TAIL_MODES[mode]
    found = set()
    for name in WAYS:
        with way(name):
            found.add(tail_trajectory(np.float32, options, size=20_001, steps=5))
    assert len(found) == 1
    pieces = set()
    for name in WAYS:
        with way(name):
            pieces.add(tail_trajectory(np.float32, options, 37, 20_001, 5, keep_norms=False))
    assert len(pieces) == 1
    if "max_grad_norm" not in options:  # a norm's last bit depends on the cuts
        assert pieces == {tail_trajectory(np.float32, options, 1, 20_001, 5, keep_norms=False)}


@pytest.mark.parametrize("name", PATHS)
@KINDS
def test_unbalanced_tensors(rng, dtypes, name):
    """One large, hundreds of tiny ones, empty ones: each as if it had an optimizer to itself."""
    sizes = [*rng.integers(0, 40, 150), 500_000, *rng.integers(0, 40, 150), 0]
    params = [rng.standard_normal(n).astype(dtypes[k % len(dtypes)]) for k, n in enumerate(sizes)]
    twins = [p.copy() for p in params]
    options = {"amsgrad": True, "ema_decay": 0.5, "weight_decay": 0.1}
    with way(name):
        opt = fastadam.Adam(params, **options)
    others = [fastadam.Adam(p, **options) for p in twins]
    for step in range(3):
        grads = [rng.standard_normal(p.size).astype(p.dtype) for p in params]
        copies = [grad.copy() for grad in grads]
        opt.step(grads, zero_grad=step == 1)
        for other, grad in zip(others, copies, strict=True):
            other.step(grad)
        assert any(grad.any() for grad in grads) == (step != 1)
    for param, twin, state, other in zip(params, twins, opt.state.values(), others, strict=True):
        assert param.tobytes() == twin.tobytes()
        for key, value in other.state[0].items():
            assert np.array(state[key]).tobytes() == np.array(value).tobytes()


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "tail"])
def test_one_dtype_in_threads_and_the_other_in_none(rng, options):
    """Large and small, by the usual limit: as on any path."""
    starts = [rng.standard_normal(100).astype("f8"), rng.standard_normal(70_000).astype("f4")]
    grads = [rng.standard_normal(p.size).astype(p.dtype) for p in starts]
    found = []
    for name in (None, *WAYS):
        params = [p.copy() for p in starts]
        with way(name) if name else contextlib.nullcontext():
            opt = fastadam.Adam(params, **options)
            results = [opt.step(grads) for _ in range(3)]
        found.append(repr((picture(opt, params), results)))
    assert len(set(found)) == 1


@KINDS
def test_state_lies_in_one_buffer_a_group(rng, dtypes):
    """Each array at the start of a cache line, and so again in a copy."""

    def buffers(opt):
        for group in opt.param_groups:
            keys = group.get("param_names", range(len(group["params"])))
            arrays = [
                a for key in keys for n, a in opt.state[key].items() if n != "step" and a.size
            ]
            assert all(a.ctypes.data % 64 == 0 for a in arrays)
            roots = []
            for array in arrays:
                while isinstance(array.base, np.ndarray):
                    array = array.base
                roots.append(id(array))
            assert len(set(roots)) == 1
            yield roots[0]

    shapes = [(3, 4), (0,), (), (257,)]
    params = [np.zeros(s, dtypes[k % len(dtypes)]) for k, s in enumerate(shapes)]
    named = {name: np.zeros(7, dtypes[-1]) for name in "ab"}
    opt = fastadam.Adam([{"params": params}, {"params": named}], amsgrad=True, ema_decay=0.9)
    grads = [rng.standard_normal(p.shape).astype(p.dtype) for p in params]
    opt.step([[np.asarray(g) for g in grads], {"a": None, "b": np.ones(7, dtypes[-1])}])
    for each in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert len(set(buffers(each))) == 2


# Peers.


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_torch_idiom(rng, optional, max_norm, fused):
    """clip_grad_norm_, AdamW, _foreach_lerp_ and zero_grad, in float64, over two groups."""
    torch = optional("torch")
    shapes, options = [[(3, 5), (257,)], [(), (33, 9)]], [{"lr": 0.01}, {"weight_decay": 0.3}]
    params = [[np.asarray(rng.standard_normal(s)) for s in group] for group in shapes]
    tensors = [[torch.tensor(p) for p in group] for group in params]
    averages = [tensor.clone() for tensor in flat(tensors)]
    peer = torch.optim.AdamW(
        [{"params": group, **own} for group, own in zip(tensors, options, strict=True)],
        lr=0.02,
        betas=(0.9, 0.95),
        fused=fused,
    )
    opt = fastadam.AdamW(
        [{"params": group, **own} for group, own in zip(params, options, strict=True)],
        lr=0.02,
        max_grad_norm=max_norm,
        nonfinite="skip",
        ema_decay=0.9,
    )
    for _ in range(20):
        grads = [[np.asarray(rng.standard_normal(s)) for s in group] for group in shapes]
        for tensor, grad in zip(flat(tensors), flat(grads), strict=True):
            tensor.grad = torch.tensor(grad)
        norm = torch.nn.utils.clip_grad_norm_(flat(tensors), max_norm)
        peer.step()
        torch._foreach_lerp_(averages, flat(tensors), 0.1)
        peer.zero_grad()
        result = opt.step(grads, zero_grad=True)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-14)
        assert not any(grad.any() for grad in flat(grads))
        pairs = [*zip(flat(params), flat(tensors), strict=True)]
        pairs += zip(flat(opt.ema_params), averages, strict=True)
        for own, theirs in pairs:
            np.testing.assert_allclose(own, theirs.numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_optax_chain(rng, optional, max_norm):
    """optax divides by the norm alone, torch and fastadam by the norm and 1e-6 more."""
    jax, optax = optional("jax"), optional("optax")
    params = [rng.standard_normal(s) for s in [(3, 5), (257,)]]
    opt = fastadam.AdamW(params, max_grad_norm=max_norm, weight_decay=0.1)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        peer = optax.chain(
            optax.clip_by_global_norm(max_norm),
            optax.adamw(0.01, 0.9, 0.95, 1e-8, weight_decay=0.1),
        )
        theirs = [jax.numpy.array(p) for p in params]
        state = peer.init(theirs)
        for _ in range(10):
            grads = [rng.standard_normal(p.shape) for p in params]
            updates, state = peer.update([jax.numpy.array(g) for g in grads], state, theirs)
            theirs = optax.apply_updates(theirs, updates)
            opt.step(grads)
        # Both 1 - beta**t and the norm's 1e-6 are of the order of float32 here.
        for own, their in zip(params, theirs, strict=True):
            np.testing.assert_allclose(own, np.asarray(their), rtol=1e-5, atol=1e-6)


@KINDS
def test_everything_against_the_reference(rng, dtypes):
    """Clipping that is on in some steps only, with L2, decoupled decay, maximize, a schedule."""
    own = [{"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}]
    own += [{"maximize": True, "lr": 0.1}]
    params = [rng.standard_normal(9).astype(dtypes[k % len(dtypes)]) for k in range(3)]
    schedule = fastadam.schedules.cosine(40)
    kept = {"schedule": schedule, "amsgrad": True, "ema_decay": 0.75}
    references = [Reference(p, **{**kept, **o}) for p, o in zip(params, own, strict=True)]
    opt = fastadam.Adam(
        [{"params": p, **o} for p, o in zip(params, own, strict=True)], max_grad_norm=4.0, **kept
    )
    clipped = 0
    for step in range(30):
        grads = [rng.standard_normal(9).astype(p.dtype) for p in params]
        if step % 4 == 3:
            grads[step % 3] = None
        norm = global_norm(grads) / 1.25
        clipped += norm > 4.0
        for ref, grad in zip(references, grads, strict=True):
            ref.step(grad, 1.25, clip_coefficient(norm, 4.0))
        assert opt.step(grads, grad_scale=1.25).grad_norm == pytest.approx(norm, rel=1e-7)
    assert 0 < clipped < 30
    for k, (param, ref) in enumerate(zip(params, references, strict=True)):
        rtol = 1e-4 if param.dtype == np.float32 else 1e-12
        np.testing.assert_allclose(param, ref.param, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(opt.ema_params[k], ref.ema, rtol=rtol, atol=rtol)


# Gradients that are not finite.

BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
SIZES = (5, 9_000, 0, 40)


def bad_grads(dtypes, bad, where):
    """Gradients of ones, one element of one array ``bad``: the first, a middle or the last."""
    grads = [np.ones(n, dtypes[k % len(dtypes)]) for k, n in enumerate(SIZES)]
    k, i = {"first": (0, 0), "middle": (1, 8_500), "last": (3, 39)}[where]
    grads[k][i] = bad
    return grads, f"grads[{k}]", f"grads[{k}][{i}]"


def advance(opt, params, seed=0, steps=3):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        opt.step([rng.standard_normal(p.shape).astype(p.dtype) for p in params])


def make(dtypes, name="serial", **options):
    params = [np.ones(n, dtypes[k % len(dtypes)]) for k, n in enumerate(SIZES)]
    with way(name):
        opt = fastadam.Adam(params, **{**EVERYTHING, **options})
    advance(opt, params)
    return opt, params


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@BAD
@KINDS
def test_skip_leaves_everything(dtypes, bad, where, zero_grad, name):
    opt, params = make(dtypes, name)
    other, twins = make(dtypes, name)
    before = picture(opt, params)
    grads, *_ = bad_grads(dtypes, bad, where)
    kept = [grad.copy() for grad in grads]
    result = opt.step(grads, zero_grad=zero_grad)
    assert (result.step, result.skipped, math.isfinite(result.grad_norm)) == (3, True, False)
    assert picture(opt, params) == before
    for grad, old in zip(grads, kept, strict=True):
        np.testing.assert_array_equal(grad, np.zeros_like(old) if zero_grad else old)
    # The next one goes on as if nothing had been.
    advance(opt, params, 1)
    advance(other, twins, 1)
    assert picture(opt, params) == picture(other, twins)


def test_skip_with_a_schedule_and_own_gradients():
    """The schedule is asked for the same step again."""
    asked = []
    opt = fastadam.Adam(
        np.zeros(2), nonfinite="skip", schedule=lambda step: asked.append(step) or 0.5
    )
    for slope in (1.0, math.nan, math.inf, 2.0):
        opt.grads[:] = slope
        result = opt.step(zero_grad=True)
        assert result.lr == 0.005
        assert not opt.grads.any()
    assert asked == [0, 1, 1, 1]
    assert (opt.step_count, opt.state[0]["step"], result.step) == (2, 2, 1)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@BAD
@KINDS
def test_raise_names_the_place(dtypes, bad, where, zero_grad, name):
    opt, params = make(dtypes, name, nonfinite="raise")
    other, twins = make(dtypes, name)
    before = picture(opt, params)
    grads, label, place = bad_grads(dtypes, bad, where)
    kept = [grad.copy() for grad in grads]
    with pytest.raises(FloatingPointError) as caught:
        opt.step(grads, zero_grad=zero_grad)
    assert str(caught.value).startswith(f"{label} must be finite, divided by grad_scale, got ")
    assert str(bad) in str(caught.value)
    assert str(caught.value).endswith(f" at {place}")
    assert picture(opt, params) == before
    for grad, old in zip(grads, kept, strict=True):
        np.testing.assert_array_equal(grad, old)
    advance(opt, params, 1)
    advance(other, twins, 1)
    assert picture(opt, params) == picture(other, twins)


NAN = np.array([[1.0, 2.0, 3.0], [4.0, math.nan, math.nan]])


@pytest.mark.parametrize(
    ("wrap", "label", "place"),
    [
        (lambda a: a, "grads", "grads[1, 1]"),
        (lambda a: [np.ones(2), a, a.copy()], "grads[1]", "grads[1][1, 1]"),
        (lambda a: {"w": a, "b": np.ones(2)}, "grads['w']", "grads['w'][1, 1]"),
        (lambda a: [[np.ones(2)], {"w": a}], "grads[1]['w']", "grads[1]['w'][1, 1]"),
        (lambda a: [np.ones(3), np.asfortranarray(a)], "grads[1]", "grads[1][1, 1]"),
        (lambda a: [np.ones(3), np.array(a[1, 1])], "grads[1]", "grads[1]"),
        (lambda a: [np.ones(3), a[1, 1]], "grads[1]", "grads[1]"),
    ],
    ids=["array", "list", "dict", "groups", "fortran", "0-d", "scalar"],
)
def test_the_first_bad_one_is_named_as_the_user_knows_it(wrap, label, place):
    grads = wrap(NAN.copy())

    def ones(x):
        if isinstance(x, Mapping):
            return {name: ones(value) for name, value in x.items()}
        return [ones(value) for value in x] if isinstance(x, list) else np.ones_like(x) * 1.0

    params = ones(grads)
    if isinstance(params, list):
        params = [np.asarray(p) if not isinstance(p, list | dict) else p for p in params]
        if isinstance(params[0], list):
            params = [{"params": group} for group in params]
    opt = fastadam.Adam(params, nonfinite="raise")
    with pytest.raises(FloatingPointError) as caught:
        opt.step(grads)
    assert str(caught.value).startswith(f"{label} must be finite, divided by grad_scale, got ")
    assert str(caught.value).endswith(f"got nan at {place}")
    assert opt.step_count == 0


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_absent_gradients_are_not_looked_at(nonfinite):
    opt = fastadam.Adam([np.zeros(2), np.zeros(2)], nonfinite=nonfinite)
    result = opt.step([None, np.array([1.0, 2.0])])
    assert (result.skipped, result.grad_norm) == (False, math.sqrt(5.0))
    bad = [None, np.array([1.0, math.inf])]
    if nonfinite == "skip":
        assert opt.step(bad).skipped
    else:
        with pytest.raises(FloatingPointError, match=r"^grads\[1\] must .* at grads\[1\]\[1\]$"):
            opt.step(bad)
    assert [opt.state[k]["step"] for k in (0, 1)] == [0, 1]


@pytest.mark.parametrize("name", PATHS)
def test_a_scale_that_makes_a_finite_gradient_overflow(name):
    """What counts is the gradient that would be computed with, in its own type."""
    for value, bad in ((1e38, True), (1e30, False), (-1e38, True)):
        param = np.zeros(40, np.float32)
        with way(name):
            opt = fastadam.Adam(param, nonfinite="skip", max_grad_norm=1.0)
        grad = np.full(40, 1.0, np.float32)
        grad[33] = value
        assert opt.step(grad, grad_scale=2.0**-7).skipped == bad
        assert param.any() != bad
        opt.nonfinite = "raise"
        if bad:
            with pytest.raises(
                FloatingPointError, match=r"^grads must .*, got .*inf at grads\[33\]"
            ):
                opt.step(grad, grad_scale=2.0**-7)
        assert np.isfinite(param).all()


def test_a_scale_that_overflows_by_its_rounding():
    """1/grad_scale is rounded to float32 too, which can take the last step to infinity."""
    largest = float(np.finfo(np.float32).max)
    for k in range(1, 400):
        scale = 1.0 / (1.0 + k * 2.0**-25 + 1e-12)
        rounded = float(np.float32(1.0 / scale))
        grad = np.array([largest / (1.0 / scale)]).astype(np.float32)
        while float(grad[0]) * (1.0 / scale) > largest:
            grad = np.nextafter(grad, np.float32(0))
        overflows = float(grad[0]) * rounded >= largest * (1 + 2.0**-25)
        param = np.zeros(1, np.float32)
        opt = fastadam.Adam(param, nonfinite="skip")
        assert opt.step(grad, grad_scale=scale).skipped == overflows
        assert np.isfinite([param, opt.state[0]["exp_avg"]]).all()


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_norm_beyond_float64_is_no_bad_gradient(nonfinite, max_norm):
    """All are finite, and so the step is taken; clipped, with gradients of nothing."""
    opt = fastadam.Adam(np.zeros(4), betas=(0.0, 0.0), nonfinite=nonfinite, max_grad_norm=max_norm)
    result = opt.step(np.full(4, 1.7e308))
    assert (result.step, result.skipped, result.grad_norm) == (0, False, math.inf)
    np.testing.assert_array_equal(opt.state[0]["exp_avg"], 1.7e308 if max_norm is None else 0.0)


@pytest.mark.parametrize("max_norm", [None, 1.0])
@BAD
def test_propagate_computes(bad, max_norm):
    """As torch does: an infinite norm leaves zeros and NaN, a norm of NaN only NaN."""
    opt = fastadam.Adam(np.zeros(2), betas=(0.0, 0.0), max_grad_norm=max_norm, ema_decay=0.5)
    result = opt.step(np.array([1.0, bad]))
    assert (result.step, result.skipped, opt.step_count) == (0, False, 1)
    wanted = [1.0, bad]
    if max_norm is not None:
        wanted = [math.nan if math.isnan(bad) else 0.0, math.nan]
    np.testing.assert_array_equal(opt.state[0]["exp_avg"], wanted)


# Averages of the parameters.


@KINDS
def test_average_begins_as_a_copy_and_follows(rng, dtypes):
    params = [rng.standard_normal(n).astype(dtypes[k % len(dtypes)]) for k, n in enumerate(SIZES)]
    opt = fastadam.Adam(params, ema_decay=0.25, lr=0.1)
    for average, param in zip(opt.ema_params, params, strict=True):
        assert average.tobytes() == param.tobytes()
        assert param.size == 0 or not np.shares_memory(average, param)
    live = opt.ema_params[0]
    before = live.copy()
    opt.step([np.ones_like(p) for p in params])
    np.testing.assert_allclose(live, 0.25 * before + 0.75 * params[0], rtol=1e-6)
    assert opt.ema_params[0] is opt.state[0]["ema"] is live
    opt.step([None, *(np.ones_like(p) for p in params[1:])])
    kept = live.copy()
    opt.step([None, *(np.ones_like(p) for p in params[1:])])
    np.testing.assert_array_equal(live, kept)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.9, 0.999, 1 - 2**-24, 1 - 2**-53])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_an_average_that_has_arrived_stays(rng, dtype, decay):
    """With lr 0 parameters stand still; so, to the last bit, does their average."""
    param = (rng.standard_normal(300) * 10.0 ** rng.uniform(-30, 30, 300)).astype(dtype)
    opt = fastadam.Adam(param, lr=0.0, ema_decay=decay)
    for _ in range(20):
        opt.step(rng.standard_normal(300).astype(dtype))
    assert opt.ema_params.tobytes() == param.tobytes()


def test_no_decay_is_the_parameter_itself(rng):
    param = rng.standard_normal(100)
    opt = fastadam.Adam(param, ema_decay=0.0)
    for _ in range(5):
        opt.step(rng.standard_normal(100))
        np.testing.assert_allclose(opt.ema_params, param, rtol=4e-16)


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        (np.zeros(3), np.ndarray),
        ([np.zeros(3)], tuple),
        ({"w": np.zeros(3)}, Mapping),
        ([{"params": [np.zeros(3)]}, {"params": {"w": np.zeros(2)}}], tuple),
    ],
    ids=["array", "list", "dict", "groups"],
)
def test_containers_of_averages(params, kind):
    opt = fastadam.Adam(params, ema_decay=0.5)
    averages = opt.ema_params
    assert isinstance(averages, kind)
    if kind is Mapping:
        assert list(averages) == ["w"]
        with pytest.raises(TypeError, match=r"^entry 'w' must stay the object it is"):
            averages["w"] = np.ones(3)
    elif isinstance(params, list) and isinstance(params[0], dict):
        assert isinstance(averages[0], tuple)
        assert averages[1]["w"].shape == (2,)
    with pytest.raises(AttributeError):
        opt.ema_params = None


def test_without_decay_there_is_no_average():
    opt = fastadam.Adam([np.zeros(2)])
    assert opt.ema_decay is None
    with pytest.raises(AttributeError, match="ema_params needs an optimizer made with ema_decay"):
        opt.ema_params  # noqa: B018
    assert not hasattr(opt, "ema_params")
    assert "ema" not in opt.state[0]
    with pytest.raises(AttributeError):
        opt.ema_decay = 0.5


@pytest.mark.parametrize(
    "duplicate",
    [
        lambda params, opt: copy.deepcopy((params, opt)),
        lambda params, opt: pickle.loads(pickle.dumps((params, opt))),
        lambda params, opt: reloaded(params, opt),
    ],
    ids=["deepcopy", "pickle", "state_dict"],
)
@KINDS
def test_tail_of_a_copy(dtypes, duplicate):
    opt, params = make(dtypes, nonfinite="raise")
    twins, other = duplicate(params, opt)
    assert picture(other, twins) == picture(opt, params)
    for name in ("max_grad_norm", "nonfinite", "ema_decay", "amsgrad"):
        assert getattr(other, name) == getattr(opt, name)
    advance(opt, params, 4)
    assert picture(other, twins) != picture(opt, params)
    advance(other, twins, 4)
    assert picture(other, twins) == picture(opt, params)


def reloaded(params, opt):
    twins = [p.copy() for p in params]
    other = fastadam.Adam(twins, **{**EVERYTHING, "nonfinite": "raise"})
    other.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    return twins, other


def test_state_with_and_without_average_do_not_fit():
    with_average, without = (
        fastadam.Adam({"w": np.zeros(2)}, ema_decay=decay) for decay in (0.5, None)
    )
    with pytest.raises(ValueError, match=r"\['w'\] has 'ema', which the optimizer has not"):
        without.load_state_dict(with_average.state_dict())
    with pytest.raises(ValueError, match=r"state\['w'\] has no 'ema'"):
        with_average.load_state_dict(without.state_dict())


def test_average_of_a_group_added_later():
    opt = fastadam.Adam([np.zeros(2)], ema_decay=0.5, lr=1.0)
    opt.step([np.ones(2)])
    late = np.full(3, 7.0)
    opt.add_param_group({"params": [late]})
    np.testing.assert_allclose(opt.ema_params[0][0], -0.5)
    np.testing.assert_array_equal(opt.ema_params[1][0], 7.0)
    opt.step([[None], [np.ones(3)]])
    np.testing.assert_allclose(opt.ema_params[0][0], -0.5)
    np.testing.assert_allclose(opt.ema_params[1][0], 6.5)


# Values out of range, and setters.

BAD_VALUES = [
    ("max_grad_norm", 0.0, ValueError, r"max_grad_norm must be > 0, got 0\.0"),
    ("max_grad_norm", -1, ValueError, r"max_grad_norm must be > 0, got -1"),
    ("max_grad_norm", math.nan, ValueError, r"max_grad_norm must be > 0, got nan"),
    ("max_grad_norm", -math.inf, ValueError, r"max_grad_norm must be > 0, got -inf"),
    ("max_grad_norm", "1", TypeError, r"max_grad_norm must be None or a real number, got '1'"),
    ("max_grad_norm", True, TypeError, r"max_grad_norm must be None or a real .* got True"),
    ("max_grad_norm", 1j, TypeError, r"max_grad_norm must be None or a real number, got 1j"),
    ("max_grad_norm", np.ones(2), TypeError, r"max_grad_norm must be None .* got array"),
    ("nonfinite", "ignore", ValueError, r"nonfinite must be .*'skip', 'raise', got 'ignore'"),
    ("nonfinite", "Skip", ValueError, r"nonfinite must be one of 'propagate', .* got 'Skip'"),
    ("nonfinite", None, TypeError, r"nonfinite must be one of 'propagate', .* got None"),
    ("nonfinite", True, TypeError, r"nonfinite must be one of .* got True"),
    ("nonfinite", ["skip"], TypeError, r"nonfinite must be one of .* got \['skip'\]"),
    ("ema_decay", 1.0, ValueError, r"ema_decay must be in \[0, 1\), got 1\.0"),
    ("ema_decay", -0.1, ValueError, r"ema_decay must be in \[0, 1\), got -0\.1"),
    ("ema_decay", math.nan, ValueError, r"ema_decay must be in \[0, 1\), got nan"),
    ("ema_decay", 10**400, ValueError, r"ema_decay must be in \[0, 1\), got 1000"),
    ("ema_decay", "0.9", TypeError, r"ema_decay must be None or a real number, got '0\.9'"),
    ("ema_decay", False, TypeError, r"ema_decay must be None or a real number, got False"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_VALUES)
def test_values_out_of_range(name, value, error, message):
    for make_one in (fastadam.Adam, fastadam.AdamW, fastadam.from_objects):
        with pytest.raises(error, match=f"^{message}"):
            make_one([], **{name: value})
    with pytest.raises(ValueError, match=rf"params\[0\] must have .* got \['{name}'\]"):
        fastadam.Adam([{"params": [], name: value}])
    if name != "ema_decay":
        opt = fastadam.Adam(np.zeros(2), max_grad_norm=2.0, nonfinite="skip")
        with pytest.raises(error, match=f"^{message}"):
            setattr(opt, name, value)
        assert (opt.max_grad_norm, opt.nonfinite) == (2.0, "skip")


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("max_grad_norm", 1, 1.0),
        ("max_grad_norm", np.float32(0.5), 0.5),
        ("max_grad_norm", math.inf, math.inf),
        ("max_grad_norm", 10**400, math.inf),
        ("max_grad_norm", None, None),
        ("nonfinite", "raise", "raise"),
    ],
)
def test_setters(name, value, kept):
    opt = fastadam.AdamW(np.zeros(2), max_grad_norm=2.0, nonfinite="skip")
    setattr(opt, name, value)
    assert getattr(opt, name) == kept
    assert type(getattr(opt, name)) is type(kept)
    made = fastadam.AdamW(np.zeros(2), **{name: value})
    assert getattr(made, name) == kept
    assert f"{name}={kept!r}" in repr(opt)


def test_what_is_set_holds_from_the_next_step_on():
    opt = fastadam.Adam(np.zeros(2), betas=(0.0, 0.0))
    opt.step(np.array([3.0, 4.0]))
    opt.max_grad_norm = 1.0
    opt.step(np.array([3.0, 4.0]))
    np.testing.assert_allclose(opt.state[0]["exp_avg"], [0.6, 0.8], rtol=1e-6)
    opt.nonfinite = "skip"
    assert opt.step(np.array([math.nan, 4.0])).skipped
    opt.nonfinite = "raise"
    with pytest.raises(FloatingPointError):
        opt.step(np.array([math.nan, 4.0]))
    opt.nonfinite, opt.max_grad_norm = "propagate", None
    assert opt.step(np.array([3.0, 4.0])) == fastadam.StepResult(2, 0.01)
    np.testing.assert_array_equal(opt.state[0]["exp_avg"], [3.0, 4.0])


def test_refused_gradients_come_before_bad_ones():
    """A gradient that does not fit is an error even where NaN would be skipped."""
    opt = fastadam.Adam([np.zeros(2), np.zeros(2)], nonfinite="skip")
    with pytest.raises(ValueError, match=r"grads\[1\].shape must be"):
        opt.step([np.full(2, math.nan), np.zeros(3)])
    locked = np.full(2, math.nan)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match=r"grads\[0\] must be writable for zero_grad=True"):
        opt.step([locked, None], zero_grad=True)
    assert opt.step_count == 0


# Objects with .data and .grad.


class Value:
    def __init__(self, data, grad):
        self.data, self.grad = data, grad


class TestObjects:
    def test_clipping_and_averages(self):
        things = [Value(1.0, 3.0), Value(np.zeros(2), np.array([0.0, 4.0])), Value(2.0, None)]
        opt = fastadam.from_objects(
            things, lr=0.5, betas=(0.0, 0.0), max_grad_norm=1.0, ema_decay=0.75
        )
        assert [np.ravel(a).tolist() for a in opt.ema_params] == [[1.0], [0.0, 0.0], [2.0]]
        result = opt.step()
        assert result.grad_norm == 5.0
        assert things[0].data == pytest.approx(0.5)
        assert opt.ema_params[0] == pytest.approx(0.875)
        assert type(opt.ema_params[0]) is float
        np.testing.assert_allclose(opt.ema_params[1], [0.0, -0.125])
        assert opt.ema_params[2] == things[2].data == 2.0
        np.testing.assert_allclose(opt.optimizer.state[0]["exp_avg"], 0.6, rtol=1e-6)
        assert [things[0].grad, things[2].grad] == [0.0, None]
        assert not things[1].grad.any()

    def test_what_is_set_is_used(self):
        """As lr and schedule: setting it is not to do nothing."""
        things = [Value(1.0, 3.0)]
        opt = fastadam.from_objects(things)
        opt.max_grad_norm, opt.nonfinite = 2.0, "skip"
        assert (opt.optimizer.max_grad_norm, opt.optimizer.nonfinite) == (2.0, "skip")
        with pytest.raises(ValueError, match="max_grad_norm must be > 0, got -1"):
            opt.max_grad_norm = -1
        assert opt.step().grad_norm == 3.0

    @pytest.mark.parametrize("bad", [0, 1])
    def test_skip(self, bad):
        things = [Value(1.0, 3.0), Value(np.ones(2), np.array([1.0, 4.0]))]
        opt = fastadam.from_objects(things, nonfinite="skip", ema_decay=0.5)
        opt.step()
        before = things[0].data, things[1].data.copy(), opt.state_dict()
        things[0].grad, things[1].grad[:] = 1.0, 1.0
        if bad == 0:
            things[0].grad = math.nan
        else:
            things[1].grad[1] = math.inf
        result = opt.step()
        assert (result.step, result.skipped, opt.step_count) == (1, True, 1)
        assert things[0].data == before[0]
        np.testing.assert_array_equal(things[1].data, before[1])
        assert repr(opt.state_dict()) == repr(before[2])
        assert things[0].grad == 0.0
        assert not things[1].grad.any()
        things[0].grad = 1.0
        assert opt.step().step == 1

    def test_raise(self):
        things = [Value(1.0, 3.0), Value(2.0, math.nan)]
        opt = fastadam.from_objects(things, nonfinite="raise")
        with pytest.raises(FloatingPointError, match=r"^grads\[1\] must be finite, .* got .*nan"):
            opt.step()
        assert [thing.data for thing in things] == [1.0, 2.0]
        assert things[0].grad == 3.0
        assert math.isnan(things[1].grad)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, duplicate):
        things = [Value(1.0, 3.0), Value(np.ones(2), np.array([1.0, 4.0]))]
        opt = fastadam.from_objects(things, max_grad_norm=1.0, nonfinite="skip", ema_decay=0.5)
        opt.step()
        twins, other = duplicate((things, opt))
        assert repr(other.ema_params) == repr(opt.ema_params)
        for each, optimizer in ((things, opt), (twins, other)):
            each[0].grad, each[1].grad[:] = 2.0, -1.0
            assert optimizer.step().grad_norm == pytest.approx(math.sqrt(6.0))
        assert things[0].data == twins[0].data
        assert repr(other.state_dict()) == repr(opt.state_dict())
        assert repr(other.ema_params) == repr(opt.ema_params)
