"""DeepSpeed's ZeRO-Offload with torch's AdamW and with fastadam's, in one rank of a few.

As a script, ``python deepspeed_run.py RANK RANKS FOLDER``. What it finds of each stage and class
is written to ``FOLDER/RANK.pt``. DeepSpeed is imported once for all: that takes longest.
"""

import os
import sys
from pathlib import Path

# Stages, and whether the model is of bfloat16; the optimizer's parameters are of float32.
CASES = (1, False), (2, True), (3, False), (3, True)
STEPS, SAVED_AT = 20, 10
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def model_and_groups(torch, dtype):
    """Return a model and two groups: in stage 3 one of them has no parameter at each step."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(16, 33), torch.nn.GELU(), torch.nn.Linear(33, 4)
    model = torch.nn.Sequential(*layers).to(dtype)
    named = list(model.named_parameters())
    weights = [param for name, param in named if name.endswith("weight")]
    biases = [param for name, param in named if name.endswith("bias")]
    return model, [{"params": weights, "weight_decay": 0.1}, {"params": biases}]


def train(engine, torch, rank, steps):
    for step in steps:
        draws = torch.Generator().manual_seed(1000 * step + rank)
        inputs, targets = torch.randn(4, 16, generator=draws), torch.randn(4, 4, generator=draws)
        dtype = next(engine.module.parameters()).dtype
        loss = (engine(inputs.to(dtype)) - targets.to(dtype)).square().mean()
        engine.backward(loss)
        engine.step()


def picture(engine, torch, full):
    """Return the whole float32 parameters, gathered from all ranks, and this rank's state."""
    params = [full(param).clone() for param in engine.module.parameters()]
    states = engine.optimizer.optimizer.state.values()
    arrays = [{name: torch.as_tensor(own[name]).clone() for name in own} for own in states]
    return {"params": params, "state": arrays}


def run(rank, folder, adamw, deepspeed, torch, stage, half, torchs=None):
    """Train; save and load half-way; and load what an engine with torch's class has saved."""
    from deepspeed.utils import safe_get_full_fp32_param

    def make():
        zero = {**CONFIG["zero_optimization"], "stage": stage}
        config = {**CONFIG, "zero_optimization": zero, "bf16": {"enabled": half}}
        model, groups = model_and_groups(torch, torch.bfloat16 if half else torch.float32)
        return deepspeed.initialize(model=model, optimizer=adamw(groups, lr=1e-2), config=config)[
            0
        ]

    engine = make()
    train(engine, torch, rank, range(SAVED_AT))
    engine.save_checkpoint(str(folder))
    train(engine, torch, rank, range(SAVED_AT, STEPS))
    found = {"straight": picture(engine, torch, safe_get_full_fp32_param)}
    engine.destroy()

    engine = make()
    engine.load_checkpoint(str(folder))
    train(engine, torch, rank, range(SAVED_AT, STEPS))
    found["resumed"] = picture(engine, torch, safe_get_full_fp32_param)
    engine.destroy()

    if torchs is not None:
        engine = make()
        engine.load_checkpoint(str(torchs))
        train(engine, torch, rank, range(SAVED_AT, STEPS))
        found["from torch"] = picture(engine, torch, safe_get_full_fp32_param)
        engine.destroy()
    return found


def main(rank, size, folder):
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in own.items()}
    os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(folder / "store"), size),
        rank=rank,
        world_size=size,
    )
    import deepspeed

    # On the CPU DeepSpeed would compile sums through shared memory, for more than a minute.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("gloo")

    from fastadam.torch import AdamW

    results = {}
    for stage, half in CASES:
        places = [folder / f"{name}-{stage}-{half}" for name in ("torch", "fastadam")]
        case = deepspeed, torch, stage, half
        results["torch", stage, half] = run(rank, places[0], torch.optim.AdamW, *case)
        results["fastadam", stage, half] = run(rank, places[1], AdamW, *case, places[0])
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
