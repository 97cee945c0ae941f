"""A run that is saved, and gone on with in another process, has the bits of one that is not."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import resume_run
from layers import environment, why_missing

pytest.importorskip("safetensors", exc_type=ImportError)

# Steps of a run, at how many points it is saved in each of the 4 shapes that every option has, and
# under what: layers and threads.
if os.environ.get("FASTADAM_TEST_FULL") == "1":
    STEPS, POINTS = 1000, 5
    UNDER = [(layer, count) for count in (1, 2) for layer in ("omp", "workqueue", "tbb")]
else:
    STEPS, POINTS = 48, 2
    UNDER = [("workqueue", 2), ("omp", 1)]


def run(mode, folder, under):
    """Have all runs taken in a process of their own; return the digests by run and point."""
    layer, count = under
    if why_missing(layer):
        pytest.skip(f"could not import the threading layer {layer}: {why_missing(layer)}")
    output = f"{mode}-{layer}-{count}.json"
    arguments = [mode, str(folder), str(STEPS), str(POINTS), output]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(Path(resume_run.__file__)), *arguments],
        env={**environment(layer), "NUMBA_NUM_THREADS": str(count)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return json.loads((folder / output).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return what takes all runs straight under a layer, once: the files' folder, the digests."""

    @functools.cache
    def go(under):
        folder = tmp_path_factory.mktemp("straight")
        return folder, run("straight", folder, under)

    return go


@pytest.mark.parametrize("under", UNDER, ids=lambda under: f"{under[0]}-{under[1]}")
def test_resumed_is_straight(straight, under):
    """Saved under one layer and number of threads, gone on with under another."""
    folder, expected = straight(UNDER[UNDER.index(under) - 1])
    found = run("resume", folder, under)
    assert len(found) == len(expected) == len(resume_run.cases())
    for case, runs in found.items():
        (whole,) = expected[case].values()
        assert len(runs) == POINTS
        for point, digests in runs.items():
            assert digests == {k: whole[k] for k in whole if int(k) >= int(point)}, (case, point)
    assert straight(under)[1] == expected


def test_digests_tell_steps_apart():
    """The digests above would prove nothing if they were always the same."""
    one = resume_run.Run("plain", "both", 8, fresh=False).go(0)
    assert len(set(one.values())) == 8
    assert set(resume_run.Run("plain", "both", 8, fresh=True).go(0).values()).isdisjoint(one)


def test_large_runs_are_in_several_threads(kernel_calls):
    resume_run.Run("plain", "large f4", 8, fresh=False).step(0)
    assert ("update", "float32", "parallel") in kernel_calls
