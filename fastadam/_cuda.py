"""The CUDA backend: three kernels, whatever the number of separate arrays.

`sum_kernel` sums the squares of the gradients, `settle_kernel` decides what becomes of
the step and prepares its scalars, `update_kernel` takes it. They run one after another
in one stream, and the host need not know what was decided.
"""

import functools
import math
from typing import Any

import numpy as np

from . import _device, _formula
from ._device import Kernel, convert, cuda, float64, fma, load, load4, mul, only_if, store, store4
from ._tables import (
    BETA1,
    BETA2,
    CHUNK,
    CHUNK_COLUMNS,
    CHUNK_OFFSET,
    CHUNK_SIZE,
    CHUNK_TENSOR,
    EMA,
    EPS,
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD_FACTOR,
    GROUP,
    GROUP_COLUMNS,
    L2,
    LR,
    MAX_EXP_AVG_SQ,
    ONE_MINUS_EMA_DECAY,
    PARAM,
    ROW,
    STEP,
    WEIGHT_DECAY,
)
from ._tables import DTYPE as TENSOR_DTYPE

# Of the table of tensors a device has the columns up to here.
COLUMNS = ROW + 1
# Bytes from one tensor's scalars to the next one's: 11 of any type, and a cache line.
ROW_BYTES = 128

# What a kernel is given the address of: for each dtype a table of these. Addresses, and how
# long the tables are; of the norm there is a part for each `WARPS` chunks.
(
    TENSORS, TENSOR_COUNT, GRADS, ROWS, HYPER, GROUP_COUNT, SCALE, STEP_COUNT, CHUNKS,
    CHUNK_COUNT, SUMS, MAXIMA, PART_COUNT, IS_DOUBLE, CONTEXT_COUNT,
) = range(15)  # fmt: skip
CONTEXT_SIZE = 16

# The cells of `HYPER`, float64: what the gradients are multiplied by, the norm they are
# scaled down to, whether a step is skipped that is not finite. Then a table of groups for
# each count of steps that the host, which does not wait to hear of skipped ones, thinks
# possible: their number, and the first count, both int64.
FACTOR, MAX_NORM, MAY_SKIP, TABLE_COUNT, FIRST_COUNT = range(5)
HYPER_TABLES = 8

# The cells of what is told of a step: norm, 1.0 if it was skipped, steps so far.
NORM, SKIPPED, COUNT = range(3)
RESULT_SIZE = 4

# Threads of a block; of `sum_kernel`, a warp to a chunk, `WARPS` of them.
UPDATE_THREADS = 256
WARP = 32
WARPS = 2 if _device.SIMULATED else 8
SUM_THREADS = WARP * WARPS
SETTLE_THREADS = 512
# Elements that a thread of `sum_kernel` asks for before it adds the first.
AHEAD = 16
# Parts added at a time.
SEGMENT = 1024
# Sums of squares between these are neither short of digits nor infinite.
SMALL, LARGE = 1e-280, 1e300
LARGEST_SCALE = 1000

INT64, DOUBLE, SINGLE, ONE = np.int64(0), np.float64(0), np.float32(0), np.float64(1)
# What a kernel is compiled for: the parameters' type, and for each option True, or None
# where it is off. `Kernel` puts other values in the place of these.
FLOAT, ITEMSIZE = np.float64, 8
AMSGRAD: Any = None
AVERAGE: Any = None
ZERO_GRAD: Any = None
LIMITED: Any = None
MEASURE: Any = None
ASK: Any = None


one_minus_power = _device.inline(_formula.bind(_formula.one_minus_power, fma=fma, mul=mul))
step_scalars = _device.inline(
    _formula.bind(
        _formula.step_scalars, fma=fma, one_minus_power=one_minus_power, math=_device.root
    )
)
adam_update = _device.inline(_formula.bind(_formula.adam_update, fma=fma, math=_device.root))


@_device.inline
def update4(
    param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, ema: Any, i: Any,
    grad_factor: Any, l2: Any, decay: Any, beta1: Any, one_minus_beta1: Any, beta2: Any,
    one_minus_beta2: Any, step_size: Any, inv_sqrt_bias2: Any, eps: Any, average: Any,
    zero_grad: Any,
) -> None:  # fmt: skip
    """Update 4 elements from ``i`` on, every address of which is aligned to 16 bytes."""
    p0, p1, p2, p3 = load4(param, i, eps)
    g0, g1, g2, g3 = load4(grad, i, eps)
    m0, m1, m2, m3 = load4(exp_avg, i, eps)
    v0, v1, v2, v3 = load4(exp_avg_sq, i, eps)
    x0, x1, x2, x3 = load4(max_exp_avg_sq, i, eps)
    e0, e1, e2, e3 = load4(ema, i, eps)
    p0, m0, v0, x0, e0 = adam_update(
        p0, g0, m0, v0, x0, e0, grad_factor, l2, decay, beta1, one_minus_beta1,
        beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, average,
    )  # fmt: skip
    p1, m1, v1, x1, e1 = adam_update(
        p1, g1, m1, v1, x1, e1, grad_factor, l2, decay, beta1, one_minus_beta1,
        beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, average,
    )  # fmt: skip
    p2, m2, v2, x2, e2 = adam_update(
        p2, g2, m2, v2, x2, e2, grad_factor, l2, decay, beta1, one_minus_beta1,
        beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, average,
    )  # fmt: skip
    p3, m3, v3, x3, e3 = adam_update(
        p3, g3, m3, v3, x3, e3, grad_factor, l2, decay, beta1, one_minus_beta1,
        beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, average,
    )  # fmt: skip
    store4(param, i, p0, p1, p2, p3)
    store4(exp_avg, i, m0, m1, m2, m3)
    store4(exp_avg_sq, i, v0, v1, v2, v3)
    if max_exp_avg_sq is not None:
        store4(max_exp_avg_sq, i, x0, x1, x2, x3)
    if ema is not None:
        store4(ema, i, e0, e1, e2, e3)
    if zero_grad is not None:
        store4(grad, i, zero_grad, zero_grad, zero_grad, zero_grad)


