"""State that goes from torch to fastadam and back: the runs go on, and no bit is lost."""

import copy
import doctest
import inspect
import io
import sys

import numpy as np
import pytest
from tools import picture

import fastadam
from fastadam import schedules

pytest.importorskip("torch", exc_type=ImportError)
from fastadam.torch import cpu_params, from_torch, state_dicts, to_torch

SHAPES = [(), (0,), (7,), (5, 3), (2, 3, 2)]
# Of the largest element: the two round differently, by some units in the last place a step.
CLOSE = {"float32": 3e-6, "float64": 1e-13}
EITHER = pytest.mark.parametrize("dtype", ["float32", "float64"])
RUNS = [
    pytest.param("Adam", {}, id="adam"),
    pytest.param("Adam", {"weight_decay": 0.1}, id="l2"),
    pytest.param("Adam", {"amsgrad": True, "maximize": True}, id="amsgrad-maximize"),
    pytest.param("AdamW", {"weight_decay": 0.1}, id="adamw"),
    pytest.param("AdamW", {"amsgrad": True, "betas": (0.8, 0.999)}, id="adamw-amsgrad"),
]


def make_params(rng, dtype="float64", shapes=SHAPES):
    params = [np.asarray(rng.standard_normal(shape), dtype=dtype) for shape in shapes]
    return [*params, np.asfortranarray(rng.standard_normal((4, 3)), dtype=dtype)]


def make_grads(rng, params, missing=()):
    """In their parameters' memory order: fused kernels of torch's too take it for granted."""
    grads = [np.empty_like(param) for param in params]
    for grad in grads:
        grad[...] = rng.standard_normal(grad.shape)
    return [None if k in missing else grad for k, grad in enumerate(grads)]


def split(things, groups):
    """Return a list of things for each group."""
    rest = iter(things)
    return [[next(rest) for _ in range(count)] for count, _ in groups]


def grouped(params, groups):
    """Return parameters as an optimizer takes them, each group with its own options."""
    if groups is None:
        return params
    parts = zip(split(params, groups), groups, strict=True)
    return [{"params": part, **options} for part, (_, options) in parts]


class Ours:
    """fastadam's side of a run."""

    def __init__(self, name, params, groups=None, **options):
        self.params, self.groups = [param.copy("K") for param in params], groups
        own = grouped(self.params, groups)
        self.opt = getattr(fastadam, name)(own, **options)

    def step(self, grads):
        self.opt.step(split(grads, self.groups) if self.groups else grads)

    def values(self):
        return self.params

    def state(self):
        return self.opt.state


class Theirs:
    """torch's side; gradients of None, and state made at the first gradient."""

    def __init__(self, torch, name, params, groups=None, **options):
        self.torch = torch
        self.params = [torch.nn.Parameter(torch.tensor(param)) for param in params]
        own = grouped(self.params, groups)
        self.opt = getattr(torch.optim, name)(own, **options)

    def step(self, grads):
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = None if grad is None else self.torch.tensor(grad)
        self.opt.step()

    def values(self):
        return [param.detach().numpy() for param in self.params]

    def state(self):
        return self.opt.state_dict()["state"]


def check_close(one, two, dtype):
    """Compare parameters, moments and steps; state that torch lacks is zeros, at step 0."""
    for ours, theirs in zip(one.values(), two.values(), strict=True):
        compare(ours, theirs, dtype)
    for k, ours in one.state().items():
        theirs = two.state().get(k)
        if theirs is None:
            assert ours["step"] == 0
            assert not any(np.any(a) for a in ours.values())
            continue
        assert ours.keys() == theirs.keys()
        assert ours["step"] == theirs["step"]
        for name in ours.keys() - {"step"}:
            compare(ours[name], np.asarray(theirs[name]), dtype)


def compare(ours, theirs, dtype):
    assert ours.dtype == theirs.dtype
    largest = float(np.max(np.abs(theirs), initial=0.0))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE[dtype] * largest)


