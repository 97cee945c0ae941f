"""Parameters that no kernel of ours takes as they are, or not all in one call."""

import copy
import math

import pytest

pytest.importorskip("torch", exc_type=ImportError)
import torch

from fastadam.torch import Adam, AdamW, parts

MAKE = {
    "bfloat16": lambda: torch.randn(4, 3, dtype=torch.bfloat16),
    "float16": lambda: torch.randn(4, 3, dtype=torch.float16),
    "gaps": lambda: torch.randn(4, 3, 2)[..., 0],
    "complex": lambda: torch.randn(4, 3, dtype=torch.complex64),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "float64": lambda: torch.randn(4, 3, dtype=torch.float64),
    "no elements": lambda: torch.randn(0, 3),
    "one number": lambda: torch.randn(()),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(names):
    return [torch.nn.Parameter(MAKE[name]()) for name in names]


def give_grads(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = torch.empty_like(param).copy_(grad)


def run(cls, params, steps=4, clip=None, **options):
    opt = cls(params, **options)
    for step in range(steps):
        give_grads(params, step)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        opt.step()
    return opt


def close(ours, theirs, at_least=0.0):
    for a, b in zip(ours, theirs, strict=True):
        eps = {torch.float64: 1e-13, torch.complex64: 1e-6, torch.float32: 1e-6}.get(a.dtype, 1e-2)
        eps = max(eps, at_least)
        torch.testing.assert_close(a, b, rtol=eps, atol=eps)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_each_kind_is_updated_as_by_torch(name, options):
    ours = make([name])
    theirs = copy.deepcopy(ours)
    mine, other = run(Adam, ours, **options), run(torch.optim.Adam, theirs, **options)
    close(ours, theirs)
    for own, state in zip(mine.state.values(), other.state.values(), strict=True):
        assert own.keys() == state.keys()
        assert own["step"] == state["step"]
        for key in own:
            assert own[key].dtype == state[key].dtype
            assert own[key].stride() == state[key].stride()


def test_all_kinds_in_one_optimizer():
    """With groups that differ in AMSGrad and rates, and all that fastadam adds.

    But for float16, in which clipped gradients have squares of 0: the updates are infinite.
    """
    ours = make(name for name in MAKE if name != "float16")
    theirs = copy.deepcopy(ours)

    def groups(params):
        return [
            {"params": params[:2], "lr": 1e-2},
            {"params": params[2:4], "amsgrad": True},
            {"params": params[4:], "weight_decay": 0.5},
        ]

    opt = AdamW(groups(ours), max_grad_norm=0.5, ema_decay=0.5)
    other = torch.optim.AdamW(groups(theirs))
    for step in range(3):
        give_grads(ours, step)
        give_grads(theirs, step)
        before = [param.grad.clone() for param in ours]
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        opt.step()
        other.step()
        assert opt.result.grad_norm == pytest.approx(float(norm), rel=1e-3)
        assert not opt.result.skipped
        for param, grad in zip(ours, before, strict=True):
            assert torch.equal(param.grad, grad)
    close(ours, theirs, at_least=1e-5)  # torch's norm is of float32
    assert [len(opt.state[param]) for param in ours] == [4, 4, 5, 5, 4, 4, 4]


@pytest.mark.parametrize("name", ["bfloat16", "gaps", "complex", "float64"])
def test_averages(name):
    params = make([name])
    opt = AdamW(params, ema_decay=0.75)
    expected = params[0].detach().clone()
    for step in range(3):
        give_grads(params, step)
        opt.step()
        expected.lerp_(params[0].detach(), 0.25)
    close(opt.ema_params, [expected])


@pytest.mark.parametrize("names", [["bfloat16", "float64"], ["float64"], ["gaps"]], ids="+".join)
def test_what_is_not_finite(names):
    params = make(names)
    opt = AdamW(params, nonfinite="skip")
    give_grads(params, 0)
    opt.step()
    give_grads(params, 1)
    params[-1].grad[0, 0] = math.nan
    before = copy.deepcopy((params, opt.state_dict()))
    opt.step()
    assert opt.result.skipped
    opt.nonfinite = "raise"
    place = rf"\['params'\]\[{len(names) - 1}\], must be finite, got nan at \[0, 0\]"
    with pytest.raises(FloatingPointError, match=place):
        opt.step()
    after = params, opt.state_dict()
    for a, b in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b)
    for k, own in before[1]["state"].items():
        for key, value in own.items():
            assert torch.equal(value, after[1]["state"][k][key])
    opt.nonfinite = "propagate"
    opt.step()
    assert params[-1].isnan().any()


def test_what_is_not_finite_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    opt = AdamW(model.named_parameters(), nonfinite="raise")
    model(torch.ones(2)).backward()
    model[0].weight.grad = None
    model[1].bias.grad.fill_(-math.inf)
    message = (
        r"^the gradient of '1.bias', param_groups\[0\]\['params'\]\[3\], must be finite, got -inf"
    )
    with pytest.raises(FloatingPointError, match=message):
        opt.step()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_clipping_what_is_not_finite(value):
    """As `clip_grad_norm_` does: by 0, which makes NaN of the infinite one, or by NaN."""
    ours = make(["bfloat16", "float64"])
    theirs = copy.deepcopy(ours)
    opt, other = AdamW(ours, max_grad_norm=1.0), torch.optim.AdamW(theirs)
    for params in (ours, theirs):
        give_grads(params, 0)
        params[1].grad[0, 0] = value
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    opt.step()
    other.step()
    assert ours[1].isnan().any()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    close([ours[0].nan_to_num()], [theirs[0].nan_to_num()])


def test_state_in_another_order_is_brought_into_the_parameters():
    """As after a load, or after the model was moved to channels_last."""
    (param,) = make(["channels_last"])
    contiguous = torch.nn.Parameter(param.detach().contiguous())
    opt, other = run(AdamW, [param]), run(torch.optim.AdamW, [contiguous])
    opt.load_state_dict(copy.deepcopy(other.state_dict()))
    assert opt.state[param]["exp_avg"].stride() != param.stride()
    with torch.no_grad():
        param.copy_(contiguous)
    for own in ([param], [contiguous]):
        give_grads(own, 9)
    opt.step()
    other.step()
    close([param], [contiguous])
    assert opt.state[param]["exp_avg"].stride() == param.stride()
    assert opt._all_usual is True


def test_a_gradient_in_another_order_is_read_through_a_copy():
    (param,) = make(["channels_last"])
    twin = copy.deepcopy(param)
    opt, other = AdamW([param]), AdamW([twin])
    for _ in range(3):
        grad = torch.randn(param.shape)
        param.grad, twin.grad = grad, torch.empty_like(twin).copy_(grad)
        opt.step()
        other.step()
        assert param.grad is grad
    assert torch.equal(param, twin)


def test_axes_on_a_device_are_brought_into_c_order():
    """Its kernels take no other. The device meta stands for one."""
    tensor = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    row = parts._in_c_order([tensor, None, tensor])
    assert row[1] is None
    for each in (row[0], row[2]):
        assert each.is_contiguous()
        assert sorted(each.shape) == [2, 3, 4, 5]
    plain = [tensor.contiguous(), None]
    assert parts._in_c_order(plain) is plain


def test_one_call_again_once_nothing_is_unusual():
    params = make(["float64", "channels_last"])
    opt = run(AdamW, params)
    assert opt._all_usual
    odd = torch.nn.Parameter(MAKE["bfloat16"]())
    opt.add_param_group({"params": [odd]})
    give_grads([*params, odd], 5)
    opt.step()
    assert not opt._all_usual
    opt.param_groups.pop()
    del opt.state[odd]
    opt.step()
    assert opt._all_usual


@pytest.mark.parametrize("fused", [None, True])
def test_capturable_follows_torchs_rules(fused):
    """On the CPU torch refuses it in the step, but not of its fused optimizers."""
    params = make(["float64", "one number"])
    groups = [{"params": params[:1]}, {"params": params[1:], "capturable": True}]
    before = copy.deepcopy(params)
    opt = AdamW(groups, fused=fused)
    give_grads(params, 0)
    if fused:
        opt.step()
        assert len(opt.state) == 2
    else:
        with pytest.raises(AssertionError, match="If capturable=True, params and state_steps"):
            opt.step()
        assert not opt.state
        for a, b in zip(params, before, strict=True):
            assert torch.equal(a, b)


def test_differentiable_is_torchs_own_step():
    results = []
    for cls in (Adam, torch.optim.Adam):
        start = torch.ones(3, dtype=torch.float64, requires_grad=True)
        param = start.clone()
        param.grad = 2 * param
        param.grad.retain_grad()
        opt = cls([param], lr=0.1, differentiable=True)
        hooks = []
        opt.register_step_pre_hook(lambda *_: hooks.append(1))  # noqa: B023
        opt.step()
        param.sum().backward()
        results.append((param.detach(), start.grad))
        assert hooks == [1]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def steps_of_both(give, *, params, steps=3, **options):
    """Return parameters and state after steps of torch's class and of ours, each on a copy.

    ``give`` gets the parameters, the optimizer and the number of a step, before that.
    """
    found = []
    for cls in (torch.optim.AdamW, AdamW):
        own = copy.deepcopy(params)
        opt = cls(own, lr=0.1, **options)
        for step in range(steps):
            give_grads(own, step)
            give(own, opt, step)
            opt.step()
        found.append((own, opt))
    return found


def assert_alike(theirs, ours, at_least=0.0):
    (expected, other), (params, opt) = theirs, ours
    close(params, expected, at_least)
    for param, twin in zip(params, expected, strict=True):
        close([opt.state[param]["exp_avg"]], [other.state[twin]["exp_avg"]])
        assert float(opt.state[param]["step"]) == float(other.state[twin]["step"])


@pytest.mark.parametrize("name", ["float64", "bfloat16", "gaps", "one number"])
@pytest.mark.parametrize("at", [0, 2], ids="first from step {}".format)
def test_gradients_of_zeros_without_memory(name, at):
    """Torch's autograd makes such. They are zeros, which count, and no missing gradients."""

    def give(params, opt, step):  # noqa: ARG001
        if step >= at:
            params[0].grad = torch._efficientzerotensor(params[0].shape, dtype=params[0].dtype)

    both = steps_of_both(give, params=make([name]), steps=4)
    assert_alike(*both, at_least=0.04 if name == "bfloat16" else 0.0)


def test_a_gradient_whose_storage_is_freed():
    """Neither zeros nor a missing gradient."""
    params = make(["float64", "float64"])
    opt = run(AdamW, params)
    before = copy.deepcopy(params)
    give_grads(params, 9)
    params[0].grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"grads\[0\] must have memory"):
        opt.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("what", ["grad", "param", "exp_avg"])
