"""`fastadam.functional.adam`: the bits of `Adam`, what it refuses, what it remembers."""

import gc
import os
import threading
import weakref

import digest_run
import numpy as np
import pytest
from digest_run import MODES, SIZE, STEPS, TAIL_MODES, cut

import fastadam
from fastadam import cpus, functional, schedules
from fastadam.cpu import backend, kernels, lists, numpy_structs, tensors
from fastadam.cpu import layout as field
from fastadam.functional import adam


@pytest.fixture(autouse=True)
def no_tables():
    functional._tables.clear()


class Engine:
    """What keeps parameters, state and counts itself."""

    def __init__(self, params, *, amsgrad=False, ema_decay=None, schedule=None, **options):
        self.params, self.options, self.schedule = params, options, schedule
        self.exp_avgs = [np.zeros_like(p) for p in params]
        self.exp_avg_sqs = [np.zeros_like(p) for p in params]
        self.max_exp_avg_sqs = [np.zeros_like(p) for p in params] if amsgrad else None
        self.averages = None if ema_decay is None else [p.copy("K") for p in params]
        self.ema_decay, self.steps = ema_decay, np.zeros(len(params), np.int64)

    def lists(self):
        return self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.averages

    def step(self, grads, **options):
        given = {"lr": 1e-2, **self.options, **options}
        if self.schedule is not None:
            given["lr"] *= self.schedule(int(self.steps[0]))
        given.setdefault("ema_decay", self.ema_decay)
        return adam(self.params, grads, *self.lists(), steps=self.steps, **given)

    def arrays(self):
        return [a for arrays in (self.params, *self.lists()) for a in arrays or ()]

    def picture_of(self, torch):
        arrays = (a.numpy() if isinstance(a, torch.Tensor) else a for a in self.arrays())
        return [a.tobytes() for a in (*arrays, self.steps)]

    def picture(self):
        return [a.tobytes() for a in (*self.arrays(), self.steps)]


def draw(rng, shapes, dtype=np.float32):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def engine(count=2, dtype=np.float32, **options):
    rng = np.random.default_rng(7)
    shapes = [(3, 4), (5,), (), (2, 1, 2)][:count]
    made = Engine([np.asarray(a) for a in draw(rng, shapes, dtype)], **options)
    return made, [np.asarray(a) for a in draw(rng, shapes, dtype)]


def trajectory(dtype, mode, pieces=1, size=SIZE):
    """Return what `digest_run.trajectory` does, by way of lists."""
    raw = np.random.Generator(np.random.PCG64(7)).integers(-(2**20), 2**20, (STEPS + 1, size))
    values = (raw / 2**20).astype(dtype)
    param = values[0].copy()
    kept = Engine(cut(param, pieces), schedule=schedules.cosine(20), **mode)
    for step in range(STEPS):
        kept.step(cut(values[step + 1], pieces), grad_scale=1.5)
    moments = [np.concatenate(arrays) for arrays in (kept.exp_avgs, kept.exp_avg_sqs)]
    return b"".join(array.astype(f"<f{param.itemsize}").tobytes() for array in (param, *moments))


@pytest.mark.parametrize("pieces", [1, 37])
@pytest.mark.parametrize("serial_below", [2**60, 0], ids=["serial", "parallel"])
def test_the_bits_are_those_stored_of_adam(monkeypatch, serial_below, pieces):
    monkeypatch.setattr(kernels, "SERIAL_BELOW", serial_below)
    monkeypatch.setattr(digest_run, "trajectory", trajectory)
    assert digest_run.digest(pieces) == digest_run.DIGEST
    assert len(functional._tables) <= len(MODES) * 2


@pytest.mark.parametrize("dtypes", [("f4",), ("f8",), ("f8", "f4")], ids="+".join)
@pytest.mark.parametrize("mode", TAIL_MODES.values(), ids=TAIL_MODES)
def test_the_tail_is_adams(rng, mode, dtypes):
    shapes = [(3, 4), (70_000,), (), (0, 2), (5,)]
    options = {name: value for name, value in mode.items() if name != "zero_grad"}
    zero_grad = mode.get("zero_grad", False)
    params = [
        np.asfortranarray(np.asarray(rng.standard_normal(shape).astype(dtypes[k % len(dtypes)])))
        for k, shape in enumerate(shapes)
    ]
    theirs = [p.copy("K") for p in params]
    opt, kept = fastadam.Adam(theirs, **options), Engine(params, **options)
    for step in range(4):
        grads = [np.asfortranarray(rng.standard_normal(p.shape).astype(p.dtype)) for p in params]
        if step == 1:
            grads[4] = None
        if step == 2:
            grads[1][7] = np.nan
        same = [None if g is None else g.copy("K") for g in grads]
        expected = opt.step(same, zero_grad=zero_grad, grad_scale=2.0)
        result = kept.step(grads, zero_grad=zero_grad, grad_scale=2.0)
        limited = "max_grad_norm" in options or "nonfinite" in options
        assert (result is not None) == limited
        if limited:
            np.testing.assert_equal(result, expected)
        for a, b in zip(grads, same, strict=True):
            np.testing.assert_array_equal(a, b)
    state = opt.state
    for k in range(len(params)):
        np.testing.assert_array_equal(params[k], theirs[k])
        for name, arrays in zip(
            ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema"), kept.lists(), strict=True
        ):
            assert (arrays is not None) == (name in state[k])
            if arrays is not None:
                np.testing.assert_array_equal(arrays[k], state[k][name])
        assert kept.steps[k] == state[k]["step"]