def check_same(one, two):
    """Compare two states of torch's, bit by bit."""
    assert one["state"].keys() == two["state"].keys()
    for k, state in one["state"].items():
        assert state.keys() == two["state"][k].keys()
        for name, tensor in state.items():
            other = two["state"][k][name]
            assert tensor.dtype == other.dtype
            assert tensor.shape == other.shape
            assert tensor.numpy().tobytes() == other.numpy().tobytes()
    assert one["param_groups"] == two["param_groups"]


def ours_and_theirs(torch, name, params, groups, options):
    common = {"lr": 0.05, "betas": (0.9, 0.95), **options}
    return Ours(name, params, groups, **common), Theirs(torch, name, params, groups, **common)


GROUPS = [
    None,
    [(2, {}), (1, {"lr": 0.2, "betas": (0.7, 0.99), "eps": 1e-4}), (3, {"weight_decay": 0.3})],
]


@EITHER
@pytest.mark.parametrize("groups", GROUPS, ids=["one-group", "groups"])
@pytest.mark.parametrize(("name", "options"), RUNS)
def test_torch_begins_and_fastadam_goes_on(optional, rng, name, options, groups, dtype):
    torch = optional("torch")
    params = make_params(rng, dtype)
    _, theirs = ours_and_theirs(torch, name, params, groups, options)
    for k in range(12):
        theirs.step(make_grads(rng, params, {4} if k < 9 else {2, 5}))
    # The optimizer's own hyperparameters are others: the file's hold.
    ours = Ours(name, theirs.values(), groups, amsgrad=options.get("amsgrad", False))
    ours.opt.load_state_dict(from_torch(theirs.opt.state_dict(), ours.opt))
    assert ours.opt.step_count == 12
    assert [ours.opt.state[k]["step"] for k in (0, 2, 4, 5)] == [12, 9, 3, 9]
    check_close(ours, theirs, dtype)
    for k in range(12):
        grads = make_grads(rng, params, {k % 6})
        ours.step(grads)
        theirs.step(grads)
        check_close(ours, theirs, dtype)


@EITHER
@pytest.mark.parametrize("fused", [None, True], ids=["plain", "fused"])
@pytest.mark.parametrize("groups", GROUPS, ids=["one-group", "groups"])
@pytest.mark.parametrize(("name", "options"), RUNS)
def test_fastadam_begins_and_torch_goes_on(optional, rng, name, options, groups, fused, dtype):
    torch = optional("torch")
    params = make_params(rng, dtype)
    ours, _ = ours_and_theirs(torch, name, params, groups, options)
    for _ in range(12):
        ours.step(make_grads(rng, params, {2}))
    # torch's side has fastadam's arrays' memory order, which fused kernels need.
    theirs = Theirs(torch, name, ours.params, groups)
    saved = to_torch(ours.opt.state_dict())
    for group in saved["param_groups"]:
        group["fused"] = fused
    theirs.opt.load_state_dict(saved)
    assert 2 not in theirs.state()
    check_close(ours, theirs, dtype)
    for k in range(12):
        grads = make_grads(rng, params, {k % 6})
        ours.step(grads)
        theirs.step(grads)
        check_close(ours, theirs, dtype)


@EITHER
@pytest.mark.parametrize(("name", "options"), RUNS)
def test_from_torch_and_back_is_the_same(optional, rng, name, options, dtype):
    torch = optional("torch")
    params = make_params(rng, dtype)
    ours, theirs = ours_and_theirs(torch, name, params, GROUPS[1], options)
    for _ in range(5):
        theirs.step(make_grads(rng, params, {3}))
    saved = copy.deepcopy(theirs.opt.state_dict())
    before = picture(ours.opt, ours.params)
    converted = from_torch(saved, ours.opt)
    assert picture(ours.opt, ours.params) == before
    theirs.step(make_grads(rng, params))  # what was converted is a copy
    check_same(to_torch(converted), saved)
    ours.opt.load_state_dict(converted)
    check_same(to_torch(ours.opt.state_dict()), saved)


