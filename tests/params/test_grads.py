"""Gradients: arrays of the optimizer's own, and arrays that come and go."""

import copy
import pickle
from collections.abc import Mapping

import numpy as np
import pytest
from tools import WAYS, picture, way

import fastadam

SHAPES = [(3, 4), (0,), (), (257,)]
TAILS = {
    "plain": {},
    "tail": {"amsgrad": True, "max_grad_norm": 1.0, "nonfinite": "skip", "ema_decay": 0.5},
}


def zeros(shapes=SHAPES, dtype=np.float64):
    return [np.zeros(shape, dtype) for shape in shapes]


def draw(rng, likes):
    return [np.asarray(rng.standard_normal(like.shape)).astype(like.dtype) for like in likes]


def fill(places, values):
    for place, value in zip(places, values, strict=True):
        place[...] = value


def root(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


class TestContainer:
    def test_one_array(self):
        param = np.asfortranarray(np.zeros((3, 2), np.float32))
        grad = fastadam.Adam(param).grads
        assert (grad.shape, grad.dtype, grad.flags.f_contiguous) == ((3, 2), np.float32, True)

    @pytest.mark.parametrize("kind", [list, tuple, iter])
    def test_sequence_is_a_tuple(self, kind):
        grads = fastadam.Adam(kind(zeros())).grads
        assert isinstance(grads, tuple)
        assert [grad.shape for grad in grads] == SHAPES
        assert not any(grad.any() for grad in grads)

    def test_mapping_is_one_by_name(self):
        opt = fastadam.Adam({"w": np.zeros(2), "b": np.zeros((1, 3))})
        assert isinstance(opt.grads, Mapping)
        assert {name: grad.shape for name, grad in opt.grads.items()} == {"w": (2,), "b": (1, 3)}

    @pytest.mark.parametrize(
        ("params", "key"), [([np.zeros(2)], 0), ({"w": np.zeros(2)}, "w")], ids=["list", "dict"]
    )
    def test_arrays_are_written_to_and_not_replaced(self, params, key):
        opt = fastadam.Adam(params)
        kept = opt.grads[key]
        opt.grads[key] += 2.0
        opt.grads[key][...] *= 2.0
        message = rf"^entry {key!r} must stay the object it is, got ndarray; to change an array"
        with pytest.raises(TypeError, match=message):
            opt.grads[key] = np.ones(2)
        with pytest.raises((TypeError, AttributeError)):
            del opt.grads[key]
        with pytest.raises(TypeError, match=r"^grads must stay the object it is, got dict"):
            opt.grads = {}
        assert opt.grads[key] is kept
        np.testing.assert_array_equal(kept, 4.0)

    def test_one_array_is_not_replaced(self):
        opt = fastadam.Adam(np.zeros(2))
        opt.grads += 3.0
        np.testing.assert_array_equal(opt.grads, 3.0)
        with pytest.raises(TypeError, match=r"^grads must stay the object it is, got ndarray"):
            opt.grads = np.ones(2)

    def test_groups_are_a_tuple_of_those(self):
        groups = [zeros(), {"w": np.zeros(2)}, np.zeros(5)]
        grads = fastadam.Adam([{"params": group} for group in groups]).grads
        assert isinstance(grads, tuple)
        for entry, kind in zip(grads, (tuple, Mapping, np.ndarray), strict=True):
            assert isinstance(entry, kind)
        assert [grad.shape for grad in grads[0]] == SHAPES

    def test_empty(self):
        assert fastadam.Adam([]).grads == ()
        assert fastadam.Adam({}).grads == {}
        opt = fastadam.Adam([])
        assert opt.grads == ()
        assert opt.step().step == 0

    def test_the_same_object_at_each_access(self):
        opt = fastadam.Adam({"w": np.zeros(2)})
        grads = opt.grads
        opt.step()
        opt.step({"w": np.ones(2)})
        assert opt.grads is grads

    @pytest.mark.parametrize("dtypes", [("f8",), ("f4",), ("f4", "f8")])
    def test_one_buffer_of_cache_lines(self, dtypes):
        params = [np.zeros(s, dtypes[k % len(dtypes)]) for k, s in enumerate(SHAPES * 3)]
        half = len(params) // 2
        opt = fastadam.Adam([{"params": params[:half]}, {"params": params[half:]}])
        grads = [grad for group in opt.grads for grad in group]
        assert len({id(root(grad)) for grad in grads}) == 1
        assert all(grad.ctypes.data % 64 == 0 for grad in grads if grad.size)
        assert all(grad.dtype == param.dtype for grad, param in zip(grads, params, strict=True))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtypes", [("f8",), ("f8", "f4")], ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_own_and_given_gradients_agree(rng, tail, dtypes, name):
    """`step()`, `step(opt.grads)`, lists of the same or of new arrays, and all in turn."""
    shapes = [*SHAPES, (9_000,)]
    starts = [
        np.asarray(rng.standard_normal(shape)).astype(dtypes[k % len(dtypes)])
        for k, shape in enumerate(shapes)
    ]
    kept = [np.zeros_like(start) for start in starts]

    def give_kept(opt, values, **options):
        fill(kept, values)
        return opt.step(kept, **options)

    def give_new(opt, values, **options):
        return opt.step([value.copy() for value in values], **options)

    def give_own(opt, values, **options):
        fill(opt.grads, values)
        result = opt.step(**options)
        assert any(grad.any() for grad in opt.grads) != options["zero_grad"]
        return result

    def name_own(opt, values, **options):
        fill(opt.grads, values)
        return opt.step(opt.grads, **options)

    def list_own(opt, values, **options):
        fill(opt.grads, values)
        return opt.step(list(opt.grads), **options)

    gives = [give_new, give_kept, give_own, name_own, list_own]
    found = set()
    for first in range(len(gives) + 1):
        seed = np.random.default_rng(8)
        params = [start.copy() for start in starts]
        with way(name):
            opt, results = fastadam.Adam(params, **TAILS[tail]), []
            for step in range(10):
                give = gives[first if first < len(gives) else step % len(gives)]
                values = draw(seed, params)
                results.append(give(opt, values, grad_scale=1.5, zero_grad=step % 3 == 0))
        found.add(repr((picture(opt, params), results)))
    assert len(found) == 1


def test_own_gradients_and_none():
    """None takes its parameter out of a step; the next step without argument has it again."""
    params = [np.zeros(3), np.zeros(3)]
    opt = fastadam.Adam(params, lr=0.5)
    fill(opt.grads, [np.ones(3), np.ones(3)])
    opt.step()
    opt.step([None, opt.grads[1]])
    opt.step([opt.grads[1], None])  # not where it belongs, and yet an array that fits
    assert [opt.state[k]["step"] for k in (0, 1)] == [2, 2]
    opt.step()
    assert [opt.state[k]["step"] for k in (0, 1)] == [3, 3]
    np.testing.assert_allclose(params[0], params[1])


@pytest.mark.parametrize("params", [np.zeros(2), [np.zeros(2)], {"w": np.zeros(2)}, []])
def test_step_without_gradients(params):
    opt = fastadam.Adam(params)
    with pytest.raises(ValueError, match=r"^grads must be given, or opt.grads be filled before"):
        opt.step()
    assert opt.step_count == 0
    assert opt.grads is not None
    assert opt.step().step == 0


def test_add_param_group_makes_new_ones():
    opt = fastadam.Adam([np.zeros(2)], lr=0.5)
    old = opt.grads
    old[0][:] = 1.0
    opt.step()
    late = np.zeros(3)
    opt.add_param_group({"params": {"late": late}})
    with pytest.raises(ValueError, match="grads must be given"):
        opt.step()
    with pytest.raises(ValueError, match="grads must have one entry for each of 2 groups, got 1"):
        opt.step(old)
    assert not opt.grads[0][0].any()
    opt.grads[1]["late"][:] = 1.0
    opt.step()
    np.testing.assert_allclose(late, -0.5)
    assert [s["step"] for s in opt.state.values()] == [2, 1]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_makes_its_own(duplicate):
    opt = fastadam.Adam(np.zeros(2))
    opt.grads[:] = 1.0
    twin = duplicate(opt)
    with pytest.raises(ValueError, match="grads must be given"):
        twin.step()
    assert not np.shares_memory(twin.grads, opt.grads)
    assert not twin.grads.any()
    opt.step()
    assert twin.step_count == 0


@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: setattr(p.flags, "writeable", False),
        lambda p: setattr(p, "dtype", np.float32),
        lambda p: p.__setstate__((1, (2,), np.dtype("f8"), False, np.ones(2).tobytes())),
    ],
    ids=["read-only", "dtype", "memory"],
)
def test_parameters_changed_in_place_are_found_with_own_gradients(spoil):
    """As with gradients that are given: the kernel must not write where nothing is any more."""
    param = np.ones(4)
    opt = fastadam.Adam(param)
    opt.grads[:] = 1.0
    spoil(param)
    before = param.copy()
    with pytest.raises((TypeError, ValueError), match=r"params(\.dtype)? must"):
        opt.step()
    np.testing.assert_array_equal(param, before)
    assert opt.step_count == 0


