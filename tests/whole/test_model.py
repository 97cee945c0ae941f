"""Any calls in any order, good and bad, drawn by hypothesis, against a plain model in NumPy.

After every call the optimizer holds what the model holds; after every refusal, each bit that it
held before.
"""

import contextlib
import copy
import itertools
import math
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from tools import full_picture

import fastadam
from fastadam import schedules

pytest.importorskip("hypothesis")
pytest.importorskip("safetensors", exc_type=ImportError)
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

# How many calls there are to be at least, and how many of them in one optimizer's life.
CALLS = 10_000 if os.environ.get("FASTADAM_TEST_FULL") == "1" else 600
LIFE = 40

HYPERPARAMETERS = {
    "lr": 0.01,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
    "maximize": False,
}
# Of each schedule: how it is made, and what it is, in plain Python.
SCHEDULES = {
    "none": (lambda: None, lambda _: 1.0),
    "cosine": (
        lambda: schedules.cosine(9),
        lambda step: 0.5 * (1 + math.cos(math.pi * min(step, 9) / 9)),
    ),
    "warmup": (
        lambda: schedules.warmup(schedules.linear(8), 3),
        lambda step: (step + 1) / 3 if step < 3 else max(0.0, 1 - (step - 3) / 8),
    ),
    "own": (lambda: halving, lambda step: 0.5**step),
    "bad": (lambda: ill, lambda _: math.nan),
}
# What a file cannot hold.
CUSTOM = ("own", "bad")
# Relative to the largest term of a sum: some roundings, of the type of the parameters.
CLOSE = {"float64": 2e-14, "float32": 3e-6}


def halving(step):
    return 0.5**step


def ill(_):
    return math.nan


class RefusalError(Exception):
    """The model will not do what it is told."""


class Param:
    """One parameter and its state, each value in the parameter's own type."""

    def __init__(self, value, model):
        zeros = np.zeros_like(value)
        self.values = {"param": value, "exp_avg": zeros, "exp_avg_sq": zeros}
        if model.amsgrad:
            self.values["max_exp_avg_sq"] = zeros
        if model.ema_decay is not None:
            self.values["ema"] = value.copy("K")
        self.step = 0

    def form(self):
        """Return what must be the same for another's state to fit."""
        return {name: (value.dtype, value.shape) for name, value in self.values.items()}


