"""The child processes of ``fastadam bench``: ``python -m fastadam.bench.worker WHAT``.

``compare`` lets fastadam and one other contender take turns. It reads a line of
JSON, the specification, with the keys ``contender`` (a name), ``workloads`` (a
list of name and shapes), ``tail``, ``dtype``, ``rounds``, ``max_memory`` (bytes
or None) and ``device``. It writes lines of JSON, each with a key ``event``:

``ready``
    The contender works: ``threads`` by contender (int or None).
``unavailable``
    It does not: ``reason``. Nothing follows.
``start``, ``round``
    A workload begins; ``done`` of its ``rounds`` are over.
``result``
    ``seconds``, ``other_seconds`` per round, ``number``, ``other_number``,
    ``crowded`` (bool: other processes kept CPUs busy that a step needs); of
    a step on a CUDA device also ``host_seconds``, ``other_host_seconds``.
``skipped``
    A workload is left out, or has failed: ``reason``.
``end``
    All is done.

``load NAME`` takes the steps of one contender beside busy processes. It answers
each line of JSON by one, and sleeps in between:

``{"size": int, "clipped": bool, "dtype": str}``
    Makes an array and its optimizer, and takes the first steps. The answer:
    ``threads`` (int: on how many a large step may run) and ``layer`` (str or
    None: Numba's threading layer, if it has started one).
``{"work": seconds, "steps": int, "seconds": float}``
    Takes a slice of steps. The answer: nanoseconds, a list, one for each step.

``spin`` keeps one CPU busy, and answers each line by the seconds of CPU time
that it has used. They all end when their standard input is closed: whoever
started them is gone.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadam import machine
from fastadam.bench import arrays, contenders, peers
from fastadam.bench.measure import BURST, CUDA_BURST, compare, host_costs, step_times
from fastadam.bench.workloads import ONE_BY_ONE, count, draw

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fastadam.bench.contenders import Contender
    from fastadam.bench.peers import Peer

__all__ = ["describe_error", "needed_bytes", "serve"]

# Rounds in which the calls alone are timed: they are short.
HOST_ROUNDS = 25


def needed_bytes(elements: int, peer: Peer, dtype: str, tail: bool, device: str = "cpu") -> int:
    """Return what fastadam and a peer need side by side.

    The arrays of both; on the CPU also the values that they start from; on a
    device also the gradients that each refills its own from where a step
    clears them.

    Examples
    --------
    >>> from fastadam.bench.peers import by_name
    >>> from fastadam.bench.worker import needed_bytes
    >>> needed_bytes(1_000, by_name("torch-fused"), "float32", tail=False)
    40000
    """
    both = sum(p.tail_arrays if tail else p.arrays for p in (peers.FASTADAM, peer))
    return (both + (2 if device == "cpu" or tail else 0)) * elements * np.dtype(dtype).itemsize


def serve(spec: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Compare on every workload of a specification; ``emit(event, **content)`` tells of it."""
    pair = [peers.by_name(name, spec["device"]) for name in ("fastadam", spec["contender"])]
    try:
        # Imports, builds and compiles what there is to, and shows whether it works at all.
        threads = {peer.name: _first_step(peer, spec) for peer in pair}
    except Exception as error:
        emit("unavailable", reason=describe_error(error))
        return
    emit("ready", threads=threads)
    for name, shapes in spec["workloads"]:
        emit("start", workload=name)
        reason = _why_too_large(count(shapes), pair[1], spec)
        if reason is None:
            try:
                _compare(name, shapes, spec, pair, emit)
            except Exception as error:
                reason = describe_error(error)
        if reason is not None:
            emit("skipped", workload=name, reason=reason)
        gc.collect()
    emit("end")


def _why_too_large(elements: int, peer: Peer, spec: Mapping[str, Any]) -> str | None:
    device, dtype, limit = spec["device"], spec["dtype"], spec["max_memory"]
    needed = needed_bytes(elements, peer, dtype, spec["tail"], device)
    if device == "cpu":
        return arrays.too_large(needed, limit, machine.memory_available())
    # What the last workload left behind must not count.
    arrays.release()
    reason = arrays.too_large(needed, limit, arrays.free_on_device(), "on the device")
    # The values that both start from are made on the host.
    values = 2 * elements * np.dtype(dtype).itemsize
    return reason or arrays.too_large(values, None, machine.memory_available())


