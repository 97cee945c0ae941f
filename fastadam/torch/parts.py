"""Tensors that no kernel takes as they are, and what is done with them instead.

Distributed tensors are updated in their local part, complex ones as pairs of reals. Half
precision, memory with gaps, other devices than the CPU's and CUDA's, and CUDA graphs
(``capturable``) are left to torch's own kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim.adam import adam as torchs_adam
from torch.optim.optimizer import _get_capturable_supported_devices

from ..params import hyperparameters
from ..params.arrays import fills_memory, long_strides
from ..params.types import Nonfinite
from ..update.limits import clip_coefficient
from ..update.result import StepResult
from .collect import OPTIONS, Group, Lists, State, Tensor, options_of

USUAL = {torch.Tensor, torch.nn.Parameter}
_DTYPES = {torch.float32, torch.float64}
_TORCHS_DTYPES = _DTYPES | {torch.float16, torch.bfloat16}
_DEVICES = {"cpu", "cuda"}
# Of what gradients are clipped by, the least that may be part of their scale.
_LEAST_CLIP = 1e-30
_SPARSE = "Adam does not support sparse gradients, please consider SparseAdam instead"
# What torch says.
_NO_TENSOR = "API has changed, `state_steps` argument must contain a list of singleton tensors"


class Part:
    """Parameters on one device, which one call updates.

    Attributes
    ----------
    by_torch : bool
        Whether torch's own kernels do it.
    lists : Lists
        With stand-ins where those are needed.
    grads : list of Tensor
        What the norm is taken of: distributed gradients are not their local parts here.
    as_given : bool
        Whether there are no stand-ins.
    """

    def __init__(self, by_torch: bool, kept: Iterable[str]) -> None:
        self.by_torch, self.as_given = by_torch, not by_torch
        self.lists = Lists([], [], [], [], {name: [] for name in kept}, [])
        self.grads: list[Tensor] = []

    def add(self, row: Sequence[Any], step: Tensor, k: int) -> None:
        """Add a parameter of group ``k``, its gradient and the arrays of its state."""
        self.lists.params.append(row[0])
        self.lists.grads.append(row[1])
        self.lists.groups.append(k)
        self.lists.steps.append(step)  # type: ignore[attr-defined]
        for column, array in zip(self.lists.arrays.values(), row[2:], strict=True):
            column.append(array)  # type: ignore[attr-defined]


def split(lists: Lists, groups: Sequence[Group], states: Sequence[State]) -> list[Part]:
    """Return the same in parts that can be updated; ``states`` has each parameter's.

    State that lies in memory in another order than its parameter is brought into that order, as
    after a load, or ``module.to(memory_format=...)``.

    Raises
    ------
    RuntimeError
        For a sparse gradient, or a distributed parameter with state that is placed otherwise.
    """
    parts: dict[tuple[torch.device, bool], Part] = {}
    seen: set[int] = set()
    for i, (param, grad, own) in enumerate(zip(lists.params, lists.grads, states, strict=True)):
        if grad is not None and grad.layout != torch.strided:
            raise RuntimeError(_SPARSE)
        whole = [param, grad, *(_in_order(own, name, param) for name in lists.arrays)]
        row: Sequence[Any] = _local(whole, lists.arrays) if hasattr(param, "to_local") else whole
        if param.is_complex():
            row = [None if t is None else torch.view_as_real(t) for t in row]
        group, step = groups[lists.groups[i]], lists.steps[i]
        if not isinstance(step, torch.Tensor):
            raise RuntimeError(_NO_TENSOR)
        _check_capturable(group, param)
        by_torch = group["capturable"] or not _has_kernel(row)
        if grad is not None and (
            row[1]._is_zerotensor() if by_torch else not _is_readable(row[1], row[0], seen)
        ):
            readable = torch.empty_like(row[0], dtype=row[1].dtype).copy_(row[1])
            row = [row[0], readable, *row[2:]]
        if step.dtype not in _DTYPES:
            step = own["step"] = step.to(torch.float32)
        if not by_torch:
            row = _in_c_order(row)
            if step.device.type != "cpu":
                # To where the host reads it at once, as after a load from a fused optimizer.
                step = own["step"] = step.to("cpu", torch.float32)
            if step.shape == (1,):
                step = step.detach().view(())
        part = parts.setdefault((row[0].device, by_torch), Part(by_torch, lists.arrays))
        part.add(row, step, lists.groups[i])
        part.as_given &= row is whole
        if grad is not None:
            part.grads.append(grad if hasattr(grad, "to_local") else row[1])
    return list(parts.values())


def _check_capturable(group: Group, param: Tensor) -> None:
    """Refuse what torch refuses in the midst of a step: before anything is changed."""
    devices = _get_capturable_supported_devices()
    if group["capturable"] and not group["fused"] and param.device.type not in devices:
        raise AssertionError(
            f"If capturable=True, params and state_steps must be on supported devices: {devices}."
        )


def _in_order(own: State, name: str, param: Tensor) -> Tensor:
    """Return an array of a parameter's state, brought into the parameter's memory order."""
    array: Tensor = own[name]
    if type(array) in USUAL and array.shape == param.shape and not _same_layout(array, param):
        array = own[name] = torch.empty_like(param, dtype=array.dtype).copy_(array)
    return array


def _local(row: Sequence[Any], kept: Iterable[str]) -> list[Any]:
    """Return the local parts of distributed tensors, all placed as the parameter is."""
    placements = row[0].placements
    local = []
    for name, tensor in zip(("param", "grad", *kept), row, strict=True):
        part = tensor
        if tensor is not None:
            found = getattr(tensor, "placements", None)
            if found != placements and name != "grad":  # an update of a copy would be lost
                raise RuntimeError(
                    f"{name} of a distributed parameter must be a DTensor with the parameter's"
                    f" placements, {placements}, got {found or type(tensor).__name__}; load state"
                    " with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                )
            if found != placements:
                part = tensor.redistribute(placements=placements)
            part = part.to_local()
            if hasattr(part, "wait"):  # it may still be on its way
                part = part.wait()
        local.append(part)
    return local


def is_flat_shard(param: Tensor) -> bool:
    """Whether a parameter is what torch's FullyShardedDataParallel has made of several."""
    return bool(getattr(param, "_fsdp_flattened", False))


