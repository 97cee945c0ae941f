"""What was measured beside busy processes: one dict fit for JSON, and tables."""

from __future__ import annotations

import datetime as dt
import sys
from typing import TYPE_CHECKING, Any

from fastadam.bench import peers, under_load
from fastadam.bench.load import BUSY
from fastadam.bench.report import installed
from fastadam.bench.tables import Column, format_ratio, print_columns, say, split

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastadam.bench.under_load import Ratio, Row, UnderLoad

__all__ = ["show", "to_dict"]

# Of what the busy processes should get; with less, they did not run all the time.
LEAST_SHARE = 0.5


def to_dict(found: UnderLoad, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put results into a form fit for JSON.

    Parameters
    ----------
    found : UnderLoad
        What was measured.
    settings : mapping
        Goes in as it is; ``load`` is among it, the number of processes.

    Returns
    -------
    dict
        With ``date``, ``machine``, ``versions``, ``settings`` and
        ``not_measured`` as of `fastadam.bench.report.to_dict`, and

        ``threads``, ``layer``
            By contender (int or None); fastadam's threading layer.
        ``load_cpus``, ``expected_load_cpus``
            The least that the busy processes got during a row, and what
            would be their fair share (float: CPUs).
        ``other_cpus``
            What other processes got meanwhile (float or None).
        ``results``
            A list of dicts: ``elements`` (int), ``work_seconds`` (float:
            other work between two steps), ``clipped`` (bool), ``contender``
            (str), ``mean_seconds``, ``median_seconds`` (float: of a step),
            ``steps`` (int), ``load_cpus`` (float).
        ``ratios``
            A list of dicts: ``elements``, ``work_seconds``, ``clipped``;
            ``ratio``, ``standard_error`` (float: fastadam's mean over that in
            one thread), ``noisy`` (bool).
        ``geometric_means``
            The same over all sizes, without ``elements``.
    """
    from fastadam.cli import probe

    rows = list(found.load)
    groups = list(dict.fromkeys((row.work, row.clipped) for row in rows))
    names = [name for name in under_load.CONTENDERS if name in found.threads]
    packages = ["numba", "numpy"]
    packages += ["torch"] if "torch-fused" in names else []
    packages += ["tbb"] if found.layer == "tbb" else []
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": probe.machine(),
        "versions": installed(packages),
        "settings": {**settings, **peers.HYPERPARAMETERS},
        "threads": dict(found.threads),
        "layer": found.layer,
        "load_cpus": min(found.load.values()),
        "expected_load_cpus": under_load.expected_cpus(
            settings["load"], found.threads["fastadam"] or 1
        ),
        "other_cpus": found.other_cpus,
        "results": [
            {
                **_place(row),
                "contender": name,
                "mean_seconds": found.mean(row, name),
                "median_seconds": found.median(row, name),
                "steps": found.steps(row, name),
                "load_cpus": found.load[row],
            }
            for row in rows
            for name in names
            if (row, name) in found.times
        ],
        "ratios": [{**_place(row), **_ratio(found.ratio(row))} for row in rows],
        "geometric_means": [
            {
                "work_seconds": work,
                "clipped": clipped,
                **_ratio(
                    under_load.geometric_mean(
                        [found.ratio(row) for row in rows if row[1:] == (work, clipped)]
                    )
                ),
            }
            for work, clipped in groups
        ],
        "not_measured": [
            {"contender": one.contender, "workload": one.workload, "reason": one.reason}
            for one in found.missing
        ],
    }


def _place(row: Row) -> dict[str, Any]:
    return {"elements": row.size, "work_seconds": row.work, "clipped": row.clipped}


def _ratio(one: Ratio) -> dict[str, Any]:
    return {"ratio": one.value, "standard_error": one.error, "noisy": one.noisy}


def show(report: Mapping[str, Any]) -> None:
    """Print a table of each kind of loop, and what they hold for.

    Parameters
    ----------
    report : mapping
        Of `to_dict`.
    """
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, markup=False)
    number = report["settings"]["load"]
    say(
        console,
        f"\nMicroseconds of a step ({report['settings']['dtype']}) beside "
        f"{under_load.busy_processes(number)}; then the mean of "
        "fastadam over the mean of fastadam in one thread, and its standard error.\n",
    )
    for total in report["geometric_means"]:
        kind = "clipped steps" if total["clipped"] else "steps"
        work = total["work_seconds"]
        where = f"with {work * 1e3:g} ms of other work between them" if work else "in a bare loop"
        say(console, f"{kind}, {where}".capitalize())
        columns = _columns(report, total, console.options.ascii_only)
        for part in split(columns[:1], columns[1:], console.width):
            print_columns(console, part, len(columns[0].cells))
    _show_conditions(console, report)


def _columns(
    report: Mapping[str, Any], total: Mapping[str, Any], ascii_only: bool
) -> list[Column]:
    def of_group(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        keys = ("work_seconds", "clipped")
        return [one for one in entries if all(one[key] == total[key] for key in keys)]

    def column(head: tuple[str, str], cells: Sequence[str]) -> Column:
        return Column(head, [(cell, "") for cell in cells])

    ratios, results = of_group(report["ratios"]), of_group(report["results"])
    columns = [column(("", "elements"), [f"{one['elements']:,}" for one in ratios] + ["all"])]
    heads = {"fastadam": "fastadam", "fastadam-1": "1 thread", "torch-fused": "torch"}
    for name, head in heads.items():
        own = [one for one in results if one["contender"] == name]
        for key, first in (("mean", head), ("median", "")) if own else ():
            cells = [f"{one[f'{key}_seconds'] * 1e6:,.0f}" for one in own]
            columns.append(column((first, key), [*cells, ""]))
    plus_minus = "+-" if ascii_only else "\N{PLUS-MINUS SIGN}"
    texts = [
        f"{format_ratio(one['ratio'])} {plus_minus} {format_ratio(one['standard_error'])}"
        + (" noisy" if one["noisy"] else "")
        for one in (*ratios, total)
    ]
    # All as long as the longest, so that numbers stand below one another.
    length = max(map(len, texts))
    return [*columns, column(("", "ratio"), [f"{text:<{length}}" for text in texts])]


def _show_conditions(console: Any, report: Mapping[str, Any]) -> None:
    machine, threads = report["machine"], report["threads"]
    say(console, f"{machine['cpu']}, {machine['cpus_allowed']} CPUs; {machine['system']}")
    layer = f" ({report['layer']})" if report["layer"] else ""
    texts = [f"fastadam {threads['fastadam']}{layer}"]
    texts += [f"torch {threads['torch-fused']}"] if "torch-fused" in threads else []
    say(console, f"Threads of a large step: {', '.join(texts)}")
    say(console, ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    noisy = any(one["noisy"] for one in (*report["ratios"], *report["geometric_means"]))
    fewest = min(one["steps"] for one in report["results"])
    say(
        console,
        f"Means and medians of {fewest} steps or more, in short turns beside the same processes; "
        "all: the geometric mean of the ratios"
        + ("; noisy: the standard error is more than a tenth of the ratio." if noisy else "."),
    )
    got, expected = report["load_cpus"], report["expected_load_cpus"]
    if expected:
        say(console, f"The busy processes kept {got:.2f} CPUs busy, or more.")
    if got < LEAST_SHARE * expected:
        say(
            console,
            f"Warning: their fair share would have been {expected:.2f} CPUs. The load was less "
            "than it should be.",
        )
    if report["other_cpus"] and report["other_cpus"] > BUSY:
        say(
            console,
            f"Warning: other processes kept {report['other_cpus']:.1f} CPUs busy besides.",
        )
    for one in report["not_measured"]:
        title = peers.by_name(one["contender"]).title
        say(console, f"Not measured: {title}: {one['reason']}")
