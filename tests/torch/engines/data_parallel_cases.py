"""Engines whose parameters are plain tensors: for each the same losses as with torch's AdamW."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import ranks
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from training import assert_alike, batch, make_model, train, values

from fastadam.torch import AdamW

PAGE = Path(__file__).parents[3] / "docs" / "engines.md"
CLASSES = (AdamW, torch.optim.AdamW)


def clipper(params, most=0.5):
    params = list(params)
    return lambda: clip_grad_norm_(params, most)


@ranks(2)
def ddp(rank, _):
    """Gradients are views of buckets; the parameters stay equal on both ranks, to the bit."""
    losses = []
    for cls in CLASSES:
        model = DistributedDataParallel(make_model(), gradient_as_bucket_view=True)
        losses.append(train(model, cls(model.parameters(), lr=1e-2), [rank]))
        assert_on_all_ranks(values(model))
    assert_alike(*losses)


def assert_on_all_ranks(tensor):
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    assert torch.equal(*both)


@ranks(2)
def ddp_accumulates_and_clips(rank, _):
    """`no_sync` for the first half of each batch."""
    models = []
    for cls in CLASSES:
        model = DistributedDataParallel(make_model())
        ours = cls is AdamW
        opt = cls(model.parameters(), lr=1e-2, **({"max_grad_norm": 0.5} if ours else {}))
        for step in range(10):
            for half in range(2):
                x, y = (t[4 * half :][:4] for t in batch(step, rank))
                with model.no_sync() if half == 0 else torch.enable_grad():
                    (model(x) - y).square().mean().backward()
            norm = clip_grad_norm_(model.parameters(), float("inf") if ours else 0.5)
            opt.step()
            opt.zero_grad()
        if ours:
            assert opt.result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
            assert norm > 0.5
        models.append(values(model))
    assert_alike(*models)


@ranks(2)
def ddp_skips_on_all_ranks(rank, _):
    """Once reduced, one rank's NaN is everyone's."""
    model = DistributedDataParallel(make_model())
    opt = AdamW(model.parameters(), nonfinite="skip")
    train(model, opt, [rank], range(2))
    before = values(model)
    x, y = batch(2, rank)
    (model(x) - y * (float("nan") if rank else 1.0)).square().mean().backward()
    opt.step()
    assert opt.result.skipped
    assert torch.equal(values(model), before)
    assert all(own["step"] == 2 for own in opt.state.values())


def zero(rank, view):
    losses = []
    for cls in CLASSES:
        model = DistributedDataParallel(make_model())
        opt = ZeroRedundancyOptimizer(
            model.parameters(), cls, lr=1e-2, parameters_as_bucket_view=view
        )
        clip = clipper(model.parameters())
        losses.append(train(model, opt, [rank], clip=clip))
        assert_on_all_ranks(values(model))
    assert_alike(*losses)


@ranks(2)
def zero_redundancy(rank, _):
    zero(rank, view=False)


@ranks(2)
def zero_redundancy_with_bucket_views(rank, _):
    """Every parameter is given other memory after the optimizer has been made."""
    zero(rank, view=True)


@ranks(2)
def zero_redundancy_resumes(rank, _):
    """Consolidated on one rank, loaded on both: the same bits, averages with them."""

    def make():
        model = DistributedDataParallel(make_model())
        groups = [
            {"params": [p for p in model.parameters() if p.ndim == dims], "weight_decay": decay}
            for dims, decay in ((2, 0.1), (1, 0.0))
        ]
        return model, ZeroRedundancyOptimizer(groups, AdamW, lr=1e-2, ema_decay=0.9)

    model, opt = make()
    train(model, opt, [rank], range(5))
    opt.consolidate_state_dict(to=1)
    box = [opt.state_dict() if rank == 1 else None, model.state_dict()]
    dist.broadcast_object_list(box, src=1)
    saved, weights = copy.deepcopy(box)
    assert len(saved["state"]) == 6  # of both ranks
    other, resumed = make()
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    losses = [train(*pair, [rank], range(5, 10)) for pair in ((model, opt), (other, resumed))]
    assert torch.equal(*losses)
    assert opt.optim.ema_params
    for one, two in zip(opt.optim.ema_params, resumed.optim.ema_params, strict=True):
        assert torch.equal(one, two)


def flat(original):
    return FullyShardedDataParallel(
        make_model(), use_orig_params=original, device_id=torch.device("cpu")
    )


@ranks(2)
def flat_shards(rank, _):
    """FSDP's first version, with its own way of clipping."""
    for original in (False, True):
        losses = []
        for cls in CLASSES:
            model = flat(original)
            opt = cls(model.parameters(), lr=1e-2)
            losses.append(train(model, opt, [rank], clip=lambda m=model: m.clip_grad_norm_(0.5)))
        assert_alike(*losses)


@ranks(2)
def flat_shards_resume(rank, _):
    """The same bits, by its own way of saving. (With use_orig_params=True, torch 2.13 itself
    mixes the state of any optimizer up on the CPU.)"""
    model, other = flat(False), flat(False)
    opt, resumed = (AdamW(m.parameters(), lr=1e-2, ema_decay=0.9) for m in (model, other))
    train(model, opt, [rank], range(5))
    other.load_state_dict(model.state_dict())
    saved = FullyShardedDataParallel.optim_state_dict(model, opt)
    resumed.load_state_dict(
        FullyShardedDataParallel.optim_state_dict_to_load(other, resumed, saved)
    )
    losses = [train(*pair, [rank], range(5, 10)) for pair in ((model, opt), (other, resumed))]
    assert torch.equal(*losses)
    assert all(map(torch.equal, opt.ema_params, resumed.ema_params))


@ranks(2)
def flat_shards_have_no_norm(*_):
    """Each rank would clip by a norm of its own: refused, and nothing has been added."""
    for original in (False, True):
        params = list(flat(original).parameters())
        for options in ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}):
            with pytest.raises(ValueError, match=re.escape("model.clip_grad_norm_()")):
                AdamW(params, **options)
        opt = AdamW([torch.nn.Parameter(torch.ones(2))], max_grad_norm=1.0)
        with pytest.raises(ValueError, match="FullyShardedDataParallel"):
            opt.add_param_group({"params": params})
        assert len(opt.param_groups) == 1
        opt = AdamW(params)
        for name, value in (("max_grad_norm", 1.0), ("nonfinite", "raise")):
            with pytest.raises(ValueError, match="FullyShardedDataParallel"):
                setattr(opt, name, value)
        assert (opt.max_grad_norm, opt.nonfinite) == (None, "propagate")


def run_example(heading, folder):
    text = PAGE.read_text("utf-8")
    section = text[text.index(f"\n## {heading}\n") :]
    code = re.search(r"^```python\n(.*?)^```$", section, re.M | re.S)[1]
    for line in ('dist.init_process_group("gloo")\n', "dist.destroy_process_group()\n"):
        assert code.count(line) == 1
        code = code.replace(line, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = {"__name__": "__main__"}
        exec(compile(code, f"engines.md, {heading}", "exec"), names)
    assert names["loss"].item() < names["first"]
    return names


@ranks(2)
def example_of_ddp(_, folder):
    run_example("DistributedDataParallel", folder)


@ranks(2)
def example_of_zero(rank, folder):
    run_example("ZeroRedundancyOptimizer", folder)
    if rank == 0:
        assert (folder / "optimizer.pt").exists()


@ranks(2)
def example_of_fully_shard(_, folder):
    run_example("FSDP2: fully_shard", folder)