class Model:
    """What an optimizer is to be and do: parameters by key, groups of keys, counts."""

    def __init__(self, amsgrad, ema_decay, schedule, max_grad_norm, nonfinite, **defaults):
        self.amsgrad, self.ema_decay = amsgrad, ema_decay
        self.schedule, self.max_grad_norm, self.nonfinite = schedule, max_grad_norm, nonfinite
        self.defaults = {**HYPERPARAMETERS, **defaults}
        self.params, self.groups, self.step_count = {}, [], 0
        # What each group's parameters came in, and whether they came as groups.
        self.containers, self.nested = [], False

    def add_group(self, values, kind, **options):
        """Add parameters by key, of which copies are kept."""
        self.params |= {key: Param(value.copy("K"), self) for key, value in values.items()}
        self.containers.append(kind)
        self.groups.append({**self.defaults, **options, "params": list(values)})

    def step(self, grads, grad_scale):
        """Return what a step tells, and by key each new value with the size of its terms."""
        factor = SCHEDULES[self.schedule][1](self.step_count)
        if not math.isfinite(factor):
            raise RefusalError
        lr = self.groups[0]["lr"] * factor if self.groups else 0.0
        norm, coefficient = None, 1.0
        there = {key: grad for key, grad in grads.items() if grad is not None}
        if grads and not there:
            raise RefusalError
        if self.max_grad_norm is not None or self.nonfinite != "propagate":
            wide = [grad.astype(np.float64) / grad_scale for grad in there.values()]
            norm = math.sqrt(sum(float(np.sum(grad * grad)) for grad in wide))
            if not math.isfinite(norm):
                if self.nonfinite == "raise":
                    raise RefusalError
                if self.nonfinite == "skip":
                    return (self.step_count, lr, norm, True), {}
            if self.max_grad_norm not in (None, math.inf):
                coefficient = min(self.max_grad_norm / (norm + 1e-6), 1.0)
        found = {}
        for group in self.groups:
            for key in group["params"]:
                if key in there:
                    grad = there[key].astype(np.float64) / grad_scale * coefficient
                    found[key] = self.update(self.params[key], grad, group, factor)
        return (self.step_count, lr, norm, False), found

    def update(self, param, g, group, factor):
        old = {name: value.astype(np.float64) for name, value in param.values.items()}
        (b1, b2), lr, t = group["betas"], group["lr"] * factor, param.step + 1
        p, decay = old["param"], group["weight_decay"]
        g = -g if group["maximize"] else g
        size = np.abs(g)
        if decay and not group["decoupled_weight_decay"]:
            g, size = g + decay * p, size + decay * np.abs(p)
        m = b1 * old["exp_avg"] + (1 - b1) * g
        v = b2 * old["exp_avg_sq"] + (1 - b2) * g * g
        sizes = {"exp_avg": b1 * np.abs(old["exp_avg"]) + (1 - b1) * size}
        sizes["exp_avg_sq"] = b2 * old["exp_avg_sq"] + (1 - b2) * size * size
        new, largest = {"exp_avg": m, "exp_avg_sq": v}, v
        if "max_exp_avg_sq" in old:
            largest = new["max_exp_avg_sq"] = np.maximum(old["max_exp_avg_sq"], v)
            sizes["max_exp_avg_sq"] = np.maximum(old["max_exp_avg_sq"], sizes["exp_avg_sq"])
        root = np.sqrt(largest / (1 - b2**t)) + group["eps"]
        move = lr * (m / (1 - b1**t)) / root
        if group["decoupled_weight_decay"]:
            p = p * (1 - lr * decay)
        new["param"] = p - move
        # A root whose terms cancelled is off by as much as they were larger.
        lost = np.sqrt(sizes["exp_avg_sq"] / (1 - b2**t)) / root
        sizes["param"] = np.abs(p) + lr * sizes["exp_avg"] / (1 - b1**t) / root * (1 + lost)
        if "ema" in old:
            new["ema"] = old["ema"] + (1 - self.ema_decay) * (new["param"] - old["ema"])
            sizes["ema"] = np.abs(old["ema"]) + sizes["param"]
        return new, sizes

    def fits(self, other, keys, *, param=True, groups=True):
        """Whether another's state may be taken over, its keys being these in their order."""
        theirs = dict(zip(keys, other.params.values(), strict=True))
        if len(set(keys)) < len(keys):
            return False
        for key in self.params.keys() | theirs.keys():
            if key not in self.params or key not in theirs:
                return False
            one, two = self.params[key].form(), theirs[key].form()
            if not param:
                del one["param"], two["param"]
            if one != two:
                return False
        if not groups:
            return True
        name = dict(zip(other.params, keys, strict=True))
        given = [{name[key] for key in group["params"]} for group in other.groups]
        return given == [set(group["params"]) for group in self.groups]

    def take(self, other, names, *, param=True, hyperparameters=True):
        """Take over another's state, by names: of ours by theirs."""
        for theirs, key in names.items():
            source = other.params[theirs]
            for name, value in source.values.items():
                if name != "param" or param:
                    self.params[key].values[name] = value.copy("K")
            self.params[key].step = source.step
        self.step_count = other.step_count
        if hyperparameters:
            for group, source in zip(self.groups, other.groups, strict=True):
                group.update({name: source[name] for name in HYPERPARAMETERS})


# A parameter's dtype, shape, memory order; a group's, and its container: None is a single array.
ARRAYS = st.tuples(
    st.sampled_from(["f4", "f8"]),
    st.sampled_from([(), (0,), (1,), (3,), (17,), (2, 3), (4, 1, 5)]),
    st.sampled_from("CF"),
)
GROUP = st.tuples(
    st.sampled_from(["list", "dict", "array"]), st.lists(ARRAYS, max_size=3), st.integers(0, 9**9)
)
GOOD = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([0.0, 1e-3, 0.1, 1]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), [0.5, 0.0]]),
        "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decoupled_weight_decay": st.booleans(),
        "maximize": st.booleans(),
    },
)
BAD = st.sampled_from(
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"lr": "0.1"},
        {"betas": (1.0, 0.9)},
        {"betas": 0.9},
        {"eps": -1e-8},
        {"eps": None},
        {"weight_decay": math.inf},
        {"decoupled_weight_decay": 1},
        {"maximize": "no"},
    ]
)
SETTINGS = {
    "schedule": st.sampled_from(["none", "none", "cosine", "warmup", "own", "bad"]),
    "max_grad_norm": st.sampled_from([None, None, 0.5, 1e3, math.inf]),
    "nonfinite": st.sampled_from(["propagate", "skip", "raise"]),
}
BAD_SETTINGS = st.sampled_from(
    [
        ("lr", -1.0),
        ("lr", True),
        ("schedule", 3),
        ("schedule", schedules.cosine),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", "1"),
        ("nonfinite", "ignore"),
        ("nonfinite", None),
    ]
)
BROKEN = st.sampled_from(["array", "shape", "dtype", "entry missing", "group missing", "text"])
SEED = st.integers(0, 9**9)
REFUSED = (TypeError, ValueError, FloatingPointError)


