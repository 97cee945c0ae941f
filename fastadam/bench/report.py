"""What was measured, pairs of contenders or steps under load, as one dict fit for JSON."""

from __future__ import annotations

import datetime as dt
import platform
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastadam import machine
from fastadam.bench import load, peers
from fastadam.bench.contenders import HYPERPARAMETERS, TRAFFIC
from fastadam.bench.measure import Spread, spread
from fastadam.bench.workloads import count

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fastadam.bench.load import Ratio, UnderLoad
    from fastadam.bench.session import Measured, Missing, Session
    from fastadam.bench.workloads import Shape

__all__ = ["Part", "as_dict", "device_facts", "fastadam_seconds", "figures", "load_to_dict"]
__all__ += ["not_measured", "step_bytes", "to_dict"]

# Distributions whose versions belong to a result on a device, where they are installed.
CUDA = "numba-cuda cuda-bindings cuda-core torch cupy-cuda13x cupy-cuda12x cupy"


class Part(NamedTuple):
    """What is measured in one go."""

    tail: bool  # the whole tail of a step rather than a step
    # The workloads: those of a name, then single arrays, whose names are their lengths.
    shapes: dict[str, Sequence[Shape]]

    @property
    def what(self) -> str:
        """What it is, in words."""
        return "the tail of a training step" if self.tail else "a step"

    @property
    def named(self) -> list[str]:
        """The workloads of a name."""
        return [name for name in self.shapes if not name.isdigit()]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths of the single arrays."""
        return tuple(int(name) for name in self.shapes if name.isdigit())


class OwnTime(NamedTuple):
    """fastadam's time of a step, and whether it says too little to be shown."""

    seconds: Spread
    noisy: bool


def fastadam_seconds(results: Iterable[Measured]) -> dict[str, OwnTime]:
    """Return fastadam's time per step by workload, from the pairs that gave the ratios.

    Over all rounds of the pairs that are not noisy, or of all pairs where
    every one is, and then this is noisy too.
    """
    quiet: dict[str, list[float]] = {}
    every: dict[str, list[float]] = {}
    for one in results:
        for times in (every,) if one.noisy else (every, quiet):
            times.setdefault(one.workload, []).extend(one.fastadam_rounds)
    found = {}
    for workload, rounds in (every | quiet).items():
        seconds = spread(rounds)
        found[workload] = OwnTime(seconds, seconds.noisy or workload not in quiet)
    return found


def step_bytes(dtype: str, tail: bool) -> int:
    """Return how many bytes of each element a step reads and writes."""
    return TRAFFIC[tail] * np.dtype(dtype).itemsize


def as_dict(values: Spread | None, noisy: bool | None = None) -> dict[str, Any] | None:
    """Return a spread as ``median``, ``q1``, ``q3`` and ``noisy``, by default by its quartiles."""
    if values is None:
        return None
    return {**values._asdict(), "noisy": values.noisy if noisy is None else noisy}


def not_measured(missing: Sequence[Missing], parts: Sequence[Part]) -> list[str]:
    """Say what was not measured: ``contenders (workloads): reason``, a line for each reason.

    Examples
    --------
    >>> from fastadam.bench.report import Part, not_measured
    >>> from fastadam.bench.session import Missing
    >>> reason = "not installed: pip install optax"
    >>> not_measured([Missing("optax", None, reason)], [Part(False, {"micro": []})])
    ['optax: not installed: pip install optax']
    """
    lines = []
    for part in parts:
        places: dict[tuple[str, str], list[str]] = {}
        for one in missing:
            if one.tail == part.tail:
                title = peers.by_name(one.contender).title
                places.setdefault((title, one.reason), []).append(one.workload or "")
        merged: dict[tuple[str, str], list[str]] = {}
        for (title, reason), names in places.items():
            # None but some is worth naming.
            everywhere = "" in names or sorted(names) == sorted(part.shapes)
            where = "" if everywhere else f" ({', '.join(names)})"
            merged.setdefault((where, reason), []).append(title)
        lines += [f"{', '.join(who)}{where}: {why}" for (where, why), who in merged.items()]
    return list(dict.fromkeys(lines))


def _report(
    settings: Mapping[str, Any], missing: Sequence[Missing], versions: Iterable[str]
) -> dict[str, Any]:
    """Return what every report begins with; see `to_dict`."""
    import fastadam

    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine.processor(),
        "versions": {
            "fastadam": fastadam.__version__,
            "python": platform.python_version(),
            **machine.installed(("numba", "numpy", *versions)),
        },
        "settings": dict(settings),
        "not_measured": [
            {"contender": m.contender, "workload": m.workload, "reason": m.reason, "tail": m.tail}
            for m in missing
        ],
    }


