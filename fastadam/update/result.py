"""What a step tells the user."""

from abc import ABCMeta
from typing import NamedTuple


class _Fields(NamedTuple):
    step: int
    lr: float
    grad_norm: float | None = None
    skipped: bool = False


class StepResult(_Fields, metaclass=ABCMeta):
    """What one call of `Adam.step` did.

    On a CUDA device, the norm and whether the step was skipped are on their way
    when `Adam.step` returns: to read them waits for them.

    Attributes
    ----------
    step : int
        The step of this call, counted from 0: what the schedule was asked
        for. A skipped step's number is the next one's again.
    lr : float
        The learning rate it used, per step: the first group's ``lr`` times
        the schedule's factor.
    grad_norm : float or None
        The global norm of the gradients, divided by ``grad_scale`` and not
        yet clipped; None where neither ``max_grad_norm`` nor ``nonfinite``
        asked for it.
    skipped : bool
        Whether nothing was updated or counted, since a gradient was not
        finite.

    Examples
    --------
    >>> import numpy as np, fastadam
    >>> opt = fastadam.Adam(np.zeros(2), lr=0.1, max_grad_norm=1.0)
    >>> opt.step(np.array([3.0, 4.0]))
    StepResult(step=0, lr=0.1, grad_norm=5.0, skipped=False)
    """

    # An abstract class, with which a result that is on its way registers, and is no tuple.
    __slots__ = ()
