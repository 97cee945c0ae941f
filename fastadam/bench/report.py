"""What was measured, as one dict that is fit for JSON."""

from __future__ import annotations

import datetime as dt
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from fastadam.bench import memory, peers
from fastadam.bench.measure import Spread, spread
from fastadam.bench.workloads import count

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fastadam.bench.session import Missing, Session

__all__ = ["as_dict", "fastadam_seconds", "installed", "not_measured", "to_dict"]


class Own(NamedTuple):
    """fastadam's time of a step, and whether it says too little to be shown."""

    seconds: Spread
    noisy: bool


def fastadam_seconds(session: Session) -> dict[str, Own]:
    """Return fastadam's time per step by workload, from the pairs that gave the ratios.

    Parameters
    ----------
    session : Session
        What was measured.

    Returns
    -------
    dict of str to Own
        Seconds, for every workload of which there is a result: over all
        rounds of the pairs that are not noisy, or of all pairs where every
        one is, and then this is noisy too.
    """
    quiet: dict[str, list[float]] = {}
    every: dict[str, list[float]] = {}
    for one in session.measured:
        for times in (every,) if one.noisy else (every, quiet):
            times.setdefault(one.workload, []).extend(one.fastadam_rounds)
    found = {}
    for workload, rounds in (every | quiet).items():
        seconds = spread(rounds)
        found[workload] = Own(seconds, seconds.noisy or workload not in quiet)
    return found


def as_dict(values: Spread, noisy: bool | None = None) -> dict[str, Any]:
    """Return a spread in a form fit for JSON.

    Parameters
    ----------
    values : Spread
        Of ratios, or of seconds.
    noisy : bool, optional
        Whether it says too little to be shown; by default, by its quartiles.

    Returns
    -------
    dict
        ``median``, ``q1``, ``q3`` (float) and ``noisy`` (bool).
    """
    return {**values._asdict(), "noisy": values.noisy if noisy is None else noisy}


def not_measured(missing: Sequence[Missing], workloads: Iterable[str]) -> list[str]:
    """Say what was not measured, one line for each reason.

    Parameters
    ----------
    missing : sequence of Missing
        From a session.
    workloads : iterable of str
        All that were asked for.

    Returns
    -------
    list of str
        ``contenders (workloads): reason``.

    Examples
    --------
    >>> from fastadam.bench.report import not_measured
    >>> from fastadam.bench.session import Missing
    >>> not_measured([Missing("optax", None, "not installed: pip install optax")], ["micro"])
    ['optax: not installed: pip install optax']
    """
    places: dict[tuple[str, str], list[str]] = {}
    for one in missing:
        title = peers.by_name(one.contender).title
        places.setdefault((title, one.reason), []).append(one.workload or "")
    merged: dict[tuple[str, str], list[str]] = {}
    everything = sorted(workloads)
    for (title, reason), names in places.items():
        # None but some is worth naming.
        where = "" if "" in names or sorted(names) == everything else f" ({', '.join(names)})"
        merged.setdefault((where, reason), []).append(title)
    return [f"{', '.join(titles)}{where}: {reason}" for (where, reason), titles in merged.items()]


def to_dict(
    session: Session, settings: Mapping[str, Any], shapes: Mapping[str, Any]
) -> dict[str, Any]:
    """Put results into a form fit for JSON.

    Parameters
    ----------
    session : Session
        What was measured.
    settings : mapping
        Goes in as it is.
    shapes : mapping of str to sequence of shapes
        The workloads.

    Returns
    -------
    dict
        With the keys

        ``date``
            In UTC (str, ISO 8601).
        ``machine``
            ``system``, ``cpu`` (str); ``cpus``, ``cpus_allowed`` (int: in the
            machine, by this process's affinity); ``cpu_quota`` (float or None:
            CPUs' worth of time that the control group grants);
            ``memory_available`` (int or None: bytes, now).
        ``versions``
            Name to version, of what took part.
        ``settings``
            As given.
        ``workloads``
            By name: ``tensors``, ``elements`` (int).
        ``threads``
            By contender (int or None).
        ``other_cpus``
            By contender (float or None): how many CPUs other processes kept
            busy while it was measured.
        ``results``
            A list of dicts: ``workload``, ``contender`` (str); ``seconds``,
            ``fastadam_seconds`` (float: median per step of this pair);
            ``ratio`` (dict of ``median``, ``q1``, ``q3``, floats: the
            contender's time over fastadam's); ``noisy`` (bool: the quartiles
            are too far apart, or ``crowded``, bool: other processes kept CPUs
            busy that a step needs); ``rounds``, ``number``, ``fastadam_number`` (int).
        ``fastadam_seconds``
            By workload, over all pairs that are not noisy: ``median``,
            ``q1``, ``q3``, ``noisy``.
        ``not_measured``
            A list of dicts: ``contender`` (str), ``workload`` (str, or None
            for all), ``reason`` (str).
    """
    from fastadam.cli import probe

    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": {**probe.machine(), "memory_available": memory.available()},
        "versions": _versions(session),
        "settings": dict(settings),
        "workloads": {
            name: {"tensors": len(own), "elements": count(own)} for name, own in shapes.items()
        },
        "threads": dict(session.threads),
        "other_cpus": dict(session.other_cpus),
        "results": [
            {
                "workload": one.workload,
                "contender": one.contender,
                "seconds": one.seconds,
                "fastadam_seconds": one.fastadam_seconds,
                "ratio": one.ratio._asdict(),
                "noisy": one.noisy,
                "crowded": one.crowded,
                "rounds": one.rounds,
                "number": one.number,
                "fastadam_number": one.fastadam_number,
            }
            for one in session.measured
        ],
        "fastadam_seconds": {
            name: as_dict(*own) for name, own in fastadam_seconds(session).items()
        },
        "not_measured": [
            {"contender": one.contender, "workload": one.workload, "reason": one.reason}
            for one in session.missing
        ],
    }


def _versions(session: Session) -> dict[str, str]:
    names = ["numba", "numpy"]
    for one in session.measured:
        names += peers.by_name(one.contender).versions
    return installed(names)


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of fastadam, Python, and of what is installed.

    Parameters
    ----------
    names : iterable of str
        Distributions.

    Returns
    -------
    dict of str to str
        Without those that are not installed.
    """
    import fastadam

    found = {"fastadam": fastadam.__version__, "python": platform.python_version()}
    for name in dict.fromkeys(names):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # CuPy has a distribution for each CUDA version
            continue
    return found
