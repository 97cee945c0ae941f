"""One child process per contender, and what they report."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastadam.bench.child import read_lines, stop, why_ended
from fastadam.bench.load import Others
from fastadam.bench.measure import Spread, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from fastadam.bench.peers import Peer

__all__ = ["Measured", "Missing", "Session", "events", "measure"]

COMMAND = (sys.executable, "-m", "fastadam.bench.worker")
# Seconds without a word after which a child counts as hung. DeepSpeed builds for a minute or two;
# a round of the slowest contender on the largest workload takes some ten seconds.
TIME_LIMIT = 300.0


@dataclass(frozen=True)
class Measured:
    """One contender beside fastadam on one workload.

    Attributes
    ----------
    contender, workload : str
        Names.
    seconds : float
        Median time of a step of the contender.
    fastadam_rounds : tuple of float
        Times of a step of fastadam, round by round.
    ratio : Spread
        Of the contender's time over fastadam's, round by round.
    rounds : int
        How many ratios.
    number, fastadam_number : int
        Steps in a timed burst, the last one.
    host_seconds, fastadam_host_seconds : Spread or None
        Of a call alone, where the step itself runs on a CUDA device.
    crowded : bool
        Whether other processes kept CPUs busy that a step needs.
    """

    contender: str
    workload: str
    seconds: float
    fastadam_rounds: tuple[float, ...]
    ratio: Spread
    rounds: int
    number: int
    fastadam_number: int
    host_seconds: Spread | None = None
    fastadam_host_seconds: Spread | None = None
    crowded: bool = False

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


@dataclass
class Session:
    """What came out.

    Attributes
    ----------
    measured, missing : list
        Results, and what there is no result of.
    threads : dict of str to int or None
        By contender: on how many threads a large step runs.
    other_cpus : dict of str to float or None
        By contender: how many CPUs other processes kept busy meanwhile.
    """

    measured: list[Measured] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    threads: dict[str, int | None] = field(default_factory=dict)
    other_cpus: dict[str, float | None] = field(default_factory=dict)


def measure(
    peers: Sequence[Peer],
    workloads: Mapping[str, Sequence[tuple[int, ...]]],
    *,
    tail: bool,
    dtype: str,
    rounds: int,
    max_memory: int | None,
    device: str = "cpu",
    on_event: Callable[[Peer, Mapping[str, Any]], Any] = lambda _peer, _event: None,
    command: Sequence[str] = COMMAND,
    time_limit: float = TIME_LIMIT,
) -> Session:
    """Measure every contender beside fastadam on every workload.

    Parameters
    ----------
    peers : sequence of Peer
        The contenders.
    workloads : mapping of str to sequence of shapes
        What the parameters look like, by name.
    tail, dtype, rounds, max_memory, device
        As the command line has them.
    on_event : callable
        Told of every event of `fastadam.bench.worker`, for a display of
        progress.
    command : sequence of str
        What to start, with the specification on its standard input.
    time_limit : float
        Seconds after which a silent child is stopped.

    Returns
    -------
    Session
        What was measured, what was not, and why.
    """
    session = Session()
    for peer in peers:
        reason = peer.why_not(dtype, tail)
        if reason is not None:
            session.missing.append(Missing(peer.name, None, reason))
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
                "device": device,
            }
            before = len(session.measured)
            child = events(spec, command, time_limit)
            with Others() as others, contextlib.closing(child) as reported:
                for event in reported:
                    _record(session, peer, event, left)
                    on_event(peer, event)
            session.other_cpus[peer.name] = others.cpus
            # A child that died leaves workloads over. Another try is worth it if it had got
            # somewhere: it may have been the one workload.
            if left and len(session.measured) == before:
                break
    return session


def _record(session: Session, peer: Peer, event: Mapping[str, Any], left: dict[str, Any]) -> None:
    kind, workload = event["event"], event.get("workload")
    if kind == "ready":
        session.threads.update(event["threads"])
    elif kind == "result":
        ours, theirs = event["seconds"], event["other_seconds"]
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        session.measured.append(
            Measured(
                contender=peer.name,
                workload=str(workload),
                seconds=spread(theirs).median,
                fastadam_rounds=tuple(ours),
                ratio=spread(ratios),
                rounds=len(ratios),
                number=event["other_number"],
                fastadam_number=event["number"],
                host_seconds=_spread(event.get("other_host_seconds")),
                fastadam_host_seconds=_spread(event.get("host_seconds")),
                crowded=event.get("crowded", False),
            )
        )
    elif kind in ("skipped", "unavailable", "died"):
        session.missing.append(Missing(peer.name, workload, event["reason"]))
    if kind in ("result", "skipped", "died"):
        left.pop(str(workload), None)
    if kind == "unavailable":
        left.clear()


def _spread(values: Sequence[float] | None) -> Spread | None:
    return spread(values) if values else None


def events(
    spec: Mapping[str, Any],
    command: Sequence[str] = COMMAND,
    time_limit: float = TIME_LIMIT,
) -> Generator[dict[str, Any]]:
    """Start a child process and yield its events.

    The child and all that it started are gone when this ends, however it
    ends. If the child ends early, the last event is ``died``, with a
    ``reason`` and the ``workload`` it was at, None if at none.

    Parameters
    ----------
    spec : mapping
        Written to its standard input as one line of JSON.
    command : sequence of str
        What to start.
    time_limit : float
        Seconds after which a silent child is stopped.

    Yields
    ------
    dict
        As `fastadam.bench.worker` describes them.
    """
    workload, last = None, ""
    with tempfile.TemporaryFile() as errors, _child(command, errors, spec) as child:
        assert child.stdin is not None  # noqa: S101 - for mypy
        with contextlib.suppress(OSError):  # dead already: read what it said
            child.stdin.write(json.dumps(spec).encode() + b"\n")
            child.stdin.flush()
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=read_lines, args=(child.stdout, lines), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=time_limit)
            except queue.Empty:
                reason = f"it hung: nothing for {time_limit:g} s"
                break
            if not line:
                reason = why_ended(child.wait(), errors)
                break
            event = json.loads(line)
            last = event["event"]
            if last == "start":
                workload = event["workload"]
            yield event
            if last in ("result", "skipped"):
                workload = None
    if last not in ("end", "unavailable"):
        yield {"event": "died", "workload": workload, "reason": reason}


@contextlib.contextmanager
def _child(
    command: Sequence[str], errors: IO[bytes], spec: Mapping[str, Any]
) -> Iterator[subprocess.Popen[bytes]]:
    # As `python` would find them in an activated environment: ninja, for one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # All that is not asked for CUDA on the CPU, whatever there is besides.
    environ = {"PATH": path, "JAX_PLATFORMS": "cpu", "DS_ACCELERATOR": "cpu"}
    if spec["dtype"] == "float64":
        environ["JAX_ENABLE_X64"] = "1"
    child = subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, **environ},
        # A group of its own: compilers that it starts end with it, and Ctrl-C is for us alone.
        start_new_session=True,
    )
    try:
        yield child
    finally:
        stop(child)
