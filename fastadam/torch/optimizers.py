"""Adam and AdamW in the place of torch's: the same arguments, state and behaviour."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import functional
from ..params import hyperparameters
from ..params.types import Nonfinite
from ..state import roles
from ..update.limits import clip_coefficient
from ..update.result import StepResult
from .collect import Lists, Tensor, collect
from .unusual import USUAL, split

# What hyperparameters are called in the groups, and by `functional.adam`.
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize")
_EXTRAS = ("max_grad_norm", "nonfinite", "ema_decay")


class _Fast(torch.optim.Optimizer):
    """The step, and what torch's optimizers have not."""

    _max_grad_norm: float | None = None
    _nonfinite: Nonfinite = "propagate"
    _ema_decay: float | None = None
    result: StepResult | None = None

    def _set_extras(
        self, max_grad_norm: float | None, nonfinite: Nonfinite, ema_decay: float | None
    ) -> None:
        self._max_grad_norm = hyperparameters.check_max_grad_norm(max_grad_norm)
        self._nonfinite = hyperparameters.check_nonfinite(nonfinite)
        self._ema_decay = hyperparameters.check_ema_decay(ema_decay)

    @property
    def ema_params(self) -> list[Tensor]:
        """The averages of the parameters, in their order; a parameter itself before its first step."""
        if self._ema_decay is None:
            raise AttributeError("ema_params needs an optimizer made with ema_decay, got None")
        params = [param for group in self.param_groups for param in group["params"]]
        return [self.state.get(param, {}).get("ema", param.detach()) for param in params]

    def __getstate__(self) -> dict[str, Any]:
        own = {f"_{name}": getattr(self, f"_{name}") for name in _EXTRAS}
        return {**super().__getstate__(), **own}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in place.

        Parameters
        ----------
        closure : callable, optional
            Computes the gradients once more, and returns the loss.

        Returns
        -------
        The closure's loss, or None.
        """
        if self.defaults["differentiable"]:
            return _torchs_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        grad_scale = 1.0 if scale is None else float(scale)
        if found_inf is not None and bool(found_inf):
            return
        flags = {bool(group["amsgrad"]) for group in self.param_groups}
        several = [
            collect(self, amsgrad=amsgrad, average=self._ema_decay is not None)
            for amsgrad in flags
        ]
        several = [lists for lists in several if lists.params]
        new = [pair for lists in several for pair in lists.new]
        before = [(param, self.state.get(param)) for param, _ in new]
        self.state.update(new)
        try:
            self._take(several, grad_scale)
        except Exception:
            for param, own in before:
                if own is None:
                    del self.state[param]
                else:
                    self.state[param] = own
            raise

    def _take(self, several: list[Lists], grad_scale: float) -> None:
        if not several:
            return
        if len(several) == 1 and set(map(type, several[0].params)) <= USUAL:
            try:
                self.result = self._call(
                    several[0], grad_scale, self._max_grad_norm, self._nonfinite
                )
                return
            except (TypeError, ValueError):
                # Whether stand-ins help; if not, the same is raised again.
                pass
        with torch.no_grad():
            parts = [
                part
                for lists in several
                for part in split(lists, [self.state[param] for param in lists.params])
            ]
            max_grad_norm, nonfinite = self._max_grad_norm, self._nonfinite
            limited = max_grad_norm is not None or nonfinite != "propagate"
            norm = None
            if limited and (
                len(parts) > 1 or any(hasattr(p, "to_local") for ls in several for p in ls.params)
            ):
                grads = [g for ls in several for g in ls.grads if g is not None]
                total = torch.nn.utils.get_total_norm(grads)
                norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
                norm /= grad_scale
                if not math.isfinite(norm):
                    if nonfinite == "raise":
                        raise FloatingPointError("a gradient holds NaN or infinity")
                    if nonfinite == "skip":
                        self.result = StepResult(0, 0.0, norm, skipped=True)
                        return
                grad_scale /= clip_coefficient(
                    norm, math.inf if max_grad_norm is None else max_grad_norm
                )
                max_grad_norm, nonfinite = None, "propagate"
            for part in parts:
                self.result = self._call(part.lists, grad_scale, max_grad_norm, nonfinite)
                part.finish()

    def _call(self, lists: Lists, grad_scale: float, max_grad_norm: Any, nonfinite: Any) -> Any:
        arrays = {
            role.argument: lists.arrays[role.name]
            for role in roles.ROLES
            if role.name in lists.arrays
        }
        values = [[_plain(group[name]) for group in self.param_groups] for name in _OPTIONS]
        options = dict(zip(_OPTIONS, values, strict=True))
        result = functional.adam(
            lists.params,
            lists.grads,
            **arrays,
            steps=lists.steps,
            groups=lists.groups,
            **options,
            ema_decay=self._ema_decay,
            grad_scale=grad_scale,
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
        )
        if result is None or not result.skipped:
            updated = [k for k, grad in enumerate(lists.grads) if grad is not None]
            torch.autograd.graph.increment_version([lists.params[k] for k in updated])
        return result


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if isinstance(value, torch.Tensor):
        return value.item()
    return bool(value) if isinstance(value, bool) else float(value)


def _torchs_step(optimizer: Any, closure: Any) -> Any:
    """Take torch's own step, which gradients can flow through, without its hooks: ours has them."""
    step = torch.optim.Adam.step
    return (
        getattr(step, "__wrapped__", step)(optimizer, closure)
        if getattr(step, "hooked", False)
        else step(optimizer, closure)
    )


class Adam(_Fast, torch.optim.Adam):
    """`torch.optim.Adam`, updated by fastadam."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        nonfinite: Nonfinite = "propagate",
        ema_decay: float | None = None,
    ) -> None:
        self._set_extras(max_grad_norm, nonfinite, ema_decay)
        torch.optim.Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class AdamW(_Fast, torch.optim.AdamW):
    """`torch.optim.AdamW`, updated by fastadam."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Nonfinite = "propagate",
        ema_decay: float | None = None,
    ) -> None:
        self._set_extras(max_grad_norm, nonfinite, ema_decay)
        torch.optim.AdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
