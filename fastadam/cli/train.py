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
from itertools import chain, islice
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from fastadam.cli import inspect, resume
from fastadam.cli.common import (
    CommandError,
    check_files,
    check_picture,
    columns,
    counted,
    output_path,
    progress_bar,
    require,
    save,
    say,
    whole_number,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from fastadam.demo.train import StepRecord

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

BETAS = (0.9, 0.95)
EPS = 1e-8
EVERY, KEEP = 100, 1


HELP = "train a small model that makes up names"
DESCRIPTION = (
    "Train a character-level transformer (4,192 parameters) on a list of names, one name per "
    "step, with Adam and a cosine schedule; then let it make up names."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
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
        metavar="N",
        help=f"how many steps (default: {resume.DEFAULTS['steps']})",
    )
    add(
        "--lr",
        type=_learning_rate,
        metavar="X",
        help=f"learning rate of the first step (default: {resume.DEFAULTS['lr']})",
    )
    add(
        "--seed",
        type=whole_number(0),
        metavar="N",
        help=f"the same seed gives the same losses and names (default: {resume.DEFAULTS['seed']})",
    )
    add(
        "--dtype",
        choices=resume.DTYPES,
        help=f"of parameters and gradients (default: {resume.DEFAULTS['dtype']})",
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
    add(
        "--checkpoint",
        type=resume.checkpoint_path,
        metavar="FILE",
        help="save what --resume needs, every so many steps and after the last",
    )
    add(
        "--every",
        type=whole_number(1),
        metavar="N",
        help=f"how many steps from one checkpoint to the next (default: {EVERY})",
    )
    add(
        "--keep",
        type=whole_number(1),
        metavar="N",
        help=(
            "how many checkpoints to keep, older ones as name.1.suffix and so on "
            f"(default: {KEEP})"
        ),
    )
    add(
        "--resume",
        type=Path,
        metavar="FILE",
        help="go on from a checkpoint, with its settings, as if there had been no break",
    )


def run(args: argparse.Namespace) -> int:
    """Train, show, and save what was asked for.

    Raises
    ------
    CommandError
        If a file or an optional package is missing, a name cannot be
        encoded, a checkpoint cannot be read or written, an option contradicts
        the one resumed from, or training runs into infinity or NaN.
    KeyboardInterrupt
        With what the checkpoint holds as its message, if one is written.
    """
    began = time.perf_counter()
    for option, value in (("--every", args.every), ("--keep", args.keep)):
        if value is not None and args.checkpoint is None:
            raise CommandError(f"{option} must come with --checkpoint, got {value} alone")
    names = _names(args.names)
    check_picture(args.plot)
    saved = None if args.resume is None else inspect.read(args.resume, verify=False)
    settings = resume.settings(args, names, saved)
    check_files(
        {
            "--names": args.names,
            "--resume": args.resume,
            "--checkpoint": None if resume.in_place(args) else args.checkpoint,
            "--plot": args.plot,
            "--json": args.json,
        }
    )
    require("autograd", "rich", *(["matplotlib"] if args.plot else []))
    if args.checkpoint is None:
        _train(args, names, settings, began)
        return 0
    require("safetensors", extra="checkpoint")
    try:
        _train(args, names, settings, began)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume.note(args.checkpoint, settings)) from None
    return 0


def _train(
    args: argparse.Namespace, names: Sequence[str], settings: Mapping[str, Any], began: float
) -> None:
    import numpy as np

    import fastadam
    from fastadam.demo.model import CONTEXT, init_params, sample
    from fastadam.demo.train import train

    num_steps, lr, dtype = settings["steps"], settings["lr"], settings["dtype"]
    # The first step is as long as lr / (1 - beta1) at most, before the moments are divided.
    largest = float(np.finfo(dtype).max) * (1 - BETAS[0])
    if lr > largest:
        raise CommandError(
            f"--lr must not exceed {largest:g}, where steps become infinite in {dtype}, got {lr:g}"
        )
    # A stream for each use: asking for more samples changes no loss.
    init_rng, order_rng, sample_rng = np.random.default_rng(settings["seed"]).spawn(3)
    params = init_params(init_rng, dtype)
    optimizer = fastadam.Adam(
        params, lr=lr, betas=BETAS, eps=EPS, schedule=fastadam.schedules.cosine(num_steps)
    )
    average = 0.0
    if args.resume is not None:
        with inspect.explained(args.resume):
            average = fastadam.load(args.resume, optimizer).extra["average"]
        say(f"{resume.position(args.resume, optimizer.step_count, num_steps)}.")
    first_step = optimizer.step_count
    if first_step < num_steps:
        say(
            f"Training {sum(param.size for param in params.values()):,} parameters ({dtype}) "
            f"on {counted(len(names), 'name')}, one name per step."
        )
    long = sum(len(name) > CONTEXT for name in names)
    if long:
        say(f"Of names of more than {CONTEXT} letters, {long} here, the rest is not learnt.")

    def save_checkpoint(average: float) -> None:
        extra = {"program": resume.PROGRAM, "settings": settings, "average": average}
        keep = args.keep or KEEP
        save(args.checkpoint, lambda path: fastadam.save(path, optimizer, keep=keep, extra=extra))

    steps = train(
        params,
        names,
        optimizer,
        num_steps=num_steps,
        rng=order_rng,
        first_step=first_step,
        average=average,
    )
    if args.checkpoint is not None:
        steps = _saving(steps, save_checkpoint, every=args.every or EVERY, num_steps=num_steps)
    try:
        records = list(_progress(steps, first_step, num_steps))
        samples = [sample(params, sample_rng) for _ in range(args.samples)]
    except FloatingPointError as error:
        raise CommandError(f"{error}; try a lower --lr than {lr:g}", status=1) from error
    saved = args.checkpoint is not None and (bool(records) or not resume.in_place(args))
    if saved and not records:  # to another file, which is to hold the last step too
        save_checkpoint(average)
    seconds = time.perf_counter() - began

    if records:
        _show_losses(records, seconds)
    _show_samples(samples, names)
    if args.json is not None:
        report = _report(args, settings, first_step, records, samples, seconds)
        _save(args.json, json.dumps(report, indent=1, allow_nan=False))
    if args.plot is not None and records:
        from fastadam.demo.figures import save_plot

        told = counted(len(names), "name")
        title = f"fastadam train: {told}, lr {lr:g}, seed {settings['seed']}"
        _save(args.plot, lambda path: save_plot(records, path, title=title))
    elif args.plot is not None:
        say(f"No step to draw: {args.plot} is not written.")
    if saved:
        say(f"Saved {args.checkpoint}")


def _saving(
    records: Iterable[StepRecord], save: Callable[[float], None], *, every: int, num_steps: int
) -> Iterator[StepRecord]:
    for record in records:
        done = record.step + 1
        if done % every == 0 or done == num_steps:
            save(record.average)
        yield record


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


def _progress(
    records: Iterable[StepRecord], first_step: int, num_steps: int
) -> Iterator[StepRecord]:
    from rich import progress

    status = progress.TextColumn("{task.fields[status]}")
    parts = (progress.MofNCompleteColumn(), status, progress.TimeRemainingColumn())
    records = iter(records)
    # The first step before the bar: it may compile and say so, in a line that a bar would cut.
    first = list(islice(records, 1))
    with progress_bar(10, *parts) as bar:
        task = bar.add_task("train", total=num_steps, completed=first_step, status="")
        for record in chain(first, records):
            text = f"loss {record.smoothed_loss:.3f}  lr {record.lr:.1e}"
            bar.update(task, advance=1, status=text)
            yield record


def _show_losses(records: Sequence[StepRecord], seconds: float) -> None:
    from fastadam.demo.data import VOCAB_SIZE
    from fastadam.demo.figures import text_curve

    first, last = records[0].step + 1, records[-1].step + 1
    which = (
        "the step"
        if first == last == 1
        else "the steps"
        if first == 1
        else f"steps {first:,} to {last:,}"
    )
    say(f"\nLoss, smoothed, over {which}:")
    smoothed = [record.smoothed_loss for record in records]
    width = max(10, min(64, shutil.get_terminal_size().columns - 8))
    curve = text_curve(smoothed, width=width, first=first)
    try:
        curve.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        curve = text_curve(smoothed, width=width, ascii_only=True, first=first)
    say(curve)

    losses = [record.loss for record in records]
    few = min(50, len(losses))
    these = "steps" if first == 1 else "of these"
    these = "step" if these == "steps" and few == 1 else these
    say(
        f"\nMean loss: {fmean(losses[:few]):.3f} over the first {few} {these}, "
        f"{fmean(losses[-few:]):.3f} over the last {few} "
        f"(a uniform guess: {math.log(VOCAB_SIZE):.3f})."
    )
    times = [record.optimizer_seconds for record in records]
    say(
        f"Time: {seconds:.2f} s in all, {sum(times):.3f} s of it in the optimizer: "
        f"{times[0]:.3f} s for the first step (compiles or loads code), median "
        f"{median(times) * 1e6:.0f} microseconds."
    )


def _show_samples(samples: Sequence[str], names: Sequence[str]) -> None:
    if samples:
        new = len(set(samples) - set(names))
        say(f"\n{counted(len(samples), 'name')} it made up, {new} of them not in the list:")
    each = min(5, max(1, ((columns(sys.stdout) or 87) - 2) // 17))
    for start in range(0, len(samples), each):
        row = (name or "(empty)" for name in samples[start : start + each])
        say(("  " + " ".join(f"{name:<16}" for name in row)).rstrip())


def _report(
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    first_step: int,
    records: Sequence[StepRecord],
    samples: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    import fastadam

    return {
        "settings": {
            "names": None if args.names is None else str(args.names),
            "num_names": settings["names"]["count"],
            "steps": settings["steps"],
            "lr": settings["lr"],
            "betas": BETAS,
            "eps": EPS,
            "schedule": "cosine",
            "dtype": settings["dtype"],
            "seed": settings["seed"],
        },
        "versions": {
            "fastadam": fastadam.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("numba", "numpy", "autograd")},
        },
        "first_step": first_step,
        "losses": [record.loss for record in records],
        "lrs": [record.lr for record in records],
        "samples": list(samples),
        "seconds": seconds,
        "optimizer_seconds": sum(record.optimizer_seconds for record in records),
    }


def _save(path: Path, content: str | Callable[[Path], object]) -> None:
    save(path, content)
    say(f"Saved {path}")
