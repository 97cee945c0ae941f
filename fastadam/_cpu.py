"""The CPU backend: one kernel call updates any number of separate arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import prange

from . import _formula, _jit
from ._jit import load, only_if, store
from ._tables import (
    CHUNK_SIZE,
    CHUNK_START,
    CHUNK_TENSOR,
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD,
    GROUP,
    MAX_EXP_AVG_SQ,
    PARAM,
    ROW,
    STEP,
    Table,
)

# Starting the threads costs some 2 to 3 microseconds, what one thread needs for
# 20,000 elements in its cache: measured, two threads are ahead from about here.
SERIAL_BELOW = 65_536

one_minus_power = _jit.inline(_formula.bind(_formula.one_minus_power, fma=_jit.fma))
step_scalars = _jit.inline(_formula.bind(_formula.step_scalars, one_minus_power=one_minus_power))
adam_update = _jit.inline(_formula.bind(_formula.adam_update, fma=_jit.fma))


@_jit.inline
def prepare(tensors: Any, groups: Any, scalars: Any) -> None:
    """Count the step of every tensor that has a gradient; give it its row of scalars.

    Tensors of one group and one step share a row: as a rule, a row a group.
    """
    row, group, step = -1, -1, -1
    for t in range(tensors.shape[0]):
        if tensors[t, GRAD] != 0:
            tensors[t, STEP] += 1
            if row < 0 or tensors[t, GROUP] != group or tensors[t, STEP] != step:
                row, group, step = row + 1, tensors[t, GROUP], tensors[t, STEP]
                g = groups[group]
                values = step_scalars(g[0], g[1], g[2], g[3], g[4], g[5], g[6], step)
                for k, value in enumerate(values):
                    scalars[row, k] = value  # float64 to the parameter's type, once
            tensors[t, ROW] = row


@_jit.inline
def update_chunk(
    param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any,
    size: Any, s: Any, l2: Any, zero_grad: Any,
) -> None:  # fmt: skip
    """Update ``size`` elements; the first five are addresses, ``s`` a row of scalars.

    ``max_exp_avg_sq``, ``l2`` and ``zero_grad`` are None where they are off.
    """
    grad_factor, decay, beta1, one_minus_beta1 = s[0], s[2], s[3], s[4]
    beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps = s[5], s[6], s[7], s[8], s[9]
    for i in range(size):
        p, m, v, x = adam_update(
            load(param, i, eps, PARAM),
            load(grad, i, eps, GRAD),
            load(exp_avg, i, eps, EXP_AVG),
            load(exp_avg_sq, i, eps, EXP_AVG_SQ),
            load(max_exp_avg_sq, i, eps, MAX_EXP_AVG_SQ),
            grad_factor, l2, decay, beta1, one_minus_beta1,
            beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps,
        )  # fmt: skip
        store(param, i, p, PARAM)
        store(exp_avg, i, m, EXP_AVG)
        store(exp_avg_sq, i, v, EXP_AVG_SQ)
        if max_exp_avg_sq is not None:
            store(max_exp_avg_sq, i, x, MAX_EXP_AVG_SQ)
        if zero_grad is not None:
            store(grad, i, zero_grad, GRAD)


def update_tensors(
    count: Any, tensors: Any, chunks: Any, groups: Any, scalars: Any, amsgrad: Any, zero_grad: Any
) -> None:
    """Take one step, and count it.

    ``amsgrad`` is True and ``zero_grad`` a zero of the parameter's type, or
    None where they are off.
    """
    count[0] += 1
    prepare(tensors, groups, scalars)
    for c in prange(chunks.shape[0]):
        tensor = tensors[chunks[c, CHUNK_TENSOR]]
        if tensor[GRAD] != 0:
            start = chunks[c, CHUNK_START] * scalars.itemsize
            param, grad = tensor[PARAM] + start, tensor[GRAD] + start
            m, v = tensor[EXP_AVG] + start, tensor[EXP_AVG_SQ] + start
            x = only_if(amsgrad, tensor[MAX_EXP_AVG_SQ] + start)
            size, s = chunks[c, CHUNK_SIZE], scalars[tensor[ROW]]
            # Decided for the chunk, so that the loop has no such question in it.
            if s[1] == 0:
                update_chunk(param, grad, m, v, x, size, s, None, zero_grad)
            else:
                update_chunk(param, grad, m, v, x, size, s, s[1], zero_grad)


update_serial = _jit.kernel(update_tensors)
update_parallel = _jit.kernel(update_tensors, parallel=True)


def update(
    tables: Sequence[Table],
    step_count: npt.NDArray[np.int64],
    groups: npt.NDArray[np.float64],
    *,
    amsgrad: bool,
    zero_grad: bool,
) -> None:
    """Update every tensor that has a gradient, in one kernel call for each dtype.

    Writes the parameters, their state, their step counts and, with
    ``zero_grad``, the gradients; adds 1 to ``step_count``, shape (1,).
    """
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    for table in tables:
        run = update_serial if table.size < SERIAL_BELOW else update_parallel
        flags = True if amsgrad else None, table.zero if zero_grad else None
        if len(tables) > 1 and (amsgrad, zero_grad) not in table.tried:
            # What can fail, compiling and starting threads, must do so before the first write.
            nothing = table.tensors[:0], table.chunks[:0]
            run(np.zeros_like(step_count), *nothing, groups, table.scalars, *flags)
            table.tried.add((amsgrad, zero_grad))
        count = np.zeros_like(step_count) if calls else step_count  # counted once
        calls.append((run, (count, table.tensors, table.chunks, groups, table.scalars, *flags)))
    if not calls:
        step_count += 1
    elif len(calls) == 1:
        ((run, arguments),) = calls
        run(*arguments)
    else:
        # Two dtypes are all there are. A signal is acted on after a call returns,
        # and nothing of Python's lies between the first return and the second call.
        (run, arguments), (run_second, arguments_second) = calls
        try:
            run(*arguments)
        finally:
            run_second(*arguments_second)
