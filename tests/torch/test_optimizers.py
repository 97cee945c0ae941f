"""Contracts of fastadam.torch's Adam and AdamW of which torch's own tests say nothing."""

import copy
import functools
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

EXTRAS = {"max_grad_norm": 0.5, "nonfinite": "skip", "ema_decay": 0.75}


@pytest.fixture
def torch(optional):
    return optional("torch")


@pytest.fixture(params=["Adam", "AdamW"])
def cls(torch, request):  # noqa: ARG001
    import fastadam.torch

    return getattr(fastadam.torch, request.param)


def make_params(torch, *shapes, dtype=None):
    """Return parameters with gradients, the same at each call."""
    draw = torch.Generator().manual_seed(20261130)
    params = []
    for shape in shapes:
        values = torch.randn(2, *shape, generator=draw, dtype=dtype)
        params.append(torch.nn.Parameter(values[0].clone()))
        params[-1].grad = values[1].clone()
    return params


def theirs_of(torch, cls):
    return getattr(torch.optim, cls.__name__)


def draw_grads(params, seed):
    """Give every parameter that requires one a gradient, the same for the same seed."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    for param in params:
        if param.requires_grad:
            values = torch.randn(param.shape, generator=draw, dtype=param.dtype)
            param.grad = torch.empty_like(param).copy_(values)


def run(opt, params, seeds):
    for seed in seeds:
        draw_grads(params, seed)
        opt.step()


def picture(opt, params):
    """Return copies of all that a step may change."""
    state = {k: {n: v.clone() for n, v in own.items()} for k, own in opt.state.items()}
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in opt.param_groups
    ]
    versions = [param._version for param in params]
    return [param.detach().clone() for param in params], state, copy.deepcopy(groups), versions


def assert_same(torch, found, expected):
    """The bits, and that each has the same state."""
    assert found[2:] == expected[2:]
    assert list(found[1]) == list(expected[1])
    torch.testing.assert_close(
        (found[0], list(found[1].values())),
        (expected[0], list(expected[1].values())),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 1.0, "ema_decay": 0.9}])
def test_a_step_without_any_gradient(torch, cls, extras):
    """Once there is state: as after zero_grad, or in a step that all gradients skip."""
    params = make_params(torch, (3, 2), (4,))
    opt = cls(params, **extras)
    opt.step()
    before = copy.deepcopy((params, opt.state_dict()))
    opt.zero_grad()
    opt.step()
    for param, old in zip(params, before[0], strict=True):
        assert torch.equal(param, old)
    torch.testing.assert_close(opt.state_dict(), before[1], rtol=0, atol=0)


@pytest.mark.parametrize("last", ["amsgrad", "no gradient", "empty"])
def test_the_last_group_has_nothing_to_update(torch, cls, last):
    """Or not in the same call: groups with and without AMSGrad are updated apart."""
    first, second = make_params(torch, (3, 2), (4,))
    groups = [{"params": [first]}, {"params": [second], "lr": 0.5, "amsgrad": last == "amsgrad"}]
    if last == "no gradient":
        second.grad = None
    elif last == "empty":
        groups[1]["params"] = []
    theirs = copy.deepcopy(groups)
    for group, old in zip(theirs, groups, strict=True):
        for param, other in zip(group["params"], old["params"], strict=True):
            param.grad = other.grad
    cls(groups, lr=0.1).step()
    getattr(torch.optim, cls.__name__)(theirs, lr=0.1).step()
    for group, other in zip(groups, theirs, strict=True):
        torch.testing.assert_close(group["params"], other["params"])


def test_result_is_not_of_the_state(torch, cls):
    """A copy has taken no step; and what vars() shows is what torch copies."""
    params = make_params(torch, (3, 2))
    opt = cls(params, max_grad_norm=1.0)
    assert opt.result is None
    opt.step()
    assert opt.result.grad_norm > 0
    other = copy.deepcopy(opt)
    assert other.result is None
    with pytest.raises(AttributeError):
        opt.result = None


def test_closure(torch, cls):
    """It may compute gradients where the caller may not; its value is returned as it is."""
    (param,) = make_params(torch, (3,))
    opt = cls([param], lr=0.5)
    calls = []

    def closure():
        calls.append((torch.is_grad_enabled(), param.detach().clone()))
        opt.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    before = param.detach().clone()
    with torch.no_grad():
        loss = opt.step(closure)
    ((enabled, seen),) = calls
    assert enabled
    assert torch.equal(seen, before)  # the closure comes before the update
    assert loss.item() == (before**2).sum().item()
    assert opt.state[param]["step"] == 1
    assert opt.step() is None
    sentinel = object()
    assert opt.step(lambda: sentinel) is sentinel


def test_closure_that_raises(torch, cls):
    params = make_params(torch, (3,))
    opt = cls(params)
    before = picture(opt, params)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert_same(torch, picture(opt, params), before)


def test_add_param_group_between_steps(torch, cls):
    """The new group counts from 0, with the defaults that it does not set."""
    runs = []
    for each in (cls, theirs_of(torch, cls)):
        first, second = params = make_params(torch, (3, 2), (4,))
        opt = each([first], lr=0.1, weight_decay=0.1)
        run(opt, [first], range(3))
        opt.add_param_group({"params": [second], "lr": 0.01})
        run(opt, params, range(3, 6))
        runs.append(params)
        assert [int(opt.state[param]["step"]) for param in params] == [6, 3]
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(torch, cls, set_to_none):
    """Zeros are a gradient, and count; None is not."""
    params = make_params(torch, (3, 2))
    opt = cls(params)
    opt.step()
    grad = params[0].grad
    opt.zero_grad(set_to_none)
    assert (params[0].grad is None) is set_to_none
    if not set_to_none:
        assert params[0].grad is grad
        assert not grad.any()
    opt.step()
    assert opt.state[params[0]]["step"] == 2 - set_to_none


def test_tensors_changed_in_place(torch, cls):
    """Each step reads lr and betas anew; float64 tensors give the bits of floats."""
    values = [(0.1, 0.9, 0.99), (0.02, 0.8, 0.999), (0.3, 0.85, 0.9)]
    lr, beta1, beta2 = (torch.tensor(value, dtype=torch.float64) for value in values[0])
    ours, others = make_params(torch, (3, 2)), make_params(torch, (3, 2))
    opt, other = cls(ours, lr=lr, betas=(beta1, beta2)), cls(others)
    for k, row in enumerate(values):
        for tensor, value in zip((lr, beta1, beta2), row, strict=True):
            tensor.fill_(value)
        other.param_groups[0].update(lr=row[0], betas=row[1:])
        run(opt, ours, [k])
        run(other, others, [k])
        assert torch.equal(ours[0], others[0])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("layout", ["today's", "of torch 1.13", "of torch 1.4"])
@pytest.mark.parametrize("ours_first", [True, False], ids=["to torch", "from torch"])
def test_state_dicts_are_torchs(torch, cls, amsgrad, layout, ours_first):
    """Halfway the other takes over, in either direction; older files have fewer keys."""
    makers = [cls, theirs_of(torch, cls)]
    first, second = makers if ours_first else makers[::-1]
    kwargs = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": amsgrad}
    params, straight = make_params(torch, (3, 2), ()), make_params(torch, (3, 2), ())
    opt, other = first(params, **kwargs), theirs_of(torch, cls)(straight, **kwargs)
    run(opt, params, range(4))
    run(other, straight, range(8))
    saved = copy.deepcopy(opt.state_dict())
    newer = {"decoupled_weight_decay"}
    if layout == "of torch 1.4":
        newer |= {"maximize", "foreach", "capturable", "differentiable", "fused"}
        for own in saved["state"].values():
            own["step"] = int(own["step"])
    if layout != "today's":
        for group in saved["param_groups"]:
            for name in newer:
                del group[name]
    opt = second(params)  # with the defaults, over which the file's go
    opt.load_state_dict(saved)
    run(opt, params, range(4, 8))
    torch.testing.assert_close(params, straight)
    names = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if amsgrad else set())
    for param, expected in zip(params, straight, strict=True):
        assert set(opt.state[param]) == names
        for name, value in other.state[expected].items():
            torch.testing.assert_close(opt.state[param][name], value)


def test_torch_leaves_an_average_alone(torch, cls):
    """It loads, and saves again, state that it does not know."""
    params = make_params(torch, (3,))
    opt = cls(params, ema_decay=0.75)
    run(opt, params, range(2))
    average = opt.ema_params[0].clone()
    theirs = theirs_of(torch, cls)(params)
    theirs.load_state_dict(opt.state_dict())
    run(theirs, params, range(2))
    other = cls(params, ema_decay=0.75)
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(other.ema_params[0], average)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "weights_only"])
def test_copies_take_the_same_steps(torch, cls, way):
    """To the bit, with all extras, which are no part of a state dict's groups."""
    params = make_params(torch, (3, 2), (4,))
    opt = cls(params, lr=0.1, amsgrad=True, **EXTRAS)
    run(opt, params, range(3))
    if way == "weights_only":
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        own = copy.deepcopy(params)
        other = cls(own, **EXTRAS)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        other = copy.deepcopy(opt) if way == "deepcopy" else pickle.loads(pickle.dumps(opt))
        own = other.param_groups[0]["params"]
    assert (other.max_grad_norm, other.nonfinite, other.ema_decay) == tuple(EXTRAS.values())
    for each, values in ((opt, params), (other, own)):
        run(each, values, range(3, 6))
        values[0].grad = values[0].grad * float("nan")
        each.step()
        assert each.result.skipped
    for found, expected in zip(own, params, strict=True):
        assert torch.equal(found, expected)
        assert other.state[found].keys() == opt.state[expected].keys()
        for name, value in opt.state[expected].items():
            assert torch.equal(other.state[found][name], value)


