"""The CUDA backend: three kernels, whatever the number of separate arrays.

`sum_kernel` sums the squares of the gradients, `settle_kernel` decides what becomes of
the step and prepares its scalars, `update_kernel` takes it. They run one after another
in one stream, and the host need not know what was decided.
"""

import functools
import math
from typing import Any

import numpy as np

from ..update import formula, limits
from ..update.layout import (
    BETA1,
    BETA2,
    CHUNK_COLUMNS,
    CHUNK_OFFSET,
    CHUNK_SIZE,
    CHUNK_TENSOR,
    EPS,
    GRAD_FACTOR,
    GROUP,
    GROUP_COLUMNS,
    L2,
    LR,
    ONE_MINUS_EMA_DECAY,
    ROW,
    STEP,
    TENSOR_COLUMNS,
    WEIGHT_DECAY,
)
from ..update.layout import DTYPE as TENSOR_DTYPE
from . import launch
from .launch import Kernel, convert, cuda, float64, fma, load, mul, store
from .layout import (
    CHUNK_COUNT,
    CHUNKS,
    CONTEXT_COUNT,
    CONTEXT_SIZE,
    COUNT,
    FACTOR,
    FIRST_COUNT,
    GRADS,
    GROUP_COUNT,
    HYPER,
    HYPER_TABLES,
    IS_DOUBLE,
    MAX_NORM,
    MAXIMA,
    MAY_SKIP,
    NORM,
    PART_COUNT,
    ROW_BYTES,
    ROWS,
    SCALE,
    SKIPPED,
    STEP_COUNT,
    SUMS,
    TABLE_COUNT,
    TENSOR_COUNT,
    TENSORS,
)
from .update import update

# Threads of a block; of `sum_kernel`, a warp to a chunk, `WARPS` of them.
UPDATE_THREADS = 256
WARP = 32
WARPS = 2 if launch.SIMULATED else 8
SUM_THREADS = WARP * WARPS
SETTLE_THREADS = 512
# Elements that a thread of `sum_kernel` asks for before it adds the first.
AHEAD = 16
# Parts added at a time, and how many sums of segments wait for another of as many.
SEGMENT, WAITING = 1024, 64

INT64, DOUBLE, SINGLE, ONE = np.int64(0), np.float64(0), np.float32(0), np.float64(1)
SINGLE_TINY, DOUBLE_TINY = (np.float64(np.finfo(kind).tiny) for kind in (np.float32, np.float64))
# What a kernel is compiled for: the gradients' type, and for each option True, or None
# where it is off. `Kernel` puts other values in the place of these.
FLOAT = np.float64
LIMITED: Any = None
MEASURE: Any = None
ASK: Any = None


clip_coefficient = launch.inline(limits.clip_coefficient)
is_exact = launch.inline(limits.is_exact)
scale_for = launch.inline(limits.scale_for)
one_minus_power = launch.inline(formula.bind(formula.one_minus_power, fma=fma, mul=mul))
step_scalars = launch.inline(
    formula.bind(formula.step_scalars, fma=fma, one_minus_power=one_minus_power, math=launch.root)
)


@launch.inline
def larger(a: Any, b: Any) -> Any:
    """Return the larger one, or NaN if either is."""
    return b if b > a or b != b else a


def sum_squares(context: Any, again: Any) -> None:
    """Sum the squares of the gradients of one dtype, and find the largest: a warp to a chunk.

    Element i of a chunk goes to lane ``i % WARP``, the lanes are added in halves,
    and chunks in pairs and pairs of pairs: in the order of the CPU's kernels.
    With ``again``, only if squares have turned out too small or too large.
    """
    sums = cuda.shared.array(SUM_THREADS, float64)
    maxima = cuda.shared.array(SUM_THREADS, float64)
    thread = cuda.threadIdx.x
    lane, first = thread % WARP, cuda.blockIdx.x * WARPS
    c, count = first + thread // WARP, load(context, CHUNK_COUNT, INT64)
    scale = load(load(context, SCALE, INT64), 0, DOUBLE) if again else ONE
    if again and scale == ONE:
        return
    zero = FLOAT(0)
    total, largest = DOUBLE, zero
    if c < count:
        chunk = load(context, CHUNKS, INT64) + c * (8 * CHUNK_COLUMNS)
        t = load(chunk, CHUNK_TENSOR, INT64)
        grad = load(load(context, GRADS, INT64), t, INT64)
        if grad != 0:
            grad += load(chunk, CHUNK_OFFSET, INT64)
            size = load(chunk, CHUNK_SIZE, INT64)
            whole = size // (WARP * AHEAD) * (WARP * AHEAD)
            i = INT64 + lane
            while i < whole:
                for _ in range(AHEAD):
                    g = load(grad, i, zero)
                    wide = convert(g, DOUBLE) * scale
                    total = fma(wide, wide, total)
                    largest = larger(largest, abs(g))
                    i += WARP
            while i < size:
                g = load(grad, i, zero)
                wide = convert(g, DOUBLE) * scale
                total = fma(wide, wide, total)
                largest = larger(largest, abs(g))
                i += WARP
    sums[thread], maxima[thread] = total, convert(largest, DOUBLE)
    half = WARP // 2
    while half > 0:
        cuda.syncthreads()
        if lane < half:
            sums[thread] += sums[thread + half]
            maxima[thread] = larger(maxima[thread], maxima[thread + half])
        half //= 2
    cuda.syncthreads()
    if thread == 0:
        present, stride = min(count - first, WARPS), 1
        while stride < present:
            for k in range(0, present - stride, 2 * stride):
                one, other = k * WARP, (k + stride) * WARP
                sums[one] += sums[other]
                maxima[one] = larger(maxima[one], maxima[other])
            stride *= 2
        store(load(context, SUMS, INT64), cuda.blockIdx.x, sums[0])
        store(load(context, MAXIMA, INT64), cuda.blockIdx.x, maxima[0])