@_device.inline
def update1(
    param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, ema: Any, i: Any,
    grad_factor: Any, l2: Any, decay: Any, beta1: Any, one_minus_beta1: Any, beta2: Any,
    one_minus_beta2: Any, step_size: Any, inv_sqrt_bias2: Any, eps: Any, average: Any,
    zero_grad: Any,
) -> None:  # fmt: skip
    """Update one element."""
    p, m, v, x, e = adam_update(
        load(param, i, eps), load(grad, i, eps), load(exp_avg, i, eps), load(exp_avg_sq, i, eps),
        load(max_exp_avg_sq, i, eps), load(ema, i, eps),
        grad_factor, l2, decay, beta1, one_minus_beta1,
        beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, average,
    )  # fmt: skip
    store(param, i, p)
    store(exp_avg, i, m)
    store(exp_avg_sq, i, v)
    if max_exp_avg_sq is not None:
        store(max_exp_avg_sq, i, x)
    if ema is not None:
        store(ema, i, e)
    if zero_grad is not None:
        store(grad, i, zero_grad)


@_device.inline
def update_elements(
    param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, ema: Any,
    size: Any, row: Any, l2: Any, zero_grad: Any, zero: Any, thread: Any, threads: Any,
) -> None:  # fmt: skip
    """Update ``size`` elements with all threads of a block; ``row`` is where the scalars are."""
    grad_factor, decay = load(row, 0, zero), load(row, 2, zero)
    beta1, one_minus_beta1 = load(row, 3, zero), load(row, 4, zero)
    beta2, one_minus_beta2 = load(row, 5, zero), load(row, 6, zero)
    step_size, inv_sqrt_bias2 = load(row, 7, zero), load(row, 8, zero)
    eps, average = load(row, 9, zero), load(row, 10, zero)
    places = param | grad | exp_avg | exp_avg_sq
    if max_exp_avg_sq is not None:
        places |= max_exp_avg_sq
    if ema is not None:
        places |= ema
    # Our own arrays are aligned; the user's may begin anywhere.
    fours = size // 4 if places % 16 == 0 else 0
    # `range` with a step that is not known would divide.
    i = 4 * thread
    while i < 4 * fours:
        update4(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, ema, i,
            grad_factor, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
            step_size, inv_sqrt_bias2, eps, average, zero_grad,
        )  # fmt: skip
        i += 4 * threads
    i = 4 * fours + thread
    while i < size:
        update1(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, ema, i,
            grad_factor, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
            step_size, inv_sqrt_bias2, eps, average, zero_grad,
        )  # fmt: skip
        i += threads


def update(context: Any, halvings: Any) -> None:
    """Take the step for one dtype: each block a part of a chunk, which was halved so often."""
    zero, thread, threads = FLOAT(0), cuda.threadIdx.x, cuda.blockDim.x
    chunk = load(context, CHUNKS, INT64) + (cuda.blockIdx.x >> halvings) * (8 * CHUNK_COLUMNS)
    t = load(chunk, CHUNK_TENSOR, INT64)
    tensor = load(context, TENSORS, INT64) + t * (8 * COLUMNS)
    grad = load(load(context, GRADS, INT64), t, INT64)
    part = CHUNK >> halvings
    start = (cuda.blockIdx.x & ((1 << halvings) - 1)) * part
    size = max(min(load(chunk, CHUNK_SIZE, INT64) - start, part), 0)  # nothing, in the last parts
    offset = load(chunk, CHUNK_OFFSET, INT64) + start * ITEMSIZE
    if load(tensor, ROW, INT64) >= 0:
        row = load(context, ROWS, INT64) + t * ROW_BYTES
        param, grad = load(tensor, PARAM, INT64) + offset, grad + offset
        m = load(tensor, EXP_AVG, INT64) + offset
        v = load(tensor, EXP_AVG_SQ, INT64) + offset
        x = only_if(AMSGRAD, load(tensor, MAX_EXP_AVG_SQ, INT64) + offset)
        e = only_if(AVERAGE, load(tensor, EMA, INT64) + offset)
        z = only_if(ZERO_GRAD, zero)
        l2 = load(row, 1, zero)
        # Decided for the block, so that the loops have no such question in them.
        if l2 == 0:
            update_elements(param, grad, m, v, x, e, size, row, None, z, zero, thread, threads)
        else:
            update_elements(param, grad, m, v, x, e, size, row, l2, z, zero, thread, threads)
    elif ZERO_GRAD is not None and grad != 0:  # the step is skipped, its gradients are not
        i = INT64 + thread
        while i < size:
            store(grad + offset, i, zero)
            i += threads


