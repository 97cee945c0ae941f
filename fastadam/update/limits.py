"""Gradients that are too large, or not finite."""

import math

import numpy as np
import numpy.typing as npt


def clip_coefficient(norm: float, max_grad_norm: float | None) -> float:
    """Return what `torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm by."""
    if max_grad_norm is None or math.isinf(max_grad_norm):
        return 1.0
    coefficient = max_grad_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1.0 else coefficient  # NaN stays NaN


def nonfinite_message(grad: npt.NDArray[np.floating], label: str, factor: float) -> str | None:
    """Return a message on the first element that, times a factor, is not finite; or None."""
    with np.errstate(all="ignore"):
        scaled = grad * grad.dtype.type(factor)
    good = np.isfinite(scaled)
    if good.all():
        return None
    place = np.unravel_index(int(np.argmin(good)), good.shape)
    where = f"[{', '.join(map(str, place))}]" if place else ""
    return (
        f"{label} must be finite, divided by grad_scale, got {float(scaled[place])!r} at"
        f" {label}{where}"
    )
