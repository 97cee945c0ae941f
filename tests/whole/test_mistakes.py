"""What is easily got wrong is refused, with what was probably meant, and nothing changes."""

import copy
import inspect
import pickle

import numpy as np
import pytest
from tools import picture

import fastadam
from fastadam import AdamW


class Value:
    def __init__(self, data):
        self.data, self.grad = data, 1.0


def one(**options):
    return fastadam.Adam(np.ones(2), **options)


# Gradients that are all None.

CONTAINERS = {
    "array": lambda a, b: a,  # noqa: ARG005
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"a": a, "b": b},
    "groups": lambda a, b: [{"params": a}, {"params": [b]}],
    "a group": lambda a, b: [{"params": [a, b]}],
}
ALL_NONE = [
    ("array", None, "got None for the one parameter"),
    ("list", None, "grads must have a gradient for each parameter, .* got None"),
    ("list", [None, None], "got None for all 2 parameters"),
    ("list", iter([None, None]), "got None for all 2 parameters"),
    ("dict", None, "grads must have a gradient for each parameter, .* got None"),
    ("dict", {"b": None, "a": None}, "got None for all 2 parameters"),
    ("groups", None, "grads must have a gradient for each parameter, .* got None"),
    ("groups", [None, [None]], "got None for all 2 parameters"),
    ("groups", [None, None], r"grads\[1\] must have a gradient for each parameter, .* got None"),
    ("a group", [None], r"grads\[0\] must have a gradient for each parameter, .* got None"),
    ("a group", [[None, None]], "got None for all 2 parameters"),
]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "nonfinite": "skip"}], ids=len)
@pytest.mark.parametrize(("container", "grads", "message"), ALL_NONE)
def test_no_gradient_at_all(container, grads, message, options):
    params = [np.ones(2), np.ones(3, "f4")]
    opt = fastadam.Adam(CONTAINERS[container](*params), **options)
    before = picture(opt, params)
    with pytest.raises(ValueError, match=message) as caught:
        opt.step(copy.copy(grads))
    assert "has the backward function returned nothing?" in str(caught.value)
    assert ".grad is None before backward() and after zero_grad()" in str(caught.value)
    assert picture(opt, params) == before


def test_the_only_gradient_comes_last():
    opt = fastadam.Adam([np.ones(2), np.ones(2), np.ones(2)])
    opt.step([None, None, np.ones(2)])
    assert [opt.state[k]["step"] for k in range(3)] == [0, 0, 1]


@pytest.mark.parametrize(("params", "grads"), [([], []), ({}, {}), ([{"params": []}], [[]])])
def test_no_parameters_at_all(params, grads):
    assert fastadam.Adam(params).step(grads).step == 0


def test_no_object_has_a_gradient():
    things = [Value(1.0), Value(np.ones(2))]
    opt = fastadam.from_objects(things)
    for thing in things:
        thing.grad = None
    before = picture(opt, [thing.data for thing in things])
    with pytest.raises(ValueError, match="has the backward function returned nothing"):
        opt.step()
    assert picture(opt, [thing.data for thing in things]) == before
    things[1].grad = np.ones(2)
    assert opt.step().step == 0


# Attributes.


def objects_of(cls):
    return fastadam.from_objects([Value(1.0)]) if cls is None else cls(np.ones(2))


@pytest.mark.parametrize("cls", [fastadam.Adam, AdamW, None], ids=["Adam", "AdamW", "objects"])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("learning_rate", "; did you mean 'lr'?"),
        ("clip_norm", "; did you mean 'max_grad_norm'?"),
        ("max_gradnorm", "; did you mean 'max_grad_norm'?"),
        ("scheduler", "; did you mean 'schedule'?"),
        ("threads", "; did you mean 'num_threads'?"),
        ("betas", '; it is set by group, as in opt.param_groups[0]["betas"] = value'),
        ("Epsilon", '; it is set by group, as in opt.param_groups[0]["eps"] = value'),
        ("qqq", ""),
    ],
)
def test_attributes_that_there_are_not(cls, name, hint):
    opt = objects_of(cls)
    with pytest.raises(AttributeError) as caught:
        setattr(opt, name, 1e-3)
    assert str(caught.value) == f"{type(opt).__name__} has no attribute {name!r} to set{hint}"
    assert not hasattr(opt, name)
    opt.lr = 0.5
    assert opt.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("cls", [fastadam.Adam, AdamW, None], ids=["Adam", "AdamW", "objects"])
@pytest.mark.parametrize("name", ["params", "amsgrad", "ema_decay", "step_count"])
def test_attributes_that_cannot_be_set(cls, name):
    opt = objects_of(cls)
    kind = type(opt).__name__
    absent, fixed = f"{kind} has no attribute {name!r} to set", f"{kind}.{name} cannot be set"
    with pytest.raises(AttributeError) as caught:
        setattr(opt, name, 1)
    message, _, hint = str(caught.value).partition("; ")
    assert message == (fixed if hasattr(type(opt), name) else absent)
    assert hint == ("" if name == "step_count" else "give it to the constructor")
    assert opt.step_count == 0


