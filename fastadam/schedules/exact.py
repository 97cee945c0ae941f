"""Cosine and powers with the same bits on every machine.

The C library's cos and pow differ in the last bit between systems. What is
used here does not: float + - * /, sqrt and fmod, which IEEE 754 fixes, and
Python's integers.
"""

import math
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


# A number in (0, 1] as (m, s): m / 2**_BITS / 2**s, with m of exactly _BITS bits.
_BITS = 256
_Scaled = tuple[int, int]
_ONE: _Scaled = (1 << (_BITS - 1), -1)


def power(base: float, exponent: int, root: int = 1) -> float:
    """Return base ** (exponent / root), base in [0, 1], correctly rounded.

    Powers of a base are remembered, so a schedule that keeps its base and
    root pays about one product per six bits of the exponent.
    """
    whole, rest = divmod(exponent, root)
    if not rest:
        exponent, root = whole, 1
        if exponent < 16:
            numerator, denominator = base.as_integer_ratio()
            exact: float = numerator**exponent / denominator**exponent  # / rounds correctly
            return exact
    if base in (0.0, 1.0):
        return base
    if whole >> 63:  # even (1 - 2**-53) ** (2**63) is far below the least float
        return 0.0
    m, s, level = 1 << _BITS, 0, 0
    while exponent:
        digit = exponent & 63
        if digit:
            factor, shift = _powers(base, root, level)[digit]
            m = m * factor >> _BITS
            s += shift
        exponent >>= 6
        level += 1
    return m / (1 << (_BITS + s)) if s < 1100 else 0.0


@lru_cache(maxsize=128)
def _powers(base: float, root: int, level: int) -> list[_Scaled]:
    """Return base ** (digit * 64**level / root) for each digit from 0 to 63."""
    if level:
        lower = _powers(base, root, level - 1)
        first = _times(lower[63], lower[1])
    else:
        first = _root(base, root)
    powers = [_ONE]
    for _ in range(63):
        powers.append(_times(powers[-1], first))
    return powers


def _times(x: _Scaled, y: _Scaled) -> _Scaled:
    m = x[0] * y[0]
    excess = m.bit_length() - _BITS
    return m >> excess, x[1] + y[1] + _BITS - excess


def _root(base: float, root: int) -> _Scaled:
    """Return base ** (1 / root): repeated square roots, one per binary digit of 1 / root."""
    numerator, denominator = base.as_integer_ratio()
    m = numerator << (_BITS - numerator.bit_length())
    s = denominator.bit_length() - 1 - numerator.bit_length()
    if root == 1:
        return m, s
    result, remainder = _ONE, 1
    for _ in range(_BITS):
        m, s = math.isqrt(m << (_BITS - (s & 1))), s >> 1
        remainder *= 2
        if remainder >= root:
            remainder -= root
            result = _times(result, (m, s))
    return result