@EITHER
@pytest.mark.parametrize(("name", "options"), RUNS)
def test_through_a_file_of_torchs_and_back_is_the_same(optional, rng, name, options, dtype):
    """And the run that goes on from it has the bits of one that was never converted."""
    torch = optional("torch")
    params = make_params(rng, dtype)
    ours, _ = ours_and_theirs(torch, name, params, GROUPS[1], options)
    for _ in range(5):
        ours.step(make_grads(rng, params, {3}))
    ours.opt.param_groups[0]["lr"] = np.float64(0.125)  # torch.load takes no scalar of NumPy's
    file = io.BytesIO()
    torch.save(to_torch(ours.opt.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Ours(name, ours.params, GROUPS[1], amsgrad=options.get("amsgrad", False))
    other.opt.load_state_dict(from_torch(saved, other.opt))
    assert picture(other.opt, other.params) == picture(ours.opt, ours.params)
    for _ in range(3):
        grads = make_grads(rng, params)
        ours.step(grads)
        other.step(grads)
    assert picture(other.opt, other.params) == picture(ours.opt, ours.params)


def test_groups_have_every_key_of_torchs(optional):
    torch = optional("torch")
    opt = fastadam.Adam([{"params": {"w": np.ones(2), "b": np.ones(1)}}, {"params": [np.ones(3)]}])
    opt.step([{"w": np.ones(2), "b": None}, [np.ones(3)]])
    converted = to_torch(opt.state_dict())
    assert [group["params"] for group in converted["param_groups"]] == [[0, 1], [2]]
    assert converted["state"].keys() == {0, 2}
    theirs = torch.optim.Adam([torch.zeros(1)])
    for group in converted["param_groups"]:
        assert group.keys() == theirs.state_dict()["param_groups"][0].keys()
        for key in ("foreach", "capturable", "differentiable", "fused", "amsgrad"):
            assert group[key] == theirs.defaults[key]
    step = converted["state"][0]["step"]
    assert (step.dtype, step.shape, step.item()) == (torch.float32, (), 1.0)


def test_to_torch_shares_no_memory_and_is_on_the_cpu(optional):
    torch = optional("torch")
    opt = named()
    opt.step([{"w": np.ones(2)}, {"b": np.ones((2, 3))}])
    state_dict = opt.state_dict()
    with torch.device("meta"):
        converted = to_torch(state_dict)
    tensors = [tensor for state in converted["state"].values() for tensor in state.values()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    for tensor in tensors:
        tensor.fill_(9.0)
    for own in state_dict["state"].values():
        assert not any(np.any(np.equal(value, 9.0)) for value in own.values())


@pytest.mark.parametrize("amsgrad", [False, True])
def test_an_optimizer_before_its_first_step(optional, rng, amsgrad):
    torch = optional("torch")
    params = make_params(rng)
    ours, theirs = ours_and_theirs(torch, "Adam", params, None, {"amsgrad": amsgrad})
    converted = to_torch(ours.opt.state_dict())
    check_same(converted, theirs.opt.state_dict())
    ours.opt.load_state_dict(from_torch(converted, ours.opt))
    assert ours.opt.step_count == 0


def test_names_and_averages_stay_fastadams(optional, rng):
    torch = optional("torch")
    arrays = make_params(rng, shapes=[(3,), (2, 2)])
    params = dict(zip(("w", "b", "f"), arrays, strict=True))
    opt = fastadam.Adam(params, ema_decay=0.5, schedule=schedules.cosine(100))
    opt.step({name: np.ones_like(array) for name, array in params.items()})
    averages = [average.copy() for average in opt.ema_params.values()]
    theirs = Theirs(torch, "Adam", arrays)
    for _ in range(6):
        theirs.step(make_grads(rng, arrays, {1}))
    converted = from_torch(theirs.opt.state_dict(), opt)
    assert list(converted["state"]) == converted["param_groups"][0]["params"] == ["w", "b", "f"]
    opt.load_state_dict(converted)
    for own, before in zip(opt.ema_params.values(), averages, strict=True):
        np.testing.assert_array_equal(own, before)
    assert [opt.state[name]["step"] for name in "wbf"] == [6, 0, 6]
    assert not opt.state["b"]["exp_avg_sq"].any()  # opt's own is gone
    grads = {"w": np.ones(3), "b": None, "f": None}
    assert opt.step(grads).lr == opt.lr * schedules.cosine(100)(6)


def test_tensors_as_hyperparameters(optional):
    torch = optional("torch")
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    lr, betas = torch.tensor(0.25), (torch.tensor(0.5), torch.tensor([0.75]))
    theirs = torch.optim.Adam([weight], lr=lr, betas=betas)
    opt = fastadam.Adam([np.ones(2)])
    group = from_torch(theirs.state_dict(), opt)["param_groups"][0]
    assert (group["lr"], group["betas"]) == (0.25, (0.5, 0.75))
    assert {type(x) for x in (group["lr"], *group["betas"], group["weight_decay"])} == {float}


@pytest.mark.parametrize("default", ["float32", "float64"])
def test_torchs_count_of_steps(optional, default):
    """Its step is a float64 where that is the default; loading takes either as it is."""
    torch = optional("torch")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, default))
        theirs = Theirs(torch, "Adam", [np.ones(2)])
        theirs.step([np.ones(2)])
        assert theirs.state()[0]["step"].dtype == getattr(torch, default)
        opt = fastadam.Adam([np.ones(2)])
        opt.load_state_dict(from_torch(theirs.opt.state_dict(), opt))
        assert to_torch(opt.state_dict())["state"][0]["step"].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    assert opt.step_count == 1


def test_the_last_step_that_torch_counts(optional):
    torch = optional("torch")
    opt = fastadam.Adam({"w": np.ones(2)})
    opt.step({"w": np.ones(2)})
    state_dict = opt.state_dict()
    state_dict["state"]["w"]["step"] = 2**24
    step = to_torch(state_dict)["state"][0]["step"]
    assert step == 2**24
    assert step + 1 == step  # torch's count stands still here
    assert step.dtype == torch.float32
    state_dict["state"]["w"]["step"] = 2**24 + 1
    with pytest.raises(ValueError, match=r"\['w'\]\['step'\] must not exceed 2\*\*24.* 16777217"):
        to_torch(state_dict)


def test_adamw_of_torchs_decouples_what_it_loads(optional):
    """Why the docstring sends L2 decay to torch's Adam; which takes over decoupling as well."""
    torch = optional("torch")
    for ours, theirs, expected in (("Adam", "AdamW", True), ("AdamW", "Adam", True)):
        opt = getattr(fastadam, ours)([np.ones(2)], weight_decay=0.1)
        other = getattr(torch.optim, theirs)([torch.ones(2)])
        other.load_state_dict(to_torch(opt.state_dict()))
        assert other.param_groups[0]["decoupled_weight_decay"] is expected


# From here on arrays stand for tensors: from_torch needs no torch.


def saved_state(step=3.0, **options):
    """Return what torch's Adam might have saved of parameters of 2 and (2, 3)."""
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0, "amsgrad": True}
    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return {
        "state": {
            k: {"step": step, **{name: np.full(shape, 0.5) for name in moments}}
            for k, shape in enumerate([(2,), (2, 3)])
        },
        "param_groups": [{**group, **options, "params": [k]} for k in range(2)],
    }


