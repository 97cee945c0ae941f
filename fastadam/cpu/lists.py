"""Arrays that come in lists with every call: one compiled look finds them where they were.

The twin of `gradients`, for `fastadam.functional`: nothing of the user's is kept between calls,
so parameters and state are looked at each time, as gradients are.
"""

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import types

from ..params.arrays import (
    DTYPES,
    address,
    as_plain,
    check_alike,
    check_order,
    check_param,
    kind_of,
    take_grad,
)
from ..params.memory import Memory
from ..state import roles
from ..update import layout
from ..update.limits import nonfinite_message
from ..update.result import StepResult
from ..update.rows import Rows
from ..update.settings import Groups, Settings
from . import intrinsics, numpy_structs
from . import layout as field
from .intrinsics import peek, table
from .numpy_structs import DATA, ITEMS, LENGTH, TYPE, accept, fits
from .stepper import Stepper
from .tensors import known_at, mark_of, meet_torch, place_of, scalar_of

_INT64, _FLOAT32, _FLOAT64 = np.int64(0), np.float32(0), np.float64(0)

# What a call gives: in the order of `layout.ADDRESSES` a tuple of arrays each, None where a role
# is not kept; then the counts of steps, an array or a tuple of arrays of one number.
Given: TypeAlias = tuple[Any, ...]
STEPS = len(layout.ADDRESSES)
MOST_STEPS = 2**62


