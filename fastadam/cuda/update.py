"""The CUDA kernel that takes the step: its blocks, its threads and their accesses."""

from typing import Any

import numpy as np

from ..update import formula, layout
from . import layout as field
from .compiler import cuda, inline, intrinsics

fma, root, only_if = intrinsics.fma, intrinsics.root, intrinsics.only_if
load, load4, store, store4 = (
    intrinsics.load, intrinsics.load4, intrinsics.store, intrinsics.store4,
)  # fmt: skip

INT64 = np.int64(0)
# What the kernel is compiled for: the parameters' type, and for each option True, or None
# where it is off. `Kernel` puts other values in the place of these.
FLOAT, ITEMSIZE = np.float64, 8
AMSGRAD: Any = None
AVERAGE: Any = None
ZERO_GRAD: Any = None

adam_update = inline(formula.bind(formula.adam_update, fma=fma, math=root))


@inline
def update4(arrays: Any, i: Any, scalars: Any, zero: Any) -> None:
    """Update 4 elements from ``i`` on, every address of which is aligned to 16 bytes.

    The calls are written out four times: for elements that a loop picks out of a tuple,
    the compiler takes memory in place of registers.
    """
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, ema, zeroed = arrays
    p0, p1, p2, p3 = load4(param, i, zero)
    g0, g1, g2, g3 = load4(grad, i, zero)
    m0, m1, m2, m3 = load4(exp_avg, i, zero)
    v0, v1, v2, v3 = load4(exp_avg_sq, i, zero)
    x0, x1, x2, x3 = load4(max_exp_avg_sq, i, zero)
    e0, e1, e2, e3 = load4(ema, i, zero)
    p0, m0, v0, x0, e0 = adam_update(p0, g0, m0, v0, x0, e0, *scalars)
    p1, m1, v1, x1, e1 = adam_update(p1, g1, m1, v1, x1, e1, *scalars)
    p2, m2, v2, x2, e2 = adam_update(p2, g2, m2, v2, x2, e2, *scalars)
    p3, m3, v3, x3, e3 = adam_update(p3, g3, m3, v3, x3, e3, *scalars)
    store4(param, i, p0, p1, p2, p3)
    store4(exp_avg, i, m0, m1, m2, m3)
    store4(exp_avg_sq, i, v0, v1, v2, v3)
    store4(max_exp_avg_sq, i, x0, x1, x2, x3)
    store4(ema, i, e0, e1, e2, e3)
    store4(zeroed, i, zero, zero, zero, zero)


@inline
def update1(arrays: Any, i: Any, scalars: Any, zero: Any) -> None:
    """Update one element."""
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, ema, zeroed = arrays
    p, m, v, x, e = adam_update(
        load(param, i, zero), load(grad, i, zero), load(exp_avg, i, zero),
        load(exp_avg_sq, i, zero), load(max_exp_avg_sq, i, zero), load(ema, i, zero), *scalars,
    )  # fmt: skip
    store(param, i, p)
    store(exp_avg, i, m)
    store(exp_avg_sq, i, v)
    store(max_exp_avg_sq, i, x)
    store(ema, i, e)
    store(zeroed, i, zero)


@inline
def update_elements(
    param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, ema: Any,
    zeroed: Any, size: Any, s: Any, l2: Any, zero: Any, thread: Any, threads: Any,
) -> None:  # fmt: skip
    """Update ``size`` elements with all threads of a block; ``s`` is where the scalars are.

    ``max_exp_avg_sq``, ``ema``, ``l2`` and ``zeroed``, the gradient that is to become 0, are
    None where they are off; loads and stores at an address of None are none.
    """
    arrays = param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, ema, zeroed
    scalars = (
        load(s, layout.S_GRAD_FACTOR, zero), l2, load(s, layout.S_DECAY, zero),
        load(s, layout.S_BETA1, zero), load(s, layout.S_ONE_MINUS_BETA1, zero),
        load(s, layout.S_BETA2, zero), load(s, layout.S_ONE_MINUS_BETA2, zero),
        load(s, layout.S_STEP_SIZE, zero), load(s, layout.S_INV_SQRT_BIAS2, zero),
        load(s, layout.S_EPS, zero), load(s, layout.S_ONE_MINUS_EMA_DECAY, zero),
        load(s, layout.S_TINY, zero), zero,
    )  # fmt: skip
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
        update4(arrays, i, scalars, zero)
        i += 4 * threads
    i = 4 * fours + thread
    while i < size:
        update1(arrays, i, scalars, zero)
        i += threads


def update(context: Any, halvings: Any) -> None:
    """Take the step for one dtype: each block a part of a chunk, which was halved so often."""
    zero, thread, threads = FLOAT(0), cuda.threadIdx.x, cuda.blockDim.x
    chunk = load(context, field.CHUNKS, INT64)
    chunk += (cuda.blockIdx.x >> halvings) * (8 * layout.CHUNK_COLUMNS)
    t = load(chunk, layout.CHUNK_TENSOR, INT64)
    tensor = load(context, field.TENSORS, INT64) + t * (8 * layout.TENSOR_COLUMNS)
    grad = load(load(context, field.GRADS, INT64), t, INT64)
    part = layout.CHUNK >> halvings
    start = (cuda.blockIdx.x & ((1 << halvings) - 1)) * part
    # Nothing, in the last parts.
    size = max(min(load(chunk, layout.CHUNK_SIZE, INT64) - start, part), 0)
    offset = load(chunk, layout.CHUNK_OFFSET, INT64) + start * ITEMSIZE
    if load(tensor, layout.ROW, INT64) >= 0:
        s = load(context, field.ROWS, INT64) + t * field.ROW_BYTES
        param, grad = load(tensor, layout.PARAM, INT64) + offset, grad + offset
        m = load(tensor, layout.EXP_AVG, INT64) + offset
        v = load(tensor, layout.EXP_AVG_SQ, INT64) + offset
        x = only_if(AMSGRAD, load(tensor, layout.MAX_EXP_AVG_SQ, INT64) + offset)
        e = only_if(AVERAGE, load(tensor, layout.EMA, INT64) + offset)
        z = only_if(ZERO_GRAD, grad)
        l2 = load(s, layout.S_L2, zero)
        # Decided for the block, so that the loops have no such question in them.
        if l2 == 0:
            update_elements(param, grad, m, v, x, e, z, size, s, None, zero, thread, threads)
        else:
            update_elements(param, grad, m, v, x, e, z, size, s, l2, zero, thread, threads)
    elif ZERO_GRAD is not None and grad != 0:  # the step is skipped, its gradients are not
        i = INT64 + thread
        while i < size:
            store(grad + offset, i, zero)
            i += threads