def _in_c_order(row: Sequence[Any]) -> Sequence[Any]:
    """Return views on a device in C order: its kernels take no other order of the axes."""
    param = row[0]
    if param.device.type == "cpu" or param.is_contiguous():
        return row
    strides = param.stride()
    axes = sorted(range(param.dim()), key=lambda axis: strides[axis], reverse=True)
    return [None if tensor is None else tensor.permute(axes) for tensor in row]


def _has_kernel(row: Sequence[Any]) -> bool:
    """Whether a kernel of ours takes a parameter with such state."""
    param = row[0]
    return (
        param.dtype in _DTYPES
        and param.device.type in _DEVICES
        and is_dense(param)
        and all(_same_layout(array, param) for array in row[2:])
        and not any(array.is_neg() or _is_wrapper(array) for array in (param, *row[2:]))
    )


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that has its own way with every operation of torch's."""
    own = getattr(type(tensor), "__torch_dispatch__", None)
    return own is not None and own is not torch.Tensor.__torch_dispatch__


def _is_readable(grad: Tensor, param: Tensor, seen: set[int]) -> bool:
    """Whether a gradient's numbers lie in memory of its own, as its parameter's do.

    ``seen`` is where earlier gradients lie: two parameters may have the same.
    """
    if grad.is_neg() or grad._is_zerotensor() or not _same_layout(grad, param):
        return False
    place = 0 if _is_wrapper(grad) else grad.data_ptr()
    alone = place not in seen
    if place:
        seen.add(place)
    return alone


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its memory without gaps, its axes in any order."""
    return fills_memory(tensor.shape, tensor.stride(), 1)


def _same_layout(tensor: Tensor, param: Tensor) -> bool:
    strides, others = tensor.stride(), param.stride()
    return strides == others or (
        long_strides(tensor.shape, strides) == long_strides(param.shape, others)
    )


def check(parts: Iterable[Part], groups: Sequence[Group]) -> None:
    """Refuse what no call takes before the first of several changes anything.

    Torch's kernels take any hyperparameter, and some refuse state when a part is done.

    Raises
    ------
    TypeError, ValueError
        For a hyperparameter out of range, or state that does not fit its parameter.
    """
    for k in sorted({k for part in parts for k in part.lists.groups}):
        hyperparameters.check_options(options_of([groups[k]]), f"param_groups[{k}]: ")
    for part in parts:
        for param, grad in zip(part.lists.params, part.lists.grads, strict=True):
            if param.dtype not in _TORCHS_DTYPES:
                raise TypeError(
                    f"param.dtype must be a real float of 2 bytes or more, got {param.dtype}"
                )
            if grad is not None and grad.dtype != param.dtype:
                raise TypeError(
                    f"grad.dtype must be its parameter's, {param.dtype}, got {grad.dtype}"
                )
        for name, arrays in part.lists.arrays.items():
            for param, array in zip(part.lists.params, arrays, strict=True):
                for what in ("shape", "dtype"):
                    got, needed = getattr(array, what), getattr(param, what)
                    if got != needed:
                        raise (TypeError if what == "dtype" else ValueError)(
                            f"{name}.{what} must be its parameter's, {needed}, got {got}"
                        )


def step_by_torch(
    lists: Lists, groups: Sequence[Group], ema_decay: float | None, grad_scale: float
) -> None:
    """Take a step by torch's own kernels."""
    for k in dict.fromkeys(lists.groups):
        group = groups[k]
        own = [i for i, g in enumerate(lists.grads) if g is not None and lists.groups[i] == k]
        if not own:
            continue
        columns: tuple[Any, ...] = (lists.params, lists.grads, lists.steps)
        params, grads, steps = ([column[i] for i in own] for column in columns)
        arrays = {name: [column[i] for i in own] for name, column in lists.arrays.items()}
        if grad_scale != 1.0:
            grads = [*torch._foreach_div(grads, grad_scale)]
        capturable, on_cpu = group["capturable"], params[0].device.type == "cpu"
        # Torch's fused kernel on the CPU takes all tensors for dense, in one order.
        fusible = on_cpu and all(
            is_dense(param)
            and all(_same_layout(array, param) for array in rest)
            and not any(array.is_neg() or _is_wrapper(array) for array in (param, *rest))
            for param, *rest in zip(params, grads, *arrays.values(), strict=True)
        )
        beta1, beta2 = group["betas"]
        torchs_adam(
            params,
            grads,
            arrays["exp_avg"],
            arrays["exp_avg_sq"],
            arrays.get("max_exp_avg_sq", []),
            steps,
            fused=group["fused"] if capturable else fusible,
            foreach=group["foreach"] if capturable else not on_cpu,
            capturable=capturable,
            amsgrad="max_exp_avg_sq" in arrays,
            beta1=beta1,
            beta2=beta2,
            **{name: group[name] for name in OPTIONS if name != "betas"},
        )
        if ema_decay is not None:
            torch._foreach_lerp_(arrays["ema"], params, 1.0 - ema_decay)


