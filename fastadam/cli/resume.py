"""Going on with ``fastadam train``: what decides a run's losses, and what a file says of it."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from typing import TYPE_CHECKING, Any

from fastadam.cli import inspect
from fastadam.cli.common import CommandError, counted, output_path, printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fastadam.checkpoint import Checkpoint

__all__ = [
    "DEFAULTS",
    "DTYPES",
    "PROGRAM",
    "checkpoint_path",
    "in_place",
    "note",
    "position",
    "settings",
]

# Of the options that a resumed run has from its file.
DEFAULTS = {"steps": 1000, "lr": 1e-2, "seed": 42, "dtype": "float64"}
DTYPES = ("float32", "float64")
PROGRAM = "fastadam train"  # marks the checkpoints that it wrote


def checkpoint_path(text: str) -> Path:
    """Argument type: a file that can be replaced by a checkpoint."""
    # A checkpoint is written beside the file, and then put in its place.
    path = output_path(text)
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a file, got {text!r}")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be in a folder that is writable, got {text!r}")
    return path


def in_place(args: argparse.Namespace) -> bool:
    """Whether the checkpoint is to be written to the file that is resumed from."""
    return args.resume is not None and args.checkpoint == args.resume.resolve()


def settings(
    args: argparse.Namespace, names: Sequence[str], saved: Checkpoint | None
) -> dict[str, Any]:
    """Return what decides every loss, fit for JSON.

    Raises
    ------
    CommandError
        For an option or names that contradict the file resumed from, or one
        of another program.
    """
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    given = {name: getattr(args, name) for name in DEFAULTS}
    if saved is None:
        chosen = {name: DEFAULTS[name] if given[name] is None else given[name] for name in given}
        built_in = args.names is None
        return {
            **chosen,
            "names": {"count": len(names), "sha256": digest, "built_in": built_in},
        }
    file, chosen = printable(str(args.resume)), _written(args.resume, saved)
    for name, value in given.items():
        if value not in (None, chosen[name]):
            raise CommandError(f"--{name} must be {chosen[name]}, as in {file}, got {value}")
    wanted = chosen["names"]
    if wanted["sha256"] != digest:
        told = f"the {counted(wanted['count'], 'name')} of {file} (SHA-256 {wanted['sha256']:.12})"
        if args.names is None and not wanted["built_in"]:
            raise CommandError(f"--names must be given: {printable(told)}")
        raise CommandError(
            f"--names must be {printable(told)}, got {counted(len(names), 'name')}"
            f" (SHA-256 {digest:.12})"
        )
    return chosen


def _written(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings in a checkpoint; refuse one that this command did not write."""
    extra = checkpoint.extra
    try:
        settings: dict[str, Any] = extra["settings"]
        kinds = {name: type(value) for name, value in settings["names"].items()}
        ours = (
            extra["program"] == PROGRAM
            and type(extra["average"]) is float
            and math.isfinite(extra["average"])
            and all(type(settings[name]) is type(value) for name, value in DEFAULTS.items())
            and max(1, checkpoint.step_count) <= settings["steps"]
            and 0 < settings["lr"] < math.inf
            and settings["seed"] >= 0
            and settings["dtype"] in DTYPES
            and kinds == {"count": int, "sha256": str, "built_in": bool}
        )
    except (AttributeError, LookupError, TypeError):
        ours = False
    if not ours:
        raise CommandError(f"{printable(str(path))} was not saved by {PROGRAM}", status=1)
    return settings


def note(path: Path, settings: Mapping[str, Any]) -> str:
    """Return what the file holds of a run, whenever it was interrupted."""
    try:
        checkpoint = inspect.read(path, verify=False)
        same = _written(path, checkpoint) == settings
    except CommandError:
        same = False
    if not same:
        return f"nothing is saved yet in {printable(str(path))}"
    return position(path, checkpoint.step_count, settings["steps"])


def position(path: Path, steps: int, num_steps: int) -> str:
    """Say where a run stands in a file."""
    file = printable(str(path))
    if steps == num_steps:
        return f"{file} holds the last step, {steps:,}: none is left to take"
    return f"{file} goes on after step {steps:,} of {num_steps:,}"
