"""One name, one step: the training loop, for any optimizer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fastadam.demo.data import encode
from fastadam.demo.model import Params, loss_and_grads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Optimizer", "StepInfo", "StepRecord", "train"]

SMOOTHING = 0.98  # the smoothed loss looks back about 1 / (1 - 0.98) = 50 steps


class StepInfo(Protocol):
    """What `train` reads of an optimizer's answer.

    Attributes
    ----------
    lr : float
        Learning rate of the step.
    """

    @property
    def lr(self) -> float: ...  # noqa: D102 - the class speaks for it


class Optimizer(Protocol):
    """What `train` asks of an optimizer; `fastadam.Adam` is one."""

    def step(self, grads: Params, /) -> StepInfo:
        """Update the parameters in place.

        Parameters
        ----------
        grads : dict of str to ndarray
            With the names, shapes and dtypes of the parameters.

        Returns
        -------
        StepInfo
        """


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one training step measured.

    Attributes
    ----------
    step : int
        Counted from 0.
    loss : float
        Loss of this step's name in nats, before the update.
    average : float
        Exponential average of the losses so far, from 0: what `train` needs,
        beside parameters and optimizer, to go on after this step.
    lr : float
        Learning rate of the update.
    optimizer_seconds : float
        Duration of the optimizer's ``step``.
    """

    step: int
    loss: float
    average: float
    lr: float
    optimizer_seconds: float

    @property
    def smoothed_loss(self) -> float:
        """The average, bias-corrected as Adam's own averages are."""
        return self.average / (1 - SMOOTHING ** (self.step + 1))


def train(
    params: Params,
    names: Sequence[str],
    optimizer: Optimizer,
    *,
    num_steps: int,
    rng: np.random.Generator,
    first_step: int = 0,
    average: float = 0.0,
) -> Iterator[StepRecord]:
    """Train on one name per step, in shuffled order, cycling.

    Parameters
    ----------
    params : dict of str to ndarray
        As from `init_params`. The optimizer updates them in place.
    names : sequence of str
        At least one, of letters a to z.
    optimizer : Optimizer
        Made for the same `params`, with its schedule.
    num_steps : int
        Steps of the whole run.
    rng : numpy.random.Generator
        Shuffles the names, once.
    first_step : int, default 0
        Steps that the parameters and the optimizer have had in an earlier
        part of the run, whose `rng` was seeded alike.
    average : float, default 0.0
        The `StepRecord.average` of the last of those steps.

    Yields
    ------
    StepRecord
        One per step, right after it.

    Raises
    ------
    FloatingPointError
        If a loss is not finite; that step makes no update.
    ValueError
        If there is no name, or one has a character other than a to z.

    Examples
    --------
    >>> import numpy as np
    >>> import fastadam
    >>> from fastadam.demo.model import init_params
    >>> from fastadam.demo.train import train
    >>> rng = np.random.default_rng(42)
    >>> params = init_params(rng)
    >>> optimizer = fastadam.Adam(params, lr=1e-2)
    >>> records = list(train(params, ["ada", "alan"], optimizer, num_steps=20, rng=rng))
    >>> records[-1].loss < records[0].loss
    True
    """
    if not names:
        raise ValueError("names must hold at least one name, got none")
    order = rng.permutation(len(names))
    for step in range(first_step, num_steps):
        tokens = encode(names[order[step % len(names)]])
        # A learning rate that is far too high overflows; that is told once, below.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            loss, grads = loss_and_grads(params, tokens)
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss of step {step} must be finite, got {loss}")
            start = time.perf_counter()
            result = optimizer.step(grads)
            seconds = time.perf_counter() - start
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        yield StepRecord(step, loss, average, float(result.lr), seconds)