def named(**options):
    """Return an optimizer that fits it."""
    params = [{"params": {"w": np.ones(2)}}, {"params": {"b": np.ones((2, 3))}}]
    return fastadam.Adam(params, amsgrad=True, **options)


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    opt = named()
    opt.load_state_dict(from_torch(saved_state(), opt))
    assert (opt.state["b"]["step"], opt.state["b"]["exp_avg"][1, 2]) == (3, 0.5)
    with pytest.raises(ImportError, match="to_torch needs torch: pip install torch") as caught:
        to_torch(opt.state_dict())
    assert caught.value.name == "torch"


def test_files_of_older_versions():
    """No decoupled_weight_decay: opt's own. No maximize: it did not exist. Steps were ints."""
    opt = named(decoupled_weight_decay=True, maximize=True)
    opt.load_state_dict(from_torch(saved_state(step=7), opt))
    assert opt.param_groups[1]["decoupled_weight_decay"] is True
    assert opt.param_groups[1]["maximize"] is False
    assert opt.step_count == opt.state["w"]["step"] == 7
    opt.load_state_dict(from_torch(saved_state(decoupled_weight_decay=False, maximize=True), opt))
    assert opt.param_groups[1]["decoupled_weight_decay"] is False
    assert opt.param_groups[1]["maximize"] is True


