"""The loss curve, as text for a terminal and as a picture."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadam.demo.data import VOCAB_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from fastadam.demo.train import StepRecord

__all__ = ["save_plot", "text_curve"]

# The bit of each of a braille character's 4 x 2 dots, in the Unicode block from U+2800.
BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def text_curve(
    values: Sequence[float],
    *,
    width: int = 64,
    height: int = 6,
    ascii_only: bool = False,
    first: int = 1,
) -> str:
    """Draw a curve in characters.

    Parameters
    ----------
    values : sequence of float
        At least one, all finite. Each column shows the mean of its share.
    width, height : int
        Size of the drawing in characters, without the axes.
    ascii_only : bool, default False
        Draw with ``*`` in place of braille dots (2 x 4 per character).
    first : int, default 1
        Number of the first value.

    Returns
    -------
    str
        `height` lines and two for the horizontal axis, which counts the
        values from `first`; no newline at the end.

    Raises
    ------
    ValueError
        If there are no values, or one is not finite.

    Examples
    --------
    >>> from fastadam.demo.figures import text_curve
    >>> print(text_curve([3, 2, 1], width=9, height=3, ascii_only=True))
    3.00 |***
         |   ***
    1.00 |      ***
         +---------
          1       3
    """
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values must be finite numbers, at least one, got {values!r}")
    columns, rows = (width, height) if ascii_only else (2 * width, 4 * height)
    means = _column_means(np.asarray(values, dtype=np.float64), columns)
    dots = _trace(means, rows)
    if ascii_only:
        tick, side, corner, dash = "||+-"
        lines = ["".join("*" if dot else " " for dot in row) for row in dots]
    else:
        tick, side, corner, dash = "┤│└─"
        codes = np.einsum("rycx,yx->rc", dots.reshape(height, 4, width, 2), BRAILLE)
        lines = ["".join(chr(0x2800 + code) for code in row) for row in codes]
    labels = [""] * height
    labels[-1] = f"{means.min():.2f}"
    labels[0] = f"{means.max():.2f}"
    margin = max(len(label) for label in labels)
    drawn = [
        f"{label:>{margin}} {tick if label else side}{line}".rstrip(" \u2800")
        for label, line in zip(labels, lines, strict=True)
    ]
    drawn.append(" " * margin + f" {corner}" + dash * width)
    left, right = str(first), str(first + len(values) - 1)
    drawn.append(" " * margin + f"  {left}{right.rjust(width - len(left))}")
    return "\n".join(drawn)


def _column_means(values: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
    # Fewer values than columns: neighbouring columns show the same one.
    edges = [column * len(values) // columns for column in range(columns + 1)]
    return np.array([values[a : max(b, a + 1)].mean() for a, b in itertools.pairwise(edges)])


def _trace(means: NDArray[np.float64], rows: int) -> NDArray[np.int64]:
    low, high = means.min(), means.max()
    span = high - low if high > low else 1.0
    heights = np.rint((high - means) / span * (rows - 1)).astype(int)  # 0 is the top row
    dots = np.zeros((rows, len(means)), dtype=np.int64)
    before = heights[0]
    for column, row in enumerate(heights):
        # Down or up to this column's row, so that a steep curve has no gaps.
        step = 1 if row >= before else -1
        dots[np.arange(before + step * (row != before), row + step, step), column] = 1
        before = row
    return dots


def save_plot(records: Sequence[StepRecord], path: Path, *, title: str) -> None:
    """Save a picture of the loss and the learning rate over the steps.

    Parameters
    ----------
    records : sequence of StepRecord
        As from `train`, at least one.
    path : pathlib.Path
        Its ending names the format: ``.png``, ``.svg`` or ``.pdf``.
    title : str
        Stands above the picture.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed.
    OSError
        If the file cannot be written.
    """
    try:
        # Not pyplot: no window, no global state, the same on a machine without a screen.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'a plot needs matplotlib: pip install "fastadam[demo]"', name=error.name
        ) from error

    steps = [record.step + 1 for record in records]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates = axes.twinx()
    # A twin lies on top of the axes it was made from; the loss belongs in front.
    axes.set_zorder(1)
    axes.patch.set_visible(False)

    losses = [record.loss for record in records]
    smoothed = [record.smoothed_loss for record in records]
    guess = math.log(VOCAB_SIZE)
    handles: list[Any] = [
        axes.plot(steps, losses, ".", ms=3, color="#9db8d9", label="loss of one name")[0],
        axes.plot(steps, smoothed, lw=2, color="#1f4e8c", label="smoothed loss")[0],
        axes.axhline(
            guess, lw=1, ls="--", color="#666666", label=f"uniform guess, ln 27 = {guess:.2f}"
        ),
        rates.plot(
            steps,
            [record.lr for record in records],
            lw=1.2,
            color="#d9822b",
            label="learning rate",
        )[0],
    ]
    axes.set(title=title, xlabel="step", ylabel="cross-entropy (nats per character)")
    axes.set_xlim(steps[0], max(steps[0] + 1, steps[-1]))
    axes.grid(alpha=0.25)
    rates.set_ylabel("learning rate", color="#d9822b")
    rates.tick_params(axis="y", colors="#d9822b")
    rates.set_ylim(bottom=0)
    for spine in (*axes.spines.values(), *rates.spines.values()):
        spine.set_visible(spine.spine_type in ("left", "bottom"))
    axes.legend(handles=handles, loc="upper right", fontsize="small", framealpha=0.9)
    figure.savefig(path, dpi=150)