@pytest.mark.parametrize("name", ["float64", "complex", "bfloat16"])
def test_what_is_to_be_read_with_the_other_sign(what, name):
    """As the imaginary part of a conjugate is."""

    def negated(tensor):
        return torch._neg_view(-tensor.detach())

    def give(params, opt, step):
        if what == "grad":
            params[0].grad = negated(params[0].grad)
        elif step == 1 and what == "param":
            params[0].data = negated(params[0])
        elif step == 1:
            opt.state[params[0]][what] = negated(opt.state[params[0]][what])

    assert_alike(*steps_of_both(give, params=make([name])))


def test_one_gradient_of_two_parameters():
    """`torch.autograd.grad` of a sum of both returns the same tensor twice."""

    def give(params, opt, step):  # noqa: ARG001
        grads = torch.autograd.grad(((params[0] + params[1]) ** 2).sum(), params)
        assert grads[0].data_ptr() == grads[1].data_ptr()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    assert_alike(*steps_of_both(give, params=make(["float64", "float64"])))


def test_a_parameter_that_is_there_twice():
    params = make(["float64"])
    opt = AdamW(params)
    opt.param_groups.append(dict(opt.param_groups[0]))
    give_grads(params, 0)
    with pytest.raises(ValueError, match="must not share memory"):
        opt.step()
    assert not opt.state


