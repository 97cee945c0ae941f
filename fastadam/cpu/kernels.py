"""The compiled loops of a step on the CPU: one call updates any number of separate arrays."""

import functools
from typing import Any

import numpy as np
from numba import prange, types

from ..update import formula, layout

# By their own names, since `load` and `store` must be given literals.
from ..update.layout import EMA, EXP_AVG, EXP_AVG_SQ, GRAD, MAX_EXP_AVG_SQ, PARAM
from . import intrinsics, numpy_structs, thread_choice
from . import layout as field
from .intrinsics import (
    clock,
    fetch_add,
    largest_magnitude,
    load,
    only_if,
    set_thread_count,
    store,
    sum_squares,
    table,
    thread_count,
)

# Starting the threads costs some 2 to 3 microseconds, what one thread needs for
# 20,000 elements in its cache: measured, two threads are ahead from about here.
SERIAL_BELOW = 65_536

# What a kernel returns that has done nothing, since the gradients need a closer look.
REFUSED = -1

look = numpy_structs.look
one_minus_power = intrinsics.inline(
    formula.bind(formula.one_minus_power, fma=intrinsics.fma, mul=intrinsics.mul)
)
step_scalars = intrinsics.inline(
    formula.bind(formula.step_scalars, fma=intrinsics.fma, one_minus_power=one_minus_power)
)
adam_update = intrinsics.inline(formula.bind(formula.adam_update, fma=intrinsics.fma))

_use_several, _note = thread_choice.use_several, thread_choice.note

_INT64, _FLOAT64 = np.int64(0), np.float64(0)
# What a kernel is compiled for: the parameters' type, its smallest normal number, and for
# each option True, or None where it is off. `intrinsics.kernel` puts other values in the place of
# these.
FLOAT, TINY, AMSGRAD, AVERAGE, ZERO_GRAD = np.float64, 0.0, None, None, None
LARGEST = None  # in place of the sum of squares


@intrinsics.inline
def read(context: Any) -> Any:
    """Return the context's own fields, and the tables of tensors and of chunks."""
    fields = table(context, 1, field.CONTEXT_SIZE, _INT64)[0]
    tensors = table(
        fields[field.TENSORS], fields[field.TENSOR_COUNT], layout.TENSOR_COLUMNS, _INT64
    )
    chunks = table(fields[field.CHUNKS], fields[field.CHUNK_COUNT], layout.CHUNK_COLUMNS, _INT64)
    return fields, tensors, chunks


@intrinsics.inline
def prepare(fields: Any, tensors: Any, scalars: Any, clip: Any, tiny: Any) -> None:
    """Count the step of every tensor that has a gradient; give it its row of scalars.

    Tensors of one group and one step share a row: as a rule, a row a group. Gradients are
    multiplied by ``clip``; ``tiny`` is the smallest normal number of their type.
    """
    groups = table(fields[field.GROUPS], fields[field.GROUP_COUNT], layout.GROUP_COLUMNS, _FLOAT64)
    place = table(fields[field.COUNTS], 1, field.COUNTS_SIZE, _INT64)[0]
    counts = table(
        place[field.COUNTS_ADDRESS], tensors.shape[0], place[field.COUNTS_WIDTH], _INT64
    )
    seen = table(fields[field.SEEN], tensors.shape[0], field.SEEN_COLUMNS, _INT64)
    row, group, step = -1, -1, -1
    for t in range(tensors.shape[0]):
        if tensors[t, layout.DTYPE] == fields[field.OWN_DTYPE] and tensors[t, GRAD] != 0:
            counts[t, 0] += 1
            if place[field.COUNTS_AS_FLOATS] != 0:
                _write_count(seen[t], counts[t, 0])
            if row < 0 or tensors[t, layout.GROUP] != group or counts[t, 0] != step:
                row, group, step = row + 1, tensors[t, layout.GROUP], counts[t, 0]
                g = groups[group]
                values = step_scalars(
                    g[layout.LR], g[layout.BETA1], g[layout.BETA2], g[layout.EPS],
                    g[layout.L2], g[layout.WEIGHT_DECAY], g[layout.GRAD_FACTOR] * clip,
                    g[layout.ONE_MINUS_EMA_DECAY], step, tiny,
                )  # fmt: skip
                for k, value in enumerate(values):
                    scalars[row, k] = value  # float64 to the parameter's type, once
            tensors[t, layout.ROW] = row


