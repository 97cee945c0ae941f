"""save, load and inspect: everything comes back, in place, or nothing is touched."""

import json
import math
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import numpy as np
import pytest
from tools import full_picture

import fastadam
from fastadam import CheckpointError, checkpoint, schedules
from fastadam.cpu import backend
from fastadam.state.state_dict import LoadedState

pytest.importorskip("safetensors", exc_type=ImportError)
from safetensors.numpy import load_file

# What was saved by each version of the format.
DATA = Path(__file__).parent / "data"

EVERYTHING = {
    "weight_decay": 0.1,
    "decoupled_weight_decay": True,
    "amsgrad": True,
    "maximize": True,
    "schedule": schedules.warmup(schedules.cosine(30), 4),
    "max_grad_norm": math.inf,
    "nonfinite": "skip",
    "ema_decay": 0.9,
}
OTHER = {"lr": 0.5, "betas": (0.25, 0.75), "eps": 1e-3}
SCHEDULES = [
    schedules.constant(0.25),
    schedules.cosine(20, 0.125),
    schedules.linear(20, 0.5, 0.125),
    schedules.polynomial(20, 1.5, 0.5, 0.125),
    schedules.exponential(0.9, 3, 0.1, True),
    schedules.inverse_sqrt(3),
    schedules.one_cycle(20, 0.4, 10.0, 100.0),
    schedules.warmup_stable_decay(20, 3, 5, 0.1, "sqrt"),
    schedules.cosine_restarts(4, 2, 0.1, 3),
    schedules.piecewise([3, 7], [1.0, 0.1 + 0.2, 1e-300]),
    schedules.warmup(schedules.warmup(schedules.piecewise([2], [1, 0.5]), 2), 3),
    schedules.chain(schedules.constant()),
    schedules.chain(
        (schedules.chain((schedules.linear(3), 2), schedules.constant(1 / 3)), 4),
        (schedules.warmup(schedules.cosine(5), 2), 7),
        schedules.chain((schedules.constant(), 1), schedules.inverse_sqrt(2)),
    ),
]


def halving(step):
    return 0.5**step


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def draw(rng, shape, dtype="f8", order="C"):
    return np.array(rng.standard_normal(shape), dtype, order=order)


# Parameters in each container, some with hyperparameters of their own.
CONTAINERS = {
    "list": lambda rng: [draw(rng, (3, 4)), draw(rng, 5)],
    "named": lambda rng: {
        "w": draw(rng, (3, 4)),
        "b/1": draw(rng, 5),
        "": draw(rng, 2),
        "ü": draw(rng, 1),
    },
    "mixed": lambda rng: [
        {"params": [draw(rng, 3)], "lr": 0.02, "maximize": True},
        {"params": {"w": draw(rng, (2, 2)), "b": draw(rng, 2, "f4")}, "betas": (0.5, 0.99)},
        {"params": draw(rng, 7), "eps": 1e-4, "weight_decay": 0.25},
        {"params": []},
    ],
    "single": lambda rng: draw(rng, (2, 3)),
    "0-d": lambda rng: [draw(rng, ()), draw(rng, (), "f4")],
    "empty": lambda rng: [draw(rng, 0), draw(rng, (3, 0, 2), "f4"), draw(rng, 2)],
    "fortran": lambda rng: [draw(rng, (3, 4), order="F"), draw(rng, (2, 3, 4), "f4", "F")],
    "dtypes": lambda rng: [draw(rng, 300, "f4"), draw(rng, (4, 5)), draw(rng, 9, "f4")],
    "nothing": lambda _: [],
}


def arrays_of(params):
    """Return the arrays in any container, in order."""
    if isinstance(params, np.ndarray):
        return [params]
    if isinstance(params, dict):
        return arrays_of(params["params"]) if "params" in params else [*params.values()]
    return [array for part in params for array in arrays_of(part)]


def like(params, make):
    """Return the same container, with what is made of each array."""
    if isinstance(params, np.ndarray):
        return make(params)
    if isinstance(params, dict):
        if "params" in params:
            return like(params["params"], make)
        return {name: make(array) for name, array in params.items()}
    return [like(part, make) for part in params]


def advance(opt, params, seed, steps=3):
    """Take steps, in each of which some parameters, but the first, have no gradient."""
    rng = np.random.default_rng(seed)
    first = next(iter(arrays_of(params)), None)

    def grad_of(param):
        grad = np.empty_like(param)
        grad[...] = rng.standard_normal(param.shape)
        return None if param is not first and rng.random() < 0.3 else grad

    return [opt.step(like(params, grad_of)) for _ in range(steps)]


def contents(opt):
    """Return what of a picture a checkpoint holds."""
    whole = full_picture(opt)
    return [whole[name] for name in ("bits", "counts", "groups", "settings", "structure")]