# What is refused: the method that does it, and what with.
BAD_CALLS = st.one_of(
    st.tuples(st.just("construct_badly"), BAD, st.booleans()),
    st.tuples(
        st.just("step_badly"),
        SEED,
        st.sampled_from(
            ["shape", "dtype", "order", "count", "container", "nothing", "scale", "flag", "alias"]
        ),
    ),
    st.tuples(
        st.just("add_group_badly"),
        BAD,
        st.sampled_from(["option", "array", "name", "unknown", "none", "again"]),
    ),
    st.tuples(st.just("set_hyperparameters_badly"), BAD, st.integers(0, 3), SEED),
    st.tuples(st.just("set_settings_badly"), BAD_SETTINGS),
    st.tuples(st.just("load_state_dict_badly"), BROKEN, BAD, SEED),
    st.tuples(
        st.just("save_badly"),
        st.sampled_from([3, [1], {"x": {1}}, {"x": np.ones(2)}, {"x": {1j}}]),
    ),
)


class Calls(RuleBasedStateMachine):
    """Two optimizers at most, one of them at work, and what was saved of either."""

    calls = refusals = 0
    kinds: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="fastadam-model-"))
        self.files, self.dicts, self.names = [], [], itertools.count()

    def teardown(self):
        shutil.rmtree(self.folder)

    # What is compared, and how.

    def note(self, kind):
        type(self).calls += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    @contextlib.contextmanager
    def refusing(self, errors=REFUSED):
        """Expect a refusal, and that it changes nothing."""
        before = full_picture(self.opt)
        with pytest.raises(errors):
            yield
        assert full_picture(self.opt) == before
        type(self).refusals += 1

    def check(self):
        """Compare all with the model, bit by bit."""
        opt, model = self.opt, self.model
        assert opt.step_count == model.step_count
        assert (opt.amsgrad, opt.ema_decay) == (model.amsgrad, model.ema_decay)
        assert opt.max_grad_norm == model.max_grad_norm
        assert opt.nonfinite == model.nonfinite
        assert opt.schedule == SCHEDULES[model.schedule][0]()
        state = opt.state
        assert list(state) == list(model.params)
        for own, (key, param) in zip(opt._groups.states, model.params.items(), strict=True):
            assert state[key]["step"] == param.step
            arrays = {"param": own.param, **state[key]}
            assert arrays.keys() == {"step", *param.values}
            for name, value in param.values.items():
                assert arrays[name].dtype == value.dtype
                assert arrays[name].shape == value.shape
                assert arrays[name].tobytes() == value.tobytes(), (key, name)
        assert len(opt.param_groups) == len(model.groups)
        for group, wanted in zip(opt.param_groups, model.groups, strict=True):
            for name in HYPERPARAMETERS:
                value = tuple(wanted[name]) if name == "betas" else wanted[name]
                assert (tuple(group[name]) if name == "betas" else group[name]) == value
            held = dict(zip(wanted["params"], group["params"], strict=True))
            assert all(held[key] is self.arrays[key] for key in held)

    # How parameters and gradients are made.

    def make_group(self, drawn, first):
        """Return new parameters in a container, the same by key, and the container's kind."""
        kind, arrays, seed = drawn
        rng = np.random.default_rng(seed)
        if kind == "array":
            arrays = (*arrays, ("f8", (5,), "C"))[:1]
        keys = list(range(first, first + len(arrays)))
        if kind == "dict":
            # Some have the names of others' parameters, and so some loads fit.
            keys = [f"w{first + k}" for k in range(len(arrays))]
        values = {
            key: np.array(rng.standard_normal(shape), dtype, order=order)
            for key, (dtype, shape, order) in zip(keys, arrays, strict=True)
        }
        return contained(kind, values), values, kind

    def wrap(self, grads):
        """Put gradients by key in the containers of the parameters."""
        parts = [
            contained(kind, {key: grads[key] for key in group["params"]})
            for kind, group in zip(self.model.containers, self.model.groups, strict=True)
        ]
        return parts if self.model.nested else parts[0]

    def make_grads(self, seed, absent, bad):
        rng = np.random.default_rng(seed)
        grads = {}
        for key, param in self.arrays.items():
            grads[key] = np.empty_like(param)
            grads[key][...] = rng.standard_normal(param.shape)
            if rng.random() < absent:
                grads[key] = None
        there = [grad for grad in grads.values() if grad is not None and grad.size]
        if bad is not None and there:
            victim = there[rng.integers(len(there))]
            victim[np.unravel_index(rng.integers(victim.size), victim.shape)] = bad
        return grads

    # The calls.

    @initialize(
        groups=st.lists(st.tuples(GROUP, GOOD), min_size=1, max_size=2),
        nested=st.booleans(),
        defaults=GOOD,
        amsgrad=st.booleans(),
        ema_decay=st.sampled_from([None, None, 0.0, 0.9]),
        **SETTINGS,
    )
    def begin(self, groups, nested, defaults, amsgrad, ema_decay, schedule, **more):
        self.build(groups, nested, defaults, amsgrad, ema_decay, schedule, more)

    @rule(
        groups=st.lists(st.tuples(GROUP, GOOD), min_size=1, max_size=2),
        nested=st.booleans(),
        defaults=GOOD,
        amsgrad=st.booleans(),
        ema_decay=st.sampled_from([None, None, 0.0, 0.9]),
        **SETTINGS,
    )
    def construct(self, groups, nested, defaults, amsgrad, ema_decay, schedule, **more):
        self.build(groups, nested, defaults, amsgrad, ema_decay, schedule, more)

    def build(self, groups, nested, defaults, amsgrad, ema_decay, schedule, more):
        self.note("construct")
        # Parameters outside a list of groups have the constructor's hyperparameters.
        groups = groups if nested else [(groups[0][0], {})]
        model = Model(amsgrad, ema_decay, schedule, **more, **defaults)
        model.nested, given, arrays = nested, [], {}
        for drawn, options in groups:
            params, values, kind = self.make_group(drawn, len(arrays))
            model.add_group(values, kind, **options)
            given.append(params)
            arrays |= values
        self.make(model, given, arrays, {**more, **defaults})

    def make(self, model, given, arrays, options):
        """Make an optimizer that is to be as a model; it is the one from now on."""
        groups = [
            {name: value for name, value in group.items() if name in HYPERPARAMETERS}
            for group in model.groups
        ]
        self.model, self.arrays = model, arrays
        self.opt = fastadam.Adam(
            [{**group, "params": params} for group, params in zip(groups, given, strict=True)]
            if model.nested
            else given[0],
            amsgrad=model.amsgrad,
            ema_decay=model.ema_decay,
            schedule=SCHEDULES[model.schedule][0](),
            **options,
        )
        self.check()

    def construct_badly(self, bad, where):
        self.note("construct badly")
        array = np.ones(3)
        with self.refusing():
            if where:
                fastadam.Adam([array], **bad)
            else:
                fastadam.Adam([{"params": [array], **bad}])
        with self.refusing():
            fastadam.Adam([array, array])

    def step(self, seed, absent, bad, scale, zero_grad, own):
        self.note("step")
        model = self.model
        own = own and not absent
        grads = self.make_grads(seed, absent, bad)
        given = grads
        if own:
            given = dict(zip(grads, self.own_grads(), strict=True))
            for key, grad in grads.items():
                given[key][...] = grad
        kept = {key: None if grad is None else grad.copy("K") for key, grad in grads.items()}

        def take():
            options = {"grad_scale": scale, "zero_grad": zero_grad}
            return self.opt.step(*(() if own else (self.wrap(given),)), **options)

        try:
            with np.errstate(all="ignore"):
                told, found = model.step(grads, scale)
        except RefusalError:
            with self.refusing():
                take()
            assert_same(given, kept)
            return
        before = full_picture(self.opt)
        result = take()
        assert (result.step, result.skipped) == (told[0], told[3])
        assert result.lr == pytest.approx(told[1], rel=1e-14, abs=1e-16)
        assert (result.grad_norm is None) == (told[2] is None)
        if told[2] is not None:
            assert result.grad_norm == pytest.approx(told[2], rel=1e-14, nan_ok=True)
        if zero_grad:
            kept = {key: None if g is None else np.zeros_like(g) for key, g in kept.items()}
        assert_same(given, kept)
        if result.skipped:
            assert full_picture(self.opt) == before
            return
        model.step_count += 1
        for key, (new, sizes) in found.items():
            arrays = {"param": self.arrays[key], **self.opt.state[key]}
            for name, want in new.items():
                assert_close(arrays[name], want, sizes[name])
                # The next call begins with these very bits.
                model.params[key].values[name] = arrays[name].copy("K")
            model.params[key].step += 1
        self.check()

    def own_grads(self):
        parts = self.opt.grads if self.model.nested else [self.opt.grads]
        return [
            array
            for kind, part in zip(self.model.containers, parts, strict=True)
            for array in (
                [part] if kind == "array" else getattr(part, "values", lambda p=part: p)()
            )
        ]

    @rule(
        seed=SEED,
        absent=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        bad=st.sampled_from([None, None, None, math.nan, math.inf]),
        scale=st.sampled_from([1.0, 3.0, 1024]),
        zero_grad=st.booleans(),
        own=st.booleans(),
    )
    def step_any(self, seed, absent, bad, scale, zero_grad, own):
        # What is not finite stays so for ever: of that, less.
        if self.model.nonfinite == "propagate" and seed % 4:
            bad = None
        self.step(seed, absent, bad, scale, zero_grad, own)

    @rule(seed=SEED)
    def step_plainly(self, seed):
        self.step(seed, 0.0, None, 1.0, False, False)

    @rule(call=BAD_CALLS)
    def refused(self, call):
        getattr(self, call[0])(*call[1:])

    # As often drawn as several others.
    step_more, step_on, refused_more = step_any, step_plainly, refused

    def step_badly(self, seed, wrong):
        self.note("step badly")
        grads = self.make_grads(seed, 0.0, None)
        options, given = {}, None
        keys = [key for key, array in self.arrays.items() if array.size > 1]
        if wrong in ("shape", "dtype", "order", "alias"):
            if not keys:
                return
            key = keys[seed % len(keys)]
            grad = grads[key]
            if wrong == "shape":
                grads[key] = np.ones((*grad.shape, 2), grad.dtype)
            elif wrong == "dtype":
                grads[key] = grad.astype({"f": "f8", "d": "f4"}[grad.dtype.char])
            elif wrong == "order":
                grads[key] = np.repeat(grad, 2, axis=0)[::2]
            else:
                grads[key] = self.arrays[key]
        elif wrong == "count":
            given = [*([self.wrap(grads)] * 2), None, *([None] * len(grads))]
            if self.model.containers == ["array"] and not self.model.nested:
                given = None
                options["grad_scale"] = 0.0
        elif wrong == "container":
            given = 3
        elif wrong == "nothing":
            if self.opt._grads is not None:
                return
            given = ...
        elif wrong == "scale":
            options["grad_scale"] = (0.0, -1.0, math.nan, "1", None)[seed % 5]
        else:
            options["zero_grad"] = (1, "yes", None)[seed % 3]
        given = self.wrap(grads) if given is None else given
        with self.refusing():
            self.opt.step(given, **options)

    @rule(drawn=GROUP, options=GOOD)
    def add_group(self, drawn, options):
        if len(self.model.groups) > 3:
            return
        self.note("add group")
        params, values, kind = self.make_group(drawn, len(self.arrays))
        self.opt.add_param_group({"params": params, **options})
        self.model.add_group(values, kind, **options)
        self.arrays |= values
        self.model.nested = True
        self.check()

    def add_group_badly(self, bad, wrong):
        self.note("add group badly")
        group = {"params": [np.ones(3)]}
        if wrong == "option":
            group |= bad
        elif wrong == "array":
            group["params"] = [np.ones(3), np.ones(3, int)]
        elif wrong == "name":
            group["params"] = {3: np.ones(3)}
        elif wrong == "unknown":
            group["momentum"] = 0.9
        elif wrong == "none":
            del group["params"]
        else:
            group["params"] = [next((a for a in self.arrays.values() if a.size), 3)]
        with self.refusing():
            self.opt.add_param_group(group)

    @rule(options=GOOD, k=st.integers(0, 3), seed=SEED)
    def set_hyperparameters(self, options, k, seed):
        self.note("set hyperparameters")
        k %= len(self.model.groups)
        self.opt.param_groups[k].update(options)
        self.model.groups[k].update(options)
        if seed % 4 == 0:
            lr = (0.0, 0.02, 0.5)[seed % 3]
            self.opt.lr = self.model.defaults["lr"] = lr
            for group in self.model.groups:
                group["lr"] = lr
        self.check()

    def set_hyperparameters_badly(self, bad, k, seed):
        """What is out of range is refused by whoever reads it."""
        self.note("set hyperparameters badly")
        group = self.opt.param_groups[k % len(self.model.groups)]
        ((name, value),) = bad.items()
        kept, group[name] = group[name], value
        with self.refusing():
            self.opt.step(self.wrap(self.make_grads(seed, 0.0, None)))
        path = self.folder / "refused.safetensors"
        with self.refusing():
            fastadam.save(path, self.opt)
        assert not path.exists()
        group[name] = kept
        self.check()

    @rule(**SETTINGS)
    def set_settings(self, schedule, max_grad_norm, nonfinite):
        self.note("set settings")
        self.opt.schedule = SCHEDULES[schedule][0]()
        self.opt.max_grad_norm, self.opt.nonfinite = max_grad_norm, nonfinite
        self.model.schedule, self.model.nonfinite = schedule, nonfinite
        self.model.max_grad_norm = max_grad_norm
        self.check()

    def set_settings_badly(self, bad):
        self.note("set settings badly")
        with self.refusing():
            setattr(self.opt, *bad)

    @rule()
    def state_dict(self):
        self.note("state_dict")
        self.dicts = [*self.dicts, (self.opt.state_dict(), copy.deepcopy(self.model))][-3:]
        self.check()

    @precondition(lambda self: self.dicts)
    @rule(k=st.integers(0, 2), through=st.booleans())
    def load_state_dict(self, k, through):
        self.note("load_state_dict")
        state, saved = self.dicts[k % len(self.dicts)]
        if through:
            state = pickle.loads(pickle.dumps(state))
        if not self.model.fits(saved, list(saved.params), param=False):
            with self.refusing():
                self.opt.load_state_dict(state)
            return
        self.opt.load_state_dict(state)
        self.model.take(saved, {key: key for key in saved.params}, param=False)
        self.check()

    def load_state_dict_badly(self, broken, bad, seed):
        self.note("load_state_dict badly")
        state = self.opt.state_dict()
        keys = list(self.arrays)
        key = keys[seed % len(keys)] if keys else None
        if broken == "group missing":
            state["param_groups"].pop()
        elif broken == "text" or key is None:
            state["param_groups"][seed % len(self.model.groups)].update(bad)
        elif broken == "entry missing":
            del state["state"][key]["exp_avg"]
        else:
            array = state["state"][key]["exp_avg_sq"]
            other = {"array": "x", "shape": np.ones((*array.shape, 2), array.dtype)}
            state["state"][key]["exp_avg_sq"] = other.get(broken, array.astype("f2"))
        with self.refusing():
            self.opt.load_state_dict(state)

    @rule(params=st.booleans())
    def save(self, params):
        self.note("save")
        path = self.folder / f"{next(self.names)}.safetensors"
        before = full_picture(self.opt)
        fastadam.save(path, self.opt, params=params, extra={"file": path.name})
        assert full_picture(self.opt) == before
        self.files = [*self.files, (path, params, copy.deepcopy(self.model))][-3:]
        self.check()

    @precondition(lambda self: self.files)
    @rule(
        k=st.integers(0, 2),
        params=st.booleans(),
        hyperparameters=st.sampled_from([True, True, False]),
    )
    def load(self, k, params, hyperparameters):
        self.load_any(k, params, hyperparameters, None)

    @precondition(lambda self: self.files)
    @rule(k=st.integers(0, 2), hyperparameters=st.booleans(), seed=SEED)
    def load_renamed(self, k, hyperparameters, seed):
        """From names of the file's to our own, in the order of both or in another."""
        _, params, saved = self.files[k % len(self.files)]
        own = list(self.model.params)
        if seed % 3 == 0:
            own.reverse()
        rename = dict(zip(saved.params, own, strict=False))
        self.load_any(
            k, params, hyperparameters, rename if seed % 2 else lambda k: rename.get(k, k)
        )

    @precondition(lambda self: self.files)
    @rule(
        k=st.integers(0, 2),
        params=st.booleans(),
        hyperparameters=st.sampled_from([True, True, False]),
        how=st.sampled_from(["same", "same", "renamed", "reversed", "misfit"]),
        schedule=SETTINGS["schedule"],
        defaults=GOOD,
    )
    def load_in_a_new_one(self, k, params, hyperparameters, how, schedule, defaults):
        """As after a restart: the same structure, other values, other hyperparameters."""
        _, held, saved = self.files[k % len(self.files)]
        amsgrad = saved.amsgrad != (how == "misfit")
        model = Model(amsgrad, saved.ema_decay, schedule, 0.75, "raise", **defaults)
        model.nested, given, arrays, rename = saved.nested, [], {}, {}
        for kind, group in zip(saved.containers, saved.groups, strict=True):
            keys = group["params"]
            if how == "renamed":
                kind = "dict"
                rename |= {key: f"r{place}" for place, key in enumerate(keys, len(rename))}
            if how == "reversed" and kind == "dict":
                keys = keys[::-1]
            values = {
                rename.get(key, key): np.full_like(saved.params[key].values["param"], 7)
                for key in keys
            }
            model.add_group(values, kind)
            given.append(contained(kind, values))
            arrays |= values
        own = {"max_grad_norm": 0.75, "nonfinite": "raise", **defaults}
        self.make(model, given, arrays, own)
        self.load_any(k, params and held, hyperparameters, rename or None)

    def load_any(self, k, params, hyperparameters, rename):
        self.note("load")
        path, held, saved = self.files[k % len(self.files)]
        name = rename if callable(rename) else (lambda k: (rename or {}).get(k, k))
        keys = [name(key) for key in saved.params]
        model = self.model
        fits = model.fits(saved, keys, param=params, groups=hyperparameters)
        if params and not held and saved.params:
            fits = False
        fits &= model.amsgrad == saved.amsgrad
        fits &= (model.ema_decay is None) == (saved.ema_decay is None)
        if hyperparameters:
            fits &= not (saved.schedule in CUSTOM and model.schedule == "none")
            fits &= None in (model.ema_decay, saved.ema_decay) or (
                model.ema_decay == saved.ema_decay
            )
        options = {"params": params, "hyperparameters": hyperparameters, "rename": rename}
        if not fits:
            with self.refusing(fastadam.CheckpointError):
                fastadam.load(path, self.opt, **options)
            return
        self.kinds["load fits"] = self.kinds.get("load fits", 0) + 1
        assert fastadam.load(path, self.opt, **options).extra == {"file": path.name}
        names = dict(zip(saved.params, keys, strict=True))
        model.take(saved, names, param=params, hyperparameters=hyperparameters)
        if hyperparameters:
            self.take_settings(saved)
        self.check()

    def take_settings(self, saved):
        model = self.model
        model.max_grad_norm, model.nonfinite = saved.max_grad_norm, saved.nonfinite
        if saved.schedule not in CUSTOM:
            model.schedule = saved.schedule

    @precondition(lambda self: self.files)
    @rule(k=st.integers(0, 2), params=st.booleans())
    def load_partially(self, k, params):
        self.note("load partially")
        path, held, saved = self.files[k % len(self.files)]
        model = self.model
        both = [key for key in model.params if key in saved.params]
        forms = [(model.params[key].form(), saved.params[key].form() | {}) for key in both]
        for _, theirs in forms:
            if not held:
                del theirs["param"]
        if not params:
            for ours, theirs in forms:
                del ours["param"]
                theirs.pop("param", None)
        for ours, theirs in forms:  # averages that one of them has alone are no matter
            ours.pop("ema", None)
            theirs.pop("ema", None)
        fits = model.amsgrad == saved.amsgrad and (both or not model.params)
        if not fits or any(ours != theirs for ours, theirs in forms):
            with self.refusing(fastadam.CheckpointError):
                fastadam.load(path, self.opt, params=params, partial=True)
            return
        assert fastadam.load(path, self.opt, params=params, partial=True).loaded == tuple(both)
        count = model.step_count
        model.take(saved, {key: key for key in both}, param=params, hyperparameters=False)
        model.step_count = count
        for key in both:
            values = model.params[key].values
            if model.ema_decay is None:
                values.pop("ema", None)
            elif saved.ema_decay is None and params:
                values["ema"] = values["param"].copy("K")
        self.check()

    @precondition(lambda self: self.files)
    @rule(k=st.integers(0, 2), seed=SEED, how=st.sampled_from(["flip", "cut", "gone", "two"]))
    def load_badly(self, k, seed, how):
        self.note("load badly")
        path, _, saved = self.files[k % len(self.files)]
        damaged, rename, error = (
            self.folder / "damaged.safetensors",
            None,
            fastadam.CheckpointError,
        )
        data = bytearray(path.read_bytes())
        if how == "flip":
            data[seed % len(data)] ^= 1 + seed % 255
        elif how == "cut":
            del data[seed % len(data) :]
        elif how == "two":
            if len(saved.params) < 2:
                return
            rename = dict.fromkeys(saved.params, "w0")
        damaged.write_bytes(data)
        if how == "gone":
            damaged.unlink()
            error = FileNotFoundError
        with self.refusing(error):
            fastadam.load(damaged, self.opt, rename=rename)

    def save_badly(self, extra):
        self.note("save badly")
        path = self.folder / "refused.safetensors"
        with self.refusing():
            fastadam.save(path, self.opt, extra=extra)
        with self.refusing():
            fastadam.save(path, self.opt, keep=0)
        with self.refusing(OSError):
            fastadam.save(self.folder / "none" / "x.safetensors", self.opt)
        assert not path.exists()

    @rule(pickled=st.booleans())
    def go_on_with_a_copy(self, pickled):
        self.note("copy")
        pair = self.arrays, self.opt
        before, old = full_picture(self.opt), self.opt
        arrays, self.opt = pickle.loads(pickle.dumps(pair)) if pickled else copy.deepcopy(pair)
        self.arrays = arrays
        self.check()
        self.step(1, 0.0, None, 1.0, False, False)
        assert full_picture(old) == before


