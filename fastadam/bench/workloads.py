"""The shapes on which optimizers are compared, and arrays of those shapes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["DEFAULTS", "ONE_BY_ONE", "WORKLOADS", "Defaults", "Shape", "count", "draw"]

Shape = tuple[int, ...]

# Random numbers drawn for one array; a longer one repeats them, which is faster, and to an
# optimizer's time the values do not matter as long as they are normal numbers.
BLOCK = 65_537


def _gpt2() -> list[Shape]:
    width, layer = 768, list[Shape]()
    for rows, columns in [(width, 3 * width), (width, width)]:
        layer += [(rows, columns), (columns,)]
    for rows, columns in [(width, 4 * width), (4 * width, width)]:
        layer += [(rows, columns), (columns,)]
    norms = [(width,)] * 2
    return [(50_257, width), (1_024, width), *(12 * [*layer, *norms, *norms]), *norms]


def _small_transformer() -> list[Shape]:
    width, vocabulary, context = 384, 3_072, 256
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = 4 * [(width, width), (width,)]  # query, key, value, output
    up: list[Shape] = [(width, 4 * width), (4 * width,)]
    down: list[Shape] = [(4 * width, width), (width,)]
    layers = 10 * [*norm, *attention, *norm, *up, *down]
    head: list[Shape] = [(width, vocabulary), (vocabulary,)]
    return [(vocabulary, width), (context, width), *norm, *layers, *norm, *head]


WORKLOADS: dict[str, list[Shape]] = {
    # The character-level transformer of `fastadam train`: 9 tensors, 4,192 elements.
    "micro": [(27, 16), (16, 16), (27, 16), *(4 * [(16, 16)]), (64, 16), (16, 64)],
    # A perceptron on images of 28 x 28: 6 tensors, 269,322 elements.
    "mlp": [(784, 256), (256,), (256, 256), (256,), (256, 10), (10,)],
    # Nothing but tensors: 1,000 of 1,024 elements.
    "many": [(32, 32) for _ in range(1_000)],
    # A transformer of 10 layers and width 384: 168 tensors, 20,206,848 elements.
    "20M": _small_transformer(),
    # Nothing but elements: 4 tensors, 67,108,864 elements.
    "67M": [(4_096, 4_096) for _ in range(4)],
    # GPT-2 small: 148 tensors, 124,439,808 elements.
    "gpt2": _gpt2(),
    # 500 optimizers of one tensor of 1,024 elements, stepped one after the other.
    "one-by-one": [(1_024,) for _ in range(500)],
}
# Those of which every tensor has an optimizer of its own.
ONE_BY_ONE = ("one-by-one",)


class Defaults(NamedTuple):
    """What is measured on one kind of device where nobody says otherwise.

    Names of workloads of a step, of the whole tail of a step, and with
    ``--quick``; then lengths of single arrays, of a step, with ``--quick``, and
    with the tail.
    """

    step: tuple[str, ...]
    tail: tuple[str, ...]
    quick: tuple[str, ...]
    sizes: tuple[int, ...]
    quick_sizes: tuple[int, ...]
    tail_sizes: tuple[int, ...] = ()


DEFAULTS = {
    "cpu": Defaults(
        step=("micro", "mlp", "many", "20M", "gpt2", "one-by-one"),
        tail=("micro", "mlp", "many", "20M", "67M", "gpt2"),
        quick=("micro", "mlp", "many"),
        sizes=tuple(10**k for k in range(3, 9)),
        quick_sizes=tuple(10**k for k in range(3, 6)),
    ),
    # Launches are what counts for the many, memory for the others.
    "cuda": Defaults(
        step=("many", "gpt2", "one-by-one"),
        tail=("many", "gpt2"),
        quick=("many",),
        sizes=tuple(10**k for k in range(6, 10)),
        quick_sizes=(10**6, 10**7),
        tail_sizes=(10**8,),
    ),
}


def count(shapes: Sequence[Shape]) -> int:
    """Count the elements of arrays of these shapes.

    Examples
    --------
    >>> from fastadam.bench.workloads import WORKLOADS, count
    >>> len(WORKLOADS["20M"]), count(WORKLOADS["20M"])
    (168, 20206848)
    """
    return sum(math.prod(shape) for shape in shapes)


def draw(
    shapes: Sequence[Shape], dtype: str, seed: int = 0
) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Make parameters and gradients of these shapes; the same seed gives the same values.

    Their absolute values lie between 0.1 and 1: squares of tiny gradients
    would be subnormal, and arithmetic on those is slow.

    Examples
    --------
    >>> from fastadam.bench.workloads import draw
    >>> params, grads = draw([(2, 3), (4,)], "float32")
    >>> [grad.shape for grad in grads]
    [(2, 3), (4,)]
    """
    rng = np.random.default_rng(seed)

    def arrays() -> list[NDArray[Any]]:
        block = rng.uniform(0.1, 1.0, min(BLOCK, max(map(math.prod, shapes), default=0)))
        block = (block * rng.choice([-1.0, 1.0], block.size)).astype(dtype)
        return [_filled(shape, block) for shape in shapes]

    return arrays(), arrays()


def _filled(shape: Shape, block: NDArray[Any]) -> NDArray[Any]:
    array = np.empty(shape, block.dtype)
    flat = array.reshape(-1)
    for start in range(0, flat.size, max(1, block.size)):
        flat[start : start + block.size] = block[: flat.size - start]
    return array