class TestRoundTrip:
    @pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
    @pytest.mark.parametrize("container", CONTAINERS)
    def test_everything_comes_back_and_goes_on(self, container, options, path):
        params = CONTAINERS[container](np.random.default_rng(1))
        opt = fastadam.Adam(params, **options)
        advance(opt, params, 2)
        before = full_picture(opt)
        assert fastadam.save(path, opt) is None
        assert full_picture(opt) == before

        twin = CONTAINERS[container](np.random.default_rng(9))
        if container == "mixed":
            twin = [{"params": group["params"]} for group in twin]
        own = {name: options[name] for name in ("amsgrad", "ema_decay") if name in options}
        new = fastadam.Adam(twin, **own, **OTHER)
        found = fastadam.load(path, new)
        assert contents(new) == contents(opt)
        assert (found.step_count, found.extra) == (3, {})
        assert found.steps == {key: state["step"] for key, state in opt.state.items()}
        assert advance(new, twin, 3) == advance(opt, params, 3)
        assert contents(new) == contents(opt)

    def test_every_schedule_is_among_those_here(self):
        classes = {getattr(schedules, name) for name in schedules.__all__ if name != "Schedule"}
        assert {type(schedule) for schedule in SCHEDULES} == classes

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_schedules(self, schedule, path):
        fastadam.save(path, fastadam.Adam([np.ones(2)], schedule=schedule))
        for given in (None, schedules.constant(7.0), halving):
            opt = fastadam.Adam([np.ones(2)], schedule=given)
            assert fastadam.load(path, opt).schedule == schedule
            assert opt.schedule == schedule
            assert repr(opt.schedule) == repr(schedule)
            assert [opt.schedule(k) for k in range(40)] == [schedule(k) for k in range(40)]

    @pytest.mark.parametrize("schedule", [halving, schedules.warmup(halving, 3)])
    def test_schedules_of_the_users_own_are_kept(self, schedule, path):
        fastadam.save(path, fastadam.Adam([np.ones(2)], lr=0.25, schedule=schedule))
        assert checkpoint.inspect(path).schedule == repr(schedule)
        for own in (halving, schedules.cosine(3)):
            opt = fastadam.Adam([np.ones(2)], schedule=own)
            fastadam.load(path, opt)
            assert (opt.schedule, opt.lr) == (own, 0.25)
        bare = fastadam.Adam([np.ones(2)])
        before = full_picture(bare)
        with pytest.raises(
            CheckpointError, match=r"schedule was .*halving.*, which the optimizer"
        ):
            fastadam.load(path, bare)
        assert full_picture(bare) == before
        fastadam.load(path, bare, hyperparameters=False)
        assert bare.schedule is None

    def test_no_schedule_takes_away_one(self, path):
        fastadam.save(path, fastadam.Adam([np.ones(2)]))
        opt = fastadam.Adam([np.ones(2)], schedule=halving, max_grad_norm=1.0, nonfinite="raise")
        fastadam.load(path, opt)
        assert (opt.schedule, opt.max_grad_norm, opt.nonfinite) == (None, None, "propagate")

    def test_hyperparameters_changed_on_the_way(self, path):
        params = CONTAINERS["mixed"](np.random.default_rng(1))
        opt = fastadam.Adam(params)
        advance(opt, params, 2)
        opt.param_groups[1].update(lr=0.1 + 0.2, betas=[0.125, 0.5], weight_decay=1, maximize=True)
        opt.param_groups[0]["decoupled_weight_decay"] = True
        opt.schedule, opt.max_grad_norm, opt.nonfinite = schedules.cosine(9), 0.5, "raise"
        fastadam.save(path, opt)
        new = fastadam.Adam(CONTAINERS["mixed"](np.random.default_rng(5)))
        fastadam.load(path, new)
        assert contents(new) == contents(opt)
        assert type(new.param_groups[1]["weight_decay"]) is float

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("lr", np.float32(0.1)),
            ("lr", np.int64(1)),
            ("betas", (np.float32(0.5), 0.25)),
            ("eps", np.float64(1e-3)),
            ("maximize", np.True_),
        ],
    )
    def test_hyperparameters_of_numpys_types(self, name, value, path):
        """A step takes them, and so does a file."""
        params = [np.ones(2)]
        opt = fastadam.Adam(params)
        opt.param_groups[0][name] = value
        fastadam.save(path, opt)
        new = fastadam.Adam([np.zeros(2)])
        fastadam.load(path, new)
        assert new.param_groups[0][name] == opt.param_groups[0][name]

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [
            ("lr", -1.0, ValueError),
            ("lr", math.nan, ValueError),
            ("eps", "1", TypeError),
            ("betas", (1.0, 0.5), ValueError),
            ("lr", 1e300, ValueError),
        ],
    )
    def test_hyperparameters_that_no_load_would_take_are_not_saved(self, name, value, error, path):
        opt = fastadam.Adam([np.ones(2, "f4")])
        fastadam.save(path, opt)
        good = path.read_bytes()
        opt.param_groups[0][name] = value
        with pytest.raises(error, match=rf"param_groups\[0\]\.{name}.* must "):
            fastadam.save(path, opt)
        assert path.read_bytes() == good

    def test_counts_past_the_integers_of_a_float(self, path):
        opt = fastadam.Adam([np.ones(2), np.ones(3)])
        state = opt.state_dict()
        state["state"][0]["step"], state["state"][1]["step"] = 2**53 + 1, 2**62 - 1
        state["step_count"] = 2**61 + 1
        opt.load_state_dict(state)
        fastadam.save(path, opt)
        new = fastadam.Adam([np.ones(2), np.ones(3)])
        assert fastadam.load(path, new).steps == {0: 2**53 + 1, 1: 2**62 - 1}
        assert [new.state[k]["step"] for k in (0, 1)] == [2**53 + 1, 2**62 - 1]
        assert new.step_count == checkpoint.inspect(path).step_count == 2**61 + 1

    def test_added_groups(self, path):
        first, second = np.ones(3), np.ones(2, "f4")
        opt = fastadam.Adam([first])
        opt.step([np.ones(3)])
        opt.add_param_group({"params": {"late": second}, "lr": 0.5})
        opt.step([[np.full(3, 2.0)], {"late": np.ones(2, "f4")}])
        fastadam.save(path, opt)
        new = fastadam.Adam([{"params": [np.zeros(3)]}, {"params": {"late": np.zeros(2, "f4")}}])
        assert fastadam.load(path, new).steps == {0: 2, "late": 1}
        assert contents(new) == contents(opt)
        added = fastadam.Adam([np.zeros(3)])
        with pytest.raises(
            CheckpointError, match=r"has 'late', .*param_groups has 2 groups, not 1"
        ):
            fastadam.load(path, added)
        added.add_param_group({"params": {"late": np.zeros(2, "f4")}})
        fastadam.load(path, added)
        assert contents(added) == contents(opt)

    def test_groups_may_list_names_in_another_order(self, path):
        params = CONTAINERS["named"](np.random.default_rng(1))
        opt = fastadam.Adam(params)
        advance(opt, params, 2)
        fastadam.save(path, opt)
        turned = {name: np.zeros_like(params[name]) for name in reversed(params)}
        new = fastadam.Adam(turned)
        fastadam.load(path, new)
        for name, param in params.items():
            assert turned[name].tobytes() == param.tobytes()
            assert new.state[name]["step"] == opt.state[name]["step"]

    def test_values_that_are_not_finite(self, path):
        values = np.array([math.nan, math.inf, -math.inf, -0.0, 5e-324])
        opt = fastadam.Adam([values.copy()], ema_decay=0.5)
        fastadam.save(path, opt)
        new = fastadam.Adam([np.zeros(5)], ema_decay=0.5)
        fastadam.load(path, new)
        assert contents(new) == contents(opt)

    def test_adamw_and_subclasses(self, path):
        class Mine(fastadam.AdamW):
            pass

        fastadam.save(path, Mine([np.ones(2)], weight_decay=0.25))
        opt = fastadam.Adam([np.zeros(2)])
        fastadam.load(str(path), opt)
        assert opt.param_groups[0]["weight_decay"] == 0.25
        assert opt.param_groups[0]["decoupled_weight_decay"]