def one_call(parts: Sequence[Part]) -> bool:
    """Whether one call of a kernel of ours sees all gradients."""
    return len(parts) == 1 and not any(
        parts[0].by_torch or hasattr(grad, "to_local") for grad in parts[0].grads
    )


def limit(
    parts: Sequence[Part],
    groups: Sequence[Group],
    grad_scale: float,
    max_grad_norm: float | None,
    nonfinite: Nonfinite,
) -> tuple[StepResult, float]:
    """Return what a step's result is to be, and the scale with which gradients are clipped.

    Where one call of a kernel does not see all gradients: some are on other processes or
    devices, or are torch's to update.

    Raises
    ------
    FloatingPointError
        With ``nonfinite="raise"``, for a gradient that is not finite.
    """
    norm = _total_norm([grad for part in parts for grad in part.grads]) / grad_scale
    if nonfinite == "raise" and not math.isfinite(norm):
        raise FloatingPointError(f"gradients must be finite, got a norm of {norm}")
    first = parts[0].lists
    lr = float(groups[first.groups[0]]["lr"])
    skipped = nonfinite == "skip" and not math.isfinite(norm)
    result = StepResult(int(first.steps[0]), lr, norm, skipped=skipped)
    clip = clip_coefficient(norm, math.inf if max_grad_norm is None else max_grad_norm)
    if clip >= _LEAST_CLIP:
        return result, grad_scale / clip
    if not skipped:  # by nearly 0, or NaN, as in one call: into copies
        for part in parts:
            part.lists.grads[:] = [None if g is None else g * clip for g in part.lists.grads]
    return result, grad_scale


def _total_norm(grads: Iterable[Tensor]) -> float:
    """Return the norm of all gradients, distributed ones as a whole, in float64."""
    families: dict[Any, list[Tensor]] = {}
    for grad in grads:
        own = torch.linalg.vector_norm(grad.detach(), dtype=torch.float64)
        families.setdefault(getattr(grad, "device_mesh", grad.device), []).append(own)
    squares = 0.0
    for norms in families.values():
        total = torch.linalg.vector_norm(torch.stack(norms))
        squares += float(total.full_tensor() if hasattr(total, "full_tensor") else total) ** 2
    return math.sqrt(squares)


def nonfinite_message(groups: Sequence[Group]) -> str | None:
    """Return a message on the first gradient here that is not finite, if there is one."""
    for k, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            grad = None if param.grad is None else param.grad.detach()
            if grad is not None and not bool(torch.isfinite(grad).all()):
                grad = grad.to_local() if hasattr(grad, "to_local") else grad
                names = group.get("param_names")
                name = f"{names[j]!r}, " if names else ""
                place = torch.nonzero(~torch.isfinite(grad))[:1].flatten().tolist()
                got = f", got {grad[tuple(place)].item()} at {place}" if place else ""
                return (
                    f"the gradient of {name}param_groups[{k}]['params'][{j}], must be finite{got}"
                )
    return None
