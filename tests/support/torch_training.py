"""Tiny models, data and every scheduler of torch. Run as a script, it goes on with saved runs.

``torch_training.py FOLDER`` loads each run in a file ``*.saved`` there, takes it to its last step,
and saves it beside that as ``*.resumed``. Nothing else is shared with who has saved it.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler, swa_utils

import fastadam.torch
from fastadam import schedules

STEPS = 500
LR = 1e-2
EPOCH = 20  # steps over whose losses ReduceLROnPlateau sees the mean


class MLP(nn.Module):
    """With a block that some steps leave out: its gradients are then None."""

    def __init__(self, width=16):
        super().__init__()
        self.first = nn.Linear(16, width)
        self.block = nn.Linear(width, width)
        self.last = nn.Linear(width, 4)

    def forward(self, images, skip):
        x = torch.tanh(self.first(images.flatten(1)))
        if not skip:
            x = x + torch.tanh(self.block(x))
        return self.last(x)


class Conv(nn.Module):
    """Smooth: at a kink, as of ReLU, two runs part by more than rounding if one is beyond it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(16, 4)

    def forward(self, images, skip):  # noqa: ARG002
        x = functional.silu(self.first(images[:, None]))
        return self.last(functional.silu(self.second(x)).flatten(1))


class Transformer(nn.Module):
    """One block over the four rows of an image, which it may leave out."""

    def __init__(self):
        super().__init__()
        self.embed, self.places = nn.Linear(4, 8), nn.Parameter(0.1 * torch.randn(4, 8))
        self.norm, self.qkv, self.mix = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, images, skip):
        x = self.embed(images) + self.places
        if not skip:
            qkv = self.qkv(self.norm(x)).view(len(x), 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
            attended = (
                functional.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(x.shape)
            )
            x = x + self.mix(attended)
            x = x + self.down(functional.gelu(self.up(x)))
        return self.last(x.mean(1))


class Mixed(MLP):
    """The first layer in float32, the others in float64."""

    def forward(self, images, skip):
        x = torch.tanh(self.first(images.float().flatten(1))).double()
        if not skip:
            x = x + torch.tanh(self.block(x))
        return self.last(x)


MODELS = {
    "mlp": MLP,
    "wide": partial(MLP, 256),  # more elements than go through in one thread
    "conv": Conv,
    "transformer": Transformer,
    "mixed": Mixed,
}


class Triangle(lr_scheduler.LRScheduler):
    """A scheduler of the user's own."""

    def get_lr(self):
        share = 1 - abs(2 * self.last_epoch / STEPS - 1)
        return [(0.01 + share) * base for base in self.base_lrs]


def sequential(optimizer):
    rise = lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 50)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 50, 1e-4)
    return lr_scheduler.SequentialLR(optimizer, [rise, fall], [50])


def chained(optimizer):
    rise = lr_scheduler.ConstantLR(optimizer, 0.1, 50)
    return lr_scheduler.ChainedScheduler([rise, lr_scheduler.ExponentialLR(optimizer, 0.995)])


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, schedules.cosine(STEPS)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(
        o, lambda step: 1 - 1 / (step + 9)
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 100, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [100, 300], 0.2),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, 100),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.01, 1.0, 100),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.995),
    "SequentialLR": sequential,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, 1e-4),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, LR, 60),  # betas too
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 70, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, LR, STEPS + 1),  # betas too
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS, 1.5),
    "SWALR": lambda o: swa_utils.SWALR(o, 1e-3, 200),
    "LRScheduler": Triangle,
}


class Case(NamedTuple):
    """What is trained, and how."""

    model: str
    scheduler: str
    optimizer: str = "AdamW"
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float32"
    seed: int = 0


class Training:
    """One run; two with the same seed see the same model and batches.

    ``make`` is an optimizer's class, and ``more`` are arguments for it alone.
    """

    def __init__(self, case, make, **more):
        self.case, options = case, dict(case.options)
        dtype = getattr(torch, case.dtype)
        self.generator = torch.Generator().manual_seed(case.seed)
        with torch.random.fork_rng():
            torch.manual_seed(case.seed)
            self.model = MODELS[case.model]().to(dtype)
        # Four classes, each an image of 4 x 4 and noise.
        draw = partial(torch.randn, generator=self.generator, dtype=torch.float64)
        self.labels = torch.randint(4, (256,), generator=self.generator)
        self.images = (draw(4, 4, 4)[self.labels] + 1.5 * draw(256, 4, 4)).to(dtype)
        self.sign = -1 if options.get("maximize") else 1
        if case.model == "mixed":
            self.model.first.float()
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": weights}, {"params": others, "lr": LR / 2, "weight_decay": 0.0}]
        self.optimizer = make(groups, lr=LR, **options, **more)
        self.scheduler = SCHEDULERS[case.scheduler](self.optimizer)
        self.losses = []
        self.rates = []  # what the scheduler has set at each step

    def backward(self):
        chosen = torch.randint(len(self.labels), (16,), generator=self.generator)
        skip = bool(torch.rand((), generator=self.generator) < 0.2)
        loss = functional.cross_entropy(self.model(self.images[chosen], skip), self.labels[chosen])
        self.optimizer.zero_grad()
        (self.sign * loss).backward()
        self.losses.append(loss.item())

    def update(self):
        self.rates.append([(group["lr"], group["betas"]) for group in self.optimizer.param_groups])
        self.optimizer.step()
        if not isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step()
        elif len(self.losses) % EPOCH == 0:
            self.scheduler.step(sum(self.losses[-EPOCH:]) / EPOCH)

    def go(self, steps=STEPS):
        """Go on to so many steps in all."""
        while len(self.losses) < steps:
            self.backward()
            self.update()
        return self

    def saved(self):
        return {
            "case": tuple(self.case),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "losses": list(self.losses),
        }

    def load(self, saved):
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.generator.set_state(saved["generator"])
        self.losses = list(saved["losses"])
        return self


def ours(case, **more):
    return Training(case, getattr(fastadam.torch, case.optimizer), **more)


def torchs(case, **more):
    return Training(case, getattr(torch.optim, case.optimizer), **more)


def resume(folder):
    torch.set_num_threads(1)
    files = Path(folder).glob("*.saved")
    # The largest first: if its threads changed anything for those after it, that would show.
    for file in sorted(files, key=lambda file: -file.stat().st_size):
        saved = torch.load(file, weights_only=True)
        training = ours(Case(*saved["case"])).load(saved).go()
        torch.save(training.saved(), file.with_suffix(".resumed"))


if __name__ == "__main__":
    resume(sys.argv[1])