class Value:
    def __init__(self, data):
        self.data, self.grad = data, 0.0


class Stubborn(Value):
    """Refuses to be set, from when it is told to."""

    refuses = False

    def __setattr__(self, name, value):
        if name == "data" and self.refuses:
            raise KeyError("stubborn")
        object.__setattr__(self, name, value)


class TestObjects:
    def objects(self, scale=1.0):
        return [
            Value(2.0 * scale),
            Value(np.full((2, 2), scale)),
            Value(3),
            Value(np.full(2, scale, "f4")),
        ]

    def advance(self, opt, objects, steps=3):
        for step in range(steps):
            for k, thing in enumerate(objects):
                thing.grad = None if k == step else 0 * thing.data + (k + 1.0)
            opt.step()

    def values(self, objects):
        return [np.asarray(thing.data).tobytes() for thing in objects]

    def test_round_trip(self, path):
        objects = self.objects()
        opt = fastadam.from_objects(objects, amsgrad=True, ema_decay=0.5)
        self.advance(opt, objects)
        fastadam.save(path, opt)
        twins = self.objects(7.0)
        arrays = [thing.data for thing in twins]
        new = fastadam.from_objects(twins, lr=3.0, amsgrad=True, ema_decay=0.5)
        fastadam.load(path, new)
        assert contents(new) == contents(opt)
        assert self.values(twins) == self.values(objects)
        assert type(twins[0].data) is float
        assert twins[1].data is arrays[1]
        for each, things in ((opt, objects), (new, twins)):
            self.advance(each, things)
        assert contents(new) == contents(opt)
        assert self.values(twins) == self.values(objects)

    def test_values_set_since_the_last_step_are_saved(self, path):
        thing = Value(1.0)
        opt = fastadam.from_objects([thing])
        thing.data = 5
        fastadam.save(path, opt)
        assert load_file(path)["param/0"] == 5.0

    def test_without_params(self, path):
        objects = self.objects()
        opt = fastadam.from_objects(objects)
        self.advance(opt, objects)
        fastadam.save(path, opt)
        twins = self.objects(7.0)
        before = self.values(twins)
        new = fastadam.from_objects(twins)
        fastadam.load(path, new, params=False)
        assert self.values(twins) == before
        assert (
            new.state_dict()["state"][1]["exp_avg"].tobytes()
            == opt.state_dict()["state"][1]["exp_avg"].tobytes()
        )
        for twin, thing in zip(twins, objects, strict=True):
            twin.data = (
                thing.data
                if np.isscalar(thing.data)
                else np.copyto(twin.data, thing.data) or twin.data
            )
        for each, things in ((opt, objects), (new, twins)):
            self.advance(each, things)
        assert self.values(twins) == self.values(objects)

    def test_an_array_that_was_replaced_is_neither_saved_nor_loaded(self, path):
        thing = Value(np.ones(2))
        opt = fastadam.from_objects([thing])
        fastadam.save(path, opt)
        good = path.read_bytes()
        thing.data = np.full(2, 7.0)
        message = r"params\[0\].data must stay the array"
        with pytest.raises(ValueError, match=message):
            fastadam.save(path, opt)
        assert path.read_bytes() == good
        before = full_picture(opt)
        with pytest.raises(ValueError, match=message):
            fastadam.load(path, opt)
        assert full_picture(opt) == before

    def test_one_that_cannot_be_set_leaves_the_others_loaded(self, path):
        things = [Stubborn(1.0), Stubborn(2.0), Value(np.ones(2))]
        opt = fastadam.from_objects(things)
        self.advance(opt, things)
        fastadam.save(path, opt)
        twins = [Stubborn(7.0), Stubborn(8.0), Value(np.zeros(2))]
        new = fastadam.from_objects(twins)
        object.__setattr__(twins[0], "refuses", True)
        with pytest.raises(KeyError, match="stubborn"):
            fastadam.load(path, new)
        assert contents(new) == contents(opt)
        assert self.values(twins[1:]) == self.values(things[1:])
        assert twins[0].data == 7.0

    def test_what_is_not_loaded_keeps_the_value_set_since_the_last_step(self, path):
        fastadam.save(path, fastadam.from_objects([Value(1.0)]))
        things = [Value(2.0), Value(3.0)]
        opt = fastadam.from_objects(things)
        things[1].data = 4.0
        assert fastadam.load(path, opt, partial=True).loaded == (0,)
        assert [thing.data for thing in things] == [1.0, 4.0]

    def test_a_value_of_the_wrong_kind_is_not_saved(self, path):
        thing = Value(1.0)
        opt = fastadam.from_objects([thing])
        thing.data = "1"
        with pytest.raises(TypeError, match=r"params\[0\].data must be a real number"):
            fastadam.save(path, opt)
        assert not path.exists()


def pair(**options):
    """Return parameters by name and an optimizer of them, some steps on."""
    rng = np.random.default_rng(4)
    params = {"w": draw(rng, (2, 3)), "b": draw(rng, 4, "f4")}
    opt = fastadam.Adam(params, **options)
    advance(opt, params, 5)
    return params, opt