class TestArraysThatComeAndGo:
    """Nothing is remembered of an array that may not be there any more."""

    def follow(self, steps, rng, **options):
        """Take the steps twice: with the arrays that ``steps`` yields, and with new ones."""
        params, twins = [np.zeros(n) for n in (5, 5, 70)], [np.zeros(n) for n in (5, 5, 70)]
        opt, other = fastadam.Adam(params, **options), fastadam.Adam(twins, **options)
        for grads in steps:
            for grad in grads:
                if grad is not None:
                    grad[:] = rng.standard_normal(grad.size)
            other.step([grad if grad is None else grad.copy() for grad in grads])
            opt.step(grads)
        assert picture(opt, params) == picture(other, twins)

    @pytest.mark.parametrize("tail", TAILS)
    def test_new_at_each_step(self, rng, tail):
        steps = ([np.empty(5), np.empty(5), np.empty(70)] for _ in range(20))
        self.follow(steps, rng, **TAILS[tail])

    @pytest.mark.parametrize("tail", TAILS)
    def test_two_that_swap_places(self, rng, tail):
        one, two, three = np.empty(5), np.empty(5), np.empty(70)
        steps = ([one, two, three] if k % 2 else [two, one, three] for k in range(20))
        self.follow(steps, rng, **TAILS[tail])

    @pytest.mark.parametrize("tail", TAILS)
    def test_two_sets_in_turn(self, rng, tail):
        sets = [[np.empty(5), np.empty(5), np.empty(70)] for _ in range(2)]
        self.follow((sets[k % 2] for k in range(20)), rng, **TAILS[tail])

    @pytest.mark.parametrize("tail", TAILS)
    def test_absent_now_and_then(self, rng, tail):
        own = [np.empty(5), np.empty(5), np.empty(70)]
        steps = [[g if rng.random() < 0.7 else None for g in own] for _ in range(30)]
        self.follow(steps, rng, **TAILS[tail])


