r"""The arithmetic of Adam over scalars, written once; every backend compiles it.

Nothing here knows arrays, threads or devices. :func:`fma` and :func:`mul` are
stand-ins: a backend binds its own with :func:`bind`. Every multiply-add is
written out as one, and a product that is rounded before something is added to
it as :func:`mul`, so that no compiler has a contraction left to choose, and all
of them round alike. The function compiled in the type of the parameter holds no
float literal, which would promote float32 to float64.
"""

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any


def fma(a: Any, b: Any, c: Any) -> Any:
    """Stand in for the fused multiply-add ``a*b + c`` of a backend."""
    return a * b + c


def mul(a: Any, b: Any) -> Any:
    """Stand in for a product that a backend rounds, whatever is done with it."""
    return a * b


def bind(function: Callable[..., Any], **primitives: Any) -> Callable[..., Any]:
    """Return the same code with some of its globals replaced."""
    names = {**function.__globals__, **primitives}
    return FunctionType(function.__code__, names, function.__name__)


def adam_update(
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    max_exp_avg_sq: Any,
    ema: Any,
    grad_factor: Any,
    l2: Any,
    decay: Any,
    beta1: Any,
    one_minus_beta1: Any,
    beta2: Any,
    one_minus_beta2: Any,
    step_size: Any,
    inv_sqrt_bias2: Any,
    eps: Any,
    one_minus_ema_decay: Any,
    tiny: Any,
    zero: Any,
) -> tuple[Any, Any, Any, Any, Any]:
    """Update one element; all scalars are of the parameter's own type, ``zero`` too.

    ``l2``, ``max_exp_avg_sq`` and ``ema`` are None where they are off, and the
    branch is gone when the function is compiled.

    Moments below ``tiny``, the smallest normal number, become 0. Processors take 10 to 60
    times as long for a denormal number, and a moment that decays would stay one for good:
    0.9 times a few units of the last place rounds back to itself.
    """
    grad = grad_factor * grad
    if l2 is not None:
        grad = fma(l2, param, grad)
    # Not exp_avg + (1-beta1)*(grad - exp_avg): with a small beta1 and a gradient
    # smaller than the last place of exp_avg, nothing would be left of the gradient.
    exp_avg = fma(beta1, exp_avg, one_minus_beta1 * grad)
    exp_avg = zero if abs(exp_avg) < tiny else exp_avg
    exp_avg_sq = fma(one_minus_beta2 * grad, grad, beta2 * exp_avg_sq)
    exp_avg_sq = zero if exp_avg_sq < tiny else exp_avg_sq
    second_moment = exp_avg_sq
    if max_exp_avg_sq is not None:
        # Written so that a NaN in exp_avg_sq is taken, as PyTorch's maximum does, and that
        # a maximum below tiny, which can only have been loaded, does not stay.
        if not max_exp_avg_sq >= (tiny if exp_avg_sq < tiny else exp_avg_sq):
            max_exp_avg_sq = exp_avg_sq
        second_moment = max_exp_avg_sq
    denom = fma(math.sqrt(second_moment), inv_sqrt_bias2, eps)
    param = fma(decay, param, -step_size * exp_avg / denom)
    if ema is not None:
        # Here the difference: an average that has arrived stays where it is, though
        # the decay and 1 less it, each rounded, may not add up to 1.
        ema = fma(one_minus_ema_decay, param - ema, ema)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq, ema


def one_minus_power(base: float, exponent: int) -> float:
    """Return ``1 - base**exponent`` in float64, for base in [0, 1).

    The C library's ``pow`` differs between machines in the last place, and
    ``1 - b**t`` loses digits while t is small. The power is therefore made by
    repeated squaring of an unevaluated sum high + low (Dekker 1971), about 106
    bits wide, so that the difference is rounded once and alike everywhere.
    """
    high, low = 1.0, 0.0
    square, square_low = base, 0.0
    while exponent > 0:
        if exponent & 1:
            product = mul(high, square)
            error = fma(high, square, -product)
            low = error + fma(high, square_low, mul(low, square))
            high = product + low
            low = (product - high) + low
        product = mul(square, square)
        square_low = fma(2.0 * square, square_low, fma(square, square, -product))
        square = product + square_low
        square_low = (product - square) + square_low
        exponent >>= 1
    return (1.0 - high) - low


def step_scalars(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    l2: float,
    weight_decay: float,
    grad_factor: float,
    one_minus_ema_decay: float,
    step: int,
    tiny: float,
) -> tuple[Any, ...]:
    """Return the scalars of one step, in float64, in the order of `adam_update`.

    ``step`` counts from 1; ``lr`` already holds the schedule's factor. ``tiny`` is the
    smallest normal number of the parameter's type.
    """
    step_size = lr / one_minus_power(beta1, step)
    inv_sqrt_bias2 = 1.0 / math.sqrt(one_minus_power(beta2, step))
    # The step is step_size*exp_avg / denom. Both sides of the division are multiplied by a
    # power of 2, which changes no digit of the quotient: step_size becomes about 1, so that
    # its product with exp_avg is not denormal. By 2**37 at most, or denom could overflow in
    # float32: 2**64, the largest root, times 2**26.5, the largest inv_sqrt_bias2.
    scale = 1.0
    if step_size < 1.0 and eps <= 1.0:
        scale = math.ldexp(1.0, min(-math.frexp(step_size)[1], 37))
    return (
        grad_factor,
        l2,
        fma(-lr, weight_decay, 1.0),
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        scale * step_size,
        scale * inv_sqrt_bias2,
        scale * eps,
        one_minus_ema_decay,
        tiny,
    )
