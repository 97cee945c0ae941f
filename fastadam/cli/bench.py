"""``fastadam bench``: fastadam beside every other optimizer that is installed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadam.bench import memory, peers, workloads
from fastadam.bench.report import not_measured, to_dict
from fastadam.bench.session import Session, measure
from fastadam.cli import CommandError, output_path, outputs, require, say, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fastadam.bench.peers import Peer

__all__ = ["add_parser", "run"]

ROUNDS, QUICK_ROUNDS = 15, 7
STDOUT = Path("-")


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``bench`` to the commands.

    Parameters
    ----------
    subparsers : argparse subparsers action
        Of the ``fastadam`` parser; modified.
    """
    parser = subparsers.add_parser(
        "bench",
        help="measure fastadam beside other optimizers on this machine",
        description=(
            "Measure the time of a step beside every other optimizer that is installed, and "
            "beside the time in which this machine can move as much memory. Takes minutes; "
            "DeepSpeed compiles its extension the first time."
        ),
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small workloads and few rounds: about a minute")
    add(
        "--tail",
        action="store_true",
        help="measure all that follows a backward pass: clip to a global norm of 1, AdamW, "
        "average the weights, zero the gradients",
    )
    add(
        "--workload",
        action="append",
        choices=tuple(workloads.WORKLOADS),
        metavar="NAME",
        help=f"one of {', '.join(workloads.WORKLOADS)}; may be repeated; default: those that fit",
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--sizes",
        type=_sizes,
        metavar="N,N",
        help="lengths of single arrays to measure; default: 1e3 to 1e8, "
        "none with --tail or --workload",
    )
    sizes.add_argument(
        "--no-sizes", dest="sizes", action="store_const", const=(), help="no single arrays"
    )
    names = [peer.name for peer in peers.PEERS]
    add(
        "--peer",
        action="append",
        choices=(*names, "none"),
        metavar="NAME",
        help=f"one of {', '.join(names)}, none; may be repeated; default: all that are installed",
    )
    add(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="of parameters and gradients (default: %(default)s)",
    )
    add(
        "--rounds",
        type=whole_number(1),
        metavar="N",
        help=f"how often each of a pair has its turn, at most (default: {ROUNDS}, fewer where "
        "steps take long)",
    )
    add(
        "--max-memory",
        type=_bytes,
        metavar="SIZE",
        help="leave out what needs more than this, such as 4G (default: what is available)",
    )
    add(
        "--json",
        type=_json_path,
        metavar="FILE",
        help="save all results, settings and versions; - prints them in place of the tables",
    )
    add("--plot", type=output_path, metavar="FILE.png", help="save a picture (.png, .svg or .pdf)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, show, and save what was asked for.

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
        If the request contradicts itself, an optional package is missing, or
        nothing could be measured.
    """
    chosen = _peers(args.peer)
    named, sizes = _workloads(args)
    outputs.check_picture(args.plot)
    json_file = None if args.json == STDOUT else args.json
    outputs.check_files({"--plot": args.plot, "--json": json_file})
    require("rich", *(["matplotlib"] if args.plot else []), extra="bench")
    shapes: dict[str, Sequence[tuple[int, ...]]] = {
        name: workloads.WORKLOADS[name] for name in named
    }
    shapes |= {str(size): [(size,)] for size in sizes}
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    what = "the tail of a training step" if args.tail else "a step"
    if args.json != STDOUT:
        say(
            f"Measuring the time of {what} ({args.dtype}): fastadam beside {len(chosen)} others "
            f"on {len(shapes)} workloads. Use the machine for nothing else meanwhile."
        )
    session = _measure(chosen, shapes, args, rounds)
    report = _report(args, session, shapes, rounds)
    if not session.measured:
        reasons = "; ".join(not_measured(session.missing, shapes))
        raise CommandError(f"nothing could be measured: {reasons}", status=1)

    text = json.dumps(report, indent=1, allow_nan=False)
    if args.json == STDOUT:
        say(text)
    else:
        _show(session, named, sizes, shapes, report)
    if json_file is not None:
        _write(args, json_file, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    if args.plot is not None:
        from fastadam.bench.plot import save_plot

        title = f"fastadam bench: {what}, {args.dtype}\n"
        title += f"{report['machine']['cpu']}, {session.threads.get('fastadam')} threads"
        own = {name: shapes[name] for name in named}
        _write(
            args,
            args.plot,
            lambda path: save_plot(session, path, workloads=own, sizes=sizes, title=title),
        )
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    sizes = []
    for part in text.split(","):
        try:
            size = float(part)
        except ValueError:
            size = 0.5
        if not 1 <= size <= 1e12 or size != int(size):
            raise argparse.ArgumentTypeError(
                f"must be whole numbers with commas between, such as 1000,1e6, got {text!r}"
            )
        sizes.append(int(size))
    return tuple(dict.fromkeys(sizes))


def _bytes(text: str) -> int:
    try:
        return memory.parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _json_path(text: str) -> Path:
    return STDOUT if text == "-" else output_path(text)


def _peers(names: Sequence[str] | None) -> list[Peer]:
    """Return the contenders; those of fastadam's own always take part, and first."""
    if names and "none" in names and set(names) != {"none"}:
        others = ", ".join(name for name in names if name != "none")
        raise CommandError(f"--peer none must not be given with others, got {others}")
    own = [peer for peer in peers.OWN if peer.name == "roofline"]
    rest = [peer for peer in peers.OWN if peer.name != "roofline"]
    return own + rest + [peer for peer in peers.PEERS if names is None or peer.name in names]


def _workloads(args: argparse.Namespace) -> tuple[list[str], tuple[int, ...]]:
    default: Sequence[str] = workloads.TAIL if args.tail else workloads.STEP
    if args.quick:
        default = workloads.QUICK
    named = list(dict.fromkeys(args.workload or default))
    if args.sizes is not None:
        return named, args.sizes
    if args.tail or args.workload:
        return named, ()
    return named, workloads.QUICK_SIZES if args.quick else workloads.SIZES


def _measure(
    chosen: Sequence[Peer], shapes: Mapping[str, Any], args: argparse.Namespace, rounds: int
) -> Session:
    from rich import progress
    from rich.console import Console

    # On stderr, and only where someone looks: what goes to a file is the result alone.
    console = Console(stderr=True)
    columns = (
        progress.BarColumn(bar_width=20),
        progress.TextColumn("{task.fields[status]}"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("bench", total=len(chosen) * len(shapes), status="starting")
        finished: set[tuple[str, str]] = set()

        def on_event(peer: Peer, event: Mapping[str, Any]) -> None:
            name = event.get("workload")
            status = {
                "start": f"{peer.title}: {name}",
                "round": f"{peer.title}: {name}, round {event.get('done')}/{event.get('rounds')}",
            }.get(event["event"], f"{peer.title}")
            if event["event"] in ("result", "skipped") and name is not None:
                finished.add((peer.name, name))
            if event["event"] in ("unavailable", "died", "end"):
                finished.update((peer.name, name) for name in shapes)
            bar.update(task, completed=len(finished), status=status)

        return measure(
            chosen,
            shapes,
            tail=args.tail,
            dtype=args.dtype,
            rounds=rounds,
            max_memory=args.max_memory,
            on_event=on_event,
        )


def _report(
    args: argparse.Namespace, session: Session, shapes: Mapping[str, Any], rounds: int
) -> dict[str, Any]:
    settings = {
        **{name: getattr(args, name) for name in ("tail", "dtype", "max_memory")},
        "rounds": rounds,
        **peers.HYPERPARAMETERS,
        **(peers.TAIL if args.tail else {}),
    }
    return to_dict(session, settings, shapes)


def _show(
    session: Session,
    named: Sequence[str],
    sizes: Sequence[int],
    shapes: Mapping[str, Any],
    report: Mapping[str, Any],
) -> None:
    from rich.console import Console

    from fastadam.bench.tables import show, show_conditions

    console = Console(file=sys.stdout, highlight=False, markup=False)
    settings = report["settings"]
    options = {"tail": settings["tail"], "dtype": settings["dtype"]}
    console.print(
        "\nTime of a step; after it, how many times as long the others take, and how close "
        "fastadam comes to the roofline, a pass over the same memory without arithmetic "
        "(100%: as fast).\n"
    )
    show(console, session, {name: shapes[name] for name in named}, first="workload", **options)
    by_size = {str(size): shapes[str(size)] for size in sizes}
    show(console, session, by_size, first="elements", **options)
    show_conditions(console, report)
    missing = not_measured(session.missing, shapes)
    if missing:
        console.print("\nNot measured:")
    for line in missing:
        console.print(f"  {line}")


def _write(args: argparse.Namespace, path: Path, write: Callable[[Path], object]) -> None:
    outputs.save(path, write)
    if args.json != STDOUT:
        say(f"Saved {path}")
