"""The CUDA backend: three kernels, whatever the number of separate arrays.

`sum_kernel` sums the squares of the gradients, `prepare_kernel` decides whether they are
clipped or the step is skipped, and prepares its scalars, `update_kernel` takes it. They run one
after another in one stream, and the host need not know what was decided.
"""

import functools
import math
from typing import Any

import numpy as np

from ..update import formula, layout, limits
from . import layout as field
from .compiler import MAX_THREADS, SIMULATED, Kernel, cuda, inline, intrinsics
from .update import update

convert, fma, load, mul, store = (
    intrinsics.convert, intrinsics.fma, intrinsics.load, intrinsics.mul, intrinsics.store,
)  # fmt: skip

# Threads of a block; of `sum_kernel`, a warp to a chunk, `WARPS` of them.
UPDATE_THREADS = 256
WARP = 32
WARPS = 2 if SIMULATED else 8
SUM_THREADS = WARP * WARPS
PREPARE_THREADS = min(512, MAX_THREADS)
# Elements that a thread of `sum_kernel` asks for before it adds the first.
AHEAD = 16
# Parts added at a time, and how many sums of segments wait for another of as many.
SEGMENT, WAITING = 1024, 64

float64 = cuda.types.float64
INT64, DOUBLE, SINGLE, ONE = np.int64(0), np.float64(0), np.float32(0), np.float64(1)
SINGLE_TINY, DOUBLE_TINY = (np.float64(np.finfo(kind).tiny) for kind in (np.float32, np.float64))
# What a kernel is compiled for: the gradients' type, and for each option True, or None
# where it is off. `Kernel` puts other values in the place of these.
FLOAT = np.float64
LIMITED: Any = None
ONLY_SCALE: Any = None
ONLY_RESULT: Any = None


clip_coefficient = inline(limits.clip_coefficient)
is_exact = inline(limits.is_exact)
scale_for = inline(limits.scale_for)
one_minus_power = inline(formula.bind(formula.one_minus_power, fma=fma, mul=mul))
step_scalars = inline(
    formula.bind(
        formula.step_scalars, fma=fma, one_minus_power=one_minus_power, math=intrinsics.root
    )
)


@inline
def larger(a: Any, b: Any) -> Any:
    """Return the larger one, or NaN if either is."""
    return b if b > a or b != b else a


@inline
def include(g: Any, scale: Any, total: Any, largest: Any) -> Any:
    """Add the square of a gradient to the sum; compare it with the largest."""
    wide = convert(g, DOUBLE) * scale
    return fma(wide, wide, total), larger(largest, abs(g))


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
    c, count = first + thread // WARP, load(context, field.CHUNK_COUNT, INT64)
    scale = load(load(context, field.SCALE, INT64), 0, DOUBLE) if again else ONE
    if again and scale == ONE:
        return
    zero = FLOAT(0)
    total, largest = DOUBLE, zero
    if c < count:
        chunk = load(context, field.CHUNKS, INT64) + c * (8 * layout.CHUNK_COLUMNS)
        t = load(chunk, layout.CHUNK_TENSOR, INT64)
        grad = load(load(context, field.GRADS, INT64), t, INT64)
        if grad != 0:
            grad += load(chunk, layout.CHUNK_OFFSET, INT64)
            size = load(chunk, layout.CHUNK_SIZE, INT64)
            whole = size // (WARP * AHEAD) * (WARP * AHEAD)
            i = INT64 + lane
            while i < whole:
                for _ in range(AHEAD):
                    total, largest = include(load(grad, i, zero), scale, total, largest)
                    i += WARP
            while i < size:
                total, largest = include(load(grad, i, zero), scale, total, largest)
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
        store(load(context, field.SUMS, INT64), cuda.blockIdx.x, sums[0])
        store(load(context, field.LARGEST, INT64), cuda.blockIdx.x, maxima[0])


@inline
def combine(a: Any, b: Any, find_largest: Any) -> Any:
    """Return the sum of two numbers, or the larger one."""
    return larger(a, b) if find_largest else a + b


