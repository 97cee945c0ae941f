"""One child process per contender, and what they report."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadam.bench.child import TIME_LIMIT, WORKER, Child, ChildError
from fastadam.bench.measure import Spread, spread
from fastadam.machine import OtherProcesses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fastadam.bench.peers import Peer

__all__ = ["Measured", "Missing", "Session", "measure"]

COMMAND = (*WORKER, "compare")


@dataclass(frozen=True)
class Measured:
    """One contender beside fastadam on one workload."""

    contender: str
    workload: str
    seconds: float  # median time of a step of the contender
    fastadam_rounds: tuple[float, ...]  # times of a step of fastadam, round by round
    ratio: Spread  # of the contender's time over fastadam's, round by round
    rounds: int
    number: int  # steps in a timed burst, the last one
    fastadam_number: int
    # Of a call alone, where the step itself runs on a CUDA device.
    host_seconds: Spread | None = None
    fastadam_host_seconds: Spread | None = None
    crowded: bool = False  # other processes kept CPUs busy that a step needs
    tail: bool = False  # a step is the whole tail of a training step

    @property
    def noisy(self) -> bool:
        """Whether the ratio says too little to be shown: rounds differ, or CPUs were busy.

        Beside busy CPUs rounds may well agree, on times that tell of the
        others alone.
        """
        return self.ratio.noisy or self.crowded

    @property
    def fastadam_seconds(self) -> float:
        """Median time of a step of fastadam."""
        return spread(self.fastadam_rounds).median


@dataclass(frozen=True)
class Missing:
    """What was not measured, and why; on all workloads if `workload` is None."""

    contender: str
    workload: str | None
    reason: str
    tail: bool = False


@dataclass
class Session:
    """What came out."""

    device: str = "cpu"  # or "cuda": where the steps were taken
    measured: list[Measured] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    # By contender: on how many threads a large step runs; how many CPUs others kept busy.
    threads: dict[str, int | None] = field(default_factory=dict)
    other_cpus: dict[str, float | None] = field(default_factory=dict)

    def results(self, tail: bool) -> list[Measured]:
        """Return the results of a step, or of the whole tail of a step."""
        return [one for one in self.measured if one.tail == tail]

    def record(self, peer: Peer, tail: bool, event: Mapping[str, Any]) -> None:
        """Take an event of `fastadam.bench.worker`."""
        kind, workload = event["event"], event.get("workload")
        if kind == "ready":
            self.threads.update(event["threads"])
        elif kind == "result":
            ours, theirs = event["seconds"], event["other_seconds"]
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            hosts = (event.get(key) for key in ("other_host_seconds", "host_seconds"))
            host_seconds, fastadam_host_seconds = (
                spread(each) if each else None for each in hosts
            )
            self.measured.append(
                Measured(
                    contender=peer.name,
                    workload=str(workload),
                    seconds=spread(theirs).median,
                    fastadam_rounds=tuple(ours),
                    ratio=spread(ratios),
                    rounds=len(ratios),
                    number=event["other_number"],
                    fastadam_number=event["number"],
                    host_seconds=host_seconds,
                    fastadam_host_seconds=fastadam_host_seconds,
                    crowded=event.get("crowded", False),
                    tail=tail,
                )
            )
        elif kind in ("skipped", "unavailable", "died"):
            self.missing.append(Missing(peer.name, workload, event["reason"], tail))


def measure(
    found: Session,
    peers: Sequence[Peer],
    workloads: Mapping[str, Sequence[tuple[int, ...]]],
    *,
    tail: bool,
    dtype: str,
    rounds: int,
    max_memory: int | None,
    on_event: Callable[[Peer, Mapping[str, Any]], Any] = lambda _peer, _event: None,
    command: Sequence[str] = COMMAND,
    time_limit: float = TIME_LIMIT,
) -> None:
    """Measure every contender beside fastadam on every workload, and tell `found`.

    The options are the command line's. `on_event` is told of every event of
    `fastadam.bench.worker`, for a display of progress; a child that is silent
    for `time_limit` seconds is stopped.
    """
    for peer in peers:
        reason = peer.why_not(dtype, tail)
        if reason is not None:
            found.missing.append(Missing(peer.name, None, reason, tail))
            continue
        left = dict(workloads)
        while left:
            spec = {
                "contender": peer.name,
                "workloads": list(left.items()),
                "tail": tail,
                "dtype": dtype,
                "rounds": rounds,
                "max_memory": max_memory,
                "device": found.device,
            }
            before = len(found.measured)
            with OtherProcesses() as others, _child(command, dtype, time_limit) as child:
                for event in _events(child, spec):
                    found.record(peer, tail, event)
                    if event["event"] in ("result", "skipped", "died"):
                        left.pop(str(event["workload"]), None)
                    if event["event"] == "unavailable":
                        left.clear()
                    on_event(peer, event)
            busy = [cpus for cpus in (others.cpus, found.other_cpus.get(peer.name)) if cpus]
            found.other_cpus[peer.name] = max(busy, default=others.cpus)
            # A child that died leaves workloads over. Another try is worth it if it had got
            # somewhere: it may have been the one workload.
            if left and len(found.measured) == before:
                break


def _events(child: Child, spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a child; the last is ``died`` if it ends early.

    Then it has a ``reason`` and the ``workload`` it was at, None if at none.
    """
    child.send(spec)
    workload, last = None, ""
    while last not in ("end", "unavailable"):
        try:
            event = child.read()
        except ChildError as error:
            yield {"event": "died", "workload": workload, "reason": str(error)}
            return
        last = event["event"]
        if last == "start":
            workload = event["workload"]
        yield event
        if last in ("result", "skipped"):
            workload = None


def _child(command: Sequence[str], dtype: str, time_limit: float) -> Child:
    # As `python` would find them in an activated environment: ninja, for one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # All that is not asked for CUDA on the CPU, whatever there is besides.
    environ = {"PATH": path, "JAX_PLATFORMS": "cpu", "DS_ACCELERATOR": "cpu"}
    if dtype == "float64":
        environ["JAX_ENABLE_X64"] = "1"
    return Child(command, environ, time_limit)
