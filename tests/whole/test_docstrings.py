"""Every public name has a docstring that says what there is to say, and its examples are right."""

import doctest
import importlib
import importlib.util
import inspect
import subprocess
import sys

import pytest

import fastadam
from fastadam import functional, schedules

MODULES = ["adam", "checkpoint.loading", "checkpoint.saving", "compiling", "functional"]
MODULES += ["objects", "schedules", "schedules.exact", "update.formula"]
# Public names that are modules, or explain themselves.
PLAIN = {"CheckpointError", "__version__", "checkpoint", "functional", "objects", "schedules"}
PUBLIC = [
    *(getattr(fastadam, name) for name in fastadam.__all__ if name not in {*PLAIN, "torch"}),
    functional.adam,
    *(getattr(schedules, name) for name in schedules.__all__ if name != "Schedule"),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, optional):
    if name.startswith("checkpoint."):
        optional("safetensors")
    module = importlib.import_module(f"fastadam.{name}")
    failed, _ = doctest.testmod(module)
    assert failed == 0


@pytest.mark.parametrize("public", PUBLIC, ids=lambda p: p.__name__)
def test_sections(public):
    """A summary, its parameters or attributes, what it raises, an example that runs."""
    doc = inspect.getdoc(public)
    assert doc
    assert len(doc.splitlines()[0]) <= 75
    signature = inspect.signature(public)
    for name in signature.parameters:
        assert name.lstrip("*") in doc, f"{name} is not described"
    assert "Raises\n------\n" in doc or public is fastadam.StepResult
    assert "Examples\n--------\n" in doc
    assert ">>> " in doc


@pytest.mark.parametrize("owner", [fastadam.Adam, type(fastadam.from_objects([]))])
def test_public_methods(owner):
    for name, member in vars(owner).items():
        if not name.startswith("_"):
            assert inspect.getdoc(member), f"{owner.__name__}.{name} has no docstring"


@pytest.mark.parametrize(
    "name", ["", ".schedules", ".checkpoint", ".functional", ".objects", ".torch"]
)
def test_dir_shows_the_public_names(name, optional):
    if name == ".checkpoint":
        optional("safetensors")
    if name == ".torch":
        optional("torch")
    module = importlib.import_module(f"fastadam{name}")
    # One is not in a star's names, where it would replace torch itself.
    torch = ["torch"] if importlib.util.find_spec("torch") else []
    named = [*module.__all__, *torch] if module is fastadam else module.__all__
    assert dir(module) == sorted(named)
    for public in dir(module):
        assert getattr(module, public) is not None
        assert public == "__version__" or not public.startswith("_")


def test_all_is_what_there_is():
    for name in fastadam.__all__:
        assert hasattr(fastadam, name)
    with pytest.raises(AttributeError, match="module 'fastadam' has no attribute 'adamm'"):
        fastadam.adamm  # noqa: B018


def test_a_star_imports_nothing_of_torch():
    code = "import sys; from fastadam import *; assert not {'torch', 'fastadam.torch'}"
    code += ".intersection(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_its_door_says_how_to_install_it():
    code = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import fastadam
for look in (lambda: fastadam.torch, lambda: __import__("fastadam.torch")):
    try:
        look()
    except ImportError as error:
        print(error, error.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "fastadam.torch needs PyTorch: pip install torch torch\n"
    assert (done.stdout, done.stderr) == (message * 2, "")