@intrinsics.inline
def _write_count(row: Any, count: Any) -> None:
    """Write a count to the user's float, whose place is in a row of SEEN."""
    place = row[field.COUNT_PLACE]
    if row[field.COUNT_BYTES] == 4:
        table(place, 1, 1, np.float32(0))[0, 0] = count
    else:
        table(place, 1, 1, _FLOAT64)[0, 0] = count


@intrinsics.inline
def count_step(fields: Any) -> Any:
    """Count the optimizer's step; return the count."""
    count = table(fields[field.STEP_COUNT], 1, 1, _INT64)
    count[0, 0] += 1
    return count[0, 0]


@intrinsics.inline
def update_elements(
    param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, ema: Any,
    size: Any, s: Any, l2: Any, zero_grad: Any, zero: Any,
) -> None:  # fmt: skip
    """Update ``size`` elements; the first six are addresses, ``s`` a row of scalars.

    ``max_exp_avg_sq``, ``ema``, ``l2`` and ``zero_grad`` are None where they are off;
    ``zero`` is of the parameters' type.
    """
    grad_factor, decay, eps, tiny = (
        s[layout.S_GRAD_FACTOR], s[layout.S_DECAY], s[layout.S_EPS], s[layout.S_TINY],
    )  # fmt: skip
    beta1, one_minus_beta1 = s[layout.S_BETA1], s[layout.S_ONE_MINUS_BETA1]
    beta2, one_minus_beta2 = s[layout.S_BETA2], s[layout.S_ONE_MINUS_BETA2]
    step_size, inv_sqrt_bias2 = s[layout.S_STEP_SIZE], s[layout.S_INV_SQRT_BIAS2]
    one_minus_ema_decay = s[layout.S_ONE_MINUS_EMA_DECAY]
    for i in range(size):
        p, m, v, x, e = adam_update(
            load(param, i, eps, PARAM),
            load(grad, i, eps, GRAD),
            load(exp_avg, i, eps, EXP_AVG),
            load(exp_avg_sq, i, eps, EXP_AVG_SQ),
            load(max_exp_avg_sq, i, eps, MAX_EXP_AVG_SQ),
            load(ema, i, eps, EMA),
            grad_factor, l2, decay, beta1, one_minus_beta1,
            beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, one_minus_ema_decay,
            tiny, zero,
        )  # fmt: skip
        store(param, i, p, PARAM)
        store(exp_avg, i, m, EXP_AVG)
        store(exp_avg_sq, i, v, EXP_AVG_SQ)
        if max_exp_avg_sq is not None:
            store(max_exp_avg_sq, i, x, MAX_EXP_AVG_SQ)
        if ema is not None:
            store(ema, i, e, EMA)
        if zero_grad is not None:
            store(grad, i, zero_grad, GRAD)


@intrinsics.inline
def update_chunk(
    chunk: Any, tensors: Any, scalars: Any, zero: Any, amsgrad: Any, average: Any, zero_grad: Any
) -> None:
    """Update a chunk, if its tensor has a gradient. ``zero`` is of the parameters' type."""
    tensor = tensors[chunk[layout.CHUNK_TENSOR]]
    if tensor[GRAD] != 0:
        start = chunk[layout.CHUNK_OFFSET]
        param, grad = tensor[PARAM] + start, tensor[GRAD] + start
        m, v = tensor[EXP_AVG] + start, tensor[EXP_AVG_SQ] + start
        x = only_if(amsgrad, tensor[MAX_EXP_AVG_SQ] + start)
        e = only_if(average, tensor[EMA] + start)
        size, s = chunk[layout.CHUNK_SIZE], scalars[tensor[layout.ROW]]
        z = only_if(zero_grad, zero)
        # Decided for the chunk, so that the loop has no such question in it.
        l2 = s[layout.S_L2]
        if l2 == 0:
            update_elements(param, grad, m, v, x, e, size, s, None, z, zero)
        else:
            update_elements(param, grad, m, v, x, e, size, s, l2, z, zero)


@intrinsics.inline
def measure_chunk(chunk: Any, tensors: Any, scale: Any, zero: Any, largest: Any) -> Any:
    """Sum the squares of a chunk's gradients, or find the largest; 0 if there are none."""
    tensor = tensors[chunk[layout.CHUNK_TENSOR]]
    if tensor[GRAD] == 0:
        return 0.0
    place, size = tensor[GRAD] + chunk[layout.CHUNK_OFFSET], chunk[layout.CHUNK_SIZE]
    if largest is None:
        return sum_squares(place, size, scale, zero)
    return largest_magnitude(place, size, scale, zero)


