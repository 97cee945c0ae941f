"""What a step of a torch optimizer is about: lists over its groups, as `functional.adam` takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from ..state import roles

Tensor = torch.Tensor
State = dict[str, Any]
Group = dict[str, Any]

# The hyperparameters that differ from group to group, by torch's names, which are ours.
OPTIONS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize")
_options_of = itemgetter(*OPTIONS)
_NUMBERS = {float, int, bool}


class Lists(NamedTuple):
    """The parameters that have state or a gradient, and all that belongs to them.

    Attributes
    ----------
    params : list of Tensor
    grads : list of Tensor or None
    groups : list of int
        The place of each parameter's group.
    steps : sequence of Tensor
        How many each has had.
    arrays : dict
        For each role that is kept, by its name, a sequence of tensors.
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
    kept, values_of = _kept(amsgrad, average)
    params: list[Tensor] = []
    grads: list[Tensor | None] = []
    groups: list[int] = []
    new: list[tuple[Tensor, State]] = []
    rows: list[tuple[Any, ...]] = []
    for k, group in enumerate(optimizer.param_groups):
        if bool(group["amsgrad"]) is not amsgrad:
            continue
        members = group["params"]
        states: list[Any] = [*map(optimizer.state.get, members)]
        try:
            rows += [*map(values_of, states)]
        except (KeyError, TypeError):  # of some there is no state yet, or not all of it
            members, states, added = _with_state(members, states, kept, group)
            rows += map(values_of, states)
            new += added
        params += members
        grads += [param.grad for param in members]
        groups += [k] * len(members)
    steps, *columns = zip(*rows, strict=True) if rows else [() for _ in range(1 + len(kept))]
    return Lists(params, grads, groups, steps, dict(zip(kept, columns, strict=True)), new)


def _with_state(
    members: Sequence[Tensor], states: Sequence[State | None], kept: Sequence[str], group: Group
) -> tuple[list[Tensor], list[State], list[tuple[Tensor, State]]]:
    """Return the parameters that have state or a gradient, their state, and which of it is new."""
    params, owns, new = [], [], []
    for param, state in zip(members, states, strict=True):
        own = state
        if not own or any(name not in own for name in ("step", *kept)):
            if param.grad is None:
                continue
            own = completed(param, own, kept, group)
            new.append((param, own))
        params.append(param)
        owns.append(own)
    return params, owns, new


@functools.cache
def _kept(amsgrad: bool, average: bool) -> tuple[list[str], Callable[[Any], tuple[Any, ...]]]:
    """Return what is kept of a parameter, and what reads it, and the step, from its state."""
    options = [("amsgrad", amsgrad), ("ema_decay", average)]
    names = [role.name for role in roles.kept(name for name, on in options if on)]
    return names, itemgetter("step", *names)


def completed(param: Tensor, own: State | None, kept: Sequence[str], group: Group) -> State:
    """Return a parameter's state with what it lacks, as torch makes it at the first gradient."""
    if param.is_meta:
        raise RuntimeError(
            "a parameter on the device meta has no memory to update: load the model first, or"
            " move it with module.to_empty(device='cpu')"
        )
    whole = {"step": _new_step(param, group), **(own or {})}
    with torch.no_grad():
        for role in roles.ROLES:
            if role.name in kept and role.name not in whole:
                make = torch.zeros_like if role.starts_as == "zeros" else torch.clone
                whole[role.name] = make(param, memory_format=torch.preserve_format)
    return whole


def _new_step(param: Tensor, group: Group) -> Tensor:
    """Return a count of no steps, of torch's dtype: where the host reads it, if it may."""
    double = torch.get_default_dtype() == torch.float64 and not group["fused"]
    return torch.tensor(  # of a number, which torch's FakeTensorMode remembers
        0.0,
        dtype=torch.float64 if double else torch.float32,
        device=param.device if group["capturable"] else "cpu",
    )


def options_of(groups: Sequence[Group]) -> dict[str, Any]:
    """Return the groups' hyperparameters as `functional.adam` takes them.

    One value where all groups have the same, otherwise a list.
    """
    if len(groups) == 1:
        values = _options_of(groups[0])
        if not _NUMBERS.issuperset(map(type, values)):
            values = map(_plain, values)
    else:
        values = map(_one_or_list, zip(*map(_options_of, groups), strict=True))
    return dict(zip(OPTIONS, values, strict=True))


def _one_or_list(column: tuple[Any, ...]) -> Any:
    values = [*map(_plain, column)]
    first = values[0]
    return first if values.count(first) == len(values) else values


def _plain(value: Any) -> Any:
    """Return numbers of Python's for tensors of one element, and pairs of them."""
    kind = type(value)
    if kind in _NUMBERS or (kind is tuple and _NUMBERS.issuperset(map(type, value))):
        return value  # the same object: who remembers it need not look into it
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, tuple | list) else value