def test_one_value_for_each_parameter(rng):
    shapes = [(3,), (4,), (5,)]
    params = draw(rng, shapes)
    theirs = [p.copy() for p in params]
    listed = {
        "lr": [0.1, 0.2, 0.3],
        "betas": [(0.9, 0.99), (0.8, 0.9), [0.5, 0.6]],
        "eps": (1e-8, 1e-4, 0.0),
        "weight_decay": np.array([0.1, 0.0, 0.2]),
        "decoupled_weight_decay": [True, False, False],
        "maximize": np.array([False, True, False]),
    }
    groups = [
        {"params": [p], **{name: np.asarray(v, object)[k] for name, v in listed.items()}}
        for k, p in enumerate(theirs)
    ]
    for k, group in enumerate(groups):
        group["betas"] = tuple(listed["betas"][k])
        group["decoupled_weight_decay"] = bool(group["decoupled_weight_decay"])
        group["maximize"] = bool(group["maximize"])
    opt, kept = fastadam.Adam(groups), Engine(params)
    for step in range(4):
        grads = draw(rng, shapes)
        if step == 2:  # as one value, then listed again
            for group in opt.param_groups:
                group["lr"] = 0.5
        kept.step(grads, **{**listed, "lr": 0.5 if step >= 2 else listed["lr"]})
        opt.step([[g] for g in grads])
        for a, b in zip(params, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_from_one_value_to_many_and_back(rng):
    params = draw(rng, [(3,), (4,)])
    theirs = [p.copy() for p in params]
    opt, kept = fastadam.Adam([{"params": [p]} for p in theirs]), Engine(params)
    for lrs in [0.1, [0.1, 0.2], 0.3, 0.3, [0.3, 0.3], [0.3, 0.1], 0.3]:
        grads = draw(rng, [(3,), (4,)])
        kept.step(grads, lr=lrs)
        for k, group in enumerate(opt.param_groups):
            group["lr"] = lrs[k] if isinstance(lrs, list) else lrs
        opt.step([[g] for g in grads])
        for a, b in zip(params, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_averages_with_a_decay_for_each(rng):
    params = draw(rng, [(3,), (4,)])
    kept = Engine(params, ema_decay=0.5)
    before = [a.copy() for a in kept.averages]
    kept.step(draw(rng, [(3,), (4,)]), ema_decay=[0.0, 0.75])
    np.testing.assert_array_equal(kept.averages[0], params[0])
    np.testing.assert_allclose(kept.averages[1], before[1] + 0.25 * (params[1] - before[1]), 1e-6)


def test_a_value_that_was_written_elsewhere_is_seen():
    """Lists can change unnoticed, and True compares equal to 1.0."""
    kept, grads = engine()
    betas = [0.9, 0.95]
    kept.step(grads, betas=betas)
    betas[1] = 1.0
    with pytest.raises(ValueError, match=r"betas\[1\] must be in \[0, 1\), got 1.0"):
        kept.step(grads, betas=betas)
    kept.step(grads, lr=1.0)
    with pytest.raises(TypeError, match="lr must be a real number, got True"):
        kept.step(grads, lr=True)
    lrs = np.array([0.1, 0.2])
    kept.step(grads, lr=lrs)
    lrs[0] = -1.0
    with pytest.raises(ValueError, match=r"lr\[0\] must be finite and >= 0, got -1.0"):
        kept.step(grads, lr=lrs)


def test_lists_of_values_that_come_back(rng):
    params = draw(rng, [(3,), (4,)])
    theirs = [p.copy() for p in params]
    opt, kept = fastadam.Adam([{"params": [p]} for p in theirs]), Engine(params)
    a, b = 0.1, 0.2
    for lrs in ([a, b], [a, b], [b, a], (a, b), np.array([a, b]), [a, b]):
        grads = draw(rng, [(3,), (4,)])
        kept.step(grads, lr=lrs, betas=(a, b))
        for group, lr in zip(opt.param_groups, lrs, strict=True):
            group["lr"], group["betas"] = float(lr), (a, b)
        opt.step([[g] for g in grads])
        for ours, other in zip(params, theirs, strict=True):
            np.testing.assert_array_equal(ours, other)
    with pytest.raises(ValueError, match="lr must be one value, or one for each of 2 params"):
        kept.step(grads, lr=[a], betas=[(a, b), (a, b)])


def test_a_rate_that_comes_back_with_another_tuple():
    """As the one before: other objects, but the same numbers as before the quick way."""
    kept, grads = engine(1)
    theirs, same = engine(1)
    first, second, a, b = 0.1, 0.2, 0.9, 0.95
    one, other = (tuple(pair) for pair in ([a, b], [a, b]))
    for lr, betas in [(first, one), (second, one), (first, other)]:
        kept.step(grads, lr=lr, betas=betas)
        theirs.step(same, lr=[lr])
    assert kept.picture() == theirs.picture()


def test_a_rate_that_comes_back(rng):
    """The quick way for a rate alone must not leave the slow one with an old one."""
    params = draw(rng, [(3,)])
    theirs = [p.copy() for p in params]
    opt, kept = fastadam.Adam(theirs), Engine(params)
    for k, lr in enumerate([0.1, 0.2, 0.1, np.float64(0.3), 0.1]):
        opt.lr = float(lr)
        grads = draw(rng, [(3,)])
        opt.step(grads)
        kept.step(grads, lr=lr, eps=float(f"1e-{8}") if k % 2 else 1e-8)
        np.testing.assert_array_equal(params[0], theirs[0])


# What is remembered.


def built(monkeypatch):
    """Count how often tables are made."""
    made, make = [], functional._Tables.__init__

    def count(self, *args, **kwargs):
        made.append(self)
        make(self, *args, **kwargs)

    monkeypatch.setattr(functional._Tables, "__init__", count)
    return made


def test_tables_are_kept_while_addresses_stay(monkeypatch):
    made = built(monkeypatch)
    kept, grads = engine()
    for _ in range(3):
        kept.step([g.copy() for g in grads])
        # Other objects over the same memory, in other containers.
        kept.params = tuple(p.view() for p in kept.params)
        kept.exp_avgs = [m.view() for m in kept.exp_avgs]
        kept.steps = kept.steps.copy()
    assert len(made) == 1
    assert kept.steps.tolist() == [3, 3]


def test_another_number_of_threads_needs_no_other_tables(monkeypatch):
    made = built(monkeypatch)
    size = kernels.SERIAL_BELOW
    kept, twin = (Engine([np.ones(size, np.float32)]) for _ in range(2))
    for number in (1, 2, None, 1, 10**9):
        grads = [kept.params[0][::-1].copy()]
        kept.step(grads, num_threads=number)
        twin.step(grads)
        (tables, _) = functional._tables.values()
        expected = cpus.thread_count(number)
        assert tables.stepper.num_threads == expected
        assert tables.stepper.contexts[0].parallel == (expected > 1)
    assert kept.picture() == twin.picture()
    assert len(made) == 2


@pytest.mark.parametrize(
    "name", ["params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "averages"]
)
def test_another_address_is_seen(monkeypatch, name):
    made = built(monkeypatch)
    kept, grads = engine(amsgrad=True, ema_decay=0.5)
    kept.step(grads)
    old = getattr(kept, name)[1]
    getattr(kept, name)[1] = new = old.copy()
    before = old.tobytes()
    kept.step(grads)
    assert len(made) == 2
    assert old.tobytes() == before != new.tobytes()


def test_another_shape_or_dtype_at_the_same_address_is_seen(monkeypatch):
    made = built(monkeypatch)
    buffers = np.zeros((4, 96), np.uint8)

    def views(dtype, shape):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return [row[:size].view(dtype).reshape(shape) for row in buffers]

    for k, (dtype, shape) in enumerate(
        [("f4", (24,)), ("f4", (4, 6)), ("f4", (6, 4)), ("f8", (12,)), ("f8", (3,)), ("f4", (6,))]
    ):
        buffers[...] = 0
        param, grad, exp_avg, exp_avg_sq = views(dtype, shape)
        grad[...] = 1.0
        steps = np.zeros(1, np.int64)
        adam([param], [grad], [exp_avg], [exp_avg_sq], steps=steps, lr=0.5)
        np.testing.assert_allclose(param, np.full(shape, -0.5), 1e-6)
        assert len(made) == k + 1


def test_nothing_of_the_users_is_kept():
    kept, grads = engine(amsgrad=True, ema_decay=0.5)
    kept.step(grads)
    references = [weakref.ref(a) for a in (*kept.arrays(), *grads, kept.steps)]
    assert functional._tables
    del kept, grads
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(functional, "_MOST", 5 * 21)
    engines = [engine(1) for _ in range(20)]
    for kept, grads in engines:
        kept.step(grads)
        assert len(functional._tables) <= 6
    kept, grads = engines[-3]
    made = built(monkeypatch)
    kept.step(grads)
    assert not made


def test_roles_may_come_and_go(monkeypatch):
    made = built(monkeypatch)
    kept, grads = engine()
    maxima = [np.zeros_like(p) for p in kept.params]
    for count, kept.max_exp_avg_sqs in enumerate([None, maxima, None], 1):
        before = [m.copy() for m in maxima]
        kept.step(grads)
        assert len(made) == count
        assert all((a == b).all() for a, b in zip(before, maxima, strict=True)) == (
            kept.max_exp_avg_sqs is None
        )


def test_other_structures_of_numpy(monkeypatch):
    """Where they are not as known, all of it is found out in Python."""
    kept, grads = engine(3)
    theirs, same = engine(3)
    theirs.step(same)
    theirs.step(same)
    functional._tables.clear()
    monkeypatch.setattr(numpy_structs, "works", lambda: False)
    lists.find_kernel.cache_clear()
    lists.look_kernel.cache_clear()
    try:
        made = built(monkeypatch)
        kept.step(grads)
        kept.step(grads)
        assert len(made) == 1
        with pytest.raises(ValueError, match=r"grads\[0\]\.shape"):
            kept.step([grads[1], *grads[1:]])
    finally:
        lists.find_kernel.cache_clear()
        lists.look_kernel.cache_clear()
    assert kept.picture() == theirs.picture()


# What is given.


def test_gradients_that_are_none():
    kept, grads = engine()
    before = kept.picture()
    assert kept.step([None, None]) is None
    assert kept.picture() == before
    kept.step([None, grads[1]])
    assert kept.steps.tolist() == [0, 1]
    assert kept.params[0].tobytes() == before[0]


def test_no_parameters():
    steps = np.zeros(0, np.int64)
    assert adam([], [], [], [], steps=steps) is None
    result = adam([], [], [], [], steps=steps, max_grad_norm=1.0)
    assert result == (0, 1e-2, 0.0, False)


def test_derived_arrays_and_scalars():
    class Derived(np.ndarray):
        pass

    kept, grads = engine(3)
    theirs, same = engine(3)
    kept.params = [p.view(Derived) for p in kept.params]
    kept.step([grads[0].view(Derived), grads[1], np.float32(grads[2])])
    theirs.step(same)
    assert kept.picture() == theirs.picture()


@pytest.fixture(params=["C", "NumPy"])
def torch(request, optional, monkeypatch):
    """Torch, asked by DLPack's C function, or by way of NumPy as before 2.10."""
    torch = optional("torch")
    exchange = tensors.known[field.KNOWN_EXCHANGE]
    if request.param == "NumPy":
        tensors.known[field.KNOWN_EXCHANGE] = 0
        monkeypatch.setattr(tensors, "meet_torch", lambda: False)
        monkeypatch.setattr(lists, "meet_torch", lambda: False)
    elif not (exchange or tensors.meet_torch()):
        pytest.skip("this torch has no C function for DLPack")
    yield torch
    tensors.known[field.KNOWN_EXCHANGE] = exchange


def test_tensors_of_torch(monkeypatch, torch):
    shapes = [(3, 4), (5,), (), (0, 2), (4, 1), (1, 4), (2, 3, 2)]
    rng = np.random.default_rng(5)
    start, grads = draw(rng, shapes), draw(rng, shapes)
    start, grads = ([np.asarray(a) for a in some] for some in (start, grads))
    start[0], grads[0] = np.asfortranarray(start[0]), np.asfortranarray(grads[0])
    kept, theirs = (Engine([a.copy("K") for a in start]) for _ in range(2))
    plain = kept.params, kept.exp_avgs
    kept.params = [torch.nn.Parameter(torch.from_numpy(p)) for p in kept.params]
    kept.exp_avgs = [torch.from_numpy(m) for m in kept.exp_avgs]
    made, taken, take = built(monkeypatch), [], backend.take_lists
    monkeypatch.setattr(backend, "take_lists", lambda given: taken.append(0) or take(given))
    for k in range(3):
        kept.step([torch.from_numpy(g.copy("K")) for g in grads])
        if k == 0:
            count = len(taken)
    assert len(made) == 1
    assert (len(taken) == count) == (tensors.known[field.KNOWN_EXCHANGE] != 0)
    for _ in range(3):
        theirs.step(grads)
    kept.params, kept.exp_avgs = plain
    assert kept.picture() == theirs.picture()


def test_tensors_with_a_rate_for_each_and_norms(torch):
    kept, grads = engine(2)
    theirs, same = engine(2)
    arrays = kept.params
    kept.params = [torch.from_numpy(p) for p in kept.params]
    given = [torch.from_numpy(g) for g in grads]
    for lr in (0.1, [0.1, 0.2], 0.1):
        for nonfinite in ("propagate", "skip"):
            told = kept.step(given, lr=lr, nonfinite=nonfinite, zero_grad=nonfinite == "skip")
            expected = theirs.step(same, lr=lr, nonfinite=nonfinite, zero_grad=nonfinite == "skip")
            assert told == expected
    given[1][2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"got nan at grads\[1\]\[2\]"):
        kept.step(given, nonfinite="raise")
    kept.params = arrays
    assert kept.picture() == theirs.picture()


def test_tensors_that_do_not_fit(torch):
    kept, grads = engine(2)
    kept.params = [torch.from_numpy(p) for p in kept.params]
    kept.exp_avgs = [torch.from_numpy(m) for m in kept.exp_avgs]
    grads = [torch.from_numpy(g) for g in grads]
    kept.step(grads)
    before = kept.picture_of(torch)
    whole = torch.zeros(4, 3)
    for name, k, bad, kind, message in [
        ("grads", 0, whole, ValueError, r"grads\[0\]\.shape must be its parameter's"),
        ("grads", 0, whole.T, ValueError, r"grads\[0\] must be laid out in C order"),
        ("grads", 1, torch.zeros(10)[::2], ValueError, r"grads\[1\] must be contiguous"),
        ("grads", 1, torch.zeros(5).double(), TypeError, r"grads\[1\]\.dtype must be its param"),
        ("grads", 1, torch.zeros(5).int(), TypeError, r"grads\[1\]\.dtype must be its param"),
        ("grads", 1, torch.zeros(5).to_sparse(), TypeError, r"grads\[1\] must be readable as a"),
        ("grads", 1, kept.exp_avgs[1], ValueError, r"grads\[1\] must not share memory with exp_a"),
        ("exp_avgs", 1, torch.zeros(6), ValueError, r"exp_avgs\[1\]\.shape must be its param"),
        ("exp_avgs", 1, torch.zeros(5).bfloat16(), TypeError, r"exp_avgs\[1\] must be readable"),
        ("params", 1, torch.zeros(5).half(), TypeError, r"params\[1\]\.dtype must be float32 or"),
    ]:
        target = grads if name == "grads" else getattr(kept, name)
        good, target[k] = target[k], bad
        with pytest.raises(kind, match=message):
            kept.step(grads)
        target[k] = good
        assert kept.picture_of(torch) == before


def test_tensors_elsewhere_are_not_taken_for_the_hosts(torch):
    """As those on a CUDA device: the host's backend must not find tables for them."""
    given = ((torch.zeros(3, device="meta"),), *[None] * 5, None)
    assert lists.find_tables(given) == 0
    assert lists.find_tables(((torch.zeros(3), torch.zeros(3, device="meta")), *given[1:])) == 0
    here = lists.find_tables(((torch.zeros(3),), *given[1:]))
    assert (here != 0) == (tensors.known[field.KNOWN_EXCHANGE] != 0)


def test_steps_as_torch_keeps_them(optional):
    """What the docstring says to do."""
    torch = optional("torch")
    param, grad = torch.zeros(3, requires_grad=True), torch.ones(3)
    exp_avg, exp_avg_sq = torch.zeros(3), torch.zeros(3)
    state_steps = [torch.tensor(0.0)]
    twin = torch.zeros(3, requires_grad=True)
    twin.grad = grad
    theirs = torch.optim.Adam([twin], lr=0.1)
    for _ in range(3):
        steps = np.array([int(s) for s in state_steps])
        options = {"steps": steps, "lr": 0.1, "betas": (0.9, 0.999)}
        adam([param], [grad], [exp_avg], [exp_avg_sq], **options)
        torch._foreach_add_(state_steps, 1)
        theirs.step()
    assert state_steps[0] == 3
    torch.testing.assert_close(param, twin, rtol=1e-6, atol=0.0)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def put(name, place, change):
    def apply(kept, grads):
        arrays = grads if name == "grads" else getattr(kept, name)
        arrays[place] = change(arrays[place])

    return apply


def share(name, place, other, other_place):
    def apply(kept, grads):
        target = grads if name == "grads" else getattr(kept, name)
        source = grads if other == "grads" else getattr(kept, other)
        target[place] = source[other_place]

    return apply


def setting(name, value):
    return lambda kept, _: setattr(kept, name, value)


def steps_in_state(kept, _):
    kept.exp_avgs[0][...] = 0.0
    kept.steps = kept.exp_avgs[0].reshape(-1)[:4].view(np.int64)


BAD = {
    "params short": (
        lambda kept, _: kept.params.pop(),
        ValueError,
        "grads must have one array for each of 1 params, got 2",
    ),
    "exp_avgs short": (
        lambda kept, _: kept.exp_avgs.pop(),
        ValueError,
        "exp_avgs must have one array for each of 2 params, got 1",
    ),
    "exp_avgs None": (
        setting("exp_avgs", None),
        TypeError,
        "exp_avgs must be a list of arrays, got NoneType",
    ),
    "params a number": (
        setting("params", 1.0),
        TypeError,
        "params must be a list of arrays, got float",
    ),
    "params one array": (
        setting("params", np.zeros((2, 5), "f4")),
        TypeError,
        "params must be a list of arrays, got numpy.ndarray",
    ),
    "params by name": (
        setting("params", {"w": 1, "b": 2}),
        TypeError,
        "params must be a list of arrays, got dict",
    ),
    "a state that is None": (
        put("exp_avg_sqs", 1, lambda _: None),
        TypeError,
        r"exp_avg_sqs\[1\] must be a numpy.ndarray, .*got NoneType",
    ),
    "a param that is a list": (
        put("params", 1, lambda a: a.tolist()),
        TypeError,
        r"params\[1\] must be a numpy.ndarray, .*got list",
    ),
    "shape": (
        put("max_exp_avg_sqs", 0, lambda a: a.T.copy()),
        ValueError,
        r"max_exp_avg_sqs\[0\]\.shape must be its parameter's, \(3, 4\), got \(4, 3\)",
    ),
    "dtype": (
        put("averages", 1, lambda a: a.astype("f8")),
        TypeError,
        r"averages\[1\]\.dtype must be its parameter's",
    ),
    "order": (
        put("exp_avgs", 0, np.asfortranarray),
        ValueError,
        r"exp_avgs\[0\] must be laid out in C order, as its parameter is",
    ),
    "gaps": (
        put("exp_avgs", 1, lambda _: np.zeros(10, "f4")[::2]),
        ValueError,
        r"exp_avgs\[1\] must be contiguous",
    ),
    "read-only": (
        put("exp_avg_sqs", 0, read_only),
        ValueError,
        r"exp_avg_sqs\[0\] must be writable",
    ),
    "read-only param": (
        put("params", 1, read_only),
        ValueError,
        r"params\[1\] must be writable",
    ),
    "float16": (
        put("params", 0, lambda a: a.astype("f2")),
        TypeError,
        r"params\[0\]\.dtype must be float32 or float64",
    ),
    "shared": (
        share("exp_avgs", 0, "exp_avg_sqs", 0),
        ValueError,
        r"exp_avgs\[0\] and exp_avg_sqs\[0\] must not share memory",
    ),
    "gradient of another": (
        put("grads", 1, lambda _: np.zeros(6, "f4")),
        ValueError,
        r"grads\[1\]\.shape must be its parameter's, \(5,\), got \(6,\)",
    ),
    "gradient in the state": (
        share("grads", 1, "averages", 1),
        ValueError,
        r"grads\[1\] must not share memory with averages\[1\], which the step writes",
    ),
    "steps float": (
        setting("steps", np.zeros(2)),
        TypeError,
        r"steps must be a numpy.ndarray of int64, or .*, got dtype\('float64'\)",
    ),
    "steps list": (
        setting("steps", [0, 0]),
        TypeError,
        "steps must be a numpy.ndarray of int64, or a list of arrays of one float, got int in it",
    ),
    "steps no list": (
        setting("steps", 3),
        TypeError,
        "steps must be a numpy.ndarray of int64, or a list of arrays of one float, got int",
    ),
    "steps of another length": (
        setting("steps", [np.zeros(())]),
        ValueError,
        "steps must have one array for each of 2 params, got 1",
    ),
    "steps of half precision": (
        setting("steps", [np.zeros(()), np.zeros((), np.float16)]),
        TypeError,
        r"steps must be .* a list of arrays of one float, got dtype\('float16'\) in it",
    ),
    "steps of shape (1,)": (
        setting("steps", [np.zeros(()), np.zeros(1)]),
        ValueError,
        r"steps\[1\]\.shape must be \(\), got \(1,\)",
    ),
    "half a step": (
        setting("steps", [np.zeros(()), np.array(0.5)]),
        ValueError,
        r"steps\[1\] must be >= 0 and under 2\*\*62 and whole, got 0.5",
    ),
    "steps short": (
        setting("steps", np.zeros(1, np.int64)),
        ValueError,
        r"steps\.shape must be \(2,\), one for each param, got \(1,\)",
    ),
    "steps with gaps": (
        setting("steps", np.zeros(4, np.int64)[::2]),
        ValueError,
        "steps must be contiguous, aligned and writable",
    ),
    "steps negative": (
        setting("steps", np.array([0, -1])),
        ValueError,
        r"steps\[1\] must be >= 0 and under 2\*\*62, got -1",
    ),
    "steps in the state": (
        steps_in_state,
        ValueError,
        r"steps must not share memory with exp_avgs\[0\], which the step writes",
    ),
}


@pytest.mark.parametrize("before", [True, False], ids=["known", "new"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_change_nothing(case, before):
    spoil, kind, message = BAD[case]
    kept, grads = engine(amsgrad=True, ema_decay=0.5)
    if before:
        kept.step(grads)
    arrays = [*kept.arrays(), *grads, kept.steps]
    spoil(kept, grads)
    pictures = [a.tobytes() for a in arrays]
    for _ in range(2):
        with pytest.raises(kind, match=message):
            kept.step(grads)
        assert [a.tobytes() for a in arrays] == pictures


OUT_OF_RANGE = [
    ({"lr": -0.1}, ValueError, r"lr must be finite and >= 0, got -0\.1"),
    ({"lr": "0.1"}, TypeError, r"lr must be a real number, got '0\.1'"),
    ({"lr": 1e39}, ValueError, "lr must not exceed 3.403e.38, the largest float32"),
    ({"lr": 1e38}, ValueError, "lr must not exceed 3.403e.37, where steps become infinite"),
    ({"lr": [0.1]}, ValueError, "lr must be one value, or one for each of 2 params, got 1"),
    ({"lr": [0.1, np.nan]}, ValueError, r"lr\[1\] must be finite and >= 0, got nan"),
    ({"lr": [0.1, 1e39]}, ValueError, r"for params\[1\], lr must not exceed 3.403e.38"),
    ({"lr": np.zeros((2, 2))}, TypeError, r"lr\[0\] must be a real number, got \[0.0, 0.0\]"),
    ({"betas": (0.9,)}, TypeError, "betas must be a pair of real numbers"),
    ({"betas": [(0.9, 0.9), (0.9, 1.0)]}, ValueError, r"betas\[1\]\[1\] must be in \[0, 1\)"),
    ({"eps": 1e-50}, ValueError, "eps must not round to 0 in float32, got 1e-50"),
    ({"weight_decay": [0.1, -1.0]}, ValueError, r"weight_decay\[1\] must be finite and >= 0"),
    ({"maximize": 1}, TypeError, "maximize must be True or False, got 1"),
    ({"maximize": [True, 0]}, TypeError, r"maximize\[1\] must be True or False, got 0"),
    ({"ema_decay": 1.0}, ValueError, r"ema_decay must be in \[0, 1\), got 1.0"),
    ({"ema_decay": None}, ValueError, "averages and ema_decay must be given together, got aver"),
    ({"grad_scale": 0.0}, ValueError, "grad_scale must be finite and > 0, got 0.0"),
    ({"grad_scale": 1e-39}, ValueError, "1/grad_scale must be in"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be > 0, got 0.0"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of"),
    ({"zero_grad": 1}, TypeError, "zero_grad must be True or False, got 1"),
    ({"num_threads": True}, TypeError, "num_threads must be None or an integer, got True"),
    ({"num_threads": 0}, ValueError, "num_threads must be >= 1, got 0"),
]


@pytest.mark.parametrize(("options", "kind", "message"), OUT_OF_RANGE, ids=lambda x: str(x)[:20])
def test_bad_values_change_nothing(options, kind, message):
    kept, grads = engine(ema_decay=0.5)
    kept.step(grads)
    before = kept.picture()
    with pytest.raises(kind, match=message):
        kept.step(grads, **options)
    assert kept.picture() == before
    kept.step(grads)
    assert kept.steps.tolist() == [2, 2]


def test_ema_decay_without_averages():
    kept, grads = engine()
    with pytest.raises(ValueError, match="must be given together, got ema_decay alone"):
        kept.step(grads, ema_decay=0.5)


def test_read_only_gradients():
    kept, grads = engine()
    grads[1] = read_only(grads[1])
    kept.step(grads)
    before = kept.picture()
    with pytest.raises(ValueError, match=r"grads\[1\] must be writable for zero_grad=True"):
        kept.step(grads, zero_grad=True)
    assert kept.picture() == before
    kept.step(grads)


def test_nonfinite_gradients_raise():
    kept, grads = engine()
    grads[1][2] = np.inf
    before = kept.picture()
    with pytest.raises(FloatingPointError, match=r"grads\[1\] must be finite.*got inf at grads"):
        kept.step(grads, nonfinite="raise")
    assert kept.picture() == before


# Threads, signals and forks.


@pytest.mark.parametrize("size", [8, 70_000])
def test_threads_over_different_arrays(size):
    rng = np.random.default_rng(3)
    starts, grads = draw(rng, [size] * 4), draw(rng, [size] * 4)
    engines = [Engine([start.copy()]) for start in starts]

    def run(k):
        for _ in range(30):
            engines[k].step([grads[k]], max_grad_norm=1.0)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, start in enumerate(starts):
        alone = Engine([start])
        for _ in range(30):
            alone.step([grads[k]], max_grad_norm=1.0)
        assert engines[k].picture() == alone.picture()


def test_a_call_in_the_middle_of_a_call(monkeypatch):
    """As a signal's handler may make: it finds no tables that are in use."""
    kept, grads = engine()
    theirs, same = engine()
    for _ in range(3):
        theirs.step(same)
    kept.step(grads)
    once, tables = [True], list(functional._tables.values())[-1]
    step = tables.stepper.step

    def interrupted(*args):
        if once:
            once.clear()
            kept.step(grads)
        return step(*args)

    monkeypatch.setattr(tables.stepper, "step", interrupted)
    kept.step(grads)
    assert not once
    assert kept.picture() == theirs.picture()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
# Other tests have left threads, of which Python and JAX warn.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*fork:RuntimeWarning")
def test_a_forked_child_makes_tables_of_its_own():
    kept, grads = engine()
    kept.step(grads)
    theirs, same = engine()
    theirs.step(same)
    theirs.step(same)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            none = not functional._tables
            kept.step(grads)
            code = 0 if none and kept.picture() == theirs.picture() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(functional._tables) == 2


def counts_of(kind, counts, torch=None):
    """Counts of steps as a user may keep them; ``int`` is NumPy's array."""
    if kind == "int":
        return np.array(counts, dtype=np.int64)
    if kind == "torch":
        dtypes = (torch.float32, torch.float64)
        return [torch.tensor(float(c), dtype=dtypes[k % 2]) for k, c in enumerate(counts)]
    dtypes = (np.float32, np.float64)
    return [np.array(c, dtype=dtypes[k % 2]) for k, c in enumerate(counts)]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_counts_may_be_floats_as_torch_keeps_them(monkeypatch, optional, kind, compiled):
    torch = optional("torch") if kind == "torch" else None
    if not compiled:
        monkeypatch.setattr(lists, "look_kernel", lambda: None)
        monkeypatch.setattr(lists, "find_kernel", lambda: None)
    pictures = []
    for each in ("int", kind):
        kept, grads = engine(4)
        kept.steps = counts_of(each, [7, 0, 3, 2**24], torch)
        for step in range(3):
            grads[2] = None if step == 1 else np.ones((), np.float32)
            kept.step(grads, max_grad_norm=1.0 if step == 2 else None)
        pictures.append([a.tobytes() for a in kept.arrays()])
        # (The fourth is of float64.)
        assert [int(step) for step in kept.steps] == [10, 3, 5, 2**24 + 3]
    assert pictures[0] == pictures[1]


def test_a_count_in_float32_ends_where_torchs_does():
    kept, grads = engine(1)
    kept.steps = [np.array(2**24, dtype=np.float32)]
    kept.step(grads)
    assert kept.steps == [2**24]


@pytest.mark.parametrize("skip", [True, False])
def test_counts_in_floats_stay_where_a_step_is_skipped(skip):
    kept, grads = engine(2)
    kept.steps = counts_of("numpy", [1, 2])
    grads[1][0] = np.nan
    result = kept.step(grads, nonfinite="skip" if skip else "propagate", max_grad_norm=1.0)
    assert result.skipped is skip
    assert [int(step) for step in kept.steps] == ([1, 2] if skip else [2, 3])


def test_hyperparameters_by_group_are_those_of_each_parameter():
    pictures = []
    for groups in (None, [1, 0, 1, 1]):
        kept, grads = engine(4)
        for step in range(3):
            lrs, decays = [0.1 / (step + 1), 0.2], [0.0, 0.5]
            if groups is None:
                options = {"lr": [lrs[k] for k in (1, 0, 1, 1)]}
                options["weight_decay"] = [decays[k] for k in (1, 0, 1, 1)]
            else:
                options = {"lr": lrs, "weight_decay": decays, "groups": groups}
            kept.step(grads, **options)
        pictures.append(kept.picture())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("groups", [[0], [0, -1], [0, 1.0], [0, True]])
def test_bad_groups(groups):
    kept, grads = engine(2)
    before = kept.picture()
    with pytest.raises(ValueError, match=r"groups must be an int >= 0 for each of 2 params, got"):
        kept.step(grads, lr=[0.1, 0.2], groups=groups)
    assert kept.picture() == before


def test_a_value_for_each_group():
    kept, grads = engine(2)
    with pytest.raises(ValueError, match=r"lr must be one value, or one for each of 2 groups"):
        kept.step(grads, lr=[0.1], groups=[0, 1])
    kept.step(grads, lr=[0.1, 0.2, -1.0], groups=[0, 1])  # the third has no parameter


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
def test_axes_in_any_order(monkeypatch, rng, compiled):
    """As of torch's channels_last: the same bits as in C order, and what has gaps is refused."""
    if not compiled:
        monkeypatch.setattr(lists, "look_kernel", lambda: None)
        monkeypatch.setattr(lists, "find_kernel", lambda: None)
    in_c = [rng.standard_normal((4, 3, 3, 2)), rng.standard_normal((1, 5, 2))]
    grads = [rng.standard_normal(a.shape) for a in in_c]
    orders = [(0, 2, 3, 1), (2, 0, 1)]

    def other(array, order):
        """The same values with axes that lie in memory in another order."""
        return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))

    params = [other(a, order) for a, order in zip(in_c, orders, strict=True)]
    assert not params[0].flags.c_contiguous
    assert not params[0].flags.f_contiguous
    theirs, ours = Engine(in_c), Engine(params)
    for _ in range(2):
        theirs.step(grads)
        ours.step([other(g, order) for g, order in zip(grads, orders, strict=True)])
    for a, b in zip(theirs.arrays(), ours.arrays(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(
        ValueError, match=r"grads\[0\] must be laid out in memory as its parameter"
    ):
        ours.step(grads)
    gaps = np.zeros((4, 3, 6, 2))[:, :, ::2].transpose(3, 0, 1, 2)
    with pytest.raises(ValueError, match=r"params\[0\] must be contiguous, got strides"):
        Engine([gaps]).step([np.zeros_like(gaps)])


@pytest.mark.parametrize("known", [True, False], ids=["compiled", "python"])
def test_two_states_of_the_same_parameters_are_remembered_apart(monkeypatch, known):
    """As of two optimizers that step in turn."""
    if not known:
        monkeypatch.setattr(lists, "look_kernel", lambda: None)
        monkeypatch.setattr(lists, "find_kernel", lambda: None)
    first, grads = engine(2)
    second = Engine(first.params)
    for kept in (first, second, first):
        kept.step(grads)
    tables = list(functional._tables.values())
    assert len(tables) == 2
    for kept in (second, first):
        kept.step(grads)
    assert list(functional._tables.values()) == tables
