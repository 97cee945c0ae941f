"""Child processes: how they are asked, how they are ended, and why they ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Child", "ChildError", "read_lines", "stop", "why_ended"]


class ChildError(Exception):
    """A child process has ended or hangs; the message says which."""


class Child:
    """A child process that answers each line of JSON by one line of JSON.

    It is gone, with all that it started, at the end of the ``with`` block. Its
    standard input closes when this process is gone, so that it ends too if
    this one is killed.

    Parameters
    ----------
    command : sequence of str
        What to start.
    environ : mapping of str to str, optional
        Set in its environment, beside what is set in this one.
    time_limit : float, default 300.0
        Seconds after which a child that has not answered counts as hung.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str] | None = None,
        time_limit: float = 300.0,
    ) -> None:
        self._command, self._environ, self._time_limit = command, environ or {}, time_limit

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(  # noqa: S603
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **self._environ},
            # A group of its own: Ctrl-C is for this process alone, which ends the child. But the
            # same session: Linux may share out the processor by sessions, not by processes.
            process_group=0,
        )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        reader = (self._process.stdout, self._lines)
        threading.Thread(target=read_lines, args=reader, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        stop(self._process)
        self._errors.close()

    def ask(self, question: Any) -> Any:
        """Send a line, and wait for the answer.

        Parameters
        ----------
        question : object
            Fit for JSON.

        Returns
        -------
        object
            What JSON makes of the answer.

        Raises
        ------
        ChildError
            If it has ended, or does not answer in time.
        """
        assert self._process.stdin is not None  # noqa: S101 - for mypy
        with contextlib.suppress(OSError):  # dead already: read below what it said
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=self._time_limit)
        except queue.Empty:
            raise ChildError(f"it hung: nothing for {self._time_limit:g} s") from None
        if not line:
            raise ChildError(why_ended(self._process.wait(), self._errors))
        return json.loads(line)


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a child, with all in its process group, and wait for its end.

    Parameters
    ----------
    child : subprocess.Popen
        The first process of a group of its own.
    """
    with contextlib.suppress(OSError):  # gone, and with it its group
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def read_lines(stream: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    """Pass on the lines of a stream, and an empty one after the last.

    Parameters
    ----------
    stream : binary file
        A child's standard output.
    lines : queue.SimpleQueue
        Where to.
    """
    with contextlib.suppress(ValueError, OSError):  # closed: nobody listens any more
        for line in stream:
            lines.put(line)
    lines.put(b"")


def why_ended(status: int, errors: IO[bytes]) -> str:
    """Say why a child has ended.

    Parameters
    ----------
    status : int
        Its exit status; negative for a signal.
    errors : binary file
        Its standard error, of which the last line is shown.

    Returns
    -------
    str
        Half a sentence.
    """
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = str(-status)
        hints = {
            "SIGILL": " (an instruction that this processor lacks)",
            "SIGKILL": " (out of memory?)",
        }
        return f"its process was ended by signal {name}{hints.get(name, '')}"
    errors.seek(0)
    lines = errors.read().decode(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"its process ended with status {status}{f': {said[:200]}' if said else ''}"
