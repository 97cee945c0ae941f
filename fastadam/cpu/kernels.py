"""The CPU backend: one kernel call updates any number of separate arrays."""

import functools
from typing import Any

import numpy as np
from numba import prange

from ..update import formula
from ..update.tables import (
    BALANCE,
    CHUNK_COLUMNS,
    CHUNK_COUNT,
    CHUNK_OFFSET,
    CHUNK_SIZE,
    CHUNK_TENSOR,
    CHUNKS,
    CONTEXT_SIZE,
    CURSOR_BYTES,
    CURSORS,
    DONE,
    DTYPE,
    EMA,
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD,
    GROUP,
    GROUP_COLUMNS,
    GROUP_COUNT,
    GROUPS,
    MAX_EXP_AVG_SQ,
    NEXT,
    OWN_DTYPE,
    PARAM,
    ROW,
    ROWS,
    SCALARS,
    SIZE,
    STEP,
    STEP_COUNT,
    SUM_CHOICE,
    SUMS,
    TENSOR_COLUMNS,
    TENSOR_COUNT,
    TENSORS,
    THREADS,
    UPDATE_CHOICE,
    WORK,
    WORTH_SEVERAL,
)
from . import gradients, intrinsics, thread_choice
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

look = gradients.look
one_minus_power = intrinsics.inline(
    formula.bind(formula.one_minus_power, fma=intrinsics.fma, mul=intrinsics.mul)
)
step_scalars = intrinsics.inline(
    formula.bind(formula.step_scalars, fma=intrinsics.fma, one_minus_power=one_minus_power)
)
adam_update = intrinsics.inline(formula.bind(formula.adam_update, fma=intrinsics.fma))

_several, _note = thread_choice.several, thread_choice.note

_INT64, _FLOAT64 = np.int64(0), np.float64(0)
# What a kernel is compiled for: the parameters' type, its smallest normal number, and for
# each option True, or None where it is off. `intrinsics.kernel` puts other values in the place of
# these.
FLOAT, TINY, AMSGRAD, AVERAGE, ZERO_GRAD = np.float64, 0.0, None, None, None
LARGEST = None  # in place of the sum of squares


@intrinsics.inline
def read(context: Any) -> Any:
    """Return the context's own fields, and the tables of tensors and of chunks."""
    fields = table(context, 1, CONTEXT_SIZE, _INT64)[0]
    tensors = table(fields[TENSORS], fields[TENSOR_COUNT], TENSOR_COLUMNS, _INT64)
    chunks = table(fields[CHUNKS], fields[CHUNK_COUNT], CHUNK_COLUMNS, _INT64)
    return fields, tensors, chunks


@intrinsics.inline
def prepare(fields: Any, tensors: Any, scalars: Any, tiny: Any) -> None:
    """Count the step of every tensor that has a gradient; give it its row of scalars.

    Tensors of one group and one step share a row: as a rule, a row a group. ``tiny`` is
    the smallest normal number of their type.
    """
    groups = table(fields[GROUPS], fields[GROUP_COUNT], GROUP_COLUMNS, _FLOAT64)
    row, group, step = -1, -1, -1
    for t in range(tensors.shape[0]):
        if tensors[t, DTYPE] == fields[OWN_DTYPE] and tensors[t, GRAD] != 0:
            tensors[t, STEP] += 1
            if row < 0 or tensors[t, GROUP] != group or tensors[t, STEP] != step:
                row, group, step = row + 1, tensors[t, GROUP], tensors[t, STEP]
                g = groups[group]
                values = step_scalars(g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], step, tiny)
                for k, value in enumerate(values):
                    scalars[row, k] = value  # float64 to the parameter's type, once
            tensors[t, ROW] = row


@intrinsics.inline
def count_step(fields: Any) -> Any:
    """Count the optimizer's step; return the count."""
    count = table(fields[STEP_COUNT], 1, 1, _INT64)
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
    grad_factor, decay, beta1, one_minus_beta1 = s[0], s[2], s[3], s[4]
    beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps = s[5], s[6], s[7], s[8], s[9]
    one_minus_ema_decay, tiny = s[10], s[11]
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
    tensor = tensors[chunk[CHUNK_TENSOR]]
    if tensor[GRAD] != 0:
        start = chunk[CHUNK_OFFSET]
        param, grad = tensor[PARAM] + start, tensor[GRAD] + start
        m, v = tensor[EXP_AVG] + start, tensor[EXP_AVG_SQ] + start
        x = only_if(amsgrad, tensor[MAX_EXP_AVG_SQ] + start)
        e = only_if(average, tensor[EMA] + start)
        size, s = chunk[CHUNK_SIZE], scalars[tensor[ROW]]
        z = only_if(zero_grad, zero)
        # Decided for the chunk, so that the loop has no such question in it.
        if s[1] == 0:
            update_elements(param, grad, m, v, x, e, size, s, None, z, zero)
        else:
            update_elements(param, grad, m, v, x, e, size, s, s[1], z, zero)


