"""What a step of a torch optimizer is about: lists over all groups, as `functional.adam` takes."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from ..state import roles

Tensor = torch.Tensor
State = dict[str, Any]


class Lists(NamedTuple):
    """The parameters that have state or a gradient, and all that belongs to them.

    Attributes
    ----------
    params : list of Tensor
    grads : list of Tensor or None
    groups : list of int
        The place of each parameter's group.
    steps : tuple of Tensor
        How many each has had.
    arrays : dict
        For each role that is kept, by its name, a tuple of tensors.
    new : list of (Tensor, dict)
        Parameters of whose state something is not in the optimizer yet, and that state.
    """

    params: list[Tensor]
    grads: list[Tensor | None]
    groups: list[int]
    steps: Sequence[Tensor]
    arrays: dict[str, Sequence[Tensor]]
    new: list[tuple[Tensor, State]]


def collect(optimizer: torch.optim.Optimizer, *, amsgrad: bool, average: bool) -> Lists:
    """Return what a step is about in the groups with, or without, AMSGrad; change nothing.

    ``average`` is whether averages of the parameters are kept.

    Raises
    ------
    RuntimeError
        For a parameter that has no memory.
    """
    options = [("amsgrad", amsgrad), ("ema_decay", average)]
    kept = [role.name for role in roles.kept(name for name, on in options if on)]
    values_of = itemgetter("step", *kept)
    params, grads, groups, new, rows = [], [], [], [], []
    find = optimizer.state.get
    for k, group in enumerate(optimizer.param_groups):
        if group["amsgrad"] is not amsgrad:
            continue
        for param in group["params"]:
            grad, own = param.grad, find(param)
            if not own and grad is None:
                continue
            try:
                rows.append(values_of(own))
            except (KeyError, TypeError):
                own = completed(param, own, kept, group)
                new.append((param, own))
                rows.append(values_of(own))
            params.append(param)
            grads.append(grad)
            groups.append(k)
    steps, *columns = zip(*rows, strict=True) if rows else [() for _ in range(1 + len(kept))]
    return Lists(params, grads, groups, steps, dict(zip(kept, columns, strict=True)), new)


def completed(
    param: Tensor, own: State | None, kept: Sequence[str], group: dict[str, Any]
) -> State:
    """Return a parameter's state with what it lacks, as torch makes it at the first gradient."""
    if param.is_meta:
        raise RuntimeError(
            "a parameter on the device meta has no memory to update: load the model first, or"
            " move it with module.to_empty(device='cpu')"
        )
    whole = {"step": new_step(group), **(own or {})}
    for role in roles.ROLES:
        if role.name in kept and role.name not in whole:
            make = torch.zeros_like if role.starts_as == "zeros" else torch.clone
            with torch.no_grad():
                whole[role.name] = make(param, memory_format=torch.preserve_format)
    return whole


def new_step(group: dict[str, Any]) -> Tensor:
    """Return a count of no steps: of torch's dtype, and where the host reads it at once."""
    double = torch.get_default_dtype() == torch.float64 and not group["fused"]
    return torch.zeros((), dtype=torch.float64 if double else torch.float32, device="cpu")