@intrinsics.inline
def combine(values: Any, largest: Any) -> Any:
    """Add in pairs, pairs of pairs and so on: in one order, whoever made the terms.

    Or return the largest, NaN if there is one.
    """
    if largest is not None:
        result = 0.0
        for value in values:
            if not value <= result:
                result = value
            if result != result:
                break
        return result
    count, stride = values.size, 1
    while stride < count:
        for k in range(0, count - stride, 2 * stride):
            values[k] += values[k + stride]
        stride *= 2
    return values[0] if count > 0 else 0.0


@intrinsics.inline
def share_out(fields: Any, tensors: Any, choice: Any) -> Any:
    """Give every worker an equal run of chunks; return how many workers there are.

    The runs are the same in every step: a worker finds its own chunks in its
    caches, and in the memory near it, since it was the first to touch them.
    ``choice`` is the field that leads to what `thread_choice` knows of this pass.
    """
    fields[field.WORK] = 0
    for t in range(tensors.shape[0]):
        if tensors[t, layout.DTYPE] == fields[field.OWN_DTYPE] and tensors[t, GRAD] != 0:
            fields[field.WORK] += tensors[t, layout.SIZE]
    workers = min(thread_count(), fields[field.THREADS])
    # Of few elements, the others having no gradient, nothing can be learnt.
    few = fields[field.WORK] < fields[field.WORTH_SEVERAL]
    if workers > 1 and (few or not _use_several(*_choice_state(fields, choice))):
        workers = 1
    cursors = table(fields[field.CURSORS], workers, field.CURSOR_BYTES // 8, _INT64)
    for w in range(workers):
        cursors[w, field.NEXT] = fields[field.CHUNK_COUNT] * w // workers
    return workers


@intrinsics.inline
def note_time(fields: Any, choice: Any, workers: Any, started: Any) -> None:
    """Learn from how long the pass took, from a time of `clock` on."""
    if (
        min(thread_count(), fields[field.THREADS]) > 1
        and fields[field.WORK] >= fields[field.WORTH_SEVERAL]
    ):
        state, balance = _choice_state(fields, choice)
        cursors = table(fields[field.CURSORS], workers, field.CURSOR_BYTES // 8, _INT64)
        ended = clock()
        first = ended
        for w in range(workers):
            first = min(first, cursors[w, field.DONE])
        _note(state, balance, workers > 1, fields[field.WORK], ended - started, ended - first)


@intrinsics.inline
def store_done(fields: Any, worker: Any) -> None:
    """Note when a worker found nothing left to do."""
    table(fields[field.CURSORS], worker + 1, field.CURSOR_BYTES // 8, _INT64)[
        worker, field.DONE
    ] = clock()


@intrinsics.inline
def _choice_state(fields: Any, choice: Any) -> Any:
    state = table(fields[choice], 1, thread_choice.STATE_SIZE, _FLOAT64)[0]
    return state, table(fields[field.BALANCE], 1, 1, _FLOAT64)[0]


@intrinsics.inline
def next_chunk(fields: Any, workers: Any, owner: Any) -> Any:
    """Take a chunk from the run of ``owner``, whoever asks; -1 if there is none left."""
    c = fetch_add(fields[field.CURSORS] + owner * field.CURSOR_BYTES, 1)
    return c if c < fields[field.CHUNK_COUNT] * (owner + 1) // workers else -1


def update_serial(context: Any, grads: Any, clip: Any) -> Any:
    """Take one step, and count it; return the count.

    ``grads`` is as in `numpy_structs.look`, or 0 if the table has the gradients' addresses
    already; they are multiplied by ``clip``. Does nothing, and returns REFUSED, if they are
    not fit.
    """
    if grads != 0 and not look(context, grads, ZERO_GRAD is not None):
        return REFUSED
    fields, tensors, chunks = read(context)
    scalars = table(fields[field.ROWS], tensors.shape[0], layout.SCALARS, FLOAT(0))
    prepare(fields, tensors, scalars, clip, TINY)
    for c in range(chunks.shape[0]):
        update_chunk(chunks[c], tensors, scalars, FLOAT(0), AMSGRAD, AVERAGE, ZERO_GRAD)
    return count_step(fields)


def update_parallel(context: Any, grads: Any, clip: Any) -> Any:  # noqa: ARG001
    """Take one step in several threads, the table having the gradients' addresses already."""
    fields, tensors, chunks = read(context)
    scalars = table(fields[field.ROWS], tensors.shape[0], layout.SCALARS, FLOAT(0))
    prepare(fields, tensors, scalars, clip, TINY)
    started, available = clock(), thread_count()
    workers = share_out(fields, tensors, field.UPDATE_CHOICE)
    set_thread_count(workers)  # of which alone the loop waits
    for w in prange(workers):
        # Its own run, then what others have left: none waits for one that was held up.
        for k in range(workers):
            owner = (w + k) % workers
            c = next_chunk(fields, workers, owner)
            while c >= 0:
                update_chunk(chunks[c], tensors, scalars, FLOAT(0), AMSGRAD, AVERAGE, ZERO_GRAD)
                c = next_chunk(fields, workers, owner)
        store_done(fields, w)
    set_thread_count(available)
    note_time(fields, field.UPDATE_CHOICE, workers, started)
    return count_step(fields)


def measure_serial(context: Any, scale: Any) -> Any:
    """Sum ``(scale*g)**2`` over all gradients of one dtype, in float64.

    Or find the largest ``abs(scale*g)``, in that dtype; that of each chunk then stays in
    the table field.SUMS.
    """
    fields, tensors, chunks = read(context)
    values = table(fields[field.SUMS], 1, chunks.shape[0], _FLOAT64)[0]
    for c in range(chunks.shape[0]):
        values[c] = measure_chunk(chunks[c], tensors, scale, FLOAT(0), LARGEST)
    return combine(values, LARGEST)


def measure_parallel(context: Any, scale: Any) -> Any:
    """Do the same in several threads: the terms are the same, and their order."""
    fields, tensors, chunks = read(context)
    values = table(fields[field.SUMS], 1, chunks.shape[0], _FLOAT64)[0]
    started, available = clock(), thread_count()
    workers = share_out(fields, tensors, field.SUM_CHOICE)
    set_thread_count(workers)
    for w in prange(workers):
        for k in range(workers):
            owner = (w + k) % workers
            c = next_chunk(fields, workers, owner)
            while c >= 0:
                values[c] = measure_chunk(chunks[c], tensors, scale, FLOAT(0), LARGEST)
                c = next_chunk(fields, workers, owner)
        store_done(fields, w)
    set_thread_count(available)
    note_time(fields, field.SUM_CHOICE, workers, started)
    return combine(values, LARGEST)


def look_at(context: Any, grads: Any, writable: Any) -> Any:
    """Look at the gradients, and do no more."""
    return look(context, grads, writable)


@functools.cache
def look_kernel() -> Any:
    """Return the kernel that only looks at gradients."""
    return intrinsics.kernel(look_at, (types.int64, types.int64, types.boolean))


def cache_folder() -> str | None:
    """Return where compiled kernels are kept, None if there is no folder to write to."""
    return intrinsics.cache_folder(look_at)


@functools.cache
def update_kernel(
    dtype: np.dtype[Any],
    *,
    parallel: bool,
    roles: frozenset[str],
    zero_grad: bool,
    nogil: bool = False,
) -> Any:
    """Return the kernel for these arrays of state, and without code for any other.

    One that releases the GIL must be given no gradients to look at: those are Python's objects.
    """
    return intrinsics.kernel(
        update_parallel if parallel else update_serial,
        (types.int64, types.int64, types.float64),
        parallel=parallel,
        nogil=nogil,
        FLOAT=dtype.type,
        TINY=float(np.finfo(dtype).tiny),
        AMSGRAD="max_exp_avg_sq" in roles or None,
        AVERAGE="ema" in roles or None,
        ZERO_GRAD=zero_grad or None,
    )


@functools.cache
def sum_kernel(
    dtype: np.dtype[Any], *, parallel: bool, largest: bool = False, nogil: bool = False
) -> Any:
    """Return the kernel that sums the squares of such gradients, or finds the largest."""
    return intrinsics.kernel(
        measure_parallel if parallel else measure_serial,
        (types.int64, types.float64),
        parallel=parallel,
        nogil=nogil,
        FLOAT=dtype.type,
        LARGEST=largest or None,
    )
