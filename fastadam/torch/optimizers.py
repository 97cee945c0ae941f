"""Adam and AdamW in the place of torch's: the same arguments, state and behaviour."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import functional
from ..params import hyperparameters
from ..params.types import Nonfinite
from ..state import roles
from ..update.result import StepResult
from .collect import Lists, Tensor, collect, options_of
from .parts import (
    USUAL,
    check,
    is_flat_shard,
    limit,
    nonfinite_message,
    one_call,
    split,
    step_by_torch,
)

_ARGUMENTS = {role.name: role.argument for role in roles.ROLES}
_EXTRAS = ("_max_grad_norm", "_nonfinite", "_ema_decay", "_num_threads")


class _Optimizer(torch.optim.Optimizer):
    """The step, and what torch's optimizers have not."""

    _max_grad_norm: float | None = None
    _nonfinite: Nonfinite = "propagate"
    _ema_decay: float | None = None
    _num_threads: int | None = None
    # Whether one call of a kernel took all parameters as they are, in the last step.
    _all_usual = True
    _result: StepResult | None = None

    def _set_extras(
        self,
        max_grad_norm: float | None,
        nonfinite: Nonfinite,
        ema_decay: float | None,
        num_threads: int | None,
    ) -> None:
        self._max_grad_norm = hyperparameters.check_max_grad_norm(max_grad_norm)
        self._nonfinite = hyperparameters.check_nonfinite(nonfinite)
        self._ema_decay = hyperparameters.check_ema_decay(ema_decay)
        self._num_threads = hyperparameters.check_num_threads(num_threads)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch's optimizers do."""
        super().add_param_group(param_group)
        for name in ("maximize", "decoupled_weight_decay"):  # torch takes what is true or not
            self.param_groups[-1][name] = bool(self.param_groups[-1][name])
        try:
            self._check_whole(self._max_grad_norm, self._nonfinite)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_whole(self, max_grad_norm: float | None, nonfinite: Nonfinite) -> None:
        """Refuse what needs gradients of whole parameters where each rank has its own part."""
        if max_grad_norm is None and nonfinite == "propagate":
            return
        if any(map(is_flat_shard, (p for g in self.param_groups for p in g["params"]))):
            raise ValueError(
                "max_grad_norm and nonfinite need gradients of whole parameters, and each rank of"
                " FullyShardedDataParallel has a part for itself: call model.clip_grad_norm_()"
                " in place of max_grad_norm, or use fully_shard"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _EXTRAS}}

    @property
    def result(self) -> StepResult | None:
        """What the last step did, with `max_grad_norm` or `nonfinite`; None in a copy."""
        return self._result

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm to which gradients are scaled down, or None; can be set."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        max_grad_norm = hyperparameters.check_max_grad_norm(max_grad_norm)
        self._check_whole(max_grad_norm, "propagate")
        self._max_grad_norm = max_grad_norm

    @property
    def nonfinite(self) -> Nonfinite:
        """What is done if a gradient is not finite: propagate, skip or raise; can be set."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, nonfinite: Nonfinite) -> None:
        nonfinite = hyperparameters.check_nonfinite(nonfinite)
        self._check_whole(None, nonfinite)
        self._nonfinite = nonfinite

    @property
    def ema_decay(self) -> float | None:
        """How much of the parameters' average each step keeps, or None; can be set."""
        return self._ema_decay

    @ema_decay.setter
    def ema_decay(self, ema_decay: float | None) -> None:
        self._ema_decay = hyperparameters.check_ema_decay(ema_decay)

    @property
    def num_threads(self) -> int | None:
        """At most so many threads take a step on the CPU; can be set, None is the default."""
        return self._num_threads

    @num_threads.setter
    def num_threads(self, num_threads: int | None) -> None:
        self._num_threads = hyperparameters.check_num_threads(num_threads)

    @property
    def ema_params(self) -> list[Tensor]:
        """The averages of the parameters, in the order of ``param_groups``.

        They are the tensors ``state[param]["ema"]``, which each step moves. A
        parameter that has had no gradient yet stands for itself, detached.

        Raises
        ------
        AttributeError
            If the optimizer was made without ``ema_decay``.
        """
        if self._ema_decay is None:
            raise AttributeError("ema_params needs an optimizer made with ema_decay, got None")
        params = [param for group in self.param_groups for param in group["params"]]
        return [self.state.get(param, {}).get("ema", param.detach()) for param in params]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in place.

        Parameters
        ----------
        closure : callable, optional
            Computes the gradients anew, and returns the loss.

        Returns
        -------
        Any
            What the closure has returned, or None.

        Raises
        ------
        RuntimeError
            For a sparse gradient, or a parameter on the device ``meta``.
        TypeError, ValueError
            For hyperparameters out of range, or state that does not fit its
            parameter.
        FloatingPointError
            With ``nonfinite="raise"``, for a gradient that is not finite. As
            with the others, nothing has then been changed.
        """
        if self._is_watched() and not _is_wrapped_by_torch(type(self).step):
            return self._watched_step(*() if closure is None else (closure,))
        return self._plain_step(closure)

    # Torch wraps a step that is not marked so, for hooks and for its profiler, of which most steps
    # have none: that takes 8 us, as much as all else for one parameter. (Where a subclass has a
    # step of its own, torch wraps that one, and it is that wrapper that tells the hooks.)
    step.hooked = True  # type: ignore[attr-defined]

    def _is_watched(self) -> bool:
        """Whether there are hooks, or a profiler, to be told of a step."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        )

    def _plain_step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.defaults["differentiable"]:
            return _torchs_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # What a GradScaler sets, as for torch's fused optimizers.
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None or not bool(found_inf):
            self._update(1.0 if scale is None else float(scale))
        return loss

    _watched_step = torch.optim.Optimizer.profile_hook_step(_plain_step)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _update(self, grad_scale: float) -> None:
        """Take the step, with state for parameters that have a gradient for the first time."""
        several = [
            collect(self, amsgrad=amsgrad, average=self._ema_decay is not None)
            for amsgrad in {bool(group["amsgrad"]) for group in self.param_groups}
        ]
        several = [lists for lists in several if lists.params]
        new = [pair for lists in several for pair in lists.new]
        before = [(param, self.state.get(param)) for param, _ in new]
        self.state.update(new)
        try:
            self._take(several, grad_scale)
        except Exception as error:  # nothing has been changed, and this is not to be either
            for param, own in before:
                if own is None:
                    self.state.pop(param, None)  # a parameter that is there twice is refused
                else:
                    self.state[param] = own
            if isinstance(error, FloatingPointError):
                raise FloatingPointError(nonfinite_message(self.param_groups) or error) from None
            raise

    def _take(self, several: Sequence[Lists], grad_scale: float) -> None:
        groups, limits = self.param_groups, (self._max_grad_norm, self._nonfinite)
        if (
            self._all_usual
            and len(several) == 1
            and set(map(type, several[0].params)) <= USUAL
            and not any(group["capturable"] for group in groups)
        ):
            try:
                self._result = self._call(several[0], grad_scale, *limits)
                return
            except (RuntimeError, TypeError, ValueError):
                pass  # if there are no parts to make, the same is raised again
        with torch.no_grad():
            parts = [
                part
                for lists in several
                for part in split(lists, groups, [self.state[param] for param in lists.params])
            ]
            self._all_usual = len(parts) == 1 and parts[0].as_given
            if len(parts) > 1 or any(part.by_torch for part in parts):
                check(parts, groups)
            result = None
            if limits != (None, "propagate") and parts and not one_call(parts):
                result, grad_scale = limit(parts, groups, grad_scale, *limits)
                limits = None, "propagate"
            if result is None or not result.skipped:
                for part in parts:
                    if part.by_torch:
                        step_by_torch(part.lists, groups, self._ema_decay, grad_scale)
                    else:
                        last = self._call(part.lists, grad_scale, *limits)
                        result = result or last
            self._result = result

    def _call(
        self,
        lists: Lists,
        grad_scale: float,
        max_grad_norm: float | None,
        nonfinite: Nonfinite,
    ) -> StepResult | None:
        """Take a step by `functional.adam`, and tell autograd which parameters have changed."""
        arrays: dict[str, Any] = {_ARGUMENTS[name]: each for name, each in lists.arrays.items()}
        changed = lists.params
        if type(None) in map(type, lists.grads):
            changed = [p for p, g in zip(changed, lists.grads, strict=True) if g is not None]
        try:
            result = functional.adam(
                lists.params,
                lists.grads,
                **arrays,
                steps=lists.steps,
                groups=lists.groups,
                **options_of(self.param_groups),
                ema_decay=self._ema_decay,
                grad_scale=grad_scale,
                max_grad_norm=max_grad_norm,
                nonfinite=nonfinite,
                num_threads=self._num_threads,
            )
            if result is None or not result.skipped:
                torch.autograd.graph.increment_version(changed)
        except Exception:  # nothing has been changed
            raise
        except BaseException:  # Ctrl-C, perhaps between the kernel and what tells autograd
            torch.autograd.graph.increment_version(changed)
            raise
        return result