def to_dict(
    session: Session, settings: Mapping[str, Any], shapes: Mapping[str, Sequence[Shape]]
) -> dict[str, Any]:
    """Put the results of pairs into a form fit for JSON.

    `settings` go in as they are, with ``dtype`` among them; `shapes` are all
    workloads. docs/api/command_line.md says what the keys hold.
    """
    on_cuda = session.device == "cuda"
    measured = session.measured
    versions = [v for one in measured for v in peers.by_name(one.contender).versions]
    versions += CUDA.split() if on_cuda else []
    own = {
        tail: {
            name: as_dict(*one) for name, one in fastadam_seconds(session.results(tail)).items()
        }
        for tail in (False, True)
    }
    report = {
        **_report(settings, session.missing, versions),
        "workloads": {
            name: {"tensors": len(each), "elements": count(each)} for name, each in shapes.items()
        },
        "threads": dict(session.threads),
        "other_cpus": dict(session.other_cpus),
        "results": [
            {
                "workload": one.workload,
                "contender": one.contender,
                "kind": "tail" if one.tail else "step",
                "tail": one.tail,
                "device": session.device,
                "seconds": one.seconds,
                "fastadam_seconds": one.fastadam_seconds,
                "ratio": one.ratio._asdict(),
                "noisy": one.noisy,
                "crowded": one.crowded,
                "rounds": one.rounds,
                "number": one.number,
                "fastadam_number": one.fastadam_number,
                "host_seconds": as_dict(one.host_seconds),
                "fastadam_host_seconds": as_dict(one.fastadam_host_seconds),
            }
            for one in measured
        ],
        "fastadam_seconds": own[False] if on_cuda else own[False] | own[True],
    }
    report["machine"]["memory_available"] = machine.memory_available()
    if on_cuda:
        report["tail_fastadam_seconds"] = own[True]
        report["device"] = device_facts()
        report["figures"] = figures(session, shapes, settings["dtype"])
    return report


def device_facts() -> dict[str, Any]:
    """Return what the driver says of the first device, which is measured, and ``summary``."""
    _, devices = machine.cuda_devices()
    if not devices:
        return {"name": "Numba's CUDA simulator", "summary": "Numba's CUDA simulator"}
    (facts, *_) = devices
    version = f"driver {facts['driver']} for" if facts["driver"] else "driver for"
    summary = f"{machine.describe_gpu(facts)}; {version} CUDA {facts['driver_cuda']}"
    return {**facts, "summary": summary}


def figures(session: Session, shapes: Mapping[str, Sequence[Shape]], dtype: str) -> dict[str, Any]:
    """Return the answers to what a device is measured for, by workload.

    docs/api/command_line.md says what the keys hold.
    """
    found: dict[str, dict[str, Any]] = {}
    for tail, prefix in ((False, ""), (True, "tail_")):
        copies = found[f"{prefix}copy_fraction"] = {}
        fused = found[f"{prefix}torch_fused"] = {}
        each = step_bytes(dtype, tail)
        for one in session.results(tail):
            values = as_dict(one.ratio, one.noisy)
            if one.contender == "torch-fused":
                fused[one.workload] = values
            elif one.contender == "roofline":
                size = each * count(shapes[one.workload])
                copies[one.workload] = {
                    **(values or {}),
                    "bytes_per_second": size / one.fastadam_seconds,
                    "copy_bytes_per_second": size / one.seconds,
                    "bytes_per_parameter": each,
                }
    hosts = found["host_seconds"] = {}
    # From the pair of opt.grads first, so that both ways of calling were timed side by side.
    for one in sorted(session.results(False), key=lambda one: one.contender != "opt-grads"):
        who = "opt.step()" if one.contender == "opt-grads" else one.contender
        both = {"opt.step(grads)": one.fastadam_host_seconds, who: one.host_seconds}
        for name, seconds in both.items():
            if seconds is not None and one.contender != "roofline":
                hosts.setdefault(one.workload, {}).setdefault(name, as_dict(seconds))
    return found


def load_to_dict(found: UnderLoad, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put the results of steps beside busy processes into a form fit for JSON.

    `settings` go in as they are, with ``load`` among them, the number of
    processes. docs/api/command_line.md says what the keys hold.
    """
    names = [name for name in load.CONTENDERS if name in found.threads]
    packages = [version for name in names for version in peers.by_name(name).versions]
    packages += ["tbb"] if found.layer == "tbb" else []
    results, ratios = [], []
    groups: dict[tuple[float, bool, tuple[str, str]], list[Ratio]] = {}
    for row, cpus in found.load.items():
        place = {"elements": row.size, "work_seconds": row.work, "clipped": row.clipped}
        for pair in load.RATIOS:
            one = found.ratio(row, pair)
            if one is not None:
                ratios.append(place | _ratio(one, pair))
                groups.setdefault((row.work, row.clipped, pair), []).append(one)
        for name in names:
            if (row, name) in found.times:
                times = found.nanoseconds(row, name)
                results.append(
                    {
                        **place,
                        "contender": name,
                        "kind": "load",
                        "device": "cpu",
                        "mean_seconds": statistics.fmean(times) / 1e9,
                        "median_seconds": statistics.median(times) / 1e9,
                        "steps": len(times),
                        "load_cpus": cpus,
                    }
                )
    threads = found.threads["fastadam"] or 1
    return {
        **_report({**settings, **HYPERPARAMETERS}, found.missing, packages),
        "threads": dict(found.threads),
        "layer": found.layer,
        "load_cpus": min(found.load.values()),
        "expected_load_cpus": load.expected_cpus(settings["load"], threads),
        "other_cpus": found.other_cpus,
        "results": results,
        "ratios": ratios,
        "geometric_means": [
            {"work_seconds": work, "clipped": clipped, **_ratio(load.geometric_mean(own), pair)}
            for (work, clipped, pair), own in groups.items()
        ],
    }


def _ratio(one: Ratio, pair: tuple[str, str]) -> dict[str, Any]:
    values = {"ratio": one.value, "standard_error": one.error, "noisy": one.noisy}
    return {"contender": pair[0], "over": pair[1], **values}