class TestParts:
    def test_params_are_left_out(self, path):
        params, opt = pair()
        fastadam.save(path, opt, params=False)
        assert not any(name.startswith("param/") for name in load_file(path))
        twin, new = pair(lr=0.5)
        advance(new, twin, 7)
        before = [array.tobytes() for array in twin.values()]
        with pytest.raises(CheckpointError, match="no parameters: load with params=False"):
            fastadam.load(path, new)
        fastadam.load(path, new, params=False)
        assert [array.tobytes() for array in twin.values()] == before
        assert contents(new)[1:] == contents(opt)[1:]
        for name, state in opt.state.items():
            assert new.state[name]["exp_avg"].tobytes() == state["exp_avg"].tobytes()
        assert all(np.any(twin[name] != params[name]) for name in params)

    def test_params_are_in_the_file_but_not_wanted(self, path):
        _, opt = pair()
        fastadam.save(path, opt)
        new = fastadam.Adam(twin := {"w": np.full((2, 3), 7.0), "b": np.full(4, 7.0, "f4")})
        fastadam.load(path, new, params=False)
        assert all((array == 7.0).all() for array in twin.values())
        assert new.state["w"]["exp_avg"].any()

    def test_hyperparameters_stay(self, path):
        _, opt = pair(lr=0.25, schedule=schedules.cosine(9), max_grad_norm=1.0, nonfinite="skip")
        fastadam.save(path, opt)
        groups = [{"params": {"w": np.zeros((2, 3))}}, {"params": {"b": np.zeros(4, "f4")}}]
        new = fastadam.Adam(groups, **OTHER, schedule=halving, max_grad_norm=math.inf)
        before = full_picture(new)
        fastadam.load(path, new, hyperparameters=False)
        after = full_picture(new)
        for name in ("groups", "settings", "defaults", "structure", "places"):
            assert after[name] == before[name]
        assert after["bits"] == full_picture(opt)["bits"]
        assert after["counts"] == full_picture(opt)["counts"]

    def test_another_ema_decay(self, path):
        fastadam.save(path, pair(ema_decay=0.5)[1])
        params, opt = pair(ema_decay=0.25)
        with pytest.raises(CheckpointError, match=r"ema_decay is 0.5 in the file, not 0.25"):
            fastadam.load(path, opt)
        fastadam.load(path, opt, hyperparameters=False)
        assert opt.ema_decay == 0.25
        assert params["w"].shape == (2, 3)

    @pytest.mark.parametrize(
        "rename",
        [
            {"w": "weight", "b": "bias"},
            {"w": "weight", "b": "bias"}.get,
        ],
        ids=["mapping", "callable"],
    )
    def test_rename(self, rename, path):
        _, opt = pair()
        fastadam.save(path, opt)
        new = fastadam.Adam({"bias": np.zeros(4, "f4"), "weight": np.zeros((2, 3))})
        found = fastadam.load(path, new, rename=rename)
        assert found.steps.keys() == {"w", "b"}
        for old, name in (("w", "weight"), ("b", "bias")):
            assert new.state[name]["step"] == opt.state[old]["step"] > 0
            assert new.state[name]["exp_avg"].tobytes() == opt.state[old]["exp_avg"].tobytes()

    def test_rename_in_a_circle(self, path):
        opt = fastadam.Adam({"a": np.ones(2), "b": np.full(2, 2.0)})
        fastadam.save(path, opt)
        new = fastadam.Adam(params := {"a": np.zeros(2), "b": np.zeros(2)})
        fastadam.load(path, new, rename={"a": "b", "b": "a"})
        assert (params["a"][0], params["b"][0]) == (2.0, 1.0)

    def test_places_get_names_and_names_places(self, path):
        opt = fastadam.Adam([np.ones(2), np.full(3, 2.0)])
        fastadam.save(path, opt)
        new = fastadam.Adam(params := {"w": np.zeros(2), "b": np.zeros(3)})
        fastadam.load(path, new, rename={0: "w", 1: "b"})
        assert (params["w"][0], params["b"][0]) == (1.0, 2.0)
        fastadam.save(path, new)
        fastadam.load(path, opt, rename=["w", "b"].index)
        assert opt.state.keys() == {0, 1}

    def test_the_path_comes_first(self, path):
        opt = fastadam.Adam([np.ones(2)])
        with pytest.raises(TypeError) as caught:
            fastadam.save(opt, path)
        assert str(caught.value) == (
            "path must be str or os.PathLike, got Adam; it comes first, then the optimizer"
        )

    def test_a_place_and_its_digits_are_two(self, path):
        fastadam.save(path, fastadam.Adam([np.ones(2)]))
        with pytest.raises(CheckpointError, match=r"no '0'; the file has parameter 0, which"):
            fastadam.load(path, fastadam.Adam({"0": np.ones(2)}))
        both = fastadam.Adam([{"params": [np.ones(2)]}, {"params": {"0": np.ones(2)}}])
        with pytest.raises(ValueError, match="names must differ from the places of parameters"):
            fastadam.save(path, both)

    def test_rename_of_two_to_one(self, path):
        fastadam.save(path, fastadam.Adam({"a": np.ones(2), "b": np.ones(2)}))
        opt = fastadam.Adam({"a": np.zeros(2), "b": np.zeros(2)})
        before = full_picture(opt)
        for partial in (False, True):
            with pytest.raises(CheckpointError, match="rename makes 'b' of several"):
                fastadam.load(path, opt, rename={"a": "b"}, partial=partial)
            assert full_picture(opt) == before

    def test_a_rename_that_raises_or_gives_no_name(self, path):
        fastadam.save(path, fastadam.Adam({"a": np.ones(2)}))
        opt = fastadam.Adam({"a": np.zeros(2)})
        before = full_picture(opt)
        with pytest.raises(ZeroDivisionError):
            fastadam.load(path, opt, rename=lambda _: 1 / 0)
        for name in (True, 1.5, ["a"]):
            with pytest.raises(TypeError, match=r"a parameter's name must be str, or int for a"):
                fastadam.load(path, opt, rename=lambda _, name=name: name)
        assert full_picture(opt) == before

    def test_partial(self, path):
        """What is in both is loaded; the rest, all hyperparameters and step_count stay."""
        params, opt = pair(lr=0.25, schedule=schedules.cosine(9))
        fastadam.save(path, opt)
        groups = [
            {"params": {"new": np.full(2, 7.0)}, "lr": 0.125},
            {"params": (twin := {"b": np.zeros(4, "f4")}), "eps": 0.5},
        ]
        new = fastadam.Adam(groups, nonfinite="skip")
        before = full_picture(new)
        found = fastadam.load(path, new, partial=True)
        after = full_picture(new)
        for name in ("groups", "settings", "defaults", "structure", "places"):
            assert after[name] == before[name]
        assert after["bits"][:3] == before["bits"][:3]
        assert after["bits"][3:] == full_picture(opt)["bits"][3:]
        assert twin["b"].tobytes() == params["b"].tobytes()
        assert after["counts"] == (0, [0, opt.state["b"]["step"]])
        assert found.steps.keys() == {"w", "b"}
        assert found.loaded == ("b",)

    def test_partial_of_what_does_not_fit(self, path):
        fastadam.save(path, pair()[1])
        new = fastadam.Adam({"b": np.zeros(5, "f4"), "x": np.zeros(2)})
        before = full_picture(new)
        with pytest.raises(CheckpointError, match=r"'b' is float32 \(4,\) in the file, not"):
            fastadam.load(path, new, partial=True)
        assert full_picture(new) == before

    def test_partial_of_nothing(self, path):
        fastadam.save(path, pair()[1])
        new = fastadam.Adam({"x": np.zeros(2)})
        before = full_picture(new)
        with pytest.raises(CheckpointError, match=r"has no 'x'; the file has 'w', 'b', which"):
            fastadam.load(path, new, partial=True)
        assert full_picture(new) == before

    def test_a_name_in_rename_that_the_file_has_not(self, path):
        fastadam.save(path, pair()[1])
        _, new = pair()
        for partial in (False, True):
            with pytest.raises(CheckpointError, match="rename has 'W', which the file has not"):
                fastadam.load(path, new, rename={"W": "w"}, partial=partial)

    def test_a_new_head_under_its_old_name(self, path):
        """Renamed to None, a parameter of the file is left out."""
        params, opt = pair()
        fastadam.save(path, opt)
        new = fastadam.Adam(twin := {"w": np.zeros((2, 3)), "b": np.ones(7)})
        found = fastadam.load(path, new, rename={"b": None}, partial=True)
        assert found.loaded == ("w",)
        assert twin["w"].tobytes() == params["w"].tobytes()
        assert twin["b"].all()
        with pytest.raises(CheckpointError, match="the file has no 'b'"):
            fastadam.load(path, new, rename={"b": None})

    def test_averages_that_one_has_alone(self, path):
        """In part of a file they are left out, or begin as the parameters loaded."""
        params, opt = pair(ema_decay=0.5)
        fastadam.save(path, opt)
        twin, plain = pair()
        with pytest.raises(CheckpointError, match=r"ema_decay is 0\.5 in the file, not None"):
            fastadam.load(path, plain)
        fastadam.load(path, plain, partial=True)
        assert twin["w"].tobytes() == params["w"].tobytes()
        fastadam.save(path, plain)
        twin, new = pair(ema_decay=0.5)
        twin["w"][:] = 9.0
        fastadam.load(path, new, partial=True)
        for name, average in new.ema_params.items():
            assert average.tobytes() == params[name].tobytes()

    def test_parameters_alone(self, path):
        params, opt = pair(lr=0.25)
        fastadam.save(path, opt)
        twin, new = pair(lr=0.125)
        new = fastadam.Adam(twin, lr=0.125)
        for array in twin.values():
            array[:] = 9.0
        fastadam.load(path, new, state=False)
        assert [a.tobytes() for a in twin.values()] == [a.tobytes() for a in params.values()]
        assert (new.step_count, new.lr, new.state["w"]["step"]) == (0, 0.125, 0)
        assert not new.state["w"]["exp_avg"].any()

    def test_partial_and_renamed(self, path):
        _, opt = pair()
        fastadam.save(path, opt)
        new = fastadam.Adam({"head": np.zeros(2), "body": (w := np.zeros((2, 3)))})
        fastadam.load(path, new, rename={"w": "body"}, partial=True)
        assert w.any()
        assert new.state["head"]["step"] == 0