def test_an_empty_state_is_none_yet():
    """It is what reading optimizer.state[param] before the first step leaves behind."""
    saved, opt = saved_state(), named()
    saved["state"][1] = {}
    opt.load_state_dict(from_torch(saved, opt))
    assert [state["step"] for state in opt.state.values()] == [3, 0]


def edit(state, path, value):
    *parents, last = path
    for key in parents:
        state = state[key]
    if value is KeyError:
        del state[last]
    else:
        state[last] = value


COUNT = r"state\[1\]\['step'\] must be a whole number >= 0 and under 2\*\*62, not "


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["param_groups", 1], KeyError, "param_groups has 1 groups, not 2"),
        (["param_groups", 0, "params"], [0, 2], r"param_groups\[0\] has 2 parameters, not 1"),
        (["param_groups", 0, "params"], KeyError, r"param_groups\[0\] has no params"),
        (["param_groups", 0, "params"], 3, r"\[0\]\['params'\] is no list of places: 3"),
        (["param_groups", 0, "params"], [[0]], r"\['params'\] is no list of places: \[\[0\]\]"),
        (["param_groups", 0, "params"], [1], r"param_groups has \[1\] more than once"),
        (["param_groups", 0, "lr"], KeyError, r"param_groups\[0\] has no lr"),
        (["param_groups", 0, "betas"], KeyError, r"param_groups\[0\] has no betas"),
        (["param_groups", 0, "amsgrad"], KeyError, r"param_groups\[0\] has no amsgrad"),
        (["param_groups", 0, "amsgrad"], False, r"\[0\] has amsgrad=False, not True"),
        (["param_groups", 1], 3, r"param_groups\[1\] is no mapping"),
        (["param_groups", 0, "lr"], -1, r"param_groups\[0\].lr must be finite and >= 0, got -1"),
        (["param_groups", 0, "lr"], np.ones(2), r"\[0\].lr must be a real number, got array"),
        (["param_groups", 0, "betas"], (0.9, 1), r"param_groups\[0\].betas\[1\] must be in"),
        (["param_groups", 0, "maximize"], 1, r"\[0\].maximize must be True or False, got 1"),
        (["state", 1], 3, r"state\[1\] is no mapping"),
        (["state", 7], {}, "state has 7, which no group has"),
        (["state", 1, "exp_avg"], KeyError, r"state\[1\] has no 'exp_avg'"),
        (["state", 1, "step"], KeyError, r"state\[1\] has no 'step'"),
        (["state", 1, "max_exp_avg_sq"], KeyError, r"state\[1\] has no 'max_exp_avg_sq'"),
        (["state", 1, "mu_product"], 1.0, r"\[1\] has 'mu_product', which Adam has not"),
        (["state", 1, "exp_avg"], np.ones(6), r"is float64 \(6,\), not float64 \(2, 3\)"),
        (["state", 1, "exp_avg"], np.ones((2, 3), "f"), r"is float32 \(2, 3\), not float64"),
        (["state", 1, "exp_avg"], [[0.0] * 3] * 2, r"state\[1\]\['exp_avg'\] is no tensor"),
        (["state", 1, "step"], -1.0, COUNT + "-1.0"),
        (["state", 1, "step"], 1.5, COUNT + "1.5"),
        (["state", 1, "step"], np.float32("nan"), COUNT + ".*nan"),
        (["state", 1, "step"], np.inf, COUNT + "inf"),
        (["state", 1, "step"], 2.0**62, COUNT + "4"),
        (["state", 1, "step"], np.ones(2), COUNT + "array"),
        (["state", 1, "step"], True, COUNT + "True"),
        (["state", 1, "step"], "3", COUNT + "'3'"),
    ],
)
def test_what_does_not_fit_is_refused(path, value, message):
    saved, opt = saved_state(), named()
    edit(saved, path, value)
    before = picture(opt, [])
    with pytest.raises(ValueError, match="torch_state_dict must fit the optimizer: .*" + message):
        from_torch(saved, opt)
    assert picture(opt, []) == before