def overlap(one, other):
    """Whether two contiguous arrays have a byte in common."""
    a, b = one.ctypes.data, other.ctypes.data
    return one.nbytes > 0 < other.nbytes and a < b + other.nbytes and b < a + one.nbytes


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("seed", range(6))
def test_overlaps_are_found_wherever_they_are(tail, seed):
    """Views of what a step writes, and of one another, against each pair of intervals."""
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(100):
        sizes = rng.integers(0, 7, rng.integers(1, 6))
        buffer = np.arange(80.0) + 1.0
        edges = np.cumsum(sizes + rng.integers(0, 4, sizes.size))
        params = [buffer[end - n : end] for end, n in zip(edges, sizes, strict=True)]
        opt = fastadam.Adam(params, **TAILS[tail])
        states = [a for s in opt.state.values() for k, a in s.items() if k != "step"]
        moments = np.frombuffer(root(states[0])[root(states[0]).ctypes.data % 8 :], np.float64)
        spare = np.ones(60)
        for _ in range(4):
            grads = []
            for n in sizes:
                # As a rule from where there is room.
                place = rng.choice(4, p=[0.06, 0.06, 0.78, 0.1])
                source = (buffer, moments, spare, None)[place]
                start = 0 if source is None else rng.integers(0, source.size - n + 1)
                grads.append(None if source is None else source[start : start + n])
            present = [grad for grad in grads if grad is not None]
            if not present:
                continue
            bad = any(overlap(grad, own) for grad in present for own in (*params, *states)) or any(
                overlap(a, b) for k, a in enumerate(present) for b in present[:k]
            )
            if bad:
                refused += 1
                before = buffer.tobytes(), root(states[0]).tobytes(), spare.tobytes()
                count = opt.step_count
                with pytest.raises(ValueError, match="must not share memory"):
                    opt.step(grads)
                assert (buffer.tobytes(), root(states[0]).tobytes(), spare.tobytes()) == before
                assert opt.step_count == count
            else:
                opt.step(grads)
    assert 40 < refused < 360


@pytest.mark.parametrize("tail", TAILS)
def test_by_one_element_at_every_place(tail):
    """One of many gradients reaches one element into what is not its own."""
    buffer = np.zeros(400)
    params = [buffer[40 * k : 40 * k + 5] for k in range(10)]
    opt = fastadam.Adam(params, **TAILS[tail])
    own = [*params, *(a for s in opt.state.values() for n, a in s.items() if n != "step")]
    for k in range(10):
        grads = [np.zeros(5) for _ in params]
        grads[k] = buffer[40 * k + 5 : 40 * k + 10]
        opt.step(grads)  # the neighbour of its parameter
        grads[k] = buffer[40 * k + 4 : 40 * k + 9]
        with pytest.raises(ValueError, match=rf"grads\[{k}\] .* with params\[{k}\], which"):
            opt.step(grads)
        pair = np.zeros(9)
        grads[k], grads[(k + 3) % 10] = pair[:5], pair[4:]
        with pytest.raises(ValueError, match=r"grads\[\d\] and grads\[\d\] must not share"):
            opt.step(grads)
        for array in own:
            grads[k], grads[(k + 3) % 10] = array, None
            with pytest.raises(ValueError, match=rf"grads\[{k}\] must not share memory with"):
                opt.step(grads)
    assert opt.step_count == 10