class TestFiles:
    def test_keep(self, path):
        opt = fastadam.Adam([param := np.zeros(1)])
        for value in range(5):
            param[:] = value
            fastadam.save(path, opt, keep=3)
        found = {p.name: float(load_file(p)["param/0"][0]) for p in path.parent.iterdir()}
        assert found == {
            "run.safetensors": 4.0,
            "run.1.safetensors": 3.0,
            "run.2.safetensors": 2.0,
        }

    def test_extra(self, path):
        extra = {
            "epoch": 3,
            "loss": 1e-300,
            "rng": {"state": [2**80, None, True]},
            "text": "ü\ud800",
        }
        opt = fastadam.Adam([np.ones(1)])
        fastadam.save(path, opt, extra=extra)
        assert fastadam.load(path, opt).extra == extra
        assert checkpoint.inspect(path).extra == extra

    def test_extra_of_what_runs_have(self, path):
        opt = fastadam.Adam([np.ones(1)])
        rng = np.random.default_rng(3)
        extra = {"best": math.inf, "loss": np.float32(1.5), "n": np.int64(3), "pair": (1, 2)}
        fastadam.save(path, opt, extra={**extra, "rng": rng.bit_generator.state})
        found = fastadam.load(path, opt).extra
        again = np.random.default_rng()
        again.bit_generator.state = found.pop("rng")
        assert again.random() == rng.random()
        assert found == {"best": math.inf, "loss": 1.5, "n": 3, "pair": [1, 2]}

    @pytest.mark.parametrize(
        ("extra", "error", "message"),
        [
            ([1], TypeError, "extra must be a mapping, got list"),
            ({"x": np.ones(2)}, TypeError, r"extra\['x'\] must be made of .*, got ndarray"),
            (
                {"x": [{"y": {1}}]},
                TypeError,
                r"extra\['x'\]\[0\]\['y'\] must be made of .* got set",
            ),
            ({"x": {1: 2}}, TypeError, r"extra\['x'\] must have keys of str, got 1"),
        ],
    )
    def test_extra_that_is_no_json(self, extra, error, message, path):
        opt = fastadam.Adam([np.ones(1)])
        fastadam.save(path, opt, keep=2)
        good = path.read_bytes()
        with pytest.raises(error, match=message):
            fastadam.save(path, opt, extra=extra, keep=2)
        assert path.read_bytes() == good
        assert list(path.parent.iterdir()) == [path]

    def test_any_safetensors_reads_it(self, path):
        params = CONTAINERS["fortran"](np.random.default_rng(1))
        opt = fastadam.Adam(params, amsgrad=True, ema_decay=0.5)
        advance(opt, params, 2)
        fastadam.save(path, opt)
        expected = {
            f"{kind}/{key}": array
            for key, state in opt.state.items()
            for kind, array in (*state.items(), ("param", params[key]))
            if kind != "step"
        }
        found = load_file(path)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.dtype == expected[name].dtype
            np.testing.assert_array_equal(array, expected[name])

    def test_inspect(self, path):
        params = CONTAINERS["mixed"](np.random.default_rng(1))
        opt = fastadam.Adam(params, **EVERYTHING)
        advance(opt, params, 2)
        fastadam.save(path, opt, extra={"a": 1})
        for verify in (True, False):
            found = checkpoint.inspect(path, verify=verify)
            assert found.version == fastadam.__version__
            assert (found.step_count, found.extra) == (3, {"a": 1})
            assert found.schedule == EVERYTHING["schedule"]
            assert (found.max_grad_norm, found.nonfinite) == (math.inf, "skip")
            assert (found.ema_decay, found.amsgrad) == (0.9, True)
            assert [g["params"] for g in found.param_groups] == [[0], ["w", "b"], [3], []]
            assert [g["lr"] for g in found.param_groups] == [0.02, 0.01, 0.01, 0.01]
            tensors = {name: (a.dtype, a.shape) for name, a in load_file(path).items()}
            assert found.tensors == tensors
            assert list(found.tensors) == sorted(tensors)

    def test_a_count_that_was_edited(self, path):
        """What would still make sense is told by the checksum of all that is said."""
        opt = fastadam.Adam([np.ones(2)])
        opt.step([np.ones(2)])
        fastadam.save(path, opt)
        data = path.read_bytes()
        edited = data.replace(rb"\"step_count\":1,", rb"\"step_count\":2,")
        assert edited != data
        path.write_bytes(edited)
        for use in (checkpoint.inspect, lambda path: fastadam.load(path, opt)):
            with pytest.raises(CheckpointError, match="checksum of its header does not match"):
                use(path)
        assert opt.step_count == 1

    def test_verify_reads_the_tensors(self, path):
        fastadam.save(path, fastadam.Adam([np.ones(1000)]))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        checkpoint.inspect(path, verify=False)
        for use in (
            checkpoint.inspect,
            lambda p: fastadam.load(p, fastadam.Adam([np.ones(1000)])),
        ):
            with pytest.raises(
                CheckpointError, match=r"is damaged: the checksum of 'param/0' does not match"
            ):
                use(path)