@functools.cache
def _is_wrapped_by_torch(step: Any) -> bool:
    """Whether torch's wrapper for hooks is around a step, perhaps below wrappers of the user's."""
    code = getattr(_Optimizer._watched_step, "__code__", None)
    while step is not None:
        if getattr(step, "__code__", None) is code:
            return True
        step = getattr(step, "__wrapped__", None)
    return False


def _torchs_step(optimizer: Any, closure: Callable[[], Any] | None) -> Any:
    """Take torch's own step, through which gradients can flow."""
    step = torch.optim.Adam.step
    if getattr(step, "hooked", False):  # the hooks are run by our own step
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step(optimizer, closure)


class Adam(_Optimizer, torch.optim.Adam):
    """`torch.optim.Adam` with fastadam's step: change the import, and nothing else.

    A subclass of torch's class: arguments, defaults, ``param_groups``, ``state``,
    hooks, messages and ``state_dict`` are torch's. Parameters and state are
    updated in place; nothing is kept outside ``state``.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of dict
        On the CPU, or on CUDA devices with fastadam's extra ``cuda12`` or
        ``cuda13``; float32 and float64 of any shape and memory order,
        distributed and complex tensors. Others, such as bfloat16, are left to
        torch's own kernels.
    lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As in `torch.optim.Adam`; ``lr`` and ``betas`` may be tensors.
    foreach, fused : bool, optional
        Taken for code that gives them. There is one way of computing, faster than
        either, but with ``fused=True`` a `torch.amp.GradScaler` leaves its scale
        to this step, as with torch's.
    capturable : bool
        If True, torch's own kernels are used, which a CUDA graph can hold.
    differentiable : bool
        If True, torch's own step is taken, through which gradients can flow.
    max_grad_norm : float, optional
        Scale the gradients down where their global norm, over all groups,
        exceeds this, > 0, as `torch.nn.utils.clip_grad_norm_` does before a
        step; the gradients stay as they are. Distributed tensors count as a
        whole. With ``math.inf`` the norm is only measured.
    nonfinite : {"propagate", "skip", "raise"}
        What to do if a gradient holds NaN or infinity, decided before anything
        is written: compute with it, leave out the whole step, or raise
        `FloatingPointError`.
    ema_decay : float, optional
        Keep an exponential moving average of each parameter in
        ``state[param]["ema"]``, to which each step adds
        ``(1-ema_decay) * (param-average)``; in [0, 1). It begins as a copy of
        the parameter before its first step.
    num_threads : int, optional
        At most so many threads take a step on the CPU. By default this
        process's share of the CPUs, see `fastadam.Adam`. No bit depends on it.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As torch's class, and for the last four out of range.

    Examples
    --------
    >>> import torch                                      # doctest: +SKIP
    >>> from fastadam.torch import Adam
    >>> model = torch.nn.Linear(3, 1)                     # doctest: +SKIP
    >>> opt = Adam(model.parameters(), lr=1e-3, max_grad_norm=1.0)  # doctest: +SKIP
    >>> model(torch.ones(3)).sum().backward()             # doctest: +SKIP
    >>> opt.step()                                        # doctest: +SKIP
    >>> opt.result.skipped                                # doctest: +SKIP
    False
    """

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
        num_threads: int | None = None,
    ) -> None:
        self._set_extras(max_grad_norm, nonfinite, ema_decay, num_threads)
        super().__init__(
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


class AdamW(_Optimizer, torch.optim.AdamW):
    """`torch.optim.AdamW` with fastadam's step: change the import, and nothing else.

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, maximize
        As in `Adam`.
    weight_decay : float
        Each step multiplies the parameters by ``1 - lr*weight_decay``.
    foreach, fused, capturable, differentiable
        As in `Adam`.
    max_grad_norm, nonfinite, ema_decay, num_threads
        As in `Adam`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `Adam`.

    Examples
    --------
    >>> import torch                                      # doctest: +SKIP
    >>> from fastadam.torch import AdamW
    >>> model = torch.nn.Linear(3, 1)                     # doctest: +SKIP
    >>> opt = AdamW(model.parameters(), weight_decay=0.1) # doctest: +SKIP
    """

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
        num_threads: int | None = None,
    ) -> None:
        self._set_extras(max_grad_norm, nonfinite, ema_decay, num_threads)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
