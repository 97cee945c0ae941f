"""Contracts of fastadam.torch's Adam and AdamW of which torch's own tests say nothing."""

import copy

import pytest


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
