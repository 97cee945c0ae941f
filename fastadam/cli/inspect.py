"""``fastadam inspect``: what a checkpoint holds."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadam.cli.common import CommandError, columns, in_rows, printable, require, write

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    from fastadam.checkpoint import Checkpoint

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "explained", "read", "run"]

# What of a text or a list of any length is shown, and how far a long name moves a column.
LONGEST, WIDEST = 200, 48


HELP = "show what a checkpoint holds"
DESCRIPTION = (
    "Show what a checkpoint holds: steps, schedule, hyperparameters, tensors, and whether their "
    "checksums are right."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="what fastadam.save wrote")
    add("--json", action="store_true", help="print the same as JSON")
    add(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="read the header alone, not the tensors for their checksums",
    )


def run(args: argparse.Namespace) -> int:
    """Read and print."""
    checkpoint = read(args.file, verify=args.verify)
    with explained(args.file):
        size = args.file.stat().st_size
    facts = _facts(args.file, size, checkpoint, verified=args.verify)
    if args.json:
        write(json.dumps(facts, indent=1))
    else:
        write(_render(facts, columns(sys.stdout)))
    return 0


def read(path: Path, *, verify: bool) -> Checkpoint:
    """Return what a checkpoint says apart from its tensors' values.

    These are read if `verify`, for their checksums. Raises as `explained`, and
    CommandError if safetensors is not installed.
    """
    require("safetensors", extra="checkpoint")
    from fastadam import checkpoint

    with explained(path):
        return checkpoint.inspect(path, verify=verify)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say in one line whatever is wrong with a checkpoint that is read.

    Raises
    ------
    CommandError
        With status 1 if it is no checkpoint, is damaged or does not fit;
        with status 2 if it is not there, or cannot be opened.
    """
    from fastadam import CheckpointError

    try:
        yield
    except CheckpointError as error:
        raise CommandError(printable(str(error)), status=1) from error
    except OSError as error:
        raise CommandError(f"{printable(str(path))}: {error.strerror or error}") from error


def _facts(path: Path, size: int, checkpoint: Checkpoint, *, verified: bool) -> dict[str, Any]:
    """Return all that there is to tell, fit for JSON if ``extra`` is."""
    norm, schedule = checkpoint.max_grad_norm, checkpoint.schedule
    return {
        "file": str(path),
        "bytes": size,
        "version": checkpoint.version,
        "step_count": checkpoint.step_count,
        "steps": {str(name): steps for name, steps in checkpoint.steps.items()},
        "schedule": schedule if schedule is None else str(schedule),
        "max_grad_norm": "inf" if norm == math.inf else norm,
        "nonfinite": checkpoint.nonfinite,
        "ema_decay": checkpoint.ema_decay,
        "amsgrad": checkpoint.amsgrad,
        "param_groups": checkpoint.param_groups,
        "tensors": {
            name: {
                "dtype": dtype.name,
                "shape": list(shape),
                "bytes": math.prod(shape) * dtype.itemsize,
            }
            for name, (dtype, shape) in _in_order(checkpoint)
        },
        "extra": checkpoint.extra,
        "verified": verified,
    }


def _in_order(checkpoint: Checkpoint) -> list[tuple[str, Any]]:
    """Return the tensors by parameter, as the optimizer was given them, each before its state."""
    names = [str(name) for group in checkpoint.param_groups for name in group["params"]]
    place = {name: number for number, name in enumerate(names)}

    def key(tensor: tuple[str, Any]) -> tuple[int, bool, str]:
        kind, _, name = tensor[0].partition("/")
        return place.get(name, len(place)), kind != "param", kind

    return sorted(checkpoint.tensors.items(), key=key)


def _render(facts: Mapping[str, Any], columns: int | None) -> str:
    rows = [
        ("file", f"{printable(facts['file'])}, {facts['bytes']:,} bytes"),
        ("fastadam", _name(facts["version"])),
        ("step_count", f"{facts['step_count']:,}"),
    ]
    other = [
        f"{steps:,} for {_name(name)}"
        for name, steps in facts["steps"].items()
        if steps != facts["step_count"]
    ]
    rows += _under("steps", other)
    rows += [
        (key, _clipped(printable(str(facts[key]))))
        for key in ("schedule", "max_grad_norm", "nonfinite", "ema_decay", "amsgrad")
    ]
    for number, group in enumerate(facts["param_groups"]):
        options = ", ".join(f"{key}={group[key]!r}" for key in group if key != "params")
        names = ", ".join(_name(str(key)) for key in group["params"]) or "none"
        rows += _under(f"group {number}", [options, f"parameters: {_clipped(names)}"])
    extra = [
        _clipped(f"{_name(key)}: {printable(json.dumps(value, ensure_ascii=False))}")
        for key, value in facts["extra"].items()
    ]
    rows += _under("extra", extra or ["none"])
    lines = in_rows(rows, columns)
    verdict = "all right" if facts["verified"] else "not verified"
    return "\n".join([*lines, "", *_table(facts, columns), "", f"checksums: {verdict}"])


def _table(facts: Mapping[str, Any], columns: int | None) -> list[str]:
    """Return the lines of the table of tensors; two for each where one would be too long."""
    tensors = facts["tensors"]
    cells = [("tensor", "dtype", "shape", "bytes")]
    cells += [
        (_name(name), tensor["dtype"], str(tuple(tensor["shape"])), f"{tensor['bytes']:,}")
        for name, tensor in tensors.items()
    ]
    total = sum(tensor["bytes"] for tensor in tensors.values())
    cells.append((f"total: {len(tensors):,}", "", "", f"{total:,}"))
    name, dtype, shape, size = (
        min(WIDEST, max(map(len, column))) for column in zip(*cells, strict=True)
    )
    if columns is None or name + dtype + shape + size + 6 <= columns:
        return [f"{a:<{name}}  {b:<{dtype}}  {c:<{shape}}  {d:>{size}}" for a, b, c, d in cells]
    lines = []
    for a, b, c, d in cells:
        lines += [a, f"    {b:<{dtype}}  {c:<{shape}}  {d:>{size}}"]
    return lines


def _under(key: str, values: Sequence[str]) -> list[tuple[str, str]]:
    """Return rows of which the first alone has the key."""
    return [("" if i else key, value) for i, value in enumerate(values)]


def _name(text: str) -> str:
    """Show a name as it is, or, where it could be taken for something else, as its repr."""
    plain = text.isprintable() and text.isascii() and text.strip(" '\"") == text != ""
    return _clipped(text if plain and not set(text) & set("\\,:") else repr(text))


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"