def test_every_mismatch_is_in_one_message():
    saved, opt = saved_state(), named()
    saved["param_groups"][0] |= {"lr": np.nan, "eps": -1.0, "amsgrad": False, "params": [0, 2]}
    saved["state"][1] |= {"step": 0.5, "exp_avg": np.ones(6), "exp_avg_sq": np.ones(1, "f")}
    del saved["state"][0]["exp_avg"]
    with pytest.raises(ValueError, match="must fit the optimizer: ") as caught:
        from_torch(saved, opt)
    parts = str(caught.value).partition("optimizer: ")[2].split("; ")
    assert parts == [
        "param_groups[0].lr must be finite and >= 0, got nan",
        "param_groups[0].eps must be finite and >= 0, got -1.0",
        "param_groups[0] has amsgrad=False, not True",
        "param_groups[0] has 2 parameters, not 1",
        "state[0] has no 'exp_avg'",
        "state[0] has 'max_exp_avg_sq', which Adam has not",
        "state[1]['step'] must be a whole number >= 0 and under 2**62, not 0.5",
        "state[1]['exp_avg'] is float64 (6,), not float64 (2, 3)",
        "state[1]['exp_avg_sq'] is float32 (1,), not float64 (2, 3)",
    ]


def test_steps_are_looked_at_whatever_the_number_of_groups():
    saved, opt = saved_state(step=-1.0), fastadam.Adam([np.ones(2)], amsgrad=True)
    with pytest.raises(ValueError, match=r"has 2 groups, not 1; .*state\[0\].*; state\[1\]"):
        from_torch(saved, opt)


def test_hyperparameters_that_the_dtype_does_not_hold():
    saved = saved_state(eps=1e-60)
    opt = fastadam.Adam([{"params": [np.ones(s, np.float32)]} for s in (2, (2, 3))], amsgrad=True)
    with pytest.raises(ValueError, match=r"param_groups\[1\].eps must not round to 0 in float32"):
        from_torch(saved, opt)


def test_names_in_another_order_are_refused():
    """Other names are no reason to: torch's are those of a model that fastadam does not know."""
    saved, opt = saved_state(), fastadam.Adam({"w": np.ones(2), "b": np.ones(2)}, amsgrad=True)
    saved["state"][1] = saved["state"][0]
    del saved["param_groups"][1]
    saved["param_groups"][0] |= {"params": [0, 1], "param_names": ["b", "w"]}
    with pytest.raises(ValueError, match=r"\[0\] has \['b', 'w'\] in another order than \['w'"):
        from_torch(saved, opt)
    for names in (["w", "b"], ["layer.b", "layer.w"], None):
        saved["param_groups"][0]["param_names"] = names
        assert from_torch(saved, opt)["step_count"] == 3


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([], "torch_state_dict must be a mapping, got list"),
        ({}, r"torch_state_dict\['state'\] must be a mapping, got None"),
        ({"state": [], "param_groups": []}, r"\['state'\] must be a mapping, got \[\]"),
        ({"state": {}, "param_groups": {}}, r"\['param_groups'\] must be a list, got {}"),
    ],
)
def test_no_such_mapping(saved, message):
    with pytest.raises(TypeError, match=message):
        from_torch(saved, named())


def test_no_such_optimizer():
    with pytest.raises(TypeError, match=r"opt must be a fastadam.Adam, got ObjectAdam"):
        from_torch(saved_state(), fastadam.from_objects([]))


