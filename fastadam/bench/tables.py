"""What was measured, as tables for a terminal, and what they hold for."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from fastadam.bench import measure, peers
from fastadam.bench.report import fastadam_seconds, not_measured, step_bytes
from fastadam.bench.text import (
    Column,
    column,
    format_ratio,
    format_seconds,
    print_columns,
    say,
    split,
)
from fastadam.bench.workloads import count
from fastadam.machine import BUSY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from fastadam.bench.report import OwnTime, Part
    from fastadam.bench.session import Measured, Session
    from fastadam.bench.workloads import Shape

__all__ = ["busy_processes", "show", "show_load", "show_table"]

# Of what busy processes should get; with less, they did not run all the time.
LEAST_SHARE = 0.5
ROOFLINES = {
    "cpu": "the rooflines, passes over the same memory: without arithmetic, and with a square root"
    " and a division for each element",
    "cuda": "the roofline, a copy of half as many bytes on the device, which moves each twice",
}


def _console() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False)


def _micro(console: Console) -> str:
    return "us" if console.options.ascii_only else "\N{MICRO SIGN}s"


def show(session: Session, parts: Sequence[Part], report: Mapping[str, Any]) -> None:
    """Print tables of pairs, what they hold for, and what there is none of.

    `parts` is what was asked for, `report` what `fastadam.bench.report.to_dict`
    made of it.
    """
    console, dtype = _console(), report["settings"]["dtype"]
    for part in parts:
        what = part.what if session.device == "cuda" else "a step"
        say(
            f"\nTime of {what}; after it, how many times as long the others take, and how close "
            f"fastadam comes to {ROOFLINES[session.device]} (100%: as fast).\n"
        )
        by_size = [str(size) for size in part.sizes]
        for names, first in ((part.named, "workload"), (by_size, "elements")):
            shapes = {name: part.shapes[name] for name in names}
            show_table(console, session.results(part.tail), shapes, first=first, dtype=dtype)
    if session.device == "cuda":
        _show_figures(_micro(console), report["figures"], list(report["workloads"]))
    _show_conditions(report)
    _show_noise(report)
    missing = not_measured(session.missing, parts)
    if missing:
        say("\nNot measured:")
    for line in missing:
        say(line)


def show_table(
    console: Console,
    results: Sequence[Measured],
    shapes: Mapping[str, Sequence[Shape]],
    *,
    first: str,
    dtype: str,
) -> None:
    """Print a table of some workloads, cut in several where the console is narrow."""
    times = fastadam_seconds(results)
    rows = [name for name in shapes if name in times]
    if not rows:
        return
    elements = [count(shapes[name]) for name in rows]
    each = step_bytes(dtype, results[0].tail)
    rates = [
        size * each / times[n].seconds.median / 1e9 for n, size in zip(rows, elements, strict=True)
    ]
    micro = _micro(console)
    # Those of every table, those for a wide one, the ratios, and the same with quartiles.
    fixed = [
        column(("", first), (f"{int(name):,}" if name.isdigit() else name for name in rows)),
        column(("", "fastadam"), (_time(times[name], micro) for name in rows)),
    ]
    extra = [
        column(("", "tensors"), (f"{len(shapes[name]):,}" for name in rows)),
        column(("", "elements"), (f"{size:,}" for size in elements)),
        column(
            ("", "GB/s"),
            ("-" if times[n].noisy else f"{r:.1f}" for n, r in zip(rows, rates, strict=True)),
        ),
    ]
    plain, full = [], []
    for name, peer in {peer.name: peer for peer in (*peers.PEERS, *peers.OWN)}.items():
        found = {one.workload: one for one in results if one.contender == name}
        own = [found.get(row) for row in rows]
        if any(own):
            as_share = name in peers.ROOFLINES
            plain.append(Column(peer.head, [_cell(one, as_share, False) for one in own]))
            full.append(Column(peer.head, [_cell(one, as_share, True) for one in own]))

    room = console.width + 2 - sum(column.width for column in (*fixed, *extra))
    for columns in (full, plain):
        if sum(column.width for column in columns) <= room:
            print_columns(console, fixed + extra + columns)
            return
    for part in split(fixed, plain, console.width):
        print_columns(console, part)


def _time(own: OwnTime, micro: str) -> str:
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


def _show_figures(micro: str, found: Mapping[str, Any], workloads: Sequence[str]) -> None:
    """Print what the tables do not show: bandwidths, and what calls cost on the host."""

    def title(name: str) -> str:
        return f"{int(name):,} elements" if name.isdigit() else name

    def quartiles(one: Mapping[str, Any], text: Any) -> str:
        noisy = ", noisy" if one["noisy"] else ""
        return f"(quartiles {text(one['q1'])} - {text(one['q3'])}{noisy})"

    for key, what in (("copy_fraction", "a step"), ("tail_copy_fraction", "the whole tail")):
        for name in workloads:
            if name in found[key]:
                one = found[key][name]
                rate, copied = (one[f"{k}bytes_per_second"] / 1e9 for k in ("", "copy_"))
                say(
                    f"Bandwidth of {what}, {title(name)}: {rate:,.0f} GB/s, {one['median']:.1%} of"
                    f" a copy's {copied:,.0f} GB/s {quartiles(one, '{:.1%}'.format)}"
                )
    for name in workloads:
        if name in found["tail_torch_fused"]:
            one = found["tail_torch_fused"][name]
            say(
                f"The whole tail, {title(name)}: torch fused takes {format_ratio(one['median'])}"
                f" times as long {quartiles(one, format_ratio)}"
            )
    for name in workloads:
        costs = found["host_seconds"].get(name, {})
        texts = [f"{who} {format_seconds(costs[who]['median'], micro)}" for who in costs]
        if texts:
            say(f"A call alone on the host, {title(name)}: {', '.join(texts)}")


def _show_conditions(report: Mapping[str, Any]) -> None:
    """Print what results hold for: processor, device, threads, versions."""
    machine = report["machine"]
    quota = "" if machine["cpu_quota"] is None else f", the time of {machine['cpu_quota']:g}"
    say(f"{machine['cpu']}, {machine['cpus_allowed']} CPUs{quota}; {machine['system']}")
    if "device" in report:
        say(report["device"]["summary"])
    by_number: dict[int, list[str]] = {}
    for name, threads in report["threads"].items():
        if threads is not None:
            title = peers.by_name(name).title
            by_number.setdefault(threads, []).append(title)
    text = "; ".join(f"{number} ({', '.join(titles)})" for number, titles in by_number.items())
    layer = f"; threading layer {report['layer']}" if report.get("layer") else ""
    if text:
        say(f"Threads of a large step: {text}{layer}")
    say(", ".join(f"{name} {version}" for name, version in report["versions"].items()))


def _show_noise(report: Mapping[str, Any]) -> None:
    """Print how pairs were measured, and how far to trust them."""
    counts = sorted({result["rounds"] for result in report["results"]})
    rounds = " to ".join(str(number) for number in dict.fromkeys((counts[0], counts[-1])))
    say(
        f"{report['settings']['dtype']}; medians of {rounds} rounds, in which the two of a pair"
        " take turns in a process of their own; fastadam's own time is of the same rounds."
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
            f"noisy: {apart + crowded} of {len(report['results'])} ratios are too uncertain to "
            f"show: {text}."
        )
    busy = max((cpus or 0.0 for cpus in report["other_cpus"].values()), default=0.0)
    if busy > BUSY:
        means = (
            " meanwhile, which may have held up calls on the host."
            if "device" in report
            else " meanwhile. Threads that wait for one another then take many times as long, so"
            " that the ratios say little: measure again on an idle machine."
        )
        say(f"Warning: other processes kept up to {busy:.1f} CPUs busy{means}")


# Beside busy processes


def busy_processes(number: int) -> str:
    """Say how many processes keep the machine busy, as it goes on after "beside".

    Examples
    --------
    >>> from fastadam.bench.tables import busy_processes
    >>> busy_processes(1), busy_processes(0)
    ('1 busy process', 'no busy process')
    """
    return f"{number or 'no'} busy process{'es' if number > 1 else ''}"


def show_load(report: Mapping[str, Any]) -> None:
    """Print a table of each kind of loop, of `fastadam.bench.report.load_to_dict`."""
    console = _console()
    say(
        f"\nMicroseconds of a step ({report['settings']['dtype']}) beside "
        f"{busy_processes(report['settings']['load'])}; then mean / mean, and its standard "
        "error. fastadam-1 is fastadam in one thread.\n"
    )
    totals: dict[tuple[float, bool], list[Any]] = {}
    for total in report["geometric_means"]:
        totals.setdefault((total["work_seconds"], total["clipped"]), []).append(total)
    for (work, clipped), own in totals.items():
        kind = "clipped steps" if clipped else "steps"
        where = f"with {work * 1e3:g} ms of other work between them" if work else "in a bare loop"
        say(f"{kind}, {where}".capitalize())
        columns = _load_columns(report, own, console.options.ascii_only)
        for part in split(columns[:1], columns[1:], console.width):
            print_columns(console, part)
    _show_conditions(report)
    _show_load_noise(report)


def _load_columns(
    report: Mapping[str, Any], totals: Sequence[Mapping[str, Any]], ascii_only: bool
) -> list[Column]:
    def like(key: str, total: Mapping[str, Any], *keys: str) -> list[Any]:
        return [one for one in report[key] if all(one[k] == total[k] for k in keys)]

    place = ("work_seconds", "clipped")
    times: dict[str, list[Any]] = {}
    for one in like("results", totals[0], *place):
        times.setdefault(one["contender"], []).append(one)
    sizes = [f"{one['elements']:,}" for one in next(iter(times.values()))]
    columns = [column(("", "elements"), [*sizes, "all"])]
    for name, own in times.items():
        for key, first in (("mean", name), ("median", "")):
            cells = [f"{one[f'{key}_seconds'] * 1e6:,.0f}" for one in own]
            columns.append(column((first, key), [*cells, ""]))
    plus_minus = "+-" if ascii_only else "\N{PLUS-MINUS SIGN}"
    for total in totals:
        texts = [
            f"{format_ratio(one['ratio'])} {plus_minus} {format_ratio(one['standard_error'])}"
            + (" noisy" if one["noisy"] else "")
            for one in (*like("ratios", total, *place, "contender", "over"), total)
        ]
        # All as long as the longest, so that numbers stand below one another.
        length = max(map(len, texts))
        head = (f"{total['contender']} /", total["over"])
        columns.append(column(head, [f"{text:<{length}}" for text in texts]))
    return columns


def _show_load_noise(report: Mapping[str, Any]) -> None:
    noisy = any(one["noisy"] for one in (*report["ratios"], *report["geometric_means"]))
    fewest = min(one["steps"] for one in report["results"])
    say(
        f"Means and medians of {fewest} steps or more, in short turns beside the same processes; "
        "all: the geometric mean of the ratios"
        + ("; noisy: the standard error is more than a tenth of the ratio." if noisy else "."),
    )
    got, expected, others = (
        report[key] for key in ("load_cpus", "expected_load_cpus", "other_cpus")
    )
    if expected:
        say(f"The busy processes kept {got:.2f} CPUs busy, or more.")
    if got < LEAST_SHARE * expected:
        say(
            f"Warning: their fair share would have been {expected:.2f} CPUs. The load was less "
            "than it should be."
        )
    if others and others > BUSY:
        say(f"Warning: other processes kept {others:.1f} CPUs busy besides.")
    for one in report["not_measured"]:
        say(f"Not measured: {peers.by_name(one['contender']).title}: {one['reason']}")