class TestParamGroups:
    """Whatever writes a hyperparameter is noticed at the next step."""

    @pytest.mark.parametrize(
        "write",
        [
            lambda g: g.__setitem__("lr", 0.25),
            lambda g: g.update(lr=0.25),
            lambda g: g.update({"lr": 0.25}),
            lambda g: g.update([("lr", 0.25)]),
            lambda g: g.__ior__({"lr": 0.25}),
            lambda g: (g.pop("lr"), g.__setitem__("lr", 0.25)),
            lambda g: (g.pop("lr"), g.setdefault("lr", 0.25)),
            lambda g: (g.__delitem__("lr"), g.update(lr=0.25)),
            lambda g: (lambda kept: (g.clear(), g.update({**kept, "lr": 0.25})))(dict(g)),
        ],
        ids=["[]", "update", "dict", "pairs", "|=", "pop", "setdefault", "del", "clear"],
    )
    def test_a_new_value_is_used(self, write):
        param = np.zeros(2)
        opt = fastadam.Adam(param, lr=0.5)
        group = opt.param_groups[0]
        opt.grads[:] = 1.0
        assert opt.step().lr == 0.5
        write(group)
        assert opt.step().lr == 0.25
        assert opt.step().lr == 0.25
        np.testing.assert_allclose(param, -1.0)
        assert type(group) is type(opt.param_groups[0])

    @pytest.mark.parametrize(
        ("write", "message"),
        [
            (lambda g: g.__delitem__("lr"), r"param_groups\[0\] must have 'lr'"),
            (lambda g: g.pop("betas"), r"param_groups\[0\] must have 'betas'"),
            (lambda g: g.clear(), r"param_groups\[0\] must have 'lr'"),
            (lambda g: g.popitem(), r"keep its keys and its 'params', got \['params'\]"),
            (lambda g: g.update(momentum=1), r"keep its keys .*, got \['momentum'\]"),
            (lambda g: g.setdefault("x", 1), r"keep its keys .*, got \['x'\]"),
            (lambda g: g.__ior__({"eps": -1.0}), r"param_groups\[0\].eps must be finite and >= 0"),
        ],
        ids=["del", "pop", "clear", "popitem", "update", "setdefault", "|="],
    )
    def test_what_does_not_fit_is_refused_until_it_does(self, write, message):
        param = np.zeros(2)
        opt = fastadam.Adam(param)
        group = opt.param_groups[0]
        kept = dict(group)
        opt.step(np.ones(2))
        before = picture(opt, [param])
        write(group)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                opt.step(np.ones(2))
        group.clear()
        group.update(kept)
        assert picture(opt, [param]) == before
        assert opt.step(np.ones(2)).step == 1

    def test_one_group_of_several(self):
        params = [np.zeros(1), np.zeros(1), np.zeros(1)]
        opt = fastadam.Adam([{"params": p, "lr": 0.5} for p in params])
        grads = [np.ones(1) for _ in params]
        opt.step(grads)
        opt.param_groups[1]["lr"] = 0.25
        assert opt.step(grads).lr == 0.5
        np.testing.assert_allclose(np.concatenate(params), [-1.0, -0.75, -1.0])
        opt.lr = 0.125
        opt.step(grads)
        np.testing.assert_allclose(np.concatenate(params), [-1.125, -0.875, -1.125])

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_of_a_copy(self, duplicate):
        opt = fastadam.Adam(np.zeros(2), lr=0.5)
        opt.step(np.ones(2))
        twin = duplicate(opt)
        twin.param_groups[0]["lr"] = 0.25
        assert twin.step(np.ones(2)).lr == 0.25
        assert opt.step(np.ones(2)).lr == 0.5

    def test_loaded_ones_are_used(self):
        opt = fastadam.Adam(np.zeros(2), lr=0.5)
        opt.step(np.ones(2))
        state = opt.state_dict()
        state["param_groups"][0]["lr"] = 0.25
        opt.load_state_dict(state)
        assert opt.step(np.ones(2)).lr == 0.25