def test_tensors_that_fastadam_cannot_hold(optional):
    torch = optional("torch")
    opt = fastadam.Adam([np.ones(2)])
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    theirs = torch.optim.Adam([weight])
    weight.grad = torch.ones_like(weight)
    theirs.step()
    with pytest.raises(ValueError, match=r"\['exp_avg'\] is bfloat16 \(2,\), not float64 \(2,\)"):
        from_torch(theirs.state_dict(), opt)
    saved = theirs.state_dict()
    for name in ("exp_avg", "exp_avg_sq"):
        saved["state"][0][name] = torch.zeros(2, dtype=torch.float64, device="meta")
    saved["state"][0]["step"] = torch.tensor(1.0, device="meta")
    with pytest.raises(ValueError, match="is no array in memory: ") as caught:
        from_torch(saved, opt)
    assert "['step'] must be a whole number" in str(caught.value)


@pytest.mark.parametrize("name", ["RAdam", "NAdam", "Adamax", "SGD", "Adagrad"])
def test_other_optimizers_of_torchs_are_refused(optional, name):
    """RAdam's state has Adam's very keys."""
    torch = optional("torch")
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    theirs = getattr(torch.optim, name)([weight])
    weight.grad = torch.ones_like(weight)
    theirs.step()
    with pytest.raises(ValueError, match=r"has no .*amsgrad"):
        from_torch(theirs.state_dict(), fastadam.Adam([np.ones(2)]))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["state", "w"], KeyError, "state has no 'w'"),
        (["state", "w"], 3, r"state\['w'\] is no mapping"),
        (["state", "x"], {}, "state has 'x', which no group has"),
        (["state", "w", "exp_avg"], KeyError, r"state\['w'\] has no 'exp_avg'"),
        (["state", "w", "max_exp_avg_sq"], KeyError, r"state\['w'\] has no 'max_exp_avg_sq'"),
        (["state", "w", "momentum"], 1, r"state\['w'\] has 'momentum', which Adam has not"),
        (["state", "w", "exp_avg"], [1.0, 2.0], r"'exp_avg'\] is no array of float32 or float64"),
        (["state", "w", "exp_avg_sq"], np.ones(3), r"is float64 \(3,\), not float64 \(2,\)"),
        (["state", "w", "step"], -1, r"\['step'\] must be an integer >= 0, not -1"),
        (["state", "w", "step"], None, r"\['step'\] must be an integer >= 0, not None"),
        (["param_groups", 0, "lr"], KeyError, r"param_groups\[0\] has no lr"),
        (["param_groups", 0, "lr"], -1.0, r"param_groups\[0\].lr must be finite and >= 0"),
        (["param_groups", 0], 3, r"param_groups\[0\] is no mapping"),
    ],
)
def test_what_is_no_state_of_fastadams_is_refused(optional, path, value, message):
    optional("torch")
    state_dict = named(ema_decay=0.5).state_dict()
    edit(state_dict, path, value)
    with pytest.raises(ValueError, match="must be one of fastadam.Adam's: .*" + message):
        to_torch(state_dict)


def test_to_torch_of_no_such_mapping(optional):
    optional("torch")
    with pytest.raises(TypeError, match="state_dict must be a mapping, got Adam"):
        to_torch(named())


def test_examples_that_need_no_torch():
    results = [doctest.testmod(module) for module in (cpu_params, state_dicts)]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 5


def test_examples_that_do(optional):
    optional("torch")
    for example in (tests := doctest.DocTestFinder().find(to_torch, globs={})[0]).examples:
        example.options.pop(doctest.SKIP, None)
    assert doctest.DocTestRunner().run(tests).failed == 0


@pytest.mark.parametrize("function", [to_torch, from_torch])
def test_docstrings(function):
    doc = inspect.getdoc(function)
    assert len(doc.splitlines()[0]) <= 75
    assert all(name in doc for name in inspect.signature(function).parameters)
    assert all(f"{title}\n---" in doc for title in ("Parameters", "Returns", "Raises", "Examples"))