@pytest.mark.parametrize("cls", [fastadam.Adam, AdamW, None], ids=["Adam", "AdamW", "objects"])
def test_zero_grad_is_an_argument(cls):
    opt = objects_of(cls)
    instead = "use opt.step(grads, zero_grad=True)" if cls else "step() resets every .grad to 0"
    with pytest.raises(AttributeError) as caught:
        opt.zero_grad()
    assert str(caught.value) == f"{type(opt).__name__} has no attribute 'zero_grad'; {instead}"
    assert not hasattr(opt, "zero_grad")
    with pytest.raises(AttributeError, match="has no attribute 'zero_grad' to set"):
        opt.zero_grad = None


@pytest.mark.parametrize("base", [fastadam.Adam, AdamW])
def test_a_class_of_the_users_has_attributes_of_its_own(base):
    class Own(base):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.history = []

    opt = Own(np.ones(2), lr=0.5)
    opt.history.append(opt.step(np.ones(2)))
    opt.learning_rate = 7
    assert (opt.lr, opt.history[0].lr, opt.learning_rate) == (0.5, 0.5, 7)
    with pytest.raises(TypeError, match="keyword argument 'alpha'; did you mean 'lr'"):
        Own(np.ones(2), alpha=1)


def test_copies_keep_to_it():
    for opt in (copy.deepcopy(one()), pickle.loads(pickle.dumps(one()))):
        opt.step(np.ones(2))
        with pytest.raises(AttributeError, match="did you mean 'lr'"):
            opt.learning_rate = 1


# Keywords and keys.

MEANT = {
    "learning_rate": "lr",
    "alpha": "lr",
    "LR": "lr",
    "epsilon": "eps",
    "beta1": "betas",
    "beta2": "betas",
    "b1": "betas",
    "b2": "betas",
    "bates": "betas",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "weightdecay": "weight_decay",
    "clip_norm": "max_grad_norm",
    "max_norm": "max_grad_norm",
    "clipnorm": "max_grad_norm",
    "ema": "ema_decay",
    "decoupled": "decoupled_weight_decay",
    "n_threads": "num_threads",
}


@pytest.mark.parametrize("name", MEANT)
@pytest.mark.parametrize("make", [fastadam.Adam, AdamW, fastadam.from_objects])
def test_keywords_of_constructors(make, name):
    thing = Value(1.0)
    params = np.ones(2) if make is not fastadam.from_objects else [thing]
    message = rf"\(\) got an unexpected keyword argument '{name}'; did you mean '{MEANT[name]}'\?$"
    with pytest.raises(TypeError, match=message):
        make(params, **{name: 0.5})
    assert thing.grad == 1.0


def test_keywords_that_look_like_none():
    message = r"^Adam.__init__\(\) got an unexpected keyword argument 'foreach'$"
    with pytest.raises(TypeError, match=message):
        one(foreach=True)


@pytest.mark.parametrize("name", [name for name in MEANT if MEANT[name] in one().param_groups[0]])
def test_keys_of_groups(name):
    hint = rf"\['{name}'\]; did you mean '{MEANT[name]}'\?$"
    with pytest.raises(ValueError, match=r"^params\[0\] must have 'params' and any of .*" + hint):
        fastadam.Adam([{"params": np.ones(2), name: 0.5}])
    opt = one()
    with pytest.raises(ValueError, match=r"^params\[0\] must|^params\[1\] must .*" + hint):
        opt.add_param_group({"params": np.ones(2), name: 0.5})
    with pytest.raises(KeyError, match=f"'{name}' is not in the group; did you mean"):
        opt.param_groups[0][name]
    opt.param_groups[0][name] = 0.5
    before = picture(opt, [])
    with pytest.raises(ValueError, match=r"^param_groups\[0\] must keep its keys .*" + hint):
        opt.step(np.ones(2))
    assert picture(opt, []) == before
    del opt.param_groups[0][name]
    opt.step(np.ones(2))


def test_signatures_are_as_they_were():
    for cls in (fastadam.Adam, AdamW):
        names = list(inspect.signature(cls).parameters)
        assert names[:4] == ["params", "lr", "betas", "eps"]
        assert (len(names), names[-1]) == (13, "num_threads")


# A worker of joblib's has read-only memory.


def test_a_read_only_memory_map(tmp_path):
    stored = np.memmap(tmp_path / "w", np.float64, "w+", shape=4)
    stored.flush()
    stored = np.memmap(tmp_path / "w", np.float64, "r", shape=4)
    for param in (stored, stored[1:], np.asarray(stored)):
        with pytest.raises(ValueError, match=r"^params must be writable, got a read-only memory "):
            fastadam.Adam(param)


def test_an_optimizer_in_a_worker_of_joblibs(optional, tmp_path):
    joblib = optional("joblib")
    opt = fastadam.Adam({"w": np.ones(64)})
    opt.step({"w": np.ones(64)})
    joblib.dump(opt, tmp_path / "opt")
    there = joblib.load(tmp_path / "opt", mmap_mode="r")
    with pytest.raises(ValueError, match=r"^params\['w'\] must be writable.* as joblib gives .*"):
        there.step({"w": np.ones(64)})
    there = joblib.load(tmp_path / "opt", mmap_mode="c")  # what the message says
    assert there.step({"w": np.ones(64)}).step == 1
