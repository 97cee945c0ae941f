"""What the tests of ``fastadam bench`` share."""

import os
import sys
import textwrap
import time

import pytest

from fastadam.bench import workloads

GROUP = pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")


def python(*codes):
    """Return the command that runs code in a child process."""
    return [sys.executable, "-c", "".join(textwrap.dedent(code) for code in codes)]


def gone(pid):
    """Wait for the end of a process, for 10 seconds."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def stepped(peer, dtype, tail, device="cpu", shapes=((7, 3), (5,), (1_000,)), steps=5):
    """Return what a contender began with, and the contender after a few steps.

    The gradients are refilled before each.
    """
    given = workloads.draw(list(shapes), dtype)
    contender = peer.make(*given, tail, device)
    for _ in range(steps):
        contender.refill()
        contender.step()
    contender.wait()
    return given, contender
