"""Training loops of others, and torch's tools around a loop, go on as with torch's AdamW."""

import itertools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "engines_loops.md"
SECTIONS = dict(part.split("\n", 1) for part in PAGE.read_text("utf-8").split("\n## ")[1:])
PACKAGES = {
    "Accelerate": "accelerate",
    "Lightning": "lightning",
    "The Trainer of transformers": "transformers",
}
# In units of the loss. The gradients are those of the same code, so losses differ by what
# rounding does to 16 updates; where the model computes in 16 bits, by some of its roundings.
FLOAT32, HALF = 1e-5, 2e-3


@pytest.fixture
def loops(optional):
    """The loops, in one of torch's threads: on busy cores its small operations wait for others."""
    torch = optional("torch")
    import training_loops

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield training_loops
    torch.set_num_threads(threads)


@pytest.fixture
def ours(optional):
    optional("torch")
    import fastadam.torch

    return fastadam.torch.AdamW


@pytest.fixture
def theirs(loops):
    return loops.torch.optim.AdamW


def noted(loop, *args, **options):
    """Return what a loop returns, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = loop(*args, **options)
    return result, {str(each.message) for each in caught}


def assert_alike(ours, theirs, tolerance):
    """The same losses, within rounding; no warnings that torch's class does not bring too."""
    (result, warned), (expected, expected_warned) = ours, theirs
    assert len(result[0]) == len(expected[0]) > 0
    assert result[0] == pytest.approx(expected[0], rel=tolerance, abs=0)
    assert warned <= expected_warned


def assert_resumed(resumed, straight):
    """The same bits as of the run that went straight through."""
    assert resumed[0] == straight[0][-len(resumed[0]) :]
    assert len(resumed[0]) == len(straight[0]) // 2
    for one, other in zip(resumed[1], straight[1], strict=True):
        assert one.equal(other)


def assert_loop(loop, ours, theirs, folder, tolerance, **options):
    """As torch's, straight through; resumed from an own checkpoint, and from one of torch's."""
    expected = noted(loop, theirs, folder / "theirs", **options)
    result = noted(loop, ours, folder / "ours", **options)
    assert_alike(result, expected, tolerance)
    resumed, _ = noted(loop, ours, folder / "ours", resume=True, **options)
    assert_resumed(resumed, result[0])
    taken_over, _ = noted(loop, ours, folder / "theirs", resume=True, **options)
    assert taken_over[0] == pytest.approx(resumed[0], rel=tolerance)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_grad_scaler(loops, ours, theirs, fused, clip):
    """Torch's class unscales in the step if fused, and so does ours; the scaler does otherwise."""
    expected = noted(loops.scaled, theirs, clip=clip, fused=fused)
    result = noted(loops.scaled, ours, clip=clip, fused=fused)
    assert_alike(result, expected, HALF)
    _, _, scales, moved = result[0]
    assert (scales, moved) == expected[0][2:]
    assert {True, False} == set(moved)
    assert any(later > earlier for earlier, later in itertools.pairwise(scales))


def test_clipping_where_the_step_unscales(loops, ours, theirs):
    """max_grad_norm is of the unscaled gradients: as unscale_ and then clip_grad_norm_."""
    expected = noted(loops.scaled, theirs, fused=True, clip=0.5)
    result = noted(loops.scaled, ours, fused=True, max_grad_norm=0.5)
    assert_alike(result, expected, HALF)


@pytest.mark.parametrize("scheduler", [False, True])
@pytest.mark.parametrize("compiled", ["model", "train_step", "opt.step"])
def test_compile(loops, ours, theirs, compiled, scheduler):
    """Compiled code calls the step as it is, and is not compiled again for the next one."""
    expected = noted(loops.plain, theirs, scheduler=scheduler)
    result = noted(loops.plain, ours, compiled=compiled, scheduler=scheduler)
    assert_alike(result, expected, FLOAT32)


def test_several_optimizers_over_one_model(loops, ours, theirs):
    """Moments are each optimizer's own, though the parameters are the same."""
    expected = noted(loops.notebook, theirs)
    result = noted(loops.notebook, ours)
    assert_alike(result, expected, FLOAT32)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(loops, ours, theirs, optional, tmp_path, precision):
    optional("accelerate")
    tolerance = FLOAT32 if precision == "no" else HALF
    assert_loop(loops.accelerate, ours, theirs, tmp_path, tolerance, precision=precision)


def test_accelerate_in_two_processes(loops, optional, tmp_path):
    """Each process has its own losses; parameters are the same in both, also when resumed."""
    optional("accelerate")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", loops.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = [loops.torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for own in found:
        assert_alike((own["ours"], set()), (own["theirs"], set()), FLOAT32)
        assert_resumed(own["resumed"], own["ours"])
    assert found[0]["ours"][0] != found[1]["ours"][0]
    for one, other in zip(found[0]["ours"][1], found[1]["ours"][1], strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("manual", [False, True])
def test_lightning(loops, ours, theirs, optional, tmp_path, manual, precision):
    optional("lightning")
    tolerance = FLOAT32 if precision == "32-true" else HALF
    options = {"manual": manual, "precision": precision}
    assert_loop(loops.lightning, ours, theirs, tmp_path, tolerance, **options)


def test_lightning_clips_where_the_step_does_not_unscale(loops, ours, theirs, optional, tmp_path):
    """As of torch's class: fused=True and Lightning's clipping do not go together in 16 bits."""
    optional("lightning")
    options = {"precision": "bf16-mixed"}
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        noted(loops.lightning, ours, tmp_path / "refused", options={"fused": True}, **options)
    expected = noted(loops.lightning, theirs, tmp_path / "theirs", **options)
    own = {"fused": True, "max_grad_norm": 0.5}
    result = noted(loops.lightning, ours, tmp_path / "own", clip=None, options=own, **options)
    assert_alike(result, expected, HALF)


@pytest.mark.parametrize(
    ("given_as", "bf16"), [("optimizers", True), ("optimizer_cls_and_kwargs", False)]
)
def test_transformers_trainer(loops, ours, theirs, optional, tmp_path, given_as, bf16):
    optional("transformers")
    tolerance, options = HALF if bf16 else FLOAT32, {"given_as": given_as, "bf16": bf16}
    assert_loop(loops.transformers, ours, theirs, tmp_path, tolerance, **options)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_pages_examples(loops, optional, tmp_path, monkeypatch, section):
    """Those of a section run as they stand, one after the other."""
    optional(PACKAGES.get(section, "torch"))
    loops.start_anew()
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    blocks = re.findall(r"^```python\n(.*?)^```$", SECTIONS[section], re.M | re.S)
    assert blocks
    for block in blocks:
        noted(exec, block, names)
