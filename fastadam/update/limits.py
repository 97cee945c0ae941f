"""Gradients that are too large, or not finite: what is decided, for every backend.

The first functions are over scalars, and a backend may compile them.
"""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

# Sums of squares between these are neither short of digits nor infinite.
SMALL_SUM, LARGE_SUM = 1e-280, 1e300
LARGEST_EXPONENT = 1000


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Return what `torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm by.

    1 if ``max_norm`` is infinite; NaN if ``norm`` is.
    """
    if not max_norm < math.inf:
        return 1.0
    coefficient = max_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1.0 else coefficient


def is_exact(total: float) -> bool:
    """Whether a sum of squares has lost nothing to the range of float64."""
    return SMALL_SUM < total and total < LARGE_SUM  # noqa: SIM300 - CUDA compiles it


def scale_for(largest: float) -> float:
    """Return the power of 2 that brings a magnitude > 0 near 1, and so its square in range."""
    return math.ldexp(1.0, min(-math.frexp(largest)[1], LARGEST_EXPONENT))


def nonfinite_message(
    grads: Iterable[tuple[npt.NDArray[np.floating] | None, str]], factor: float
) -> str | None:
    """Return a message on the first element that, times a factor, is not finite; or None.

    ``grads`` are arrays, or None, each with what it is called.
    """
    for grad, label in grads:
        if grad is None:
            continue
        with np.errstate(all="ignore"):
            scaled = grad * grad.dtype.type(factor)
        good = np.isfinite(scaled)
        if good.all():
            continue
        place = np.unravel_index(int(np.argmin(good)), good.shape)
        where = f"[{', '.join(map(str, place))}]" if place else ""
        return (
            f"{label} must be finite, divided by grad_scale, got {float(scaled[place])!r} at"
            f" {label}{where}"
        )
    return None
