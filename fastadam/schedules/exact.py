"""Cosine and powers with the same bits on every machine.

The C library's cos and pow differ in the last bit between systems. What is
used here does not: float + - * /, sqrt and fmod, which IEEE 754 fixes, and
Python's integers and decimals.
"""

import math
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache

_PI_HIGH = math.floor(math.pi * 2.0**24) / 2.0**24  # 26 bits: times 26 bits is exact
_PI_LOW = math.pi - _PI_HIGH + 1.2246467991473532e-16  # the last term is pi - math.pi
_SPLIT = 2.0**27 + 1.0
_S3, _S5, _S7, _S9, _S11, _S13, _S15, _S17 = (
    (-1.0) ** (k // 2) / math.factorial(k) for k in range(3, 18, 2)
)
_C4, _C6, _C8, _C10, _C12, _C14, _C16, _C18 = (
    (-1.0) ** (k // 2) / math.factorial(k) for k in range(4, 19, 2)
)


def cos_pi(x: float) -> float:
    """Return cos(pi * x) for a finite x.

    The error is under one unit in the last place; multiples of one half
    are exact.
    """
    x = math.fmod(abs(x), 2.0)  # each line of the reduction is exact
    if x > 1.0:
        x = 2.0 - x
    sign = 1.0
    if x > 0.5:
        sign, x = -1.0, 1.0 - x
    use_sine = x > 0.25
    if use_sine:
        x = 0.5 - x

    # pi * x as the unevaluated sum a + b: rounding it once would already cost half a unit
    shifted = _SPLIT * x
    x_high = shifted - (shifted - x)
    product = _PI_HIGH * x_high
    rest = _PI_LOW * x_high + math.pi * (x - x_high)
    a = product + rest
    b = rest - (a - product)

    # Taylor terms up to (pi/4)^18 / 18!, far below the last bit
    z = a * a
    if use_sine:
        tail = _S9 + z * (_S11 + z * (_S13 + z * (_S15 + z * _S17)))
        tail = z * (_S3 + z * (_S5 + z * (_S7 + z * tail)))
        return sign * (a + (a * tail + b * (1.0 - 0.5 * z)))
    tail = _C10 + z * (_C12 + z * (_C14 + z * (_C16 + z * _C18)))
    tail = z * z * (_C4 + z * (_C6 + z * (_C8 + z * tail)))
    half = 0.5 * z
    one_less = 1.0 - half
    return sign * (one_less + (((1.0 - one_less) - half) + (tail - a * b)))


# Digits that are far more than the 17 of a float, whatever a power makes of the last. It raises
# nothing, whatever the program's own decimal context is told to.
_DIGITS = Context(prec=80, rounding=ROUND_HALF_EVEN, Emin=-9999, Emax=9999, traps=[])


def power(base: float, exponent: int, root: int = 1) -> float:
    """Return base ** (exponent / root), base in [0, 1], as 80 digits of it are rounded."""
    if base in (0.0, 1.0):
        return base if exponent else 1.0
    whole, rest = divmod(exponent, root)
    # Far below the least float; even 1 - 2**-53, where the exponent has more than 63 bits.
    if whole >> 63 or whole * math.log(base) < -800.0:
        return 0.0
    numerator, denominator = base.as_integer_ratio()
    if not rest and whole * numerator.bit_length() <= 4096:
        exact: float = numerator**whole / denominator**whole  # / rounds correctly
        return exact
    result = _DIGITS.power(Decimal.from_float(base), whole)
    if rest:
        result = _DIGITS.multiply(result, _DIGITS.power(_root(base, root), rest))
    return float(result)


@lru_cache(maxsize=128)
def _root(base: float, root: int) -> Decimal:
    return _DIGITS.power(Decimal.from_float(base), _DIGITS.divide(Decimal(1), Decimal(root)))