@_device.inline
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


@_device.inline
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


@_device.inline
def scale_for(total: Any, largest: Any) -> Any:
    """Return the power of 2 that keeps squares in range, 1 if they are, or if none would."""
    if (SMALL < total and total < LARGE) or largest == 0.0 or not largest < np.inf:  # noqa: SIM300
        return 1.0
    return math.ldexp(1.0, min(-math.frexp(largest)[1], LARGEST_SCALE))


@_device.inline
def is_beyond(largest: Any, factor: Any, is_double: Any) -> Any:
    """Whether a gradient, multiplied by a factor in its own type, is not finite."""
    if is_double:
        return not abs(largest * factor) < np.inf
    return not abs(np.float32(largest) * np.float32(factor)) < np.float32(np.inf)


@_device.inline
def clip_coefficient(norm: Any, max_norm: Any) -> Any:
    """As `_limits.clip_coefficient`, with infinity for None."""
    if not max_norm < np.inf:
        return 1.0
    coefficient = max_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1.0 else coefficient


@_device.inline
def prepare(context: Any, k: Any, groups: Any, coefficient: Any) -> None:
    """Count the step of a tensor, and write its scalars."""
    tensor = load(context, TENSORS, INT64) + k * (8 * COLUMNS)
    step = load(tensor, STEP, INT64) + 1
    store(tensor, STEP, step)
    group = groups + load(tensor, GROUP, INT64) * (8 * GROUP_COLUMNS)
    s = step_scalars(
        load(group, LR, DOUBLE), load(group, BETA1, DOUBLE), load(group, BETA2, DOUBLE),
        load(group, EPS, DOUBLE), load(group, L2, DOUBLE), load(group, WEIGHT_DECAY, DOUBLE),
        mul(load(group, GRAD_FACTOR, DOUBLE), coefficient),
        load(group, ONE_MINUS_EMA_DECAY, DOUBLE), step,
    )  # fmt: skip
    row = load(context, ROWS, INT64) + k * ROW_BYTES
    if load(load(context, IS_DOUBLE, INT64), load(tensor, TENSOR_DTYPE, INT64), INT64):
        write_scalars(row, s, DOUBLE)
    else:
        write_scalars(row, s, SINGLE)


@_device.inline
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


@_device.inline
def reduce(parts: Any, count: Any, values: Any, tops: Any, find_largest: Any) -> Any:
    """Add up the parts, or find the largest; every thread of the block gets the result.

    ``values`` and ``tops`` are shared arrays, which may be used again afterwards.
    """
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    segments = (count + SEGMENT - 1) // SEGMENT
    for s in range(segments):
        size = min(count - s * SEGMENT, SEGMENT)
        for k in range(thread, size, threads):
            values[k] = load(parts, s * SEGMENT + k, DOUBLE)
        cuda.syncthreads()
        add_pairs(values, size, find_largest, thread, threads)
        if thread == 0:
            tops[s] = values[0]
        cuda.syncthreads()
    add_pairs(tops, segments, find_largest, thread, threads)
    result = tops[0] if count > 0 else DOUBLE
    cuda.syncthreads()
    return result


@_device.inline
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
    tops = cuda.shared.array(SEGMENT, float64)
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
            total += reduce(load(context, SUMS, INT64), count, values, tops, False)
            own = reduce(load(context, MAXIMA, INT64), count, values, tops, True)
            is_double = load(load(contexts, IS_DOUBLE, INT64), d, INT64)
            beyond = beyond or is_beyond(own, factor, is_double)
            largest = larger(largest, own)
        if MEASURE is not None:
            if thread == 0:
                store(scale_place, 0, convert(scale_for(total, largest), DOUBLE))
            return
        if scale == 1.0 and not (SMALL < total and total < LARGE):  # noqa: SIM300
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
        store(tensors + k * (8 * COLUMNS), ROW, INT64 if present else INT64 - 1)
    cuda.syncthreads()  # all have read the count
    if thread == 0:
        if result != 0:
            tell(result, norm, skipped, steps)
        store(counter, 0, steps + (0 if skipped else 1))


def update_threads(dtype: np.dtype[Any]) -> int:
    """Return how many threads a block of the update has; twice the registers, half of them."""
    return min(UPDATE_THREADS * 4 // dtype.itemsize, _device.MOST_THREADS)


@functools.cache
def update_kernel(
    dtype: np.dtype[Any], *, amsgrad: bool, average: bool, zero_grad: bool
) -> Kernel:
    """Return the kernel that has these options, and nothing of the others."""
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