class TestRefusals:
    def check(self, path, opt, *messages, **options):
        """Load what does not fit: all is in one message, nothing is touched."""
        before = full_picture(opt)
        with pytest.raises(CheckpointError) as caught:
            fastadam.load(path, opt, **options)
        assert str(caught.value).startswith(f"{path} must fit the optimizer: ")
        for message in messages:
            assert message in str(caught.value)
        assert full_picture(opt) == before

    def test_every_mismatch_in_one_message(self, path):
        params = [
            {"params": {"a": np.ones(2), "b": np.ones(3), "c": np.ones(4)}},
            {"params": {"d": np.ones(1)}},
        ]
        opt = fastadam.Adam(params, amsgrad=True, ema_decay=0.5, schedule=halving)
        fastadam.save(path, opt)
        other = [
            {"params": {"a": np.ones((2, 1)), "b": np.ones(3, "f4"), "e": np.ones(4)}},
            {"params": {"d": np.ones(1)}},
        ]
        own = {"lr": 0.5, "max_grad_norm": 2.0, "nonfinite": "skip"}
        new = fastadam.Adam(other, ema_decay=0.25, **own)
        advance(new, other, 1)
        self.check(
            path,
            new,
            "the file has no 'e'",
            "the file has 'c', which the optimizer has not",
            "'a' is float64 (2,) in the file, not float64 (2, 1)",
            "'b' is float64 (3,) in the file, not float32 (3,)",
            "amsgrad is True in the file, not False",
            "schedule was <function halving",
            "ema_decay is 0.5 in the file, not 0.25",
            "(rename= maps names, partial=True takes what both have)",
        )

    def test_an_optimizer_of_more(self, path):
        fastadam.save(path, pair()[1])
        _, opt = pair(amsgrad=True, ema_decay=0.5)
        self.check(path, opt, "amsgrad is False in the file, not True", "ema_decay is None in")

    def test_groups(self, path):
        fastadam.save(path, pair()[1])
        groups = [{"params": {"w": np.ones((2, 3))}}, {"params": {"b": np.ones(4, "f4")}}]
        self.check(path, fastadam.Adam(groups), "param_groups has 1 groups, not 2")

    def test_hyperparameters_that_the_dtype_cannot_hold(self, path):
        fastadam.save(path, fastadam.Adam([np.ones(0)], eps=1e-200))
        self.check(
            path, fastadam.Adam([np.ones(0, "f4")]), "0 is float64 (0,) in the file, not float32"
        )

    def test_arrays_made_read_only_since(self, path):
        opt = fastadam.Adam([np.ones(2), np.ones(2)])
        advance(opt, [np.ones(2)] * 2, 3)
        fastadam.save(path, opt)
        for kind in ("param", "exp_avg"):
            new = fastadam.Adam(params := [np.zeros(2), np.zeros(2)])
            array = {"param": params[1], **new.state[1]}[kind]
            array.flags.writeable = False
            self.check(path, new, "read-only")
            array.flags.writeable = True
            fastadam.load(path, new)

    def test_read_only_arrays_are_saved(self, path):
        opt = fastadam.Adam([param := np.ones(2)])
        param.flags.writeable = False
        fastadam.save(path, opt)
        assert load_file(path)["param/0"].tobytes() == param.tobytes()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"params": 1}, "params must be True or False, got 1"),
            ({"hyperparameters": None}, "hyperparameters must be True or False, got None"),
            ({"partial": "yes"}, "partial must be True or False, got 'yes'"),
            ({"rename": 3}, "rename must be a mapping or callable, got 3"),
            ({"rename": "w"}, "rename must be a mapping or callable, got 'w'"),
        ],
    )
    def test_arguments_of_load(self, options, message, path):
        fastadam.save(path, opt := fastadam.Adam([np.ones(1)]))
        with pytest.raises(TypeError, match=message):
            fastadam.load(path, opt, **options)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"params": 1}, TypeError, "params must be True or False, got 1"),
            ({"keep": 0}, ValueError, "keep must be >= 1, got 0"),
            ({"keep": True}, TypeError, "keep must be an integer, got True"),
            ({"keep": 1.0}, TypeError, "keep must be an integer, got 1.0"),
            ({"extra": 3}, TypeError, "extra must be a mapping, got int"),
        ],
    )
    def test_arguments_of_save(self, options, error, message, path):
        with pytest.raises(error, match=message):
            fastadam.save(path, fastadam.Adam([np.ones(1)]), **options)
        assert not path.exists()

    def test_what_is_no_optimizer(self, path):
        for use in (fastadam.save, fastadam.load):
            with pytest.raises(
                TypeError, match="opt must be an optimizer of fastadam's, got dict"
            ):
                use(path, {})

    def test_paths(self, path):
        opt = fastadam.Adam([np.ones(1)])
        for use in (fastadam.load, lambda p, _: checkpoint.inspect(p)):
            with pytest.raises(FileNotFoundError):
                use(path, opt)
            with pytest.raises(CheckpointError, match="must be a file"):
                use(path.parent, opt)
        with pytest.raises(FileNotFoundError):
            fastadam.save(path / "none" / "x", opt)
        with pytest.raises(FileExistsError):
            fastadam.save(path.parent, opt)

    def test_a_name_that_no_file_can_hold(self, path):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            fastadam.save(path, fastadam.Adam({"\ud800": np.ones(1)}))
        assert not path.exists()

    def test_the_error_is_a_value_error(self):
        assert issubclass(CheckpointError, ValueError)
        assert fastadam.CheckpointError is checkpoint.CheckpointError

    def test_without_safetensors(self, path, monkeypatch):
        opt = fastadam.Adam([np.ones(1)])
        monkeypatch.setitem(sys.modules, "safetensors", None)
        uses = (fastadam.save, fastadam.load, lambda p, _: checkpoint.inspect(p))
        for use in uses:
            with pytest.raises(
                ImportError, match=r"pip install 'fastadam\[checkpoint\]'"
            ) as caught:
                use(path, opt)
            assert caught.value.name == "safetensors"
        assert not path.exists()