@inline
def combine_all(parts: Any, count: Any, values: Any, waiting: Any, find_largest: Any) -> Any:
    """Return the sum of the parts, or the largest, to every thread of a block.

    They are added in pairs, pairs of pairs and so on, whatever their number, as on the CPU.
    ``values`` and ``waiting`` are shared arrays, which may be used again afterwards.
    """
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    segments, depth = (count + SEGMENT - 1) // SEGMENT, 0
    for s in range(segments):
        size = min(count - s * SEGMENT, SEGMENT)
        for k in range(thread, size, threads):
            values[k] = load(parts, s * SEGMENT + k, DOUBLE)
        cuda.syncthreads()
        stride = 1
        while stride < size:
            for k in range(2 * stride * thread, size - stride, 2 * stride * threads):
                values[k] = combine(values[k], values[k + stride], find_largest)
            stride *= 2
            cuda.syncthreads()
        if thread == 0:
            waiting[depth] = values[0]
        depth += 1
        # A segment's sum joins the last one, if that is of as many segments; so the binary
        # digits of their number tell how often. At the end all are joined.
        rest = s
        while depth > 1 and (rest & 1 or s == segments - 1):
            depth -= 1
            if thread == 0:
                waiting[depth - 1] = combine(waiting[depth - 1], waiting[depth], find_largest)
            rest >>= 1
        cuda.syncthreads()
    result = waiting[0] if count > 0 else DOUBLE
    cuda.syncthreads()
    return result


@inline
def is_beyond(largest: Any, factor: Any, is_double: Any) -> Any:
    """Whether a gradient, multiplied by a factor in its own type, is not finite."""
    if is_double:
        return not abs(largest * factor) < np.inf
    return not abs(np.float32(largest) * np.float32(factor)) < np.float32(np.inf)


@inline
def store_all(row: Any, scalars: Any, like: Any) -> None:
    """Write a tensor's scalars in the type of its elements."""
    for place in range(layout.SCALARS):
        store(row, place, convert(scalars[place], like))


@inline
def prepare_tensor(context: Any, k: Any, groups: Any, coefficient: Any) -> None:
    """Count the step of a tensor, and write its scalars in the type of its elements."""
    tensor = load(context, field.TENSORS, INT64) + k * (8 * layout.TENSOR_COLUMNS)
    step = load(tensor, layout.STEP, INT64) + 1
    store(tensor, layout.STEP, step)
    g = groups + load(tensor, layout.GROUP, INT64) * (8 * layout.GROUP_COLUMNS)
    dtype = load(tensor, layout.DTYPE, INT64)
    is_double = load(load(context, field.IS_DOUBLE, INT64), dtype, INT64)
    scalars = step_scalars(
        load(g, layout.LR, DOUBLE), load(g, layout.BETA1, DOUBLE), load(g, layout.BETA2, DOUBLE),
        load(g, layout.EPS, DOUBLE), load(g, layout.L2, DOUBLE),
        load(g, layout.WEIGHT_DECAY, DOUBLE),
        mul(load(g, layout.GRAD_FACTOR, DOUBLE), coefficient),
        load(g, layout.ONE_MINUS_EMA_DECAY, DOUBLE), step,
        DOUBLE_TINY if is_double else SINGLE_TINY,
    )  # fmt: skip
    row = load(context, field.ROWS, INT64) + k * field.ROW_BYTES
    if is_double:
        store_all(row, scalars, DOUBLE)
    else:
        store_all(row, scalars, SINGLE)


@inline
def write_result(result: Any, norm: Any, skipped: Any, steps: Any) -> None:
    """Write the result of a step before which there were so many."""
    store(result, field.NORM, convert(norm, DOUBLE))
    store(result, field.SKIPPED, ONE if skipped else DOUBLE)
    store(result, field.COUNT, steps + (0 if skipped else 1))


