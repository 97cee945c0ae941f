"""What was measured on a CUDA device: one dict fit for JSON, and the figures that it is for."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastadam.bench import driver
from fastadam.bench.report import as_dict
from fastadam.bench.report import to_dict as to_dict_on_cpu
from fastadam.bench.tables import TAIL_TRAFFIC, TRAFFIC, format_ratio, format_seconds, say
from fastadam.bench.workloads import count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from fastadam.bench.measure import Spread
    from fastadam.bench.session import Session

__all__ = ["device_facts", "figures", "show_figures", "to_dict"]

# Distributions whose versions belong to a result, where they are installed.
DISTRIBUTIONS = "numba-cuda cuda-bindings cuda-core torch cupy-cuda13x cupy-cuda12x cupy"


def device_facts() -> dict[str, Any]:
    """Return what the driver says of the first device, which is the one that is measured.

    Returns
    -------
    dict
        As `fastadam.bench.driver.ask` has it, and ``summary`` (str).
    """
    _, devices = driver.ask()
    if not devices:
        return {"name": "Numba's CUDA simulator", "summary": "Numba's CUDA simulator"}
    (facts, *_) = devices
    version = f"driver {facts['driver']} for" if facts["driver"] else "driver for"
    summary = f"{driver.describe(facts)}; {version} CUDA {facts['driver_cuda']}"
    return {**facts, "summary": summary}


def figures(
    step: Session, tail: Session, shapes: Mapping[str, Sequence[tuple[int, ...]]], dtype: str
) -> dict[str, Any]:
    """Return the answers to what a device is measured for.

    Parameters
    ----------
    step, tail : Session
        What was measured of a step, and of the whole tail of a step.
    shapes : mapping of str to sequence of shapes
        All workloads.
    dtype : str
        ``"float32"`` or ``"float64"``.

    Returns
    -------
    dict
        By workload, each with ``median``, ``q1``, ``q3`` and ``noisy``:

        ``copy_fraction``, ``tail_copy_fraction``
            A step's bandwidth over that of a copy on the device; also
            ``bytes_per_second``, ``copy_bytes_per_second`` and
            ``bytes_per_parameter``.
        ``torch_fused``, ``tail_torch_fused``
            How many times as long torch's fused optimizer takes.
        ``host_seconds``
            Of a call alone, by ``opt.step(grads)``, ``opt.step()`` and the
            names of the peers.
    """
    itemsize = 8 if dtype == "float64" else 4
    return {
        "copy_fraction": _fractions(step, shapes, TRAFFIC * itemsize),
        "tail_copy_fraction": _fractions(tail, shapes, TAIL_TRAFFIC * itemsize),
        "torch_fused": _ratios(step, "torch-fused"),
        "tail_torch_fused": _ratios(tail, "torch-fused"),
        "host_seconds": _host(step),
    }


def _fractions(session: Session, shapes: Mapping[str, Any], each: int) -> dict[str, Any]:
    found = {}
    for one in session.measured:
        if one.contender == "roofline":
            size = each * count(shapes[one.workload])
            found[one.workload] = {
                **as_dict(one.ratio, one.noisy),
                "bytes_per_second": size / one.fastadam_seconds,
                "copy_bytes_per_second": size / one.seconds,
                "bytes_per_parameter": each,
            }
    return found


def _ratios(session: Session, name: str) -> dict[str, Any]:
    return {
        one.workload: as_dict(one.ratio, one.noisy)
        for one in session.measured
        if one.contender == name
    }


def _host(session: Session) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}

    def note(workload: str, who: str, spread: Spread | None) -> None:
        if spread is not None:
            found.setdefault(workload, {}).setdefault(who, as_dict(spread))

    # From the pair of opt.grads first, so that both ways of calling were timed side by side.
    for one in sorted(session.measured, key=lambda one: one.contender != "opt-grads"):
        if one.contender != "roofline":
            note(one.workload, "opt.step(grads)", one.fastadam_host_seconds)
            who = "opt.step()" if one.contender == "opt-grads" else one.contender
            note(one.workload, who, one.host_seconds)
    return found


def to_dict(
    step: Session,
    tail: Session,
    settings: Mapping[str, Any],
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    device: Mapping[str, Any],
) -> dict[str, Any]:
    """Put the results of both sessions into a form fit for JSON.

    Parameters
    ----------
    step, tail : Session
        What was measured of a step, and of the whole tail of a step.
    settings : mapping
        Goes in as it is, with ``dtype`` among it.
    shapes : mapping of str to sequence of shapes
        All workloads.
    device : mapping
        Of `device_facts`.

    Returns
    -------
    dict
        As `fastadam.bench.report.to_dict`, with ``tail`` (bool) in each entry
        of ``results`` and ``not_measured``, ``host_seconds`` and
        ``fastadam_host_seconds`` (dict of ``median``, ``q1``, ``q3``,
        ``noisy``, or None) in the former; ``tail_fastadam_seconds``;
        ``device``; and ``figures``, as above.
    """
    both = [to_dict_on_cpu(session, settings, shapes) for session in (step, tail)]
    for report, session, is_tail in zip(both, (step, tail), (False, True), strict=True):
        for entry in (*report["results"], *report["not_measured"]):
            entry["tail"] = is_tail
        for entry, one in zip(report["results"], session.measured, strict=True):
            for name in ("host_seconds", "fastadam_host_seconds"):
                spread = getattr(one, name)
                entry[name] = None if spread is None else as_dict(spread)
    report, other = both
    for name in ("results", "not_measured"):
        report[name] += other[name]
    for name in ("versions", "threads"):
        report[name] |= other[name]
    for name, cpus in other["other_cpus"].items():
        report["other_cpus"][name] = max(cpus or 0.0, report["other_cpus"].get(name) or 0.0)
    report["tail_fastadam_seconds"] = other["fastadam_seconds"]
    report["versions"] |= _installed()
    report["device"] = dict(device)
    report["figures"] = figures(step, tail, shapes, settings["dtype"])
    return report


def _installed() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def show_figures(console: Console, found: Mapping[str, Any], workloads: Sequence[str]) -> None:
    """Print what the tables do not show: bandwidths, and what calls cost on the host.

    Parameters
    ----------
    console : rich.console.Console
        Where to.
    found : mapping
        Of `figures`.
    workloads : sequence of str
        In this order.
    """
    for key, what in (("copy_fraction", "a step"), ("tail_copy_fraction", "the whole tail")):
        for name in workloads:
            if name in found[key]:
                one = found[key][name]
                say(
                    console,
                    f"Bandwidth of {what}, {_title(name)}: {one['bytes_per_second'] / 1e9:,.0f}"
                    f" GB/s, {one['median']:.1%} of a copy's {_giga(one)} (quartiles"
                    f" {one['q1']:.1%} - {one['q3']:.1%}{', noisy' if one['noisy'] else ''})",
                )
    for name in workloads:
        if name in found["tail_torch_fused"]:
            one = found["tail_torch_fused"][name]
            texts = [format_ratio(one[key]) for key in ("median", "q1", "q3")]
            say(
                console,
                f"The whole tail, {_title(name)}: torch fused takes {texts[0]} times as long"
                f" (quartiles {texts[1]} - {texts[2]}{', noisy' if one['noisy'] else ''})",
            )
    for name in workloads:
        costs = found["host_seconds"].get(name, {})
        if costs:
            micro = "\N{MICRO SIGN}s" if console.encoding.startswith("utf") else "us"
            texts = [f"{who} {format_seconds(costs[who]['median'], micro)}" for who in costs]
            say(console, f"A call alone on the host, {_title(name)}: {', '.join(texts)}")


def _title(name: str) -> str:
    return f"{int(name):,} elements" if name.isdigit() else name


def _giga(one: Mapping[str, Any]) -> str:
    return f"{one['copy_bytes_per_second'] / 1e9:,.0f} GB/s"