def test_data_swapped_between_steps(torch, cls):
    """As engines do that gather and scatter: what is updated is what is there at the step."""
    params, straight = make_params(torch, (3, 2), (4,)), make_params(torch, (3, 2), (4,))
    opt, other = cls(params), cls(straight)
    for seed in range(4):
        old = [param.data for param in params]
        values = [data.clone() for data in old]
        for param in params:
            param.data = param.data.clone()
        run(opt, params, [seed])
        run(other, straight, [seed])
        for data, value in zip(old, values, strict=True):
            assert torch.equal(data, value)
    for param, expected in zip(params, straight, strict=True):
        assert torch.equal(param, expected)


def test_requires_grad_toggled(torch, cls):
    """Frozen for two of six steps: as torch's, in value and count."""
    runs = []
    for each in (cls, theirs_of(torch, cls)):
        params = make_params(torch, (3, 2), (4,))
        opt = each(params)
        for seed in range(6):
            params[1].requires_grad_(seed not in (2, 3))
            opt.zero_grad()
            run(opt, params, [seed])
        runs.append((params, [int(opt.state[param]["step"]) for param in params]))
    torch.testing.assert_close(runs[0], runs[1])
    assert runs[0][1] == [6, 4]


def test_a_parameter_without_a_gradient(torch, cls):
    """It has no state, as in torch, and is left alone, until it has one."""
    params = make_params(torch, (3, 2), (4,))
    params[0].grad = None
    opt = cls(params)
    old = params[0].detach().clone()
    opt.step()
    assert torch.equal(params[0], old)
    assert list(opt.state) == [params[1]]
    run(opt, params, range(2))
    assert [int(opt.state[param]["step"]) for param in params] == [2, 3]


