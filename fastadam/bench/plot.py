"""A picture of what was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fastadam.bench import peers
from fastadam.bench.report import fastadam_seconds
from fastadam.bench.text import format_ratio, format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fastadam.bench.report import OwnTime
    from fastadam.bench.session import Measured

__all__ = ["save_plot"]

# In the order of bars and lines.
CONTENDERS = {
    peer.name: peers.by_name(peer.name) for peer in (peers.FASTADAM, *peers.PEERS, *peers.OWN)
}


def save_plot(
    results: Sequence[Measured],
    path: Path,
    *,
    names: Sequence[str],
    sizes: Sequence[int],
    title: str,
) -> None:
    """Save bars of the ratios, and lines of the cost of a parameter by size.

    The bars are of the workloads `names`, the lines over `sizes`. Of what is
    noisy, only the quartiles are drawn, with that word beside them. The ending of
    `path` names the format: ``.png``, ``.svg`` or ``.pdf``. OSError if the file
    cannot be written.
    """
    # Not pyplot: no window, no global state, the same on a machine without a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    times = fastadam_seconds(results)
    lengths = [size for size in sizes if str(size) in times]
    bars = {
        name: [one for one in results if one.workload == name] for name in names if name in times
    }
    height = max(4.5, 1.8 + 0.22 * sum(len(group) + 1.5 for group in bars.values()))
    panels = bool(bars) + bool(lengths)
    figure = Figure(figsize=(7.0 * max(1, panels), height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = iter(figure.subplots(1, max(1, panels), squeeze=False)[0])
    if bars:
        _bars(next(axes), bars, times)
    if lengths:
        _lines(next(axes), results, lengths, times)
    handles: dict[str, Any] = {}  # the same colours in both panels: one legend
    for panel in figure.axes:
        found, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center",
        ncols=4 * max(1, panels), fontsize="small", frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def _bars(
    axes: Any, groups: Mapping[str, Sequence[Measured]], times: Mapping[str, OwnTime]
) -> None:
    order = list(CONTENDERS)
    place, ticks, labelled = 0.0, [], set()
    ratios = [one.ratio for group in groups.values() for one in group]
    lowest, highest = min(r.q1 for r in ratios), max(r.q3 for r in ratios)
    for name, group in groups.items():
        start = place
        for one in sorted(group, key=lambda one: order.index(one.contender)):
            ratio, peer = one.ratio, CONTENDERS[one.contender]
            label = None if one.contender in labelled else peer.title
            labelled.add(one.contender)
            start_of_bar, end = (ratio.q1, ratio.q3) if one.noisy else (1, ratio.median)
            axes.barh(
                place,
                end - start_of_bar,
                left=start_of_bar,
                height=0.3 if one.noisy else 0.85,
                color=peer.color,
                label=label,
                zorder=2,
            )
            axes.plot([ratio.q1, ratio.q3], [place, place], lw=1, color="#222222", zorder=3)
            left = ratio.median < 1
            axes.annotate(
                "noisy" if one.noisy else format_ratio(ratio.median),
                (min(ratio.median, ratio.q1) if left else max(ratio.median, ratio.q3), place),
                (-3 if left else 3, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=7,
            )
            place += 1
        own = "noisy" if times[name].noisy else format_seconds(times[name].seconds.median)
        ticks.append(((start + place - 1) / 2, f"{name}\n{own}"))
        place += 1.5
    axes.axvline(1, color=peers.FASTADAM.color, lw=1.5, zorder=4)
    axes.set_xscale("log")
    axes.set_xlim(lowest / 1.7, highest * 1.7)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_title("Time of a step; below each name, fastadam's", fontsize="medium")
    axes.set_xlabel("times as long as fastadam (fastadam = 1, log scale; line: quartiles)")
    _finish(axes, "x")


def _lines(
    axes: Any, results: Sequence[Measured], sizes: Sequence[int], times: Mapping[str, OwnTime]
) -> None:
    for name, peer in CONTENDERS.items():
        own = peer is peers.FASTADAM
        found = {one.workload: one for one in results if one.contender == name}
        # By size: seconds, of the same rounds as the ratios; and where those are noisy, which.
        quiet, noisy = {}, {}
        for size in sizes:
            one = found.get(str(size))
            if own and times[str(size)].noisy:
                noisy[size] = times[str(size)].seconds[1:]
            elif own:
                quiet[size] = times[str(size)].seconds.median
            elif one and one.noisy:
                noisy[size] = (one.seconds, one.seconds)
            elif one:
                quiet[size] = one.seconds
        if quiet:
            axes.plot(
                # No line over a noisy point: NaN leaves a gap.
                sizes, [quiet.get(size, math.nan) / size * 1e9 for size in sizes],
                marker="o", ms=4, color=peer.color, lw=2.5 if own else 1.3,
                ls="--" if name in peers.ROOFLINES else "-", zorder=3 if own else 2,
                label=peer.title,
            )  # fmt: skip
        for size, ends in noisy.items():
            heights = [seconds / size * 1e9 for seconds in ends]
            once = None if quiet or size != min(noisy) else peer.title
            axes.plot([size, size], heights, marker="_", color=peer.color, label=once, zorder=1)
            place = (size, heights[-1])
            axes.annotate("noisy", place, (3, 2), textcoords="offset points", fontsize=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_title("One array, from the caches to memory", fontsize="medium")
    axes.set_xlabel("elements (log scale)")
    axes.set_ylabel("nanoseconds per element and step (log scale)")
    _finish(axes, "both")


def _finish(axes: Any, grid: Any) -> None:
    axes.grid(axis=grid, alpha=0.25, zorder=0)
    for spine in axes.spines.values():
        spine.set_visible(spine.spine_type in ("left", "bottom"))
