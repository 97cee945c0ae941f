"""A small torch model, its data, and a training loop, for the tests of engines."""

import torch
from torch import nn

STEPS = range(20)


def make_model(width=7):
    """Return an MLP; 2 ranks get uneven shards of the first layer, and one none of the last."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 1)
    )


def batch(step, rank):
    """Return what a rank trains on at a step."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, 6, generator=draw)
    return x, 3 * x.sum(1, keepdim=True)


def train(model, opt, ranks, steps=STEPS, clip=None):
    """Train on the batches of these ranks; return the losses. ``clip`` is called before a step."""
    losses = []
    for step in steps:
        opt.zero_grad()
        x, y = map(torch.cat, zip(*(batch(step, rank) for rank in ranks), strict=True))
        loss = (model(x) - y).square().mean()
        loss.backward()
        if clip is not None:
            clip()
        opt.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def values(model):
    """Return all parameters, whole, as one tensor."""
    whole = (getattr(p, "full_tensor", p.clone)() for p in model.parameters())
    return torch.cat([p.detach().flatten() for p in whole])


def assert_alike(one, other):
    """Equal within what rounding explains after some 20 steps."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
