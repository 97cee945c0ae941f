"""The same traffic to memory as a step, and little arithmetic: how fast a step could be.

`Roofline` has next to none, and shows what the memory allows; `Divider` has the
square root and the division of the formula, and shows what the divider allows.

Brings the compiler along: to be imported where it is used.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numba

from fastadam.adam import Adam
from fastadam.cpu import intrinsics, kernels
from fastadam.cpu.intrinsics import load, only_if, store
from fastadam.cpu.layout import UPDATE_CHOICE
from fastadam.update.formula import bind
from fastadam.update.layout import (
    CHUNK_OFFSET,
    CHUNK_SIZE,
    CHUNK_TENSOR,
    EMA,
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD,
    PARAM,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Divider", "Roofline"]


class Roofline:
    """Read and write what a step of Adam must, in the same arrays and the same order.

    Reads param, grad, exp_avg and exp_avg_sq, and writes all but grad; with
    `tail`, first reads grad once more (for its norm), and also reads and
    writes an average of param and writes grad. Chunks, threads and the
    placing of the state are those of a step. The arrays are float32 or float64, all
    alike, and written to.

    Examples
    --------
    >>> import numpy as np
    >>> from fastadam.bench.roofline import Roofline
    >>> param = np.ones(3, np.float32)
    >>> roofline = Roofline([param], [np.full(3, 0.5, np.float32)])
    >>> roofline.step()
    >>> param
    array([1.5, 1.5, 1.5], dtype=float32)
    """

    _divides = False

    def __init__(
        self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]], tail: bool = False
    ) -> None:
        # An optimizer for its tables: where everything lies, and how it is cut.
        self._opt = Adam(list(params), ema_decay=0.5 if tail else None)
        self._grads = tuple(grads)
        stepper: Any = self._opt._stepper
        stepper.take_grads(self._grads, tail)
        (context,) = stepper.contexts
        move = _kernel(context.dtype, context.parallel, tail, self._divides)
        norm = kernels.sum_kernel(context.dtype, parallel=context.parallel)
        self._address = context.address
        self._kernels = [norm, move] if tail else [move]
        if self._divides:
            for state in self._opt.state.values():
                state["exp_avg"].fill(1)
                state["exp_avg_sq"].fill(1)

    def step(self) -> None:
        """Pass over memory once; with `tail`, over the gradients twice."""
        for kernel in self._kernels:
            kernel(self._address, 1.0)


class Divider(Roofline):
    """Read and write the same, and take a square root and divide, once for each element.

    param becomes ``exp_avg / sqrt(exp_avg_sq)``, exp_avg the gradient and
    exp_avg_sq the old param, in positive arrays: there is no other arithmetic, and
    what is positive at first stays so, and neither overflows nor becomes subnormal.

    Examples
    --------
    >>> import numpy as np
    >>> from fastadam.bench.roofline import Divider
    >>> param = np.ones(2, np.float32)
    >>> divider = Divider([param], [np.full(2, 0.25, np.float32)])
    >>> for _ in range(2):
    ...     divider.step()
    >>> param
    array([0.25, 0.25], dtype=float32)
    """

    _divides = True


# Whether there is an average: in `move_chunk`, replaced by True or None.
AVERAGE = None


def move_chunk(chunk: Any, tensors: Any, scale: Any, zero: Any, largest: Any) -> Any:  # noqa: ARG001
    """Read and write a chunk; in the place of `kernels.measure_chunk`, so return a number."""
    tensor, start = tensors[chunk[CHUNK_TENSOR]], chunk[CHUNK_OFFSET]
    move_elements(
        tensor[PARAM] + start,
        tensor[GRAD] + start,
        tensor[EXP_AVG] + start,
        tensor[EXP_AVG_SQ] + start,
        only_if(AVERAGE, tensor[EMA] + start),
        chunk[CHUNK_SIZE],
        zero,
    )
    return 0.0


@intrinsics.inline
def move_elements(
    param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, ema: Any, size: Any, zero: Any
) -> None:
    """Add the gradient to everything: the sums neither overflow nor become subnormal."""
    for i in range(size):
        g = load(grad, i, zero, GRAD)
        p = load(param, i, zero, PARAM) + g
        store(param, i, p, PARAM)
        store(exp_avg, i, load(exp_avg, i, zero, EXP_AVG) + g, EXP_AVG)
        store(exp_avg_sq, i, load(exp_avg_sq, i, zero, EXP_AVG_SQ) + g, EXP_AVG_SQ)
        if ema is not None:
            store(ema, i, load(ema, i, zero, EMA) + p, EMA)
            store(grad, i, zero, GRAD)


@intrinsics.inline
def divide_elements(
    param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, ema: Any, size: Any, zero: Any
) -> None:
    """Take the square root and the division of the formula, and pass values around."""
    for i in range(size):
        p, g = load(param, i, zero, PARAM), load(grad, i, zero, GRAD)
        m, v = load(exp_avg, i, zero, EXP_AVG), load(exp_avg_sq, i, zero, EXP_AVG_SQ)
        store(param, i, m / math.sqrt(v), PARAM)
        store(exp_avg, i, g, EXP_AVG)
        if ema is None:
            store(exp_avg_sq, i, p, EXP_AVG_SQ)
        else:
            store(exp_avg_sq, i, load(ema, i, zero, EMA), EXP_AVG_SQ)
            store(ema, i, p, EMA)
            store(grad, i, zero, GRAD)


@functools.cache
def _kernel(dtype: Any, parallel: bool, tail: bool, divides: bool) -> Any:
    """Make the loop over chunks that sums squares do something else in each.

    Its machine code is not kept: the cache's key does not cover this file.
    """
    elements = divide_elements if divides else move_elements
    move = intrinsics.inline(bind(move_chunk, AVERAGE=tail or None, move_elements=elements))
    loop = kernels.measure_parallel if parallel else kernels.measure_serial
    # With the choice of threads for passes of this length, not for the norm's.
    function = bind(loop, FLOAT=dtype.type, measure_chunk=move, SUM_CHOICE=UPDATE_CHOICE)
    return numba.njit(parallel=parallel, nogil=parallel, **intrinsics.FLAGS)(function)