@pytest.mark.parametrize("shapes", [((2, 3, 4, 5),), ((), (1,), (0,), (3, 0, 2)), ((1, 1, 1, 1),)])
def test_shapes_and_channels_last(torch, cls, shapes):
    """Any dense order of the axes gives the same bits; no axis, or no element, is no trouble."""
    plain, last, theirs = (make_params(torch, *shapes) for _ in range(3))
    for param in last:
        if param.dim() == 4:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
    for params, each in ((plain, cls), (last, cls), (theirs, theirs_of(torch, cls))):
        opt = each(params, lr=0.1)
        run(opt, params, range(3))
        for param in params:
            assert opt.state[param]["exp_avg"].stride() == param.stride()
    for param, other in zip(plain, last, strict=True):
        assert torch.equal(param, other)
    torch.testing.assert_close(plain, theirs)


def test_state_of_another_memory_format(torch, cls):
    """A model is made channels_last after a load, or between two steps: the same bits."""
    plain, last = make_params(torch, (2, 3, 4, 5)), make_params(torch, (2, 3, 4, 5))
    opt, other = cls(plain, amsgrad=True), cls(last, amsgrad=True)
    run(opt, plain, range(2))
    run(other, last, range(2))
    last[0].data = last[0].data.contiguous(memory_format=torch.channels_last)
    run(opt, plain, range(2, 4))
    run(other, last, range(2, 4))
    assert torch.equal(plain[0], last[0])
    again = cls(last, amsgrad=True)
    # In C order. A copy: torch's loading shares what need not be converted.
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(opt, plain, range(4, 6))
    run(again, last, range(4, 6))
    assert torch.equal(plain[0], last[0])