def contained(kind, arrays):
    """Return arrays by key in a container."""
    if kind == "array":
        return next(iter(arrays.values()))
    return dict(arrays) if kind == "dict" else list(arrays.values())


def assert_same(given, kept):
    """Compare gradients with what they were, bit by bit."""
    for key, grad in kept.items():
        assert (given[key] is None) == (grad is None)
        assert grad is None or given[key].tobytes() == grad.tobytes()


def assert_close(got, want, size):
    """Compare with what is exact, within some roundings of terms of a size."""
    close, got = CLOSE[got.dtype.name], got.astype(np.float64)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    there = np.isfinite(want)
    assert np.array_equal(got[~there], want[~there], equal_nan=True)
    error = np.abs(got[there] - want[there])
    tolerance = close * size[there] + 1e-300
    assert (error <= tolerance).all(), (got, want)


def test_any_calls():
    Calls.calls, Calls.refusals, Calls.kinds = 0, 0, {}
    # What is drawn depends on numbers in whatever modules have been imported: so, until it is
    # enough of each kind.
    for number in range(20):
        run_state_machine_as_test(
            seed(number)(Calls),
            settings=settings(
                max_examples=CALLS // 30,
                stateful_step_count=LIFE,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],  # to make a failure's calls fewer would take minutes
            ),
        )
        if not what_is_short():
            break
    assert not what_is_short()


def what_is_short():
    """The draws are to reach everything: each kind of call, and each kind's refusal."""
    needs = {
        "calls": Calls.calls >= CALLS,
        "refusals": Calls.refusals >= CALLS // 6,
        "kinds": len(Calls.kinds) == 20,
        "each kind": min(Calls.kinds.values()) >= CALLS // 300,
        "load fits": Calls.kinds.get("load fits", 0) >= CALLS // 50,
    }
    return [name for name, holds in needs.items() if not holds]
