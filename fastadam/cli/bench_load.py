"""``fastadam bench --load N``: steps beside busy processes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastadam.cli import CommandError, outputs, require, say, write

if TYPE_CHECKING:
    import argparse

    from fastadam.bench.under_load import Row, UnderLoad

__all__ = ["run"]


def run(args: argparse.Namespace, json_file: Any) -> int:
    """Measure, show, and save what was asked for.

    Parameters
    ----------
    args : argparse.Namespace
        From the parser of `fastadam.cli.bench`, with a `load`.
    json_file : pathlib.Path or None
        The file to save to; None with ``--json -``, or without ``--json``.

    Returns
    -------
    int
        0.

    Raises
    ------
    CommandError
        If another option does not go with ``--load``, an optional package is
        missing, or a process ended.
    """
    _check(args)
    require("rich", extra="bench")
    from fastadam.bench import load_report
    from fastadam.bench.child import ChildError

    tables = args.json is None or json_file is not None
    if tables:
        from fastadam.bench import under_load

        say(
            f"Measuring steps beside {under_load.busy_processes(args.load)}: about half a minute "
            "for each size. Use the machine for nothing else meanwhile."
        )
    try:
        found = _measure(args)
    except ChildError as error:
        raise CommandError(f"could not be measured: {error}", status=1) from error
    report = load_report.to_dict(found, {"load": args.load, "dtype": args.dtype})
    text = json.dumps(report, indent=1, allow_nan=False)
    if tables:
        load_report.show(report)
    else:
        write(text)
    if json_file is not None:
        outputs.save(json_file, lambda path: path.write_text(text + "\n", encoding="utf-8"))
        say(f"Saved {json_file}")
    return 0


def _check(args: argparse.Namespace) -> None:
    given = {
        "--device cuda": args.device == "cuda",
        "--quick": args.quick,
        "--tail": args.tail,
        "--workload": args.workload,
        "--no-sizes": args.sizes == (),
        "--rounds": args.rounds,
        "--max-memory": args.max_memory,
        "--plot": args.plot,
    }
    for option, value in given.items():
        if value:
            raise CommandError(f"--load must not be given with {option}")
    others = [name for name in args.peer or () if name not in ("torch-fused", "none")]
    if others:
        raise CommandError(f"--load must not be given with --peer {others[0]}")


def _measure(args: argparse.Namespace) -> UnderLoad:
    from rich import progress
    from rich.console import Console

    from fastadam.bench import under_load

    # On stderr, and only where someone looks: what goes to a file is the result alone.
    console = Console(stderr=True)
    columns = (
        progress.BarColumn(bar_width=20),
        progress.TextColumn("{task.fields[status]}"),
        progress.TimeElapsedColumn(),
    )
    # Drawn between the turns, by this thread: nothing else runs within them.
    with progress.Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("bench", total=None, status="starting")

        def on_turn(done: int, total: int, row: Row, contender: str) -> None:
            status = f"{row.size:,} elements: {under_load.CONTENDERS[contender]}"
            bar.update(task, completed=done, total=total, status=status, refresh=True)

        return under_load.measure(
            args.load,
            sizes=args.sizes or under_load.SIZES,
            dtype=args.dtype,
            with_torch=args.peer is None or "torch-fused" in args.peer,
            on_turn=on_turn,
        )