class TestInPlace:
    def test_arrays_stay_where_they_are(self, path):
        """The same objects at the same addresses: views of them see what is loaded."""
        fastadam.save(path, saved := pair(amsgrad=True, ema_decay=0.5)[1])
        params, opt = pair(amsgrad=True, ema_decay=0.5)
        advance(opt, params, 8)
        before = full_picture(opt)["places"]
        views = {
            name: (array[:], array) for name, array in opt.state["w"].items() if name != "step"
        }
        average, row = opt.ema_params["w"], params["w"][1]
        fastadam.load(path, opt)
        assert full_picture(opt)["places"] == before
        for name, (view, array) in views.items():
            assert opt.state["w"][name] is array
            assert view.tobytes() == saved.state["w"][name].tobytes()
        assert average is opt.ema_params["w"]
        assert row.base is params["w"]
        assert opt.param_groups[0]["params"][0] is params["w"]

    @pytest.mark.parametrize("order", ["C", "F"])
    def test_memory_order_is_the_optimizers(self, order, path):
        values = np.arange(12.0).reshape(3, 4)
        for saved in "CF":
            fastadam.save(path, fastadam.Adam([np.array(values, order=saved)], ema_decay=0.5))
            opt = fastadam.Adam([param := np.zeros((3, 4), order=order)], ema_decay=0.5)
            fastadam.load(path, opt)
            for array in (param, opt.ema_params[0]):
                assert array.flags[f"{order}_CONTIGUOUS"]
                np.testing.assert_array_equal(array, values)

    def test_gradients_are_not_touched(self, path):
        params, opt = pair()
        grads = opt.grads
        for grad in grads.values():
            grad[...] = 3.0
        fastadam.save(path, opt)
        assert not any(name.startswith("grad") for name in load_file(path))
        grads["w"][...] = 4.0
        fastadam.load(path, opt)
        assert opt.grads is grads
        assert (grads["w"] == 4.0).all()
        assert (grads["b"] == 3.0).all()
        before = params["w"].copy()
        opt.step()
        assert (params["w"] != before).all()

    def test_a_step_after_a_load_uses_what_was_loaded(self, path):
        """What steps keep of hyperparameters between them is made anew."""
        fastadam.save(path, fastadam.Adam([np.zeros(2)], lr=0.5, weight_decay=1.0))
        opt = fastadam.Adam([param := np.zeros(2)], lr=0.25, max_grad_norm=1.0)
        opt.step([np.ones(2)])
        fastadam.load(path, opt)
        assert opt.step([np.ones(2)]) == fastadam.StepResult(step=0, lr=0.5)
        np.testing.assert_allclose(param, -0.5, rtol=1e-6)

    def test_neither_in_the_middle_of_a_step(self, path):
        fastadam.save(path, fastadam.Adam([np.zeros(2)]))
        good = path.read_bytes()

        def make(use):
            opt = fastadam.Adam([np.ones(2)], schedule=lambda _: use(path, opt) or 1.0)
            return opt

        for use in (fastadam.save, fastadam.load):
            opt = make(use)
            before = full_picture(opt)
            with pytest.raises(RuntimeError, match="in the middle of its own step"):
                opt.step([np.ones(2)])
            assert full_picture(opt) == before
            assert path.read_bytes() == good

    def test_no_step_in_the_middle_of_a_load(self, path):
        fastadam.save(path, fastadam.Adam([np.zeros(2)]))
        opt = fastadam.Adam([np.ones(2)])
        before = full_picture(opt)
        with pytest.raises(RuntimeError, match="in the middle of its own step"):
            fastadam.load(path, opt, rename=lambda name: opt.step([np.ones(2)]) and name)
        assert full_picture(opt) == before
        fastadam.load(path, opt)


