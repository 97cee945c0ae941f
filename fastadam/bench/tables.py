"""What was measured, as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fastadam.bench import measure, peers
from fastadam.bench.load import BUSY
from fastadam.bench.report import fastadam_seconds
from fastadam.bench.text import wrapped
from fastadam.bench.workloads import count

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

    from fastadam.bench.report import Own
    from fastadam.bench.session import Measured, Session

__all__ = [
    "Column",
    "format_ratio",
    "format_seconds",
    "print_columns",
    "say",
    "show",
    "show_conditions",
    "split",
]

# In two lines, so that more columns fit beside one another.
HEADS = {
    "torch-fused": ("torch", "fused"),
    "torch-foreach": ("torch", "foreach"),
    "deepspeed": ("", "DeepSpeed"),
    "optax": ("", "optax"),
    "thinc": ("", "thinc"),
    "scikit-learn": ("scikit-", "learn"),
    "opt-grads": ("opt.", "grads"),
    "cupy": ("", "CuPy"),
    "cupy-kernel": ("CuPy", "kernel"),
    "roofline": ("memory", "roofline"),
    "divider": ("divider", "roofline"),
}
# What a step reads and writes, in times the parameters' bytes; with the tail, the gradients
# twice and an average as well.
TRAFFIC, TAIL_TRAFFIC = 7, 11


class Column(NamedTuple):
    """A heading of two lines and a cell per row, each with a style."""

    head: tuple[str, str]
    cells: list[tuple[str, str]]

    @property
    def width(self) -> int:
        """Characters, and two to the next column."""
        return max(len(text) for text in (*self.head, *(cell for cell, _ in self.cells))) + 2


def format_seconds(seconds: float, micro: str = "\N{MICRO SIGN}s") -> str:
    """Write a time in three digits and a unit.

    Parameters
    ----------
    seconds : float
        At least 0.
    micro : str
        The unit of a microsecond.

    Returns
    -------
    str
        Such as ``"53.8 ms"``.

    Examples
    --------
    >>> from fastadam.bench.tables import format_seconds
    >>> format_seconds(0.0538), format_seconds(1.2e-7)
    ('53.8 ms', '120 ns')
    """
    units = ((1.0, "s"), (1e3, "ms"), (1e6, micro))
    fitting = (pair for pair in units if seconds * pair[0] >= 0.9995)
    factor, unit = next(fitting, (1e9, "ns"))
    return f"{_three_digits(seconds * factor)} {unit}"


def format_ratio(ratio: float) -> str:
    """Write a ratio in three digits.

    Parameters
    ----------
    ratio : float
        At least 0.

    Returns
    -------
    str
        Such as ``"1.04"`` or ``"82.2"``.

    Examples
    --------
    >>> from fastadam.bench.tables import format_ratio
    >>> format_ratio(1.04), format_ratio(82.226), format_ratio(1234)
    ('1.04', '82.2', '1,234')
    """
    return _three_digits(ratio)


def _three_digits(number: float) -> str:
    return f"{number:,.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def say(console: Console, text: str) -> None:
    """Print text, on a terminal in lines of whole words, of which one may be longer.

    Parameters
    ----------
    console : rich.console.Console
        Where to.
    text : str
        One or more lines.
    """
    # rich would either cut a word that is longer, or break no line at all.
    width = console.width if console.is_terminal else None
    console.print(wrapped(text, width), no_wrap=True, overflow="ignore", crop=False)


def show(
    console: Console,
    session: Session,
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    *,
    first: str,
    tail: bool,
    dtype: str,
) -> None:
    """Print a table of the workloads, cut in several where the console is narrow.

    Parameters
    ----------
    console : rich.console.Console
        Where to.
    session : Session
        What was measured.
    shapes : mapping of str to sequence of shapes
        The rows.
    first : str
        Heading of the first column.
    tail, dtype
        As they were measured.
    """
    rows = [name for name in shapes if name in fastadam_seconds(session)]
    if not rows:
        return
    fixed, extra, plain, full = _columns(console, session, shapes, rows, first, tail, dtype)
    room = console.width + 2 - sum(column.width for column in fixed)
    spare = sum(column.width for column in extra)
    if sum(column.width for column in full) + spare <= room:
        parts = [fixed + extra + full]
    elif sum(column.width for column in plain) + spare <= room:
        parts = [fixed + extra + plain]
    else:
        parts = split(fixed, plain, console.width)
    for part in parts:
        print_columns(console, part, len(rows))


def split(fixed: Sequence[Column], columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Share columns out to as many tables as they need.

    Parameters
    ----------
    fixed : sequence of Column
        The first ones of every table.
    columns : sequence of Column
        The others.
    width : int
        Characters for a table.

    Returns
    -------
    list of list of Column
        The tables.
    """
    room = width + 2 - sum(column.width for column in fixed)
    parts: list[list[Column]] = []
    left = 0
    for column in columns:
        if column.width > left:
            parts.append(list(fixed))
            left = room
        parts[-1].append(column)
        left -= column.width
    return parts


