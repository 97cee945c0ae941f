"""What the README says, works as it stands. (The pages of docs/ are tested by Sphinx.)"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastadam

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_there_are_examples():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs_when_pasted(number, optional):
    if "import torch" in BLOCKS[number]:
        optional("torch")
    names = {"__name__": "__main__"}
    exec(compile(BLOCKS[number], f"README.md, example {number}", "exec"), names)
    if "params" in names:
        assert all(abs(array).max() < 0.05 for array in names["params"].values())
    elif "loss" in names:
        assert names["loss"].item() < 0.05
    else:
        assert max(abs(names["x"].data), abs(names["y"].data)) < 0.05


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_examples_as_scripts(number, optional):
    """Nothing comes up as Python exits."""
    if "import torch" in BLOCKS[number]:
        optional("torch")
    code = f"def own(): pass\n{BLOCKS[number]}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command", ['pip install ".[demo]" && fastadam train', 'pip install ".[test]" && pytest']
)
def test_each_command_stands_on_one_line(command):
    assert README.splitlines().count(command) == 1
    assert README.count(command) == 1


def test_stated_defaults():
    opt = fastadam.Adam([])
    assert opt.lr == 1e-2
    assert opt.param_groups[0]["betas"] == (0.9, 0.95)


def test_links_lead_somewhere():
    root = Path(__file__).parents[2]
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (root / target).exists(), target