@launch.inline
def add_pairs(values: Any, count: Any, find_largest: Any, thread: Any, threads: Any) -> None:
    """Add in pairs, pairs of pairs and so on, all threads of a block; the sum comes first.

    Or find the largest, in the same manner.
    """
    stride = 1
    while stride < count:
        for k in range(2 * stride * thread, count - stride, 2 * stride * threads):
            if find_largest:
                values[k] = larger(values[k], values[k + stride])
            else:
                values[k] += values[k + stride]
        stride *= 2
        cuda.syncthreads()


@launch.inline
def scale_if_needed(total: Any, largest: Any) -> Any:
    """Return the power of 2 that keeps squares in range, 1 if they are, or if none would."""
    if is_exact(total) or largest == 0.0 or not largest < np.inf:
        return 1.0
    return scale_for(largest)


@launch.inline
def is_beyond(largest: Any, factor: Any, is_double: Any) -> Any:
    """Whether a gradient, multiplied by a factor in its own type, is not finite."""
    if is_double:
        return not abs(largest * factor) < np.inf
    return not abs(np.float32(largest) * np.float32(factor)) < np.float32(np.inf)


@launch.inline
def prepare(context: Any, k: Any, groups: Any, coefficient: Any) -> None:
    """Count the step of a tensor, and write its scalars."""
    tensor = load(context, TENSORS, INT64) + k * (8 * TENSOR_COLUMNS)
    step = load(tensor, STEP, INT64) + 1
    store(tensor, STEP, step)
    group = groups + load(tensor, GROUP, INT64) * (8 * GROUP_COLUMNS)
    is_double = load(load(context, IS_DOUBLE, INT64), load(tensor, TENSOR_DTYPE, INT64), INT64)
    s = step_scalars(
        load(group, LR, DOUBLE), load(group, BETA1, DOUBLE), load(group, BETA2, DOUBLE),
        load(group, EPS, DOUBLE), load(group, L2, DOUBLE), load(group, WEIGHT_DECAY, DOUBLE),
        mul(load(group, GRAD_FACTOR, DOUBLE), coefficient),
        load(group, ONE_MINUS_EMA_DECAY, DOUBLE), step, DOUBLE_TINY if is_double else SINGLE_TINY,
    )  # fmt: skip
    row = load(context, ROWS, INT64) + k * ROW_BYTES
    if is_double:
        write_scalars(row, s, DOUBLE)
    else:
        write_scalars(row, s, SINGLE)


@launch.inline
def write_scalars(row: Any, s: Any, like: Any) -> None:
    """Write a tensor's scalars in the type of its elements."""
    store(row, 0, convert(s[0], like))
    store(row, 1, convert(s[1], like))
    store(row, 2, convert(s[2], like))
    store(row, 3, convert(s[3], like))
    store(row, 4, convert(s[4], like))
    store(row, 5, convert(s[5], like))
    store(row, 6, convert(s[6], like))
    store(row, 7, convert(s[7], like))
    store(row, 8, convert(s[8], like))
    store(row, 9, convert(s[9], like))
    store(row, 10, convert(s[10], like))
    store(row, 11, convert(s[11], like))


@launch.inline
def reduce(parts: Any, count: Any, values: Any, waiting: Any, find_largest: Any) -> Any:
    """Add up the parts, or find the largest; every thread of the block gets the result.

    ``values`` and ``waiting`` are shared arrays, which may be used again afterwards.
    """
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    segments, held = (count + SEGMENT - 1) // SEGMENT, 0
    for s in range(segments):
        size = min(count - s * SEGMENT, SEGMENT)
        for k in range(thread, size, threads):
            values[k] = load(parts, s * SEGMENT + k, DOUBLE)
        cuda.syncthreads()
        add_pairs(values, size, find_largest, thread, threads)
        if thread == 0:
            waiting[held] = values[0]
        held += 1
        # In pairs and pairs of pairs: it joins the last one, if that is of as many segments.
        # At the end all are joined.
        rest = s
        while held > 1 and (rest & 1 or s == segments - 1):
            held -= 1
            if thread == 0:
                one, other = waiting[held - 1], waiting[held]
                waiting[held - 1] = larger(one, other) if find_largest else one + other
            rest >>= 1
        cuda.syncthreads()
    result = waiting[0] if count > 0 else DOUBLE
    cuda.syncthreads()
    return result