@pytest.mark.parametrize("name", ["float64", "bfloat16"])
@pytest.mark.parametrize(
    "count",
    [torch.tensor([5.0]), torch.tensor(5), torch.tensor(5.0, dtype=torch.bfloat16)],
    ids=["shape (1,)", "int64", "bfloat16"],
)
def test_counts_that_torch_takes(name, count):
    """As other tools have written them, or who casts a whole checkpoint."""

    def give(params, opt, step):
        if step == 1:
            opt.state[params[0]]["step"] = count.clone()

    assert_alike(*steps_of_both(give, params=make([name])))


@pytest.mark.parametrize("name", ["float64", "bfloat16"])
def test_counts_that_are_no_tensors(name):
    """With torch's message."""
    params = make([name])
    opt = run(AdamW, params)
    opt.state[params[0]]["step"] = 4
    with pytest.raises(RuntimeError, match="`state_steps` argument must contain"):
        opt.step()


@pytest.mark.parametrize("what", ["gradient", "parameter"])
def test_a_dtype_that_torch_refuses_leaves_the_others_alone(what):
    """Torch's kernels notice in the midst of a step."""
    params = make(["float64", "bfloat16"])
    opt = AdamW(params)
    give_grads(params, 0)
    if what == "gradient":
        opt.step()
        params[1].grad.data = params[1].grad.data.float()
        message = "grad.dtype must be its parameter's, torch.bfloat16, got torch.float32"
    else:
        params[1].grad = None
        params[1].data = params[1].data.to(torch.float8_e4m3fn)
        params[1].grad = params[1].data.clone()
        message = "param.dtype must be"
    before = params[0].detach().clone()
    with pytest.raises(TypeError, match=message):
        opt.step()
    assert torch.equal(params[0], before)


def test_wrapper_subclasses():
    """Tensors made of others, as torchao's of float8 are: their class knows what to do."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    results = []
    for cls in (torch.optim.AdamW, AdamW):
        values = torch.linspace(-1, 1, 4)
        params = [torch.nn.Parameter(two_tensor(values.clone(), values.clone()))]
        params.append(torch.nn.Parameter(values.clone()))
        opt = cls(params, lr=0.1)
        for step in range(3):
            grad = torch.sin(values * (step + 1))
            params[0].grad, params[1].grad = two_tensor(grad, grad.clone()), grad.clone()
            opt.step()
        results.append([params[0].a.detach(), params[0].b.detach(), params[1].detach()])
        assert type(opt.state[params[0]]["exp_avg"]) is two_tensor
    close(*results)


def test_fake_tensors():
    """As who estimates the memory of a training run takes its steps."""
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake_tensor.FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(4, 3))]
        opt = AdamW(params)
        params[0].grad = torch.empty(4, 3)
        opt.step()
        opt.step()
        assert opt.state[params[0]]["exp_avg"].shape == (4, 3)
