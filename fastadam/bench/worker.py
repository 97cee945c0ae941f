"""The child process in which fastadam and one other contender take turns.

``python -m fastadam.bench.worker`` reads a line of JSON, the specification,
and writes lines of JSON, the events, each with a key ``event``:

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

The specification has the keys ``contender`` (a name), ``workloads`` (a list
of name and shapes), ``tail``, ``dtype``, ``rounds``, ``max_memory`` (bytes or
None) and, unless it is the CPU, ``device``. A process whose standard input is
closed ends at once: whoever started it is gone.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, TextIO

from fastadam.bench import cuda_library, memory, peers
from fastadam.bench.load import Others, crowds
from fastadam.bench.measure import BURST, CUDA_BURST, compare, host_costs
from fastadam.bench.workloads import count, draw

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fastadam.bench.peers import Peer

__all__ = ["device_bytes", "needed_bytes", "serve"]

# Rounds in which the calls alone are timed: they are short.
HOST_ROUNDS = 25


def needed_bytes(elements: int, peer: Peer, dtype: str, tail: bool) -> int:
    """Return what fastadam and a peer need side by side.

    Parameters
    ----------
    elements : int
        Of all parameters.
    peer : Peer
        The other contender.
    dtype : str
        ``"float32"`` or ``"float64"``.
    tail : bool
        Whether both average as well.

    Returns
    -------
    int
        Bytes: the arrays of both, and the values they start from.

    Examples
    --------
    >>> from fastadam.bench.peers import by_name
    >>> from fastadam.bench.worker import needed_bytes
    >>> needed_bytes(1_000, by_name("torch-fused"), "float32", tail=False)
    40000
    """
    both = [p.tail_arrays if tail else p.arrays for p in (peers.FASTADAM, peer)]
    return (2 + sum(both)) * elements * (8 if dtype == "float64" else 4)


def device_bytes(elements: int, peer: Peer, dtype: str, tail: bool) -> int:
    """Return what fastadam and a peer need side by side on a CUDA device.

    Parameters
    ----------
    elements, peer, dtype, tail
        As in `needed_bytes`.

    Returns
    -------
    int
        Bytes: the arrays of both, and the gradients that each refills its own
        from where a step clears them.

    Examples
    --------
    >>> from fastadam.bench.peers import by_name
    >>> from fastadam.bench.worker import device_bytes
    >>> device_bytes(1_000, by_name("torch-fused", "cuda"), "float32", tail=False)
    32000
    """
    both = [p.tail_arrays if tail else p.arrays for p in (peers.CUDA_FASTADAM, peer)]
    return (sum(both) + 2 * tail) * elements * (8 if dtype == "float64" else 4)


def serve(spec: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Compare on every workload of a specification.

    Parameters
    ----------
    spec : mapping
        As described above.
    emit : callable
        ``emit(event, **content)`` passes an event on.
    """
    device, tail, dtype = spec.get("device", "cpu"), spec["tail"], spec["dtype"]
    pair = [peers.by_name(name, device) for name in ("fastadam", spec["contender"])]
    peer = pair[1]
    try:
        # Imports, builds and compiles what there is to, and shows whether it works at all.
        both = [_try(contender, dtype, tail) for contender in pair]
    except Exception as error:
        emit("unavailable", reason=describe(error))
        return
    emit("ready", threads={"fastadam": both[0], peer.name: both[1]})
    for name, shapes in spec["workloads"]:
        emit("start", workload=name)
        reason = _why_too_large(count(shapes), peer, spec)
        if reason is None:
            try:
                _compare(name, shapes, spec, pair, emit)
            except Exception as error:
                reason = describe(error)
        if reason is not None:
            emit("skipped", workload=name, reason=reason)
        gc.collect()
    emit("end")


def _why_too_large(elements: int, peer: Peer, spec: Mapping[str, Any]) -> str | None:
    tail, dtype, limit = spec["tail"], spec["dtype"], spec["max_memory"]
    if spec.get("device", "cpu") == "cpu":
        return too_large(needed_bytes(elements, peer, dtype, tail), limit)
    # What the last workload left behind must not count.
    cuda_library.release()
    needed = device_bytes(elements, peer, dtype, tail)
    reason = cuda_library.too_large(needed, limit, cuda_library.free_memory())
    # The values that both start from are made on the host.
    return reason or too_large(2 * elements * (8 if dtype == "float64" else 4), None)


def too_large(needed: int, limit: int | None) -> str | None:
    """Return why a workload does not fit, None if it does."""
    if limit is not None and needed > limit:
        return f"needs {memory.format_bytes(needed)}, --max-memory is {memory.format_bytes(limit)}"
    free = memory.available()
    # A tenth for what comes with the arrays: libraries, threads, the system's tables.
    if free is not None and needed > 0.9 * free:
        return f"needs {memory.format_bytes(needed)}, available are {memory.format_bytes(free)}"
    return None


def _try(peer: Peer, dtype: str, tail: bool) -> int | None:
    params, grads = draw([(8, 8), (8,)], dtype)
    contender = peer.make(params, grads, tail)
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
    on_cuda = spec.get("device", "cpu") == "cuda"
    params, grads = draw([tuple(shape) for shape in shapes], spec["dtype"])
    both = [p.make(params, grads, spec["tail"]) for p in pair]
    del params
    refill = any(contender.clears_grads for contender in both)
    with Others() as others:
        found = compare(
            *both,
            rounds=spec["rounds"],
            refill=refill,
            burst_seconds=CUDA_BURST if on_cuda else BURST,
            on_round=lambda done, rounds: emit("round", workload=name, done=done, rounds=rounds),
        )
    # On a device, threads of others do not take part in a step.
    needed = 0 if on_cuda else threads_needed(count(shapes), [c.threads() for c in both])
    crowded = others.cpus is not None and crowds(others.cpus, needed)
    host: dict[str, Any] = {}
    if on_cuda and not refill:
        keys = ("host_seconds", "other_host_seconds")
        host = dict(zip(keys, host_costs(*both, rounds=HOST_ROUNDS), strict=True))
    emit("result", workload=name, crowded=crowded, **found._asdict(), **host)


def threads_needed(elements: int, threads: Sequence[int | None]) -> int:
    """Return on how many threads steps run, where large ones run on so many.

    Smaller ones take one, in fastadam; the libraries beside it have limits of that order.
    """
    from fastadam.cpu.kernels import SERIAL_BELOW  # not sooner: it imports Numba

    return 1 if elements < SERIAL_BELOW else max(number or 1 for number in threads)


def describe(error: BaseException) -> str:
    """Return an error and its causes in one line."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 3:
        lines = str(cause).split("\n")
        text = " ".join(next((line for line in lines if line.strip()), "").split())
        parts.append(f"{type(cause).__name__}: {text}"[:200])
        cause = cause.__cause__
    return "; because of ".join(parts)


def _end_with_parent(stdin: TextIO) -> None:
    """End this process and those it started when the other end of stdin is closed."""
    stdin.read()
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _main() -> None:
    # Events have a stream of their own: what libraries print, ninja among them, goes to stderr.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    spec = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(sys.stdin,), daemon=True).start()

    def emit(event: str, **content: Any) -> None:
        events.write(json.dumps({"event": event, **content}) + "\n")
        events.flush()

    serve(spec, emit)
    events.close()
    sys.stderr.flush()
    os._exit(0)  # at once: not all libraries survive an orderly end beside a blocked thread


if __name__ == "__main__":
    _main()