def _first_step(peer: Peer, spec: Mapping[str, Any]) -> int | None:
    params, grads = draw([(8, 8), (8,)], spec["dtype"])
    contender = peer.make(params, grads, spec["tail"], spec["device"])
    contender.step()
    contender.wait()
    return contender.threads()


def _compare(
    name: str,
    shapes: Any,
    spec: Mapping[str, Any],
    pair: Sequence[Peer],
    emit: Callable[..., None],
) -> None:
    on_cuda = spec["device"] == "cuda"
    params, grads = draw([tuple(shape) for shape in shapes], spec["dtype"])
    given = (params, grads, spec["tail"], spec["device"])
    both = [peer.contender(name, *given) for peer in pair]
    del params, given
    refill = any(contender.clears_grads for contender in both)
    with machine.OtherProcesses() as others:
        found = compare(
            *both,
            rounds=spec["rounds"],
            refill=refill,
            burst_seconds=CUDA_BURST if on_cuda else BURST,
            on_round=lambda done, rounds: emit("round", workload=name, done=done, rounds=rounds),
        )
    # On a device, threads of others do not take part in a step.
    elements = count(shapes[:1] if name in ONE_BY_ONE else shapes)
    needed = 0 if on_cuda else _threads_needed(elements, [c.threads() for c in both])
    crowded = others.cpus is not None and machine.too_busy(others.cpus, needed)
    host: dict[str, Any] = {}
    if on_cuda and not refill:
        keys = ("host_seconds", "other_host_seconds")
        host = dict(zip(keys, host_costs(*both, rounds=HOST_ROUNDS), strict=True))
    emit("result", workload=name, crowded=crowded, **found._asdict(), **host)


def _threads_needed(elements: int, threads: Sequence[int | None]) -> int:
    """Return on how many threads steps run, where large ones run on so many.

    Smaller ones take one, in fastadam; the libraries beside it have limits of that order.
    """
    few = elements < machine.parallel_from()
    return 1 if few else max(number or 1 for number in threads)


def describe_error(error: BaseException) -> str:
    """Return an error and its causes in one line."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 3:
        lines = str(cause).split("\n")
        text = " ".join(next((line for line in lines if line.strip()), "").split())
        parts.append(f"{type(cause).__name__}: {text}"[:200])
        cause = cause.__cause__
    return "; because of ".join(parts)


def _threading_layer() -> str | None:
    numba: Any = sys.modules.get("numba")
    try:
        layer: str = numba.threading_layer()
    except (AttributeError, ValueError):  # not imported, or no step in several threads yet
        return None
    return layer


def _end_with_parent() -> None:
    """End this process and those it started when the other end of stdin is closed."""
    sys.stdin.read()
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _run_compare(write: Callable[[Any], None]) -> None:
    spec = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    serve(spec, lambda event, **content: write({"event": event, **content}))
    sys.stderr.flush()
    os._exit(0)  # at once: not all libraries survive an orderly end beside a blocked thread


def _run_load(write: Callable[[Any], None], name: str) -> None:
    contender: Contender | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "size" in request:
            contender = None  # gives its memory back
            params, grads = draw([(request["size"],)], request["dtype"])
            make = contenders.Clipped if request["clipped"] else peers.by_name(name).make
            contender = make(params, grads, False)
            del params, grads
            for _ in range(3):
                contender.step()
            gc.collect()
            write({"threads": contender.threads(), "layer": _threading_layer()})
        elif contender is not None:
            write(step_times(contender.step, **request))


def _run_spin(write: Callable[[Any], None]) -> None:
    def answer() -> None:
        for _ in sys.stdin:
            write(time.process_time())
        os._exit(0)

    threading.Thread(target=answer, daemon=True).start()
    while True:
        pass


def _main(what: str, *arguments: str) -> None:
    # Answers have a stream of their own: what libraries print, ninja among them, goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def write(content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    run: Any = {"compare": _run_compare, "load": _run_load, "spin": _run_spin}[what]
    run(write, *arguments)


if __name__ == "__main__":
    _main(*sys.argv[1:])
