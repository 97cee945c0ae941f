"""Engines whose parameters are DTensors: FSDP2, tensor parallel, both, and their checkpoints."""

import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import clip_grad_norm_
from training import assert_alike, make_model, train, values

from fastadam.torch import Adam, AdamW

BOTH = (0, 1)


def shard(model, **options):
    for module in (*(m for m in model if isinstance(m, nn.Linear)), model):
        fully_shard(module, **options)
    return model


def whole_run(of=BOTH, *, clip=None, width=7):
    """Train the model in one piece, on the batches of all ranks, with torch's AdamW."""
    model = make_model(width)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    limit = clip and (lambda: clip_grad_norm_(model.parameters(), clip))
    losses = train(model, opt, of, clip=limit)
    return losses, values(model)


def bits(opt):
    """Return all state of an optimizer's local parts."""
    arrays = (t for own in opt.state.values() for t in own.values())
    return [getattr(t, "to_local", t.clone)().numpy().tobytes() for t in arrays]


@ranks(2)
def fully_sharded(rank, _):
    """As torch's AdamW in the same engine, and state placed as the parameter; some are empty."""
    losses = []
    for cls in (AdamW, torch.optim.AdamW):
        model = shard(make_model())
        opt = cls(model.parameters(), lr=1e-2, amsgrad=True)
        losses.append(train(model, opt, [rank]))
        if cls is AdamW:
            opt = AdamW(model.parameters(), lr=1e-2, amsgrad=True, ema_decay=0.9)
            train(model, opt, [rank], range(1))
            sizes = set()
            for param in model.parameters():
                own = dict(opt.state[param])
                assert isinstance(own.pop("step"), torch.Tensor)
                assert set(own) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema"}
                for array in own.values():
                    assert isinstance(array, DTensor)
                    assert (array.device_mesh, array.placements, array.shape) == (
                        param.device_mesh,
                        param.placements,
                        param.shape,
                    )
                    assert array.to_local().shape == param.to_local().shape
                sizes.add(tuple(param.to_local().shape))
            assert sizes >= ({(4, 6), (1, 4)} if rank == 0 else {(3, 6), (0, 4), (0,)})
    assert_alike(*losses)


@ranks(2)
def fully_sharded_in_other_ways(rank, _):
    """Columns over the ranks; offloaded to the CPU; computed in bfloat16."""
    for options in (
        {"shard_placement_fn": lambda param: Shard(param.ndim - 1)},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
    ):
        losses = []
        for cls in (AdamW, torch.optim.AdamW):
            model = shard(make_model(8), **options)
            losses.append(train(model, cls(model.parameters(), lr=1e-2), [rank]))
        tolerance = 2e-2 if "mp_policy" in options else 1e-5
        torch.testing.assert_close(*losses, rtol=tolerance, atol=1e-6)


@ranks(2)
def norm_of_all_shards(rank, _):
    """Clipped by the same norm as clip_grad_norm_, though each rank holds a part."""
    model = shard(make_model())
    opt = AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5)
    train(model, opt, [rank])
    norm = clip_grad_norm_(model.parameters(), math.inf).full_tensor().item()
    assert opt.result.grad_norm == pytest.approx(norm, rel=1e-6)
    assert opt.result[:2] == (19, 1e-2)
    assert norm > 0.5
    assert_alike(values(model), whole_run(clip=0.5)[1])


@ranks(2)
def one_ranks_nan(rank, _):
    """Whether to skip is decided alike on all ranks."""
    model = shard(make_model())
    for nonfinite in ("skip", "raise"):
        opt = AdamW(model.parameters(), nonfinite=nonfinite)
        train(model, opt, [rank], range(2))
        before, state = values(model), bits(opt)
        if rank == 1:
            model[0].weight.grad.to_local()[0, 0] = math.nan
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError):
                opt.step()
        else:
            opt.step()
            assert opt.result.skipped
        assert torch.equal(values(model), before)
        assert bits(opt) == state


@ranks(2)
def large_gradients_are_finite(*_):
    """Their squares are not, in float32."""
    model = shard(make_model())
    opt = AdamW(model.parameters(), nonfinite="skip")
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e30)
    opt.step()
    assert not opt.result.skipped


@ranks(2)
def scaled_by_a_scaler(rank, _):
    """A GradScaler skips a step on both ranks where one has an infinite gradient."""
    for options in ({}, {"fused": True}):
        model = shard(make_model())
        opt = AdamW(model.parameters(), lr=1e-2, **options)
        train(model, opt, [rank], range(1))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(1))
        before = values(model)
        if rank == 1:
            model[0].bias.grad.to_local()[0] = math.inf
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 4.0
        assert torch.equal(values(model), before)
        for param in model.parameters():
            param.grad = torch.full_like(param, 4.0)
        scaler.step(opt)
        assert not torch.equal(values(model), before)
        assert all(own["step"] == 2 for own in opt.state.values())


@ranks(2)
def misplaced_state(rank, _):
    """Whole tensors in the place of DTensors: refused, and nothing changes."""
    model = shard(make_model())
    opt = AdamW(model.parameters())
    train(model, opt, [rank], range(2))
    saved = opt.state_dict()
    before = values(model)
    weight = saved["state"][0]["exp_avg"]
    for wrong in (weight.full_tensor(), weight.redistribute(placements=[Replicate()])):
        saved["state"][0]["exp_avg"] = wrong
        opt.load_state_dict(saved)
        with pytest.raises(RuntimeError, match=r"exp_avg .*set_optimizer_state_dict"):
            opt.step()
        assert torch.equal(values(model), before)


