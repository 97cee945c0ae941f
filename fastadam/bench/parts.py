"""What one command measures: a step, the whole tail of a step, or both."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastadam.bench import cuda_report, report, workloads
from fastadam.bench.session import Session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Part", "missing_lines", "show", "to_dict"]


@dataclass
class Part:
    """What is measured in one go.

    Attributes
    ----------
    tail : bool
        The whole tail of a step rather than a step.
    named : list of str
        Workloads.
    sizes : tuple of int
        Lengths of single arrays.
    session : Session
        What was measured of it.
    """

    tail: bool
    named: list[str]
    sizes: tuple[int, ...]
    session: Session = field(default_factory=Session)

    @property
    def what(self) -> str:
        """What it is, in words."""
        return "the tail of a training step" if self.tail else "a step"

    @property
    def shapes(self) -> dict[str, Sequence[tuple[int, ...]]]:
        """The workloads: those of a name, then single arrays."""
        named = {name: workloads.WORKLOADS[name] for name in self.named}
        return {**named, **{str(size): [(size,)] for size in self.sizes}}


def to_dict(parts: Sequence[Part], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put the results of all parts into a form fit for JSON.

    Parameters
    ----------
    parts : sequence of Part
        One of a kind at most; on the CPU, one.
    settings : mapping
        Goes in as it is. On a CUDA device, ``device`` is among it.

    Returns
    -------
    dict
        Of `fastadam.bench.report`, or `fastadam.bench.cuda_report`.
    """
    if "device" not in settings:
        return report.to_dict(parts[0].session, settings, parts[0].shapes)
    shapes: dict[str, Any] = {}
    sessions = {False: Session(), True: Session()}
    for part in parts:
        shapes |= part.shapes
        sessions[part.tail] = part.session
    facts = cuda_report.device_facts()
    return cuda_report.to_dict(sessions[False], sessions[True], settings, shapes, facts)


def missing_lines(parts: Sequence[Part]) -> list[str]:
    """Say what was not measured, one line for each reason.

    Parameters
    ----------
    parts : sequence of Part
        After they were measured.

    Returns
    -------
    list of str
        As of `fastadam.bench.report.not_measured`.
    """
    lines = []
    for part in parts:
        lines += report.not_measured(part.session.missing, part.shapes)
    return list(dict.fromkeys(lines))


def show(parts: Sequence[Part], found: Mapping[str, Any]) -> None:
    """Print tables, what they hold for, and what there is none of.

    Parameters
    ----------
    parts : sequence of Part
        After they were measured.
    found : mapping
        Of `to_dict`.
    """
    from rich.console import Console

    from fastadam.bench import tables

    console = Console(file=sys.stdout, highlight=False, markup=False)
    rooflines = (
        "the rooflines, passes over the same memory: without arithmetic, and with a square root "
        "and a division for each element"
    )
    if "device" in found:
        rooflines = (
            "the roofline, a copy of half as many bytes on the device, which moves each twice"
        )
    for part in parts:
        what = part.what if "device" in found else "a step"
        tables.say(
            console,
            f"\nTime of {what}; after it, how many times as long the others take, and how close "
            f"fastadam comes to {rooflines} (100%: as fast).\n",
        )
        shapes, session = part.shapes, part.session
        own = {name: shapes[name] for name in part.named}
        by_size = {str(size): shapes[str(size)] for size in part.sizes}
        for rows, first in ((own, "workload"), (by_size, "elements")):
            dtype = found["settings"]["dtype"]
            tables.show(console, session, rows, first=first, tail=part.tail, dtype=dtype)
    if "device" in found:
        cuda_report.show_figures(console, found["figures"], list(found["workloads"]))
    tables.show_conditions(console, found)
    missing = missing_lines(parts)
    if missing:
        console.print("\nNot measured:")
    for line in missing:
        tables.say(console, line)
