"""Gradients that are too large, or not finite."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def clip_coefficient(norm: float, max_grad_norm: float | None) -> float:
    """Return what `torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm by."""
    if max_grad_norm is None or math.isinf(max_grad_norm):
        return 1.0
    coefficient = max_grad_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1.0 else coefficient  # NaN stays NaN


def find_nonfinite(
    grads: Sequence[Any], labels: Sequence[str], factor: float, norm: float, largest: float
) -> str | None:
    """Return a message on the first gradient that, times a factor, is not finite.

    ``norm`` is that of all of them, and ``largest`` what their dtypes hold.
    """
    # As a rule the norm tells. Where it does not, elements are looked at: near the
    # largest number it may be the factor's own rounding that leads beyond it.
    if norm <= 0.99 * largest:
        return None
    for grad, label in zip(grads, labels, strict=True):
        if grad is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                scaled = np.asarray(grad) * grad.dtype.type(factor)
            good = np.isfinite(scaled)
            if not good.all():
                place = np.unravel_index(int(np.argmin(good)), good.shape)
                where = f"[{', '.join(map(str, place))}]" if place else ""
                value = float(scaled[place])
                return (
                    f"{label} must be finite, divided by grad_scale, got {value!r} at"
                    f" {label}{where}"
                )
    return None