def make_bad(torch, name, opt, params):
    """Make the next step impossible; return what it raises."""
    last, group = params[-1], opt.param_groups[-1]
    if name == "sparse":
        last.grad = last.grad.to_sparse()
        return RuntimeError, "does not support sparse gradients"
    if name == "meta":
        meta = torch.nn.Parameter(torch.empty(3, device="meta"))
        meta.grad = torch.empty(3, device="meta")
        group["params"].append(meta)
        return RuntimeError, "meta has no memory"
    if name == "nonfinite":
        opt.nonfinite = "raise"
        last.grad = last.grad * float("inf")
        return FloatingPointError, "finite"
    if name == "lr":
        group["lr"] = -1.0
        return ValueError, "lr"
    if name == "betas":
        group["betas"] = (0.9, 1.0)
        return ValueError, "betas"
    if name == "eps":
        group["eps"] = "small"
        return TypeError, "eps"
    new = opt.state[last]
    if name == "shape of state":
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema")
        new.update({each: torch.zeros(7, dtype=last.dtype) for each in names})
        new["step"] = torch.tensor(1.0)
        return ValueError, "exp_avg"
    raise AssertionError(name)


BAD = ("sparse", "meta", "nonfinite", "lr", "betas", "eps", "shape of state")


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("kind", ["usual", "amsgrad", "float16", "strided", "complex64"])
def test_a_call_that_raises_changes_nothing(torch, cls, name, steps, kind):
    """No parameter, no state or count, and no parameter gets state.

    Also not if the group at fault comes after others: what differs in kind takes several calls.
    """
    params = make_params(torch, (3, 2), (4,), (5,))
    if kind in ("float16", "complex64"):
        params[1:] = [torch.nn.Parameter(p.detach().to(getattr(torch, kind))) for p in params[1:]]
    elif kind == "strided":
        params[1:] = [torch.nn.Parameter(torch.rand(n, 2)[:, 0]) for n in (4, 5)]
    opt = cls(
        [{"params": params[:1]}, {"params": params[1:], "amsgrad": kind == "amsgrad"}],
        ema_decay=0.75,
    )
    run(opt, params, range(steps))
    draw_grads(params, steps)
    error, message = make_bad(torch, name, opt, params)
    before = picture(opt, params)
    for _ in range(2):  # nor is anything remembered
        with pytest.raises(error, match=message):
            opt.step()
        assert_same(torch, picture(opt, params), before)


def test_autograd_is_told(torch, cls):
    """A graph that has kept a parameter for its backward refuses to go on, as with torch's."""
    for each in (cls, theirs_of(torch, cls)):
        first, second = make_params(torch, (3, 3), (3,))
        opt = each([first, second])
        still = (torch.ones(3) @ first).sum()  # does not keep the parameter
        loss = (first @ second).sum()
        opt.step()
        still.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_autograd_is_not_told_of_what_stays(torch, cls):
    """Without a gradient, or skipped, a parameter is as it was."""
    first, second = make_params(torch, (3, 3), (3,))
    loss = (first @ second).sum()
    first.grad = None
    second.grad = second.grad * float("nan")
    opt = cls([first, second], nonfinite="skip")
    opt.step()
    assert opt.result.skipped
    loss.backward()
    assert first.grad is not None


def with_grad(torch, **kwargs):
    param = torch.ones(2, **kwargs)
    param.grad = torch.ones_like(param)
    return [param]


