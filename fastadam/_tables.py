"""Where everything lies: tables of addresses and of chunks, and who shares memory."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ._arrays import address, check_grad
from ._state import ParamState

Addresses = npt.NDArray[np.int64]

# The columns of a table of tensors. The first five hold addresses, 0 for none.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, SIZE, GROUP, STEP, ROW = range(9)
# The columns of a table of chunks: which tensor, its first element, how many.
CHUNK_TENSOR, CHUNK_START, CHUNK_SIZE = range(3)
# Elements in a chunk, the unit of work of a thread: under 1 microsecond.
CHUNK = 8192
# The scalars of one step: what `_formula.step_scalars` returns.
SCALARS = 10


class Memory:
    """The memory that an optimizer updates, as sorted, disjoint intervals of bytes.

    Parameters
    ----------
    labels, starts, sizes
        Of each array: its name in messages, its address, its bytes.

    Raises
    ------
    ValueError
        If two arrays share memory: each update would see the other's.
    """

    def __init__(self, labels: Sequence[str], starts: Addresses, sizes: Addresses) -> None:
        self._labels, self._starts, self._ends = _disjoint(labels, starts, sizes)

    def check_apart(self, labels: Sequence[str], starts: Addresses, sizes: Addresses) -> None:
        """Refuse arrays that share memory with these, or with one another."""
        others, starts, ends = _disjoint(labels, starts, sizes)
        # Both sides are disjoint: of the own intervals, those that begin before
        # the end of another, less those that end before its start, overlap it.
        first = np.searchsorted(self._ends, starts, side="right")
        last = np.searchsorted(self._starts, ends, side="left")
        for k in np.flatnonzero(first < last)[:1]:
            raise ValueError(
                f"{others[k]} must not share memory with {self._labels[first[k]]},"
                f" which the step writes"
            )


def _disjoint(
    labels: Sequence[str], starts: Addresses, sizes: Addresses
) -> tuple[list[str], Addresses, Addresses]:
    """Return the intervals that are not empty in order of address; refuse overlaps."""
    order = np.argsort(starts, kind="stable")
    order = order[sizes[order] > 0]
    starts, ends = starts[order], starts[order] + sizes[order]
    for k in np.flatnonzero(ends[:-1] > starts[1:])[:1]:
        one, other = (labels[order[i]] for i in sorted((k, k + 1), key=order.__getitem__))
        raise ValueError(f"{one} and {other} must not share memory")
    return [labels[k] for k in order], starts, ends


class Table:
    """What one kernel call reads: where every tensor of one dtype lies, cut into chunks."""

    def __init__(self, states: Sequence[ParamState], members: Sequence[int]) -> None:
        self.members = list(members)
        own = [states[k] for k in members]
        dtype = own[0].param.dtype
        self.tensors = np.zeros((len(own), ROW + 1), dtype=np.int64)
        for row, state in zip(self.tensors, own, strict=True):
            row[PARAM] = address(state.param)
            row[EXP_AVG] = address(state.exp_avg)
            row[EXP_AVG_SQ] = address(state.exp_avg_sq)
            row[MAX_EXP_AVG_SQ] = address(state.max_exp_avg_sq)
            row[SIZE], row[GROUP] = state.param.size, state.group
        self.chunks = cut(self.tensors[:, SIZE])
        self.scalars = np.zeros((len(own), SCALARS), dtype=dtype)
        self.zero = dtype.type(0)
        self.size = int(self.tensors[:, SIZE].sum())


def cut(sizes: Addresses) -> Addresses:
    """Cut tensors of these sizes into chunks; return rows of tensor, start, size."""
    counts = -(-sizes // CHUNK)
    tensor = np.repeat(np.arange(sizes.size), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(tensor.size) - first) * CHUNK
    return np.stack([tensor, start, np.minimum(sizes[tensor] - start, CHUNK)], axis=1)


class Plan:
    """Everything a kernel call needs to know about where parameters and gradients lie.

    One table for each dtype. The gradients' addresses are read and checked
    when an array comes that the last step had not.

    Raises
    ------
    ValueError
        If parameters share memory.
    """

    def __init__(self, states: Sequence[ParamState], steps: npt.NDArray[np.int64]) -> None:
        self._states = states
        owned = [(state.label, state.param) for state in states]
        for state in states:
            owned += [(f"{state.label}.{n}", array) for n, array in state.arrays().items()]
        self._memory = Memory(
            [label for label, _ in owned],
            np.array([address(array) for _, array in owned], dtype=np.int64),
            np.array([array.nbytes for _, array in owned], dtype=np.int64),
        )
        self.tables = []
        for dtype in {state.param.dtype: None for state in states}:
            members = [k for k, state in enumerate(states) if state.param.dtype == dtype]
            self.tables.append(Table(states, members))
        self.steps = steps
        # NumPy refuses to resize, and so to move, an array that has a weak reference.
        self._pins = [weakref.ref(state.param) for state in states]
        self._refs: list[Callable[[], Any]] | None = None
        self._boxes: list[Any] = []
        self._writable = True

    @property
    def largest(self) -> float:
        """The largest number that every dtype here can hold."""
        return min((float(np.finfo(t.zero).max) for t in self.tables), default=np.inf)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Steps that each parameter has had, in the order of the parameters."""
        steps = np.zeros(len(self._states), dtype=np.int64)
        for table in self.tables:
            steps[table.members] = table.tensors[:, STEP]
        return steps

    @steps.setter
    def steps(self, steps: npt.NDArray[np.int64]) -> None:
        for table in self.tables:
            table.tensors[:, STEP] = steps[table.members]

    def take_grads(self, grads: list[Any], labels: Sequence[str], *, writable: bool) -> None:
        """Check gradients unless they are the last step's; note where they lie.

        Raises
        ------
        TypeError, ValueError
            If one does not fit its parameter, shares memory, or is read-only
            where ``writable`` is asked for.
        """
        refs = self._refs
        # A dead reference gives None too: it must not pass for a None that came again.
        if refs is None or any(
            ref() is not grad or (grad is None and ref is not _nothing)
            for ref, grad in zip(refs, grads, strict=True)
        ):
            self._read_grads(grads, labels)
        if writable and not self._writable:
            for grad, label in zip(grads, labels, strict=True):
                if grad is not None and not grad.flags.writeable:
                    kind = (
                        "a NumPy scalar" if isinstance(grad, np.generic) else "a read-only array"
                    )
                    raise ValueError(f"{label} must be writable for zero_grad=True, got {kind}")

    def _read_grads(self, grads: list[Any], labels: Sequence[str]) -> None:
        given, grads = grads, [_boxed(grad) for grad in grads]
        for grad, state, label in zip(grads, self._states, labels, strict=True):
            if grad is not None:
                check_grad(grad, state.param, label)
        starts = np.array([address(grad) for grad in grads], dtype=np.int64)
        sizes = np.array([0 if g is None else g.nbytes for g in grads], dtype=np.int64)
        self._memory.check_apart(labels, starts, sizes)
        for table in self.tables:
            table.tensors[:, GRAD] = starts[table.members]
        self._writable = all(grad is None or grad.flags.writeable for grad in grads)
        # Weak references know the same array again without keeping it alive.
        self._refs = [_nothing if grad is None else weakref.ref(grad) for grad in grads]
        self._boxes = [g for g, was in zip(grads, given, strict=True) if g is not was]


def _nothing() -> None:
    """Stand for the reference to a gradient that was None."""


def _boxed(grad: Any) -> Any:
    """Return a NumPy scalar, what arithmetic on 0-d arrays gives, as a read-only array."""
    if isinstance(grad, np.generic):
        grad = np.asarray(grad)
        grad.flags.writeable = False
    return grad