@launch.inline
def tell(result: Any, norm: Any, skipped: Any, steps: Any) -> None:
    """Write what there is to tell of a step, before which there were so many."""
    store(result, NORM, convert(norm, DOUBLE))
    store(result, SKIPPED, ONE if skipped else DOUBLE)
    store(result, COUNT, steps + (0 if skipped else 1))


def settle(contexts: Any, result: Any) -> None:
    """Decide what becomes of the step, and prepare the scalars of every tensor: one block.

    ``contexts`` is the first dtype's, the others follow it. What there is to
    tell is written to ``result``, unless that is 0. With MEASURE, it only finds
    what squares must be scaled by; with ASK, it only tells.
    """
    values = cuda.shared.array(SEGMENT, float64)
    waiting = cuda.shared.array(WAITING, float64)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    hyper, counter = load(contexts, HYPER, INT64), load(contexts, STEP_COUNT, INT64)
    steps = load(counter, 0, INT64)
    norm, coefficient, skipped = DOUBLE, ONE, False
    if LIMITED is not None:
        total, largest, beyond = DOUBLE, DOUBLE, False
        scale_place = load(contexts, SCALE, INT64)
        factor, scale = load(hyper, FACTOR, DOUBLE), load(scale_place, 0, DOUBLE)
        for d in range(load(contexts, CONTEXT_COUNT, INT64)):
            context = contexts + d * (8 * CONTEXT_SIZE)
            count = load(context, PART_COUNT, INT64)
            total += reduce(load(context, SUMS, INT64), count, values, waiting, False)
            own = reduce(load(context, MAXIMA, INT64), count, values, waiting, True)
            is_double = load(load(contexts, IS_DOUBLE, INT64), d, INT64)
            beyond = beyond or is_beyond(own, factor, is_double)
            largest = larger(largest, own)
        if MEASURE is not None:
            if thread == 0:
                store(scale_place, 0, convert(scale_if_needed(total, largest), DOUBLE))
            return
        if scale == 1.0 and not is_exact(total):
            norm = largest
        else:
            norm = mul(math.sqrt(total), factor) / scale
        skipped = beyond and load(hyper, MAY_SKIP, DOUBLE) != 0.0
        coefficient = clip_coefficient(norm, load(hyper, MAX_NORM, DOUBLE))
        if ASK is not None:
            if thread == 0:
                tell(result, norm, skipped, steps)
            return
    place = steps - load(hyper, FIRST_COUNT, INT64)
    place = max(min(place, load(hyper, TABLE_COUNT, INT64) - 1), 0)
    groups = hyper + 8 * HYPER_TABLES
    groups += place * load(contexts, GROUP_COUNT, INT64) * (8 * GROUP_COLUMNS)
    grads, tensors = load(contexts, GRADS, INT64), load(contexts, TENSORS, INT64)
    for k in range(thread, load(contexts, TENSOR_COUNT, INT64), threads):
        present = load(grads, k, INT64) != 0 and not skipped
        if present:
            prepare(contexts, k, groups, coefficient)
        store(tensors + k * (8 * TENSOR_COLUMNS), ROW, INT64 if present else INT64 - 1)
    cuda.syncthreads()  # all have read the count
    if thread == 0:
        if result != 0:
            tell(result, norm, skipped, steps)
        store(counter, 0, steps + (0 if skipped else 1))


def update_threads(dtype: np.dtype[Any]) -> int:
    """Return how many threads a block of the update has; twice the registers, half of them."""
    return min(UPDATE_THREADS * 4 // dtype.itemsize, launch.MOST_THREADS)


@functools.cache
def update_kernel(dtype: np.dtype[Any], *, roles: frozenset[str], zero_grad: bool) -> Kernel:
    """Return the kernel for these arrays of state, and without code for any other."""
    amsgrad, average = "max_exp_avg_sq" in roles, "ema" in roles
    return Kernel(
        update,
        2,
        # So many blocks on a multiprocessor leave a thread 64 registers, 128 or 255.
        (update_threads(dtype), 2 if amsgrad or average or dtype.itemsize > 4 else 4),
        FLOAT=dtype.type,
        ITEMSIZE=dtype.itemsize,
        AMSGRAD=amsgrad or None,
        AVERAGE=average or None,
        ZERO_GRAD=zero_grad or None,
    )


@functools.cache
def sum_kernel(dtype: np.dtype[Any]) -> Kernel:
    """Return the kernel that sums the squares of such gradients."""
    return Kernel(sum_squares, 2, (SUM_THREADS, 4), FLOAT=dtype.type)


@functools.cache
def settle_kernel(*, limited: bool, measure: bool = False, ask: bool = False) -> Kernel:
    """Return the kernel that decides, or one that goes only part of the way; see `settle`."""
    return Kernel(
        settle,
        2,
        (SETTLE_THREADS, 1),
        LIMITED=limited or None,
        MEASURE=measure or None,
        ASK=ask or None,
    )
