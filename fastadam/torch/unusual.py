"""Tensors that no kernel takes as they are: what stands in for them during a step.

Distributed tensors are updated in their local part, complex ones as pairs of reals. Where a
parameter is of half precision, or has gaps in memory, it and its state are copied to tensors
that a kernel takes, and the results are copied back.
"""

from collections.abc import Iterable
from typing import Any

import torch

from .collect import Lists, State, Tensor

USUAL = {torch.Tensor, torch.nn.Parameter}
DEVICES = ("cpu", "cuda")
_SPARSE = "Adam does not support sparse gradients, please consider SparseAdam instead"
_Row = tuple[Any, ...]


class Part:
    """Parameters that one call of `functional.adam` can update: those on one device.

    Attributes
    ----------
    lists : Lists
        With stand-ins where those are needed.
    """

    def __init__(self, kept: Iterable[str]) -> None:
        self._kept = list(kept)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.lists = Lists([], [], [], [], {name: [] for name in self._kept}, [])

    def add(self, row: _Row, step: Tensor, group: int, own: State) -> None:
        """Add a parameter, its gradient and its arrays, as they are or what stands in for them."""
        param, grad, *arrays = self._usual(row, own)
        self.lists.params.append(param)
        self.lists.grads.append(grad)
        self.lists.groups.append(group)
        self.lists.steps.append(step)
        for column, array in zip(self.lists.arrays.values(), arrays, strict=True):
            column.append(array)

    def _usual(self, row: _Row, own: State) -> _Row:
        if hasattr(row[0], "to_local"):
            row = _local(row)
        if row[0].is_complex():
            row = tuple(None if t is None else torch.view_as_real(t) for t in row)
        param, grad, *arrays = row
        if param.dtype not in (torch.float32, torch.float64) or not is_dense(param):
            return self._copied(row)
        if grad is not None and grad.stride() != param.stride() and grad.dtype == param.dtype:
            grad = torch.empty_like(param).copy_(grad)
        for k, name in enumerate(self._kept):
            if arrays[k].stride() != param.stride() and own[name] is row[2 + k]:
                # Once and for all, as after a load, or module.to(memory_format=...).
                arrays[k] = own[name] = torch.empty_like(param, dtype=arrays[k].dtype).copy_(
                    arrays[k]
                )
        return param, grad, *arrays

    def _copied(self, row: _Row) -> _Row:
        param = row[0]
        if not param.is_floating_point():
            raise TypeError(f"a parameter must be of floats, got {param.dtype}")
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        copies = []
        for k, tensor in enumerate(row):
            copy = None
            if tensor is not None:
                copy = torch.empty(param.shape, dtype=dtype, device=param.device).copy_(tensor)
                if k != 1:  # the gradient is only read
                    self._copies.append((tensor, copy))
            copies.append(copy)
        return tuple(copies)

    def finish(self) -> None:
        """Write what has been computed on copies to the tensors themselves."""
        for target, source in self._copies:
            target.copy_(source)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its memory without gaps, in any order of the axes."""
    like = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    return bool(tensor.is_contiguous() or like.stride() == tensor.stride())


def _local(row: _Row) -> _Row:
    """Return the local parts of distributed tensors, all placed as the parameter is."""
    placements = row[0].placements
    local = []
    for tensor in row:
        if tensor is not None:
            if tensor.placements != placements:
                tensor = tensor.redistribute(placements=placements)
            tensor = tensor.to_local()
            if hasattr(tensor, "wait"):  # it may still be on its way
                tensor = tensor.wait()
        local.append(tensor)
    return tuple(local)


def split(lists: Lists, owns: Iterable[State]) -> list[Part]:
    """Return the same in parts that `functional.adam` can take; ``owns`` is each one's state.

    Raises
    ------
    RuntimeError
        For a sparse gradient, or a device for which there is no kernel.
    """
    parts: dict[torch.device, Part] = {}
    rows = zip(lists.params, lists.grads, *lists.arrays.values(), strict=True)
    for row, step, group, own in zip(rows, lists.steps, lists.groups, owns, strict=True):
        param, grad = row[0], row[1]
        if grad is not None and grad.layout != torch.strided:
            raise RuntimeError(_SPARSE)
        if param.device.type not in DEVICES:
            raise RuntimeError(
                f"fastadam updates parameters on the CPU and on CUDA devices, got one on"
                f" {param.device}"
            )
        part = parts.setdefault(param.device, Part(lists.arrays))
        part.add(row, step, group, own)
    return list(parts.values())
