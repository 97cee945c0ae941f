"""Child processes that are asked in lines of JSON: how they end, and why they ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["WORKER", "Child", "ChildError"]

WORKER = (sys.executable, "-m", "fastadam.bench.worker")
# Seconds without a word after which a child counts as hung. DeepSpeed builds for a minute or two;
# a round of the slowest contender on the largest workload takes some ten seconds.
TIME_LIMIT = 300.0
HINTS = {
    "SIGILL": " (an instruction that this processor lacks)",
    "SIGKILL": " (out of memory?)",
}


class ChildError(Exception):
    """A child process has ended or hangs; the message says which."""


class Child:
    """A child process that is sent lines of JSON, and writes such lines.

    It is gone, with all that it started, at the end of the ``with`` block. Its
    standard input closes when this process is gone, so that it can end too if
    this one is killed. `environ` is set beside the environment of this process;
    a child that has not written for `time_limit` seconds counts as hung.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str] | None = None,
        time_limit: float = TIME_LIMIT,
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
            # A group of its own: what it starts, such as compilers, ends with it, and Ctrl-C is
            # for this process alone. But the same session: Linux may share out the processor by
            # sessions, not by processes.
            process_group=0,
        )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read_lines, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        child = self._process
        with contextlib.suppress(OSError):  # gone, and with it its group
            if hasattr(os, "killpg"):
                os.killpg(child.pid, signal.SIGKILL)
            else:
                child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _read_lines(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - for mypy
        with contextlib.suppress(ValueError, OSError):  # closed: nobody listens any more
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(b"")

    def send(self, content: Any) -> None:
        """Send what is fit for JSON, as a line."""
        assert self._process.stdin is not None  # noqa: S101 - for mypy
        with contextlib.suppress(OSError):  # dead already: `read` says so
            self._process.stdin.write(json.dumps(content).encode() + b"\n")
            self._process.stdin.flush()

    def read(self) -> Any:
        """Wait for a line, and return what it holds; raise `ChildError` if none comes."""
        try:
            line = self._lines.get(timeout=self._time_limit)
        except queue.Empty:
            raise ChildError(f"it hung: nothing for {self._time_limit:g} s") from None
        if not line:
            raise ChildError(self._why_ended(self._process.wait()))
        return json.loads(line)

    def ask(self, question: Any) -> Any:
        """Send a line, and return the answer; raise `ChildError` if none comes."""
        self.send(question)
        return self.read()

    def _why_ended(self, status: int) -> str:
        if status < 0:
            try:
                name = signal.Signals(-status).name
            except ValueError:
                name = str(-status)
            return f"its process was ended by signal {name}{HINTS.get(name, '')}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"its process ended with status {status}{f': {said[:200]}' if said else ''}"
