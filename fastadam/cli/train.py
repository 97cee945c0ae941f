"""``fastadam train``: a small transformer learns names, under fastadam."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from fastadam.cli import CommandError, output_path, outputs, require, say, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from fastadam.demo.train import StepRecord

__all__ = ["add_parser", "run"]

BETAS = (0.9, 0.95)
EPS = 1e-8


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``train`` to the commands.

    Parameters
    ----------
    subparsers : argparse subparsers action
        Of the ``fastadam`` parser; modified.
    """
    parser = subparsers.add_parser(
        "train",
        help="train a small model that makes up names",
        description=(
            "Train a character-level transformer (4,192 parameters) on a list of names, one "
            "name per step, with Adam and a cosine schedule; then let it make up names."
        ),
    )
    add = parser.add_argument
    add(
        "--names",
        type=Path,
        metavar="FILE",
        help="one name per line, letters a to z; default: first names of the 1990 US census",
    )
    add(
        "--steps",
        type=whole_number(1),
        default=1000,
        metavar="N",
        help="how many steps (default: %(default)s)",
    )
    add(
        "--lr",
        type=_learning_rate,
        default=1e-2,
        metavar="X",
        help="learning rate of the first step (default: %(default)s)",
    )
    add(
        "--seed",
        type=whole_number(0),
        default=42,
        metavar="N",
        help="the same seed gives the same losses and names (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("float32", "float64"),
        default="float64",
        help="of parameters and gradients (default: %(default)s)",
    )
    add(
        "--samples",
        type=whole_number(0),
        default=20,
        metavar="N",
        help="how many names to make up (default: %(default)s)",
    )
    add(
        "--plot",
        type=output_path,
        metavar="OUT.png",
        help="save a picture of loss and learning rate (.png, .svg or .pdf)",
    )
    add(
        "--json",
        type=output_path,
        metavar="OUT.json",
        help="save every loss and learning rate, the settings, versions and names",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, show, and save what was asked for.

    Parameters
    ----------
    args : argparse.Namespace
        From the parser of `add_parser`.

    Returns
    -------
    int
        0.

    Raises
    ------
    CommandError
        If a file or an optional package is missing, a name cannot be
        encoded, or training runs into infinity or NaN.
    """
    began = time.perf_counter()
    names = _names(args.names)
    outputs.check_picture(args.plot)
    outputs.check_files({"--names": args.names, "--plot": args.plot, "--json": args.json})
    require("autograd", "rich", *(["matplotlib"] if args.plot else []))

    import numpy as np

    import fastadam
    from fastadam.demo.model import CONTEXT, init_params, sample
    from fastadam.demo.train import train

    # The first step is as long as lr / (1 - beta1) at most, before the moments are divided.
    largest = float(np.finfo(args.dtype).max) * (1 - BETAS[0])
    if args.lr > largest:
        raise CommandError(
            f"--lr must not exceed {largest:g}, where steps become infinite in {args.dtype},"
            f" got {args.lr:g}"
        )
    # A stream for each use: asking for more samples changes no loss.
    init_rng, order_rng, sample_rng = np.random.default_rng(args.seed).spawn(3)
    params = init_params(init_rng, args.dtype)
    optimizer = fastadam.Adam(
        params, lr=args.lr, betas=BETAS, eps=EPS, schedule=fastadam.schedules.cosine(args.steps)
    )
    say(
        f"Training {sum(param.size for param in params.values()):,} parameters ({args.dtype}) "
        f"on {len(names):,} names, one name per step; the very first run compiles the kernel."
    )
    long = sum(len(name) > CONTEXT for name in names)
    if long:
        say(f"Of names of more than {CONTEXT} letters, {long} here, the rest is not learnt.")
    steps = train(params, names, optimizer, num_steps=args.steps, rng=order_rng)
    try:
        records = list(_progress(steps, args.steps))
        samples = [sample(params, sample_rng) for _ in range(args.samples)]
    except FloatingPointError as error:
        raise CommandError(f"{error}; try a lower --lr than {args.lr:g}", status=1) from error
    seconds = time.perf_counter() - began

    _show(records, samples, names, seconds)
    if args.json is not None:
        report = _report(args, len(names), records, samples, seconds)
        text = json.dumps(report, indent=1, allow_nan=False)
        _write(args.json, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    if args.plot is not None:
        from fastadam.demo.figures import save_plot

        title = f"fastadam train: {len(names):,} names, lr {args.lr:g}, seed {args.seed}"
        _write(args.plot, lambda path: save_plot(records, path, title=title))
    return 0


def _learning_rate(text: str) -> float:
    try:
        lr = float(text)
    except ValueError:
        lr = math.nan
    if not 0 < lr < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text!r}")
    return lr


def _names(path: Path | None) -> list[str]:
    from fastadam.demo.data import load_names, read_names

    if path is None:
        return load_names()
    try:
        return read_names(path)
    except OSError as error:
        raise CommandError(f"--names {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CommandError(f"--names {error}") from error


def _progress(records: Iterable[StepRecord], num_steps: int) -> Iterator[StepRecord]:
    from rich import progress
    from rich.console import Console

    # On stderr, and only where someone looks: what goes to a file is the result alone.
    console = Console(stderr=True)
    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[status]}"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=num_steps, status="preparing the kernel")
        for record in records:
            status = f"loss {record.smoothed_loss:.3f}  lr {record.lr:.1e}"
            bar.update(task, advance=1, status=status)
            yield record


def _show(
    records: Sequence[StepRecord], samples: Sequence[str], names: Sequence[str], seconds: float
) -> None:
    from fastadam.demo.data import VOCAB_SIZE
    from fastadam.demo.figures import text_curve

    say("\nLoss, smoothed, over the steps:")
    smoothed = [record.smoothed_loss for record in records]
    width = max(10, min(64, shutil.get_terminal_size().columns - 8))
    curve = text_curve(smoothed, width=width)
    try:
        curve.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        curve = text_curve(smoothed, width=width, ascii_only=True)
    say(curve)

    losses = [record.loss for record in records]
    few = min(50, len(losses))
    say(
        f"\nMean loss: {fmean(losses[:few]):.3f} over the first {few} steps, "
        f"{fmean(losses[-few:]):.3f} over the last {few} "
        f"(a uniform guess: {math.log(VOCAB_SIZE):.3f})."
    )
    times = [record.optimizer_seconds for record in records]
    say(
        f"Time: {seconds:.2f} s in all, {sum(times):.3f} s of it in the optimizer: "
        f"{times[0]:.3f} s for the first step, median {median(times) * 1e6:.0f} microseconds."
    )
    if samples:
        new = len(set(samples) - set(names))
        say(f"\n{len(samples)} names it made up, {new} of them not in the list:")
    for start in range(0, len(samples), 5):
        row = (name or "(empty)" for name in samples[start : start + 5])
        say(("  " + " ".join(f"{name:<16}" for name in row)).rstrip())


def _report(
    args: argparse.Namespace,
    num_names: int,
    records: Sequence[StepRecord],
    samples: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    import fastadam

    return {
        "settings": {
            "names": None if args.names is None else str(args.names),
            "num_names": num_names,
            "steps": args.steps,
            "lr": args.lr,
            "betas": BETAS,
            "eps": EPS,
            "schedule": "cosine",
            "dtype": args.dtype,
            "seed": args.seed,
        },
        "versions": {
            "fastadam": fastadam.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("numba", "numpy", "autograd")},
        },
        "losses": [record.loss for record in records],
        "lrs": [record.lr for record in records],
        "samples": list(samples),
        "seconds": seconds,
        "optimizer_seconds": sum(record.optimizer_seconds for record in records),
    }


def _write(path: Path, write: Callable[[Path], object]) -> None:
    outputs.save(path, write)
    say(f"Saved {path}")
