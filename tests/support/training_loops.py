"""One small problem, trained by several loops with any AdamW; as a script, in two processes.

Each loop returns its losses and the parameters at its end, as tensors. Those that can be resumed
save half-way to ``folder``, and with ``resume`` begin there.
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCHES = 16


def data():
    draws = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(4 * BATCHES, 8, generator=draws), torch.randn(4 * BATCHES, 1, generator=draws)
    )


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def copies(module):
    return [param.detach().clone() for param in module.parameters()]


def start_anew():
    """Forget what torch has compiled, and how the last Accelerator of the process was made."""
    torch.compiler.reset()
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def plain(adamw, *, compiled="nothing", scheduler=True):
    """The loop of torch's tutorials; the model, the optimizer's step or all of it compiled."""
    start_anew()
    model = net()
    opt = adamw(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9) if scheduler else None
    wrap = {compiled: lambda function: torch.compile(function, backend="eager")}
    forward = wrap.get("model", noop)(model)
    update = wrap.get("opt.step", noop)(opt.step)

    def train_step(x, y):
        opt.zero_grad()
        loss = nn.functional.mse_loss(forward(x), y)
        loss.backward()
        update()
        return loss

    train_step = wrap.get("train_step", noop)(train_step)
    losses = []
    for k, (x, y) in enumerate(DataLoader(data(), batch_size=4)):
        # Once there are gradients and state, nothing is compiled again.
        with torch.compiler.set_stance("default" if k < 2 else "fail_on_recompile"):
            losses.append(train_step(x, y).item())
        if schedule is not None:
            schedule.step()
    return losses, copies(model)


def noop(function):
    return function


def notebook(adamw):
    """Optimizers for the whole model and for parts of it, in turn; one is made anew half-way."""
    model = net()
    opts = [
        adamw(model.parameters(), lr=1e-2),
        adamw(model[2].parameters(), lr=1e-2),
        torch.optim.SGD(model[0].parameters(), lr=1e-2),
    ]
    losses = []
    for k, (x, y) in enumerate(DataLoader(data(), batch_size=4)):
        if k == BATCHES // 2:
            opts[0] = adamw(model.parameters(), lr=1e-2)  # as in a cell that is run again
        model.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        opts[k % 3].step()
        losses.append(loss.item())
    return losses, copies(model)


def scaled(adamw, *, clip=None, **options):
    """With float16 and GradScaler; beside the usual, the scales, and which steps were taken."""
    model = net()
    opt = adamw(model.parameters(), lr=1e-2, **options)
    # The first scales overflow; then it grows often enough to overflow again.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    losses, scales, moved = [], [], []
    for x, y in DataLoader(data(), batch_size=4):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = copies(model)
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        moved.append(not all(map(torch.equal, before, copies(model))))
    return losses, copies(model), scales, moved


def accelerate(adamw, folder, *, precision="no", resume=False):
    """With accumulation, clipping and a scheduler; in several processes if launched so."""
    from accelerate import Accelerator

    start_anew()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = net()
    opt = adamw(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, BATCHES)
    loader = DataLoader(data(), batch_size=4)
    model, opt, loader, schedule = accelerator.prepare(model, opt, loader, schedule)
    half = len(loader) // 2
    if resume:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, half)
    losses = []
    for k, (x, y) in enumerate(loader, start=half if resume else 0):
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            schedule.step()
            opt.zero_grad()
        losses.append(loss.item())
        if k + 1 == half and not resume:
            accelerator.save_state(folder)
    return losses, copies(model)


def lightning(adamw, folder, *, manual=False, resume=False, clip=0.5, options=None, **trainer):
    """Two epochs; automatic, or by hand with two optimizers that take turns in clipped steps."""
    import lightning as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual
            self.net = net()
            self.losses = []

        def configure_optimizers(self):
            parts = [self.net[0], self.net[2]] if manual else [self.net]
            several = []
            for part in parts:
                opt = adamw(part.parameters(), lr=1e-2, weight_decay=0.1, **(options or {}))
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, BATCHES)
                rest = {"scheduler": schedule, "interval": "step"}
                several.append({"optimizer": opt, "lr_scheduler": rest})
            return several

        def training_step(self, batch, k):
            x, y = batch
            loss = nn.functional.mse_loss(self.net(x), y)
            self.losses.append(loss.item())
            if manual:
                self.manual_backward(loss)
                opt = self.optimizers()[k % 2]
                self.clip_gradients(opt, gradient_clip_val=clip)
                opt.step()
                self.zero_grad()
                self.lr_schedulers()[k % 2].step()
            return loss

    module = Module()
    if not manual:
        trainer = {"gradient_clip_val": clip, "accumulate_grad_batches": 2} | trainer
    quiet = ("logger", "enable_progress_bar", "enable_model_summary")
    fit = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)],
        **dict.fromkeys(quiet, False),
        **trainer,
    ).fit
    path = Path(folder) / "epoch=0.ckpt" if resume else None
    fit(module, DataLoader(data(), batch_size=4), ckpt_path=path)
    return module.losses, copies(module)


def transformers(adamw, folder, *, given_as, resume=False, **arguments):
    """A model of two layers, and the Trainer told of AdamW in one of both ways."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (64, 12), generator=draws)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    if given_as == "optimizers":
        opt = adamw(model.parameters(), lr=1e-2, weight_decay=0.1)
        given = {"optimizers": (opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 8))}
    else:
        given = {"optimizer_cls_and_kwargs": (adamw, {"lr": 1e-2})}
    args = TrainingArguments(
        folder,
        max_steps=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        weight_decay=0.1,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(
        model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids], **given
    )
    path = str(Path(folder) / "checkpoint-4") if resume else None
    trainer.train(resume_from_checkpoint=path)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses[-4:] if resume else losses, copies(model)


if __name__ == "__main__":  # as a process that torchrun starts
    import fastadam.torch

    folder = Path(sys.argv[1])
    found = {
        "theirs": accelerate(torch.optim.AdamW, folder / "theirs"),
        "ours": accelerate(fastadam.torch.AdamW, folder / "ours"),
        "resumed": accelerate(fastadam.torch.AdamW, folder / "ours", resume=True),
    }
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
