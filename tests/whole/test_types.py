"""What mypy and pyright say of calls: right ones pass, wrong ones fail before they are run."""

import doctest
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastadam

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = ["adam", "checkpoint", "objects", "schedules", "update.result"]

# Exactly the lines that say so are refused.
CALLS = """
import numpy as np

import fastadam
from fastadam import schedules
from fastadam.params.types import Array

w, f = np.zeros(3), np.zeros(3, np.float32)
named = {"w": w, "b": np.zeros((2, 2))}
opt = fastadam.Adam(w)
fastadam.Adam([w, f])
fastadam.Adam((w, f))
fastadam.Adam([])
fastadam.Adam({"w": w, "f": f}, betas=[0.9, 0.99])
fastadam.Adam(named)
fastadam.Adam(named.values())
fastadam.Adam(array for array in (w, f))
fastadam.Adam([{"params": [w], "lr": 0.1}, {"params": named}])
groups = [{"params": [w], "lr": 0.1}, {"params": w, "lr": 0.2}]
fastadam.Adam(groups)
fastadam.AdamW(named, 0.1, (0.9, 0.99), 1e-8, weight_decay=0.1, nonfinite="raise")
opt.add_param_group(groups[0])
opt.step(w)
opt.step([w, None])
opt.step({"w": w, "f": None})
opt.step({name: 2 * array for name, array in named.items()})
opt.step([array * 2 for array in named.values()])
opt.step([[w, None], {"f": None}])
opt.step(np.float64(0.5))
opt.step(w.sum())
opt.step(w[0])
opt.step(grad_scale=2.0, zero_grad=True)
opt.grads["w"][:] = 3
opt.ema_params[0][:] = 3
opt.param_groups[0]["lr"] = 0.5
opt.nonfinite = "skip"
opt.max_grad_norm = None
opt.num_threads = 2
opt.num_threads = None
fastadam.AdamW(w, num_threads=2)
opt.schedule = schedules.cosine(10)
opt.schedule = lambda step: 1 / (step + 1)
schedules.chain((schedules.warmup(schedules.constant(), 5), 10), lambda step: 1.0)
schedules.warmup_stable_decay(10, 1, 2, decay="sqrt")
schedules.piecewise((1, 2), (1.0, 0.5, 0.1))
schedules.piecewise([1, 2], [1.0, 0.5, 0.1])

def of_any_library(array: Array, arrays: list[Array], missing: Array | None) -> None:
    opt = fastadam.Adam(array)
    fastadam.Adam(arrays).step([missing])
    fastadam.Adam({"w": array}).step({"w": missing})

fastadam.Adam("abc")  # wrong
fastadam.Adam(["abc"])  # wrong
fastadam.Adam({"w": "text"})  # wrong
fastadam.Adam([1.0])  # wrong
fastadam.Adam(1.0)  # wrong
fastadam.Adam(None)  # wrong
fastadam.Adam([None])  # wrong
fastadam.Adam(w, nonfinite="ignore")  # wrong
fastadam.Adam(w, lr="0.1")  # wrong
fastadam.Adam(w, betas=0.9)  # wrong
fastadam.Adam(w, betas=(0.9,))  # wrong
fastadam.Adam(w, schedule=0.5)  # wrong
fastadam.Adam(w, schedule=schedules.cosine)  # wrong
fastadam.Adam(w, learning_rate=0.1)  # wrong
fastadam.AdamW("abc")  # wrong
opt.nonfinite = "ignore"  # wrong
opt.lr = "1"  # wrong
opt.amsgrad = True  # wrong
opt.learning_rate = 0.1  # wrong
opt.max_grad_norm = "1"  # wrong
opt.schedule = 0.5  # wrong
opt.num_threads = "2"  # wrong
fastadam.Adam(w, num_threads=0.5)  # wrong
opt.step("abc")  # wrong
opt.step({"w": 1.0})  # wrong
opt.step([1.0])  # wrong
opt.step(2.0)  # wrong
opt.step(None)  # wrong
opt.step(w, zero_grad="yes")  # wrong
opt.step(w).norm  # wrong
opt.zero_grad()  # wrong
schedules.warmup_stable_decay(10, 1, 2, decay="exp")  # wrong
schedules.cosine("10")  # wrong
schedules.warmup(5, 2)  # wrong
schedules.chain(schedules.cosine(3), 5)  # wrong
"""

WRONG = {k for k, line in enumerate(CALLS.splitlines(), 1) if line.endswith("# wrong")}

# Pages are made of pieces, and some of these name what the reader is to have.
SETTINGS = """
[mypy]
allow_redefinition = true
check_untyped_defs = true
disable_error_code = name-defined
ignore_missing_imports = true
[mypy-numba.*,llvmlite.*,matplotlib.*,torch.*]
follow_imports = skip
[mypy-fastadam.*]
follow_imports = silent
"""


def pieces(page):
    """Return the code of a page: examples that share their names, and those that stand alone."""
    text, shared, alone = page.read_text(encoding="utf-8"), "", []
    for kind, code in re.findall(
        r"^```({doctest}|{execute}|python)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        if kind == "{doctest}":
            shared += sources(code)
        elif kind == "{execute}":
            shared += re.sub("^:.*\n", "", code, flags=re.MULTILINE)
        else:
            alone.append(code)
    return [code for code in (shared, *alone) if code]


def sources(text):
    """Return the code of the examples in a docstring."""
    return "".join(example.source for example in doctest.DocTestParser().get_examples(text))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Return what mypy says: the lines of `CALLS`, and all about the examples."""
    pytest.importorskip("mypy", exc_type=ImportError)
    pytest.importorskip("safetensors", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("types")
    (folder / "mypy.ini").write_text(SETTINGS)
    (folder / "calls.py").write_text(CALLS)
    for page in PAGES:
        for k, code in enumerate(pieces(page)):
            (folder / f"page_{page.stem}_{k}.py").write_text(code, encoding="utf-8")
    examples = 0
    for name in MODULES:
        module = importlib.import_module(f"fastadam.{name}")
        for k, test in enumerate(doctest.DocTestFinder().find(module)):
            examples += len(test.examples)
            code = "from fastadam.schedules import *\n" + sources(test.docstring)
            (folder / f"doc_{name.replace('.', '_')}_{k}.py").write_text(code, encoding="utf-8")
    assert examples > 50
    assert len(list(folder.glob("page_*.py"))) > 10
    command = [sys.executable, "-m", "mypy", "--config-file", folder / "mypy.ini"]
    command += ["--cache-dir", folder / "cache", "--no-error-summary", *folder.glob("*.py")]
    # Where it is installed, mypy finds it; and not where it is, beside modules like mypy's own.
    root, env = Path(fastadam.__path__[0]).parent, {**os.environ}
    if root.name != "site-packages":
        env["MYPYPATH"] = str(root)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    errors = re.findall(r"(\w+)\.py:(\d+): error: (.*)", done.stdout)
    calls = {int(line) for file, line, _ in errors if file == "calls"}
    return calls, [error for error in errors if error[0] != "calls"]


def test_mypy_refuses_what_is_wrong_and_nothing_else(said):
    assert said[0] == WRONG


def test_mypy_accepts_every_example(said):
    assert said[1] == []


def test_pyright_refuses_what_is_wrong_and_nothing_else(tmp_path):
    if importlib.util.find_spec("basedpyright") is None:
        pytest.skip("no basedpyright, which is pyright with what it needs in one wheel")
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--level", "error", file]
    command += ["--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert {each["range"]["start"]["line"] + 1 for each in found} == WRONG