def prepare_step(contexts: Any, result: Any) -> None:
    """Decide what becomes of the step, and prepare the scalars of every tensor: one block.

    ``contexts`` is the first dtype's, the others follow it. The result is written to the
    address ``result``, unless that is 0. With ONLY_SCALE, nothing is done but to find what
    squares must be scaled by; with ONLY_RESULT, nothing but to write the result.
    """
    values = cuda.shared.array(SEGMENT, float64)
    waiting = cuda.shared.array(WAITING, float64)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    hyper, counter = load(contexts, field.HYPER, INT64), load(contexts, field.STEP_COUNT, INT64)
    steps = load(counter, 0, INT64)
    norm, coefficient, skipped = DOUBLE, ONE, False
    if LIMITED is not None:
        total, largest, beyond = DOUBLE, -ONE, False
        scale_place = load(contexts, field.SCALE, INT64)
        factor, scale = load(hyper, field.FACTOR, DOUBLE), load(scale_place, 0, DOUBLE)
        for d in range(load(contexts, field.CONTEXT_COUNT, INT64)):
            context = contexts + d * (8 * field.CONTEXT_SIZE)
            count = load(context, field.PART_COUNT, INT64)
            total += combine_all(load(context, field.SUMS, INT64), count, values, waiting, False)
            own = combine_all(load(context, field.LARGEST, INT64), count, values, waiting, True)
            is_double = load(load(contexts, field.IS_DOUBLE, INT64), d, INT64)
            beyond = beyond or is_beyond(own, factor, is_double)
            largest = larger(largest, own)
        if ONLY_SCALE is not None:
            # A power of 2 that keeps squares in range: 1 if they are, or if none would.
            exact = is_exact(total) or largest == 0.0 or not largest < np.inf
            if thread == 0:
                store(scale_place, 0, ONE if exact else convert(scale_for(largest), DOUBLE))
            return
        if scale == 1.0 and not is_exact(total):
            norm = largest
        else:
            norm = mul(math.sqrt(total), factor) / scale
        skipped = beyond and load(hyper, field.MAY_SKIP, DOUBLE) != 0.0
        coefficient = clip_coefficient(norm, load(hyper, field.MAX_NORM, DOUBLE))
        if ONLY_RESULT is not None:
            if thread == 0:
                write_result(result, norm, skipped, steps)
            return
    groups = hyper + 8 * field.HYPER_GROUPS
    grads, tensors = load(contexts, field.GRADS, INT64), load(contexts, field.TENSORS, INT64)
    for k in range(thread, load(contexts, field.TENSOR_COUNT, INT64), threads):
        present = load(grads, k, INT64) != 0 and not skipped
        if present:
            prepare_tensor(contexts, k, groups, coefficient)
        tensor = tensors + k * (8 * layout.TENSOR_COLUMNS)
        store(tensor, layout.ROW, INT64 if present else INT64 - 1)
    cuda.syncthreads()  # all have read the count
    if thread == 0:
        if result != 0:
            write_result(result, norm, skipped, steps)
        store(counter, 0, steps + (0 if skipped else 1))


def update_threads(dtype: np.dtype[Any]) -> int:
    """Return how many threads a block of the update has; twice the registers, half of them."""
    return min(UPDATE_THREADS * 4 // dtype.itemsize, MAX_THREADS)


@functools.cache
def update_kernel(dtype: np.dtype[Any], *, roles: frozenset[str], zero_grad: bool) -> Kernel:
    """Return the kernel for these arrays of state, and without code for any other."""
    amsgrad, average = "max_exp_avg_sq" in roles, "ema" in roles
    return Kernel(
        update,
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
    return Kernel(sum_squares, (SUM_THREADS, 4), FLOAT=dtype.type)


@functools.cache
def prepare_kernel(
    *, limited: bool, only_scale: bool = False, only_result: bool = False
) -> Kernel:
    """Return the kernel that decides, or one that does only a part; see `prepare_step`."""
    return Kernel(
        prepare_step,
        (PREPARE_THREADS, 1),
        LIMITED=limited or None,
        ONLY_SCALE=only_scale or None,
        ONLY_RESULT=only_result or None,
    )
