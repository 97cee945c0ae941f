"""Engines that keep optimizers on the CPU, with fastadam's AdamW where torch's would be."""

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)

from fastadam.torch import AdamW  # noqa: E402


def test_groups_may_be_empty():
    """As in DeepSpeed's stage 3, where at each step but one group has parameters."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    opt = AdamW(
        [{"params": [param], "lr": lr} for param, lr in zip(params, (1, 2, 4), strict=True)]
    )
    for group, param in zip(opt.param_groups, params, strict=True):
        param.grad = torch.ones(3)
        for other in opt.param_groups:
            other["params"] = [param] if other is group else []
        opt.step()
    moved = [1 - param[0].item() for param in params]
    assert moved == pytest.approx([1.01, 2.02, 4.04])
