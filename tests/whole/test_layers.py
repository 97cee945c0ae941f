"""Threads, forks and signals under each of Numba's threading layers."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import layer_run
import pytest
from layers import LAYERS, environment, why_missing

# Seconds: of a cell, and of compiling what all of them need.
LIMIT, COMPILE_LIMIT = 60, 400
SAMPLE = {
    "omp": ("fork", "signal", "torch"),
    "workqueue": ("threads", "mp-fork", "copies"),
    "tbb": ("fork-busy",),
}
NEEDS = {"fork": "fork", "fork-busy": "fork", "mp-fork": "fork", "mp-forkserver": "fork"}
NEEDS |= {"signal": "setitimer", "torch": "fork"}


def run(cell, layer, folder, limit):
    """Run a cell; return how it ended, and what it and its children had to say."""
    script, output = str(Path(layer_run.__file__)), folder / "output.txt"
    # A file, since a child that hangs would keep a pipe open.
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", script, cell],
            env=environment(layer),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"not within {limit} s"
            end_all(process, "SIGABRT")  # faulthandler then shows where each thread is
        finally:
            end_all(process, "SIGKILL")
    return code, output.read_text(errors="replace")


def end_all(process, name):
    """Send a signal to a process and its children."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    try:
        os.killpg(process.pid, getattr(signal, name))
    except ProcessLookupError:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Compile once: the machine code is the same under every layer."""
    code, output = run("warm", "workqueue", tmp_path_factory.mktemp("warm"), COMPILE_LIMIT)
    assert (code, output) == (0, "ok\n"), output


def cells():
    """Every cell under every layer; those not in the sample take too long for every day."""
    for layer in LAYERS:
        for cell in layer_run.CELLS:
            if cell != "warm":
                marks = () if cell in SAMPLE[layer] else pytest.mark.full
                yield pytest.param(layer, cell, marks=marks, id=f"{layer}-{cell}")


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(("layer", "cell"), list(cells()))
def test_cell(layer, cell, tmp_path, optional):
    if cell == "torch":
        optional("torch")
    if cell in NEEDS and not hasattr({"setitimer": signal}.get(NEEDS[cell], os), NEEDS[cell]):
        pytest.skip(f"no {NEEDS[cell]} on this system")
    if why_missing(layer):
        pytest.skip(f"could not import the threading layer {layer}: {why_missing(layer)}")
    code, output = run(cell, layer, tmp_path, LIMIT)
    assert code == 0, f"{code}\n{output}"
    assert output.endswith("ok\n"), output