@intrinsics.inline
def measure_chunk(chunk: Any, tensors: Any, scale: Any, zero: Any, largest: Any) -> Any:
    """Sum the squares of a chunk's gradients, or find the largest; 0 if there are none."""
    tensor = tensors[chunk[CHUNK_TENSOR]]
    if tensor[GRAD] == 0:
        return 0.0
    place, size = tensor[GRAD] + chunk[CHUNK_OFFSET], chunk[CHUNK_SIZE]
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
    ``choice`` is the field that leads to what `_thread_choice` knows of this pass.
    """
    fields[WORK] = 0
    for t in range(tensors.shape[0]):
        if tensors[t, DTYPE] == fields[OWN_DTYPE] and tensors[t, GRAD] != 0:
            fields[WORK] += tensors[t, SIZE]
    workers = min(thread_count(), fields[THREADS])
    # Of few elements, the others having no gradient, nothing can be learnt.
    few = fields[WORK] < fields[WORTH_SEVERAL]
    if workers > 1 and (few or not _several(*_choice_state(fields, choice))):
        workers = 1
    cursors = table(fields[CURSORS], workers, CURSOR_BYTES // 8, _INT64)
    for w in range(workers):
        cursors[w, NEXT] = fields[CHUNK_COUNT] * w // workers
    return workers


@intrinsics.inline
def note_time(fields: Any, choice: Any, workers: Any, started: Any) -> None:
    """Learn from how long the pass took, from a time of `clock` on."""
    if min(thread_count(), fields[THREADS]) > 1 and fields[WORK] >= fields[WORTH_SEVERAL]:
        state, balance = _choice_state(fields, choice)
        cursors = table(fields[CURSORS], workers, CURSOR_BYTES // 8, _INT64)
        ended = clock()
        first = ended
        for w in range(workers):
            first = min(first, cursors[w, DONE])
        _note(state, balance, workers > 1, fields[WORK], ended - started, ended - first)


@intrinsics.inline
def store_done(fields: Any, worker: Any) -> None:
    """Note when a worker found nothing left to do."""
    table(fields[CURSORS], worker + 1, CURSOR_BYTES // 8, _INT64)[worker, DONE] = clock()


@intrinsics.inline
def _choice_state(fields: Any, choice: Any) -> Any:
    state = table(fields[choice], 1, thread_choice.STATE_SIZE, _FLOAT64)[0]
    return state, table(fields[BALANCE], 1, 1, _FLOAT64)[0]


@intrinsics.inline
def next_chunk(fields: Any, workers: Any, owner: Any) -> Any:
    """Take a chunk from the run of ``owner``, whoever asks; -1 if there is none left."""
    c = fetch_add(fields[CURSORS] + owner * CURSOR_BYTES, 1)
    return c if c < fields[CHUNK_COUNT] * (owner + 1) // workers else -1


def update_serial(context: Any, grads: Any) -> Any:
    """Take one step, and count it; return the count.

    ``grads`` as in `gradients.look`, or 0 if the table has the gradients'
    addresses already. Does nothing, and returns REFUSED, if they are not fit.
    """
    if grads != 0 and not look(context, grads, ZERO_GRAD is not None):
        return REFUSED
    fields, tensors, chunks = read(context)
    scalars = table(fields[ROWS], tensors.shape[0], SCALARS, FLOAT(0))
    prepare(fields, tensors, scalars, TINY)
    for c in range(chunks.shape[0]):
        update_chunk(chunks[c], tensors, scalars, FLOAT(0), AMSGRAD, AVERAGE, ZERO_GRAD)
    return count_step(fields)


def update_parallel(context: Any, grads: Any) -> Any:  # noqa: ARG001
    """Take one step in several threads, the table having the gradients' addresses already."""
    fields, tensors, chunks = read(context)
    scalars = table(fields[ROWS], tensors.shape[0], SCALARS, FLOAT(0))
    prepare(fields, tensors, scalars, TINY)
    started, available = clock(), thread_count()
    workers = share_out(fields, tensors, UPDATE_CHOICE)
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
    note_time(fields, UPDATE_CHOICE, workers, started)
    return count_step(fields)


def measure_serial(context: Any, scale: Any) -> Any:
    """Sum ``(scale*g)**2`` over all gradients of one dtype, in float64.

    Or find the largest ``abs(scale*g)``, in that dtype; that of each chunk then stays in
    the table SUMS.
    """
    fields, tensors, chunks = read(context)
    values = table(fields[SUMS], 1, chunks.shape[0], _FLOAT64)[0]
    for c in range(chunks.shape[0]):
        values[c] = measure_chunk(chunks[c], tensors, scale, FLOAT(0), LARGEST)
    return combine(values, LARGEST)


def measure_parallel(context: Any, scale: Any) -> Any:
    """Do the same in several threads: the terms are the same, and their order."""
    fields, tensors, chunks = read(context)
    values = table(fields[SUMS], 1, chunks.shape[0], _FLOAT64)[0]
    started, available = clock(), thread_count()
    workers = share_out(fields, tensors, SUM_CHOICE)
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
    note_time(fields, SUM_CHOICE, workers, started)
    return combine(values, LARGEST)


def look_at(context: Any, grads: Any, writable: Any) -> Any:
    """Look at the gradients, and do no more."""
    return look(context, grads, writable)


look_kernel = intrinsics.kernel(look_at)


@functools.cache
def update_kernel(
    dtype: np.dtype[Any], *, parallel: bool, amsgrad: bool, average: bool, zero_grad: bool
) -> Any:
    """Return the kernel that has these options, and nothing of the others."""
    return intrinsics.kernel(
        update_parallel if parallel else update_serial,
        parallel=parallel,
        FLOAT=dtype.type,
        TINY=float(np.finfo(dtype).tiny),
        AMSGRAD=amsgrad or None,
        AVERAGE=average or None,
        ZERO_GRAD=zero_grad or None,
    )


@functools.cache
def sum_kernel(dtype: np.dtype[Any], *, parallel: bool, largest: bool = False) -> Any:
    """Return the kernel that sums the squares of such gradients, or finds the largest."""
    return intrinsics.kernel(
        measure_parallel if parallel else measure_serial,
        parallel=parallel,
        FLOAT=dtype.type,
        LARGEST=largest or None,
    )