def run(code, *arguments):
    """Run code in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imported_when_asked_for():
    run("""
        import sys, fastadam
        loaded = lambda: [name for name in sys.modules if "safetensors" in name]
        assert not loaded() and "fastadam.checkpoint" not in sys.modules
        assert {"save", "load", "checkpoint", "CheckpointError"} <= set(fastadam.__all__)
        assert fastadam.save is fastadam.checkpoint.save
        assert fastadam.load is fastadam.checkpoint.load
        assert "fastadam.checkpoint" in sys.modules and not loaded()
    """)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc of Linux")
def test_memory(path):
    """Saving copies no state; loading needs the file's size, once, beside what there is."""
    found = json.loads(
        run(
            """
            import json, sys, pathlib
            import numpy as np, fastadam

            def status(name):
                text = pathlib.Path("/proc/self/status").read_text()
                return int(text.split(name + ":")[1].split()[0]) * 1024

            def growth(use, *arguments):
                pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is now
                before = status("VmRSS")
                use(*arguments)
                return status("VmHWM") - before

            path, small = sys.argv[1], fastadam.Adam([np.ones(9)], ema_decay=0.5)
            fastadam.save(path, small)
            fastadam.load(path, small)  # whatever is imported and made once
            params = [np.ones(3_200_000, np.float32) for _ in range(4)]
            opt = fastadam.Adam(params, ema_decay=0.5)
            for state in opt.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name][...] = 1.0
            saving = growth(fastadam.save, path, opt)
            loading = growth(fastadam.load, path, opt)
            print(json.dumps([saving, loading]))
            """,
            path,
        )
    )
    size = path.stat().st_size
    assert size > 200e6
    saving, loading = found
    assert saving < 0.25 * size
    assert 0.5 * size < loading < 1.1 * size


def test_each_array_is_let_go_as_it_is_written(monkeypatch):
    """So that what is loaded is never in memory twice."""
    opt = fastadam.Adam([np.zeros(3)], ema_decay=0.5)
    targets = [array for name, array in opt.state[0].items() if name != "step"]
    sources = [np.full(3, value) for value in (1.0, 2.0, 3.0)]
    alive, counts = [weakref.ref(array) for array in sources], []
    loaded = LoadedState([*targets], sources, np.array([1]), 1, [])
    assign = backend.assign

    def count(target, source):
        counts.append(sum(ref() is not None for ref in alive))
        assign(target, source)

    monkeypatch.setattr(backend, "assign", count)
    opt._take_over(loaded)
    assert counts == [3, 2, 1]
    assert [target[0] for target in targets] == [1.0, 2.0, 3.0]


# How each earlier format's file was made; a new format adds its own here, and its file.


def made_of_version_1(path):
    """Save what has all that a file of format 1 can say."""
    params = [
        {"params": [np.zeros((2, 3), "f4"), np.zeros((2, 2), order="F")], "lr": 0.25},
        {"params": {"scale": np.zeros(()), "none": np.zeros((0, 3))}, "betas": (0.5, 0.875)},
        {"params": {"tail": np.zeros(5, "f4")}, "maximize": True, "weight_decay": 0.5},
    ]
    schedule = schedules.chain(
        (schedules.warmup(schedules.cosine(8, 0.125), 2), 9),
        (schedules.piecewise([2, 4], [1.0, 0.5, 0.25]), 5),
        schedules.exponential(0.5, 3, 0.0625, True),
    )
    opt = fastadam.Adam(
        params,
        eps=1e-6,
        decoupled_weight_decay=True,
        amsgrad=True,
        schedule=schedule,
        max_grad_norm=math.inf,
        nonfinite="skip",
        ema_decay=0.75,
    )
    # Not by steps: their bits are no concern of a format.
    for place, state in enumerate(opt._groups.states):
        for k, array in enumerate(state.arrays(param=True).values()):
            array[...] = (np.arange(array.size) * (place + 1) - k).reshape(array.shape) / 8
    state = opt.state_dict()
    for step, key in zip((7, 2**53 + 1, 0, 3, 1), state["state"], strict=True):
        state["state"][key]["step"] = step
    opt.load_state_dict({**state, "step_count": 2**53 + 3})
    fastadam.save(path, opt, extra={"epoch": 3, "best": [0.5, None, "ü"]})
    return opt


MADE = {1: made_of_version_1}


def test_every_format_has_its_file():
    from fastadam.checkpoint import file_format

    assert set(MADE) == set(range(1, file_format.FORMAT + 1))


@pytest.mark.parametrize("number", MADE)
def test_files_of_earlier_formats_load(number, path):
    stored = DATA / f"checkpoint_v{number}.safetensors"
    assert stored.stat().st_size < 8192
    opt = MADE[number](path)
    old, new = checkpoint.inspect(stored), checkpoint.inspect(path)
    for name in checkpoint.Checkpoint.__slots__:
        assert name == "version" or getattr(old, name) == getattr(new, name)
    assert old.version == "0.1.0"
    one, two = load_file(stored), load_file(path)
    assert one.keys() == two.keys()
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)

    wanted = contents(opt)
    for state in opt._groups.states:
        for array in state.arrays(param=True).values():
            array[...] = -1.0
    opt.lr, opt.schedule, opt.max_grad_norm = 9.0, None, None
    assert contents(opt) != wanted
    assert fastadam.load(stored, opt).extra == {"epoch": 3, "best": [0.5, None, "ü"]}
    assert contents(opt) == wanted