def grouped(model, cls=AdamW, **options):
    """Return an optimizer of two groups."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == dims], "weight_decay": decay}
        for dims, decay in ((2, 0.1), (1, 0.0))
    ]
    return cls(groups, lr=1e-2, **options)


TAIL = {"ema_decay": 0.9, "max_grad_norm": 2.0}


def load(folder, model, opt):
    """Load a distributed checkpoint into a model and an optimizer, both fresh."""
    weights, state = get_state_dict(model, opt)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)


@ranks(2)
def checkpoint(rank, folder):
    """Saved on 2 ranks and loaded on 2: the same bits as straight through."""
    model = shard(make_model())
    opt = grouped(model, **TAIL)
    train(model, opt, [rank], range(5))
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=folder / "saved")
    names = {param: name for name, param in model.named_parameters()}
    averages = {names[p]: own["ema"].full_tensor() for p, own in opt.state.items()}
    moments = {names[p]: own["exp_avg"].full_tensor() for p, own in opt.state.items()}

    other = shard(make_model())
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1.0)
    resumed = grouped(other, **TAIL)
    load(folder / "saved", other, resumed)
    assert bits(resumed) == bits(opt)
    losses = [train(*pair, [rank], range(5, 10)) for pair in ((model, opt), (other, resumed))]
    assert torch.equal(*losses)
    assert torch.equal(values(model), values(other))
    assert bits(resumed) == bits(opt)
    after = [average.full_tensor() for average in opt.ema_params]
    if rank == 0:
        torch.save((averages, moments, values(model), after), folder / "whole.pt")
    else:
        values(model)


@ranks(1)
def checkpoint_of_two_ranks(_, folder):
    """Loaded on one, sharded or not: the same state, and it trains on alike."""
    averages, moments, weights, after = torch.load(folder / "whole.pt")
    for make in (make_model, lambda: shard(make_model())):
        model = make()
        opt = grouped(model, **TAIL)
        load(folder / "saved", model, opt)
        for name, param in model.named_parameters():
            own = opt.state[param]
            whole = [getattr(own[n], "full_tensor", own[n].clone)() for n in ("ema", "exp_avg")]
            assert own["step"] == 5
            assert torch.equal(whole[0], averages[name])
            assert torch.equal(whole[1], moments[name])
        train(model, opt, BOTH, range(5, 10))
        assert_alike(values(model), weights)
        for average, expected in zip(opt.ema_params, after, strict=True):
            assert_alike(getattr(average, "full_tensor", average.clone)(), expected)


@ranks(2)
def state_that_checkpoints_make(*_):
    """They take a step with zero gradients and lr 0: it changes no parameter and no average."""
    for lr in (1e-2, torch.tensor(1e-2)):
        model = shard(make_model())
        opt = Adam(model.parameters(), lr=lr, weight_decay=0.1, **TAIL)
        before = values(model)
        state = get_optimizer_state_dict(model, opt)["state"]
        assert torch.equal(values(model), before)
        assert opt.param_groups[0]["lr"] == lr
        for name, param in model.named_parameters():
            assert torch.equal(state[name]["ema"].full_tensor(), param.full_tensor())
            assert state[name]["step"] == 1  # as with torch's own


@ranks(2)
def exchanged_state_dicts(rank, _):
    """Torch's AdamW goes on with ours, and the other way round: whole, flattened, and sharded."""
    for first, second in ((torch.optim.AdamW, AdamW), (AdamW, torch.optim.AdamW)):
        model = shard(make_model())
        opt = grouped(model, first)
        train(model, opt, [rank], range(3))
        opt.zero_grad()  # or else torch makes no state, of any optimizer
        for form in (
            {"full_state_dict": True, "broadcast_from_rank0": True},
            {"flatten_optimizer_state_dict": True},
            {},
        ):
            options = StateDictOptions(**form)
            saved = get_optimizer_state_dict(model, opt, options=options)
            if "full_state_dict" in form and rank == 1:
                saved = {}
            fresh = grouped(model, second)
            set_optimizer_state_dict(model, fresh, saved, options=options)
            assert bits(fresh) == bits(opt)
            assert [g["weight_decay"] for g in fresh.param_groups] == [0.1, 0.0]


def parallel(model, mesh):
    """Split the first layers over the ranks: by rows, by columns; the last stays a plain layer."""
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


@ranks(2)
def tensor_parallel(*_):
    """Rows, columns, copies and plain tensors in one optimizer: as the model in one piece."""
    for clip in (None, 0.5):
        model = parallel(make_model(8), init_device_mesh("cpu", (2,)))
        opt = AdamW(model.parameters(), lr=1e-2, max_grad_norm=clip, ema_decay=0.9)
        losses = train(model, opt, BOTH)
        expected, weights = whole_run(clip=clip, width=8)
        assert_alike(losses, expected)
        assert_alike(values(model), weights)
        placements = {getattr(p, "placements", None) for p in model.parameters()}
        assert placements == {(Shard(0),), (Shard(1),), (Replicate(),), None}
        for param, own in opt.state.items():
            assert getattr(own["ema"], "placements", None) == getattr(param, "placements", None)


@ranks(4)
def two_meshes(*_):
    """FSDP2 over tensor parallel: some parameters lie over one mesh, some over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    model = shard(parallel(make_model(8), mesh["model"]), mesh=mesh["data"])
    opt = AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5)
    train(model, opt, [mesh["data"].get_local_rank()])
    assert len({param.device_mesh for param in model.parameters()}) == 2
    assert_alike(values(model), whole_run(clip=0.5, width=8)[1])


@ranks(4)
def replicated_shards(rank, _):
    """FSDP2 over a mesh of two dimensions: copies in one, parts in the other."""
    model = shard(
        make_model(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    )
    opt = AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5)
    train(model, opt, [rank])
    assert_alike(values(model), whole_run(of=range(4), clip=0.5)[1])