def _columns(
    console: Console,
    session: Session,
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    rows: Sequence[str],
    first: str,
    tail: bool,
    dtype: str,
) -> tuple[list[Column], list[Column], list[Column], list[Column]]:
    """Return those of every table, those for a wide one, the ratios, and with quartiles."""
    times = fastadam_seconds(session)
    micro = "us" if console.options.ascii_only else "\N{MICRO SIGN}s"
    elements = {name: count(shapes[name]) for name in rows}
    step_bytes = (TAIL_TRAFFIC if tail else TRAFFIC) * (8 if dtype == "float64" else 4)

    def column(head: tuple[str, str], cells: Iterable[str]) -> Column:
        return Column(head, [(cell, "") for cell in cells])

    fixed = [
        column(("", first), (f"{int(name):,}" if name.isdigit() else name for name in rows)),
        column(("", "fastadam"), (_time(times[name], micro) for name in rows)),
    ]
    extra = [
        column(("", "tensors"), (f"{len(shapes[name]):,}" for name in rows)),
        column(("", "elements"), (f"{elements[name]:,}" for name in rows)),
        column(
            ("", "GB/s"),
            (
                "-"
                if times[n].noisy
                else f"{elements[n] * step_bytes / times[n].seconds.median / 1e9:.1f}"
                for n in rows
            ),
        ),
    ]
    ratios = {(one.contender, one.workload): one for one in session.measured}
    plain, full = [], []
    for contender, head in HEADS.items():
        own = [ratios.get((contender, name)) for name in rows]
        if any(own):
            as_share = contender in peers.ROOFLINES
            plain.append(Column(head, [_cell(ratio, as_share, False) for ratio in own]))
            full.append(Column(head, [_cell(ratio, as_share, True) for ratio in own]))
    return fixed, extra, plain, full


def _time(own: Own, micro: str) -> str:
    return "noisy" if own.noisy else format_seconds(own.seconds.median, micro)


def _cell(one: Measured | None, as_share: bool, quartiles: bool) -> tuple[str, str]:
    if one is None:
        return "-", "dim"
    ratio = one.ratio
    if as_share:
        text, texts = f"{ratio.median:.0%}", f"{ratio.q1 * 100:.0f} - {ratio.q3:.0%}"
        style = ""
    else:
        text, texts = format_ratio(ratio.median), " - ".join(map(format_ratio, ratio[1:]))
        # Only what most rounds agree on gets a colour.
        style = "green" if ratio.q1 > 1.02 else "red" if ratio.q3 < 0.98 else ""
    if one.noisy:
        text, style = "noisy", "dim"
    # Beside busy CPUs the quartiles may lie close together, and mean nothing.
    return f"{text} ({texts})" if quartiles and not one.crowded else text, style


def print_columns(console: Console, columns: Sequence[Column], rows: int) -> None:
    """Print a table.

    Parameters
    ----------
    console : rich.console.Console
        Where to.
    columns : sequence of Column
        From left to right.
    rows : int
        How many there are.
    """
    from rich import box
    from rich.segment import Segment, Segments
    from rich.table import Table
    from rich.text import Text

    # Between columns stand a blank of the padding and one of the box.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for place, column in enumerate(columns):
        head = Text("\n".join(column.head))
        table.add_column(head, justify="right" if place else "left", no_wrap=True)
    for row in range(rows):
        table.add_row(*(Text(*column.cells[row]) for column in columns))
    # rich fills all lines up to the same length.
    lines = Segment.split_lines(console.render(table))
    for line in lines:
        while line and not line[-1].text.strip():
            line.pop()
        console.print(Segments([*line, Segment.line()]), end="")
    console.print()


def show_conditions(console: Console, report: Mapping[str, Any]) -> None:
    """Print what the results hold for: processor, threads, versions, rounds.

    Parameters
    ----------
    console : rich.console.Console
        Where to.
    report : mapping
        From `fastadam.bench.report.to_dict`.
    """
    machine = report["machine"]
    quota = "" if machine["cpu_quota"] is None else f", the time of {machine['cpu_quota']:g}"
    say(console, f"{machine['cpu']}, {machine['cpus_allowed']} CPUs{quota}; {machine['system']}")
    if "device" in report:
        say(console, report["device"]["summary"])
    by_number: dict[int, list[str]] = {}
    for name, threads in report["threads"].items():
        if threads is not None:
            by_number.setdefault(threads, []).append(peers.by_name(name).title)
    text = "; ".join(f"{number} ({', '.join(titles)})" for number, titles in by_number.items())
    if text:
        say(console, f"Threads of a large step: {text}")
    say(console, ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    counts = sorted({result["rounds"] for result in report["results"]})
    rounds = " to ".join(str(number) for number in dict.fromkeys((counts[0], counts[-1])))
    say(
        console,
        f"{report['settings']['dtype']}; medians of {rounds} rounds, in which the two of a pair"
        " take turns in a process of their own; fastadam's own time is of the same rounds.",
    )
    crowded = sum(result["crowded"] for result in report["results"])
    apart = sum(result["noisy"] and not result["crowded"] for result in report["results"])
    reasons = [
        (apart, f"their rounds differ by more than {measure.NOISY - 1:.0%}"),
        (crowded, "other processes used CPUs that the step needs"),
    ]
    if apart or crowded:
        text = "; ".join(f"{number} because {reason}" for number, reason in reasons if number)
        say(
            console,
            f"noisy: {apart + crowded} of {len(report['results'])} ratios are too uncertain to "
            f"show: {text}.",
        )
    busy = [cpus for cpus in report["other_cpus"].values() if cpus and cpus > BUSY]
    if busy and "device" in report:
        say(
            console,
            f"Warning: other processes kept up to {max(busy):.1f} CPUs busy meanwhile, which may"
            " have held up calls on the host.",
        )
    elif busy:
        say(
            console,
            f"Warning: other processes kept up to {max(busy):.1f} CPUs busy meanwhile. Threads"
            " that wait for one another then take many times as long, so that the ratios say"
            " little: measure again on an idle machine.",
        )