def find(given: Any, known_at: Any) -> Any:
    """Return a number made of where some arrays lie, 0 if one of those is of no known kind.

    Those are parameters, and the first of the state: several optimizers may have the same
    parameters. ``given`` is the ``id()`` of a `Given`, ``known_at`` the address of
    `tensors.known`.
    """
    params = peek(given + ITEMS, _INT64)
    key = count = peek(params + LENGTH, _INT64)
    for t in range(0, count, count // 8 + 1):
        mark = mark_of(peek(params + ITEMS + 8 * t, _INT64), known_at)
        if mark < 0:
            return 0
        key = key * 1_000_003 + mark
    state = peek(given + ITEMS + 8 * layout.EXP_AVG, _INT64)
    if count > 0 and peek(state + LENGTH, _INT64) > 0:
        mark = mark_of(peek(state + ITEMS, _INT64), known_at)
        if mark < 0:
            return 0
        key = key * 1_000_003 + mark
    return key


def look(context: Any, given: Any, writable: Any) -> Any:
    """Note where gradients and counts lie, if all arrays are as they should be; say whether.

    Parameters
    ----------
    context : int
        Address of a `Context` whose table SEEN has one more row, for the counts.
    given : int
        ``id()`` of a `Given`, which the caller keeps alive.
    writable : bool
        Whether the gradients must be writable.
    """
    fields = table(context, 1, field.CONTEXT_SIZE, _INT64)[0]
    total, none = fields[field.TENSOR_COUNT], fields[field.NONE]
    tensors = table(fields[field.TENSORS], total, layout.TENSOR_COLUMNS, _INT64)
    seen = table(fields[field.SEEN], total + 1, field.SEEN_COLUMNS, _INT64)
    for column in range(STEPS):
        arrays = peek(given + ITEMS + 8 * column, _INT64)
        if arrays != none and peek(arrays + LENGTH, _INT64) != total:
            return False
    changed, known_at, ndarray = False, fields[field.KNOWN], fields[field.NDARRAY]
    for t in range(total):
        row = seen[t]
        for column in range(STEPS):
            arrays, is_grad = peek(given + ITEMS + 8 * column, _INT64), column == layout.GRAD
            array, start = none, 0
            if arrays != none:
                array = peek(arrays + ITEMS + 8 * t, _INT64)
                if array != none or not is_grad:
                    if peek(array + TYPE, _INT64) == ndarray:
                        if not fits(array, row, writable or not is_grad):
                            return False
                        start = peek(array + DATA, _INT64)
                    else:
                        start = place_of(array, row, known_at)
                        if start < 0:
                            return False
                    if row[field.BYTES] == 0:
                        start = 1
                    elif start == 0:  # what torch makes for zeros has no memory
                        return False
            if is_grad:
                row[field.FOUND] = start
            if start != tensors[t, column]:
                if not is_grad:
                    return False
                changed = True
    steps = peek(given + ITEMS + 8 * STEPS, _INT64)
    at = _look_at_array(steps, seen) if peek(steps + TYPE, _INT64) == ndarray else 0
    if at < 0 or (at == 0 and not _look_at_floats(steps, tensors, seen, known_at)):
        return False
    counts = table(fields[field.COUNTS], 1, field.COUNTS_SIZE, _INT64)[0]
    seen[total, field.FOUND] = at
    changed |= counts[field.COUNTS_ADDRESS] != at and at != 0
    if changed and not accept(fields, tensors, seen):
        return False
    counts[field.COUNTS_AS_FLOATS] = at == 0
    counts[field.COUNTS_ADDRESS] = at if at != 0 else fields[field.TENSORS] + 8 * layout.STEP
    counts[field.COUNTS_WIDTH] = 1 if at != 0 else layout.TENSOR_COLUMNS
    return True


@intrinsics.inline
def _look_at_array(steps: Any, seen: Any) -> Any:
    """Return where an array of counts lies; -1 if it is not as its row, the last, asks for."""
    total = seen.shape[0] - 1
    if not fits(steps, seen[total], True):
        return -1
    start = peek(steps + DATA, _INT64)
    for t in range(total):
        if not 0 <= peek(start + 8 * t, _INT64) < MOST_STEPS:
            return -1
    return start


@intrinsics.inline
def _look_at_floats(steps: Any, tensors: Any, seen: Any, known_at: Any) -> Any:
    """Take over counts from a tuple of arrays of one float, and note where they lie."""
    total = tensors.shape[0]
    if peek(steps + LENGTH, _INT64) != total:
        return False
    for t in range(total):
        place, size = scalar_of(peek(steps + ITEMS + 8 * t, _INT64), known_at)
        if size == 0:
            return False
        count = np.float64(peek(place, _FLOAT32)) if size == 4 else peek(place, _FLOAT64)
        if not 0 <= count < MOST_STEPS or count != np.floor(count):
            return False
        tensors[t, layout.STEP] = np.int64(count)
        seen[t, field.COUNT_PLACE], seen[t, field.COUNT_BYTES] = place, size
    return True


@functools.cache
def find_kernel() -> Any:
    """Return the kernel that finds tables; None where NumPy's structures are not as known."""
    if not numpy_structs.works():
        return None
    return intrinsics.entry_point(intrinsics.kernel(find, (types.int64, types.int64)))


@functools.cache
def look_kernel() -> Any:
    """Return the kernel that looks at all arrays of a call, or None."""
    if not numpy_structs.works():
        return None
    signature = types.int64, types.int64, types.boolean
    return intrinsics.entry_point(intrinsics.kernel(look, signature))


def find_tables(given: Given) -> int:
    """Do what `find` does."""
    find = find_kernel()
    if find is not None:
        key = find(id(given), known_at)
        if key == 0 and meet_torch():
            key = find(id(given), known_at)
        return key  # type: ignore[no-any-return]
    arrays = *given[layout.PARAM], *given[layout.EXP_AVG][:1]
    if any(type(array) is not np.ndarray for array in arrays):
        return 0
    return hash(tuple(map(_place, arrays)))


def _place(array: Any) -> int:
    """Return where an array lies, 1 if it is empty: where those lie means nothing."""
    return 0 if array is None else address(array) if array.size else 1


NAMES = ("params", "grads", *(role.argument for role in roles.ROLES), "steps")


def label(column: int, place: int) -> str:
    """Return what an array is called in messages."""
    return f"{NAMES[column]}[{place}]"


def plain(given: Given) -> Given:
    """Return the same with plain arrays over the memory of what other libraries' arrays are."""

    def one(column: int, k: int, array: Any) -> Any:
        if type(array) is np.ndarray or (array is None and column == layout.GRAD):
            return array
        if column == STEPS and not hasattr(array, "dtype"):
            return array  # `check_steps` says what it must be
        if hasattr(type(array), "data_ptr"):
            return _of_tensor(array, label(column, k))
        return as_plain(array, label(column, k))

    return tuple(
        tuple(one(column, k, array) for k, array in enumerate(arrays))
        if type(arrays) is tuple
        else arrays
        for column, arrays in enumerate(given)
    )


_DTYPES_OF_TORCH = {f"torch.{dtype.name}": dtype for dtype in DTYPES}


def _of_tensor(tensor: Any, name: str) -> npt.NDArray[Any]:
    """Return a plain array over the memory of one of torch's, whether or not it requires grad.

    The caller keeps the tensor. Not by ``tensor.numpy()``, after which torch refuses to resize
    the tensor's storage, as engines do to free its memory.
    """
    dtype = _DTYPES_OF_TORCH.get(str(tensor.dtype))
    if dtype is not None and _is_plain_tensor(tensor):
        return _over(tensor, dtype, name)
    try:
        array: npt.NDArray[Any] = tensor.detach().numpy()
    except Exception as error:  # of a dtype or a layout that NumPy has not
        raise TypeError(
            f"{name} must be readable as a NumPy array without a copy, got"
            f" {kind_of(tensor)}: {error}"
        ) from error
    return array


def _is_plain_tensor(tensor: Any) -> bool:
    """Whether a tensor's numbers lie in the host's memory as they are."""
    torch: Any = sys.modules.get("torch")
    return (
        torch is not None
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_neg()
    )


def _over(tensor: Any, dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    """Return an array over a tensor's memory."""
    shape = tuple(tensor.shape)
    if 0 in shape:
        return np.empty(shape, dtype)
    place = tensor.data_ptr()
    if place == 0:
        raise ValueError(f"{name} must have memory, got a tensor whose storage has been freed")
    strides = [dtype.itemsize * stride for stride in tensor.stride()]
    pairs = zip(shape, strides, strict=True)
    extent = dtype.itemsize + sum((length - 1) * stride for length, stride in pairs)
    memory = (ctypes.c_char * extent).from_address(place)
    return np.ndarray(shape, dtype, memory, strides=strides)


class Lists:
    """What the arrays of a call must be, for tables made for them to serve it.

    Parameters
    ----------
    given : Given
        Plain arrays, of which nothing is kept.
    writable : bool
        Whether the gradients must be writable.
    groups : Groups
        Whose hyperparameters each parameter has.

    Raises
    ------
    TypeError, ValueError
        If one cannot be updated in place or does not fit its parameter, or if
        two share memory.

    Attributes
    ----------
    rows : Rows
        Where parameters and state are, and where `take` notes the gradients.
    fields, compiled
        As in `Gradients`.
    """

    def __init__(self, given: Given, writable: bool, groups: Groups) -> None:
        self._memory = check(given, writable)
        params = given[layout.PARAM]
        names = (roles.PARAM, None, *roles.NAMES)
        kept = [(name, given[c]) for c, name in enumerate(names) if name and given[c] is not None]
        self.rows = Rows(
            [{name: _place(arrays[k]) for name, arrays in kept} for k in range(len(params))],
            [param.size for param in params],
            [param.dtype for param in params],
            groups or [0] * len(params),
            [0] * len(params),
        )
        self._kept = None if look_kernel() else _kept(given)
        counts = np.empty(len(params), dtype=np.int64)  # as `steps` is, if it is an array
        self._seen, self._shapes = numpy_structs.new_seen([*params, counts])
        self._counts = np.zeros(field.COUNTS_SIZE, dtype=np.int64)
        self.fields = {
            field.COUNTS: address(self._counts),
            field.SEEN: address(self._seen),
            field.OWN_MEMORY: address(self._memory.blocks),
            field.OWN_COUNT: len(self._memory.blocks),
            field.NDARRAY: id(np.ndarray),
            field.KNOWN: known_at,
            field.NONE: id(None),
        }
        # To `Stepper`: its kernels are not to look at gradients themselves.
        self.compiled = False

    def fit(self, given: Given, writable: bool) -> bool:
        """Do what `look` does, where NumPy's structures are not the known ones."""
        check(given, writable)
        if _kept(given) != self._kept:
            return False
        self.rows.table[:, layout.GRAD] = [_place(grad) for grad in given[layout.GRAD]]
        steps = given[STEPS]
        if type(steps) is tuple:
            self.rows.table[:, layout.STEP] = [int(step) for step in steps]
            place = address(self.rows.table) + 8 * layout.STEP, layout.TENSOR_COLUMNS, 0
        else:
            place = address(steps), 1, 0
        self._counts[:] = place
        return True

    def write_counts(self, given: Given) -> None:
        """Write counts that are floats, as the kernel does after `look`."""
        if self._kept is not None and type(given[STEPS]) is tuple:
            for step, count in zip(given[STEPS], self.rows.table[:, layout.STEP], strict=True):
                step[...] = count

    def take(self, context: int, grads: Given, writable: bool) -> Given:  # noqa: ARG002
        """Return the arrays of this call: `ListStepper.fit` has looked at them."""
        return grads

    take_unusual = take

    def nonfinite_message(self, grads: Given, factor: float) -> str | None:
        """Return a message on the first element that, times a factor, is not finite."""
        taken = plain(grads)[layout.GRAD]
        labels = [label(layout.GRAD, k) for k in range(len(taken))]
        return nonfinite_message(zip(taken, labels, strict=True), factor)


def _kept(given: Given) -> Any:
    """Return all that tables are made for, as something to compare."""
    return [
        None if arrays is None else [(_place(a), a.shape, a.dtype, a.strides) for a in arrays]
        for column, arrays in enumerate(given[:STEPS])
        if column != layout.GRAD
    ]


def _named(given: Given, columns: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    return {
        label(column, k): array
        for column in columns
        for k, array in enumerate(given[column] or ())
        if array is not None
    }


def check(given: Given, writable: bool) -> Memory:
    """Refuse what does not fit, and say what it is; return the memory that a step writes.

    Raises
    ------
    TypeError, ValueError
        As `Lists`.
    """
    for k, param in enumerate(given[layout.PARAM]):
        check_param(param, label(layout.PARAM, k), any_order=True)
        for column in range(layout.EXP_AVG, STEPS):
            if given[column] is not None:
                _check_state(given[column][k], param, label(column, k))
        grad = given[layout.GRAD][k]
        if grad is not None:
            take_grad(grad, param, label(layout.GRAD, k), writable)
    steps = given[STEPS]
    check_steps(steps, len(given[layout.PARAM]))
    others = _named(given, [layout.GRAD])
    if type(steps) is not tuple:
        others["steps"] = steps
    starts = np.array([address(array) for array in others.values()], dtype=np.int64)
    sizes = np.array([array.nbytes for array in others.values()], dtype=np.int64)
    own = [column for column in layout.ADDRESSES if column != layout.GRAD]
    memory = Memory.of(_named(given, own), address)
    memory.check_apart(list(others), starts, sizes)
    return memory


def _check_state(array: Any, param: npt.NDArray[Any], name: str) -> None:
    check_param(array, name, any_order=True)
    check_alike(array, param, name)
    check_order(array, param, name)


def check_steps(steps: Any, count: int) -> None:
    """Refuse what cannot count the steps of so many parameters, in place."""
    if type(steps) is tuple:
        _check_floats(steps, count)
        return
    if type(steps) is not np.ndarray or steps.dtype != np.int64:
        kind = repr(steps.dtype) if isinstance(steps, np.ndarray) else type(steps).__qualname__
        raise TypeError(
            f"steps must be a numpy.ndarray of int64, or a list of arrays of one float, got {kind}"
        )
    if steps.shape != (count,):
        raise ValueError(f"steps.shape must be ({count},), one for each param, got {steps.shape}")
    if not (steps.flags.c_contiguous and steps.flags.aligned and steps.flags.writeable):
        raise ValueError("steps must be contiguous, aligned and writable, to be counted in place")
    for k, step in enumerate(steps.tolist()):
        _check_step(step, k)


def _check_floats(steps: tuple[Any, ...], count: int) -> None:
    """Refuse what are no arrays of one float each, as torch counts steps."""
    if len(steps) != count:
        raise ValueError(f"steps must have one array for each of {count} params, got {len(steps)}")
    for k, step in enumerate(steps):
        if str(getattr(step, "dtype", None)).rpartition(".")[2] not in ("float32", "float64"):
            kind = repr(step.dtype) if hasattr(step, "dtype") else type(step).__qualname__
            raise TypeError(
                f"steps must be a numpy.ndarray of int64, or a list of arrays of one float, got"
                f" {kind} in it"
            )
        if tuple(step.shape) != ():
            raise ValueError(f"steps[{k}].shape must be (), got {tuple(step.shape)}")
        if isinstance(step, np.ndarray) and not (step.flags.writeable and step.flags.aligned):
            raise ValueError(f"steps[{k}] must be writable and aligned, to be counted in place")
        _check_step(float(step), k)


def _check_step(step: float, k: int) -> None:
    if not 0 <= step < MOST_STEPS or step != step // 1:
        whole = "" if isinstance(step, int) else " and whole"
        raise ValueError(f"steps[{k}] must be >= 0 and under 2**62{whole}, got {step}")


class ListStepper(Stepper):
    """A stepper over arrays that come with every call; see `Lists`."""

    def __init__(self, given: Given, writable: bool, settings: Settings) -> None:
        self._lists = Lists(given, writable, settings.groups)
        super().__init__(self._lists.rows, settings, self._lists, 0)
        self._look = look_kernel()

    def fit(self, given: Given, writable: bool) -> bool:
        """Note where gradients and counts lie, if the arrays are those that were seen first."""
        if self._look is not None:
            return self._look(self._context, id(given), writable)  # type: ignore[no-any-return]
        return self._lists.fit(given, writable)

    def step(self, grads: Given, zero_grad: bool) -> int:
        """Take the step, with the arrays that have been looked at last."""
        step = self.update(zero_grad, 1.0)
        self._lists.write_counts(grads)
        return step

    def limited_step(
        self, grads: Given, zero_grad: bool, max_grad_norm: float | None, nonfinite: str
    ) -> StepResult:
        """Do the same where the norm is needed; its number is the first parameter's."""
        self.step_count[0] = int(grads[STEPS][0])
        result = super().limited_step(grads, zero_grad, max_grad_norm, nonfinite)
        self._lists.write_counts(grads)
        return result
