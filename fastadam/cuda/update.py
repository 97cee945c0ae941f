"""The CUDA kernel that takes the step: its blocks, its threads and their accesses."""

from typing import Any

import numpy as np

from ..update import formula
from ..update.layout import (
    CHUNK,
    CHUNK_COLUMNS,
    CHUNK_OFFSET,
    CHUNK_SIZE,
    CHUNK_TENSOR,
    EMA,
    EXP_AVG,
    EXP_AVG_SQ,
    MAX_EXP_AVG_SQ,
    PARAM,
    ROW,
    TENSOR_COLUMNS,
)
from . import launch
from .launch import cuda, fma, load, load4, only_if, store, store4
from .layout import CHUNKS, GRADS, ROW_BYTES, ROWS, TENSORS

INT64 = np.int64(0)
# What the kernel is compiled for: the parameters' type, and for each option True, or None
# where it is off. `Kernel` puts other values in the place of these.
FLOAT, ITEMSIZE = np.float64, 8
AMSGRAD: Any = None
AVERAGE: Any = None
ZERO_GRAD: Any = None

adam_update = launch.inline(formula.bind(formula.adam_update, fma=fma, math=launch.root))


@launch.inline
def update4(
    param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, ema: Any, i: Any,
    grad_factor: Any, l2: Any, decay: Any, beta1: Any, one_minus_beta1: Any, beta2: Any,
    one_minus_beta2: Any, step_size: Any, inv_sqrt_bias2: Any, eps: Any, average: Any,
    tiny: Any, zero: Any, zero_grad: Any,
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
        beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, average, tiny, zero,
    )  # fmt: skip
    p1, m1, v1, x1, e1 = adam_update(
        p1, g1, m1, v1, x1, e1, grad_factor, l2, decay, beta1, one_minus_beta1,
        beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, average, tiny, zero,
    )  # fmt: skip
    p2, m2, v2, x2, e2 = adam_update(
        p2, g2, m2, v2, x2, e2, grad_factor, l2, decay, beta1, one_minus_beta1,
        beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, average, tiny, zero,
    )  # fmt: skip
    p3, m3, v3, x3, e3 = adam_update(
        p3, g3, m3, v3, x3, e3, grad_factor, l2, decay, beta1, one_minus_beta1,
        beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, average, tiny, zero,
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


@launch.inline
def update1(
    param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, ema: Any, i: Any,
    grad_factor: Any, l2: Any, decay: Any, beta1: Any, one_minus_beta1: Any, beta2: Any,
    one_minus_beta2: Any, step_size: Any, inv_sqrt_bias2: Any, eps: Any, average: Any,
    tiny: Any, zero: Any, zero_grad: Any,
) -> None:  # fmt: skip
    """Update one element."""
    p, m, v, x, e = adam_update(
        load(param, i, eps), load(grad, i, eps), load(exp_avg, i, eps), load(exp_avg_sq, i, eps),
        load(max_exp_avg_sq, i, eps), load(ema, i, eps),
        grad_factor, l2, decay, beta1, one_minus_beta1,
        beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, average, tiny, zero,
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


@launch.inline
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
    tiny = load(row, 11, zero)
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
            step_size, inv_sqrt_bias2, eps, average, tiny, zero, zero_grad,
        )  # fmt: skip
        i += 4 * threads
    i = 4 * fours + thread
    while i < size:
        update1(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, ema, i,
            grad_factor, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
            step_size, inv_sqrt_bias2, eps, average, tiny, zero, zero_grad,
        )  # fmt: skip
        i += threads


def update(context: Any, halvings: Any) -> None:
    """Take the step for one dtype: each block a part of a chunk, which was halved so often."""
    zero, thread, threads = FLOAT(0), cuda.threadIdx.x, cuda.blockDim.x
    chunk = load(context, CHUNKS, INT64) + (cuda.blockIdx.x >> halvings) * (8 * CHUNK_COLUMNS)
    t = load(chunk, CHUNK_TENSOR, INT64)
    tensor = load(context, TENSORS, INT64) + t * (8 * TENSOR_COLUMNS)
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