REFUSED = {
    "fused and foreach": lambda t, c: c(with_grad(t), fused=True, foreach=True),
    "fused and differentiable": lambda t, c: c(with_grad(t), fused=True, differentiable=True),
    "lr < 0": lambda t, c: c(with_grad(t), lr=-1),
    "lr of text": lambda t, c: c(with_grad(t), lr="0.1"),
    "eps < 0": lambda t, c: c(with_grad(t), eps=-1.0),
    "betas of ints": lambda t, c: c(with_grad(t), betas=(0, 0)),
    "one beta": lambda t, c: c(with_grad(t), betas=(0.9,)),
    "no params": lambda t, c: c([]),  # noqa: ARG005
    "params that are no tensors": lambda t, c: c(["weight"]),  # noqa: ARG005
    "a set of params": lambda t, c: c([{"params": set(with_grad(t))}]),
    "a group without params": lambda t, c: c([{"lr": 0.1}]),  # noqa: ARG005
    "no leaf": lambda t, c: c([t.ones(2, requires_grad=True) * 2]),
    "unknown argument": lambda t, c: c(with_grad(t), momentum=0.9),
    "seven by position": lambda t, c: c(with_grad(t), 1e-3, (0.9, 0.9), 1e-8, 0, True, True),
    "closure of a number": lambda t, c: c(with_grad(t)).step(3),
    "capturable on the CPU": lambda t, c: c(with_grad(t), capturable=True).step(),
    "state of other groups": lambda t, c: c(with_grad(t)).load_state_dict(
        c(with_grad(t) + with_grad(t)).state_dict()
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_by_torch(torch, cls, name):
    """The same type with the same words, whatever refuses it."""
    raised = []
    for each in (cls, theirs_of(torch, cls)):
        with pytest.raises(Exception) as error:  # noqa: PT011
            REFUSED[name](torch, each)
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("set_later", [False, True])
def test_arrays_of_numpy_as_hyperparameters(torch, cls, set_later):
    """As `numpy.where`, in a schedule, returns a learning rate."""
    values = {"lr": np.array(0.25), "betas": np.array([0.5, 0.75])}
    results = []
    for each in (cls, theirs_of(torch, cls)):
        params = make_params(torch, (3, 2), (4,))
        opt = each([{"params": [param], **({} if set_later else values)} for param in params])
        if set_later:
            for group in opt.param_groups:
                group.update(values)
        run(opt, params, range(3))
        results.append(params)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("maximize", [1, 0, None])
def test_maximize_that_is_true_or_not(torch, cls, maximize):
    results = []
    for each in (cls, theirs_of(torch, cls)):
        params = make_params(torch, (3, 2))
        run(each(params, maximize=maximize), params, range(3))
        results.append(params)
    torch.testing.assert_close(*results)


def test_ctrl_c_after_the_kernel(torch, cls, monkeypatch):
    """Autograd is told all the same: what it has saved of the old values is not used."""
    from fastadam import functional

    params = make_params(torch, (3, 2))
    opt = cls(params)
    loss = (params[0] ** 2).sum()
    adam = functional.adam

    def interrupted(*args, **kwargs):
        adam(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(functional, "adam", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def timed(step):
    """A wrapper as of a tracer's."""

    @functools.wraps(step)
    def wrapper(*args, **kwargs):
        return step(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("how", ["own step", "wrapped", "wrapped in place", "wrapped twice"])
def test_hooks_run_once_whoever_wraps_the_step(torch, cls, how):
    class Own(cls):
        pass

    if how == "own step":

        def step(self, closure=None):
            return super(Own, self).step(closure)

        Own.step = step
    elif how != "wrapped in place":
        Own.step = timed(cls.step)
    (param,) = make_params(torch, (3,))
    opt = Own([param])
    if how == "wrapped in place":
        Own.step = timed(Own.step)
    if how == "wrapped twice":
        Own.step = timed(Own.step)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    param.grad = torch.ones_like(param)
    opt.step()
    assert calls == ["pre", "post"]
    assert opt.state[param]["step"] == 1


def test_storage_can_be_resized_after_a_step(torch, cls):
    """As engines do that free memory for a while."""
    (param,) = make_params(torch, (3,))
    opt = cls([param])
    opt.step()
    for tensor in (param, param.grad, opt.state[param]["exp_avg"]):
        storage = tensor.untyped_storage()
        storage.resize_(0)
        storage.resize_(12)


@pytest.mark.usefixtures("torch")
def test_torch_that_is_too_old():
    code = "import torch; torch.__version__ = '2.6.1+cpu'; import fastadam.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = (
        "ImportError: fastadam.torch needs PyTorch 2.7 or later: pip install -U torch, got 2.6"
    )
    assert message in done.stderr
