"""``fastadam bench``: fastadam beside every other optimizer that is installed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadam.bench import cuda_library, memory, peers, workloads
from fastadam.bench.parts import Part, missing_lines, show, to_dict
from fastadam.bench.session import measure
from fastadam.cli import (
    CommandError,
    bench_load,
    counted,
    output_path,
    outputs,
    require,
    say,
    whole_number,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fastadam.bench.peers import Peer
    from fastadam.bench.session import Session

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
            "beside the times in which this machine can move as much memory, without arithmetic "
            "and with a square root and a division for each element. Takes minutes; "
            "DeepSpeed compiles its extension the first time."
        ),
    )
    add = parser.add_argument
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the arrays are (default: %(default)s); on cuda, the tail is measured as well "
        "unless --tail, --workload or --sizes says what to measure",
    )
    add("--quick", action="store_true", help="small workloads and few rounds: some minutes")
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
        help="lengths of single arrays to measure; default: 1e3 to 1e8, on cuda 1e6 to 1e9, "
        "none with --tail or --workload",
    )
    sizes.add_argument(
        "--no-sizes", dest="sizes", action="store_const", const=(), help="no single arrays"
    )
    names = list(dict.fromkeys(peer.name for peer in (*peers.PEERS, *peers.CUDA_PEERS)))
    add(
        "--peer",
        action="append",
        choices=(*names, "none"),
        metavar="NAME",
        help=f"one of {', '.join(names)}, none; may be repeated; default: all that are installed",
    )
    add(
        "--load",
        type=whole_number(0),
        metavar="N",
        help="measure beside N busy processes, or none with 0: the mean of a step in several "
        "threads, in one, and of torch's fused Adam if it is installed; goes with --sizes, "
        "--peer, --dtype and --json",
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
        help="leave out what needs more than this on the device, such as 4G (default: what is "
        "available)",
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
        If the request contradicts itself, an optional package or the device
        is missing, or nothing could be measured.
    """
    json_file = None if args.json == STDOUT else args.json
    if args.load is not None:
        return bench_load.run(args, json_file)
    chosen = _peers(args.peer, args.device)
    parts = _parts(args)
    outputs.check_picture(args.plot)
    outputs.check_files({"--plot": args.plot, "--json": json_file})
    require("rich", *(["matplotlib"] if args.plot else []), extra="bench")
    if args.device == "cuda":
        missing = cuda_library.why_no_device()
        if missing is not None:
            raise CommandError(f"--device cuda must find a CUDA device, got none: {missing}")
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    for part in parts:
        if args.json != STDOUT:
            say(_announcement(chosen, part, args.dtype))
        part.session = _measure(chosen, part, args, rounds)
    report = to_dict(parts, _settings(args, parts, rounds))
    if not report["results"]:
        reasons = "; ".join(missing_lines(parts))
        raise CommandError(f"nothing could be measured: {reasons}", status=1)

    text = json.dumps(report, indent=1, allow_nan=False)
    if args.json == STDOUT:
        write(text)
    else:
        show(parts, report)
        absent = _absent(args.peer, args.device)
        if absent:
            say(absent)
    if json_file is not None:
        _save(args, json_file, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    if args.plot is not None:
        from fastadam.bench.plot import save_plot

        part = parts[0]
        title = f"fastadam bench: {part.what}, {args.dtype}\n"
        threads = part.session.threads.get("fastadam")
        cpu = f"{report['machine']['cpu']}, {threads} threads"
        title += report["device"]["name"] if args.device == "cuda" else cpu
        own = {name: part.shapes[name] for name in part.named}
        _save(
            args,
            args.plot,
            lambda path: save_plot(
                part.session, path, workloads=own, sizes=part.sizes, title=title
            ),
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


def _peers(names: Sequence[str] | None, device: str = "cpu") -> list[Peer]:
    """Return the contenders; those of fastadam's own always take part, and first."""
    if names and "none" in names and set(names) != {"none"}:
        others = ", ".join(name for name in names if name != "none")
        raise CommandError(f"--peer none must not be given with others, got {others}")
    every = {"cpu": (peers.OWN, peers.PEERS), "cuda": (peers.CUDA_OWN, peers.CUDA_PEERS)}
    ours, theirs = every[device]
    known = {peer.name for peer in theirs}
    for name in names or ():
        if name != "none" and name not in known:
            raise CommandError(
                f"--peer must be one of {', '.join(peer.name for peer in theirs)} with --device "
                f"{device}, got {name}"
            )
    own = [peer for peer in ours if peer.name in peers.ROOFLINES]
    rest = [peer for peer in ours if peer.name not in peers.ROOFLINES]
    # Who is not installed takes part nowhere, unless he is asked for: then it says why not.
    wanted = [peer for peer in theirs if (peer.installed if names is None else peer.name in names)]
    return own + rest + wanted


def _absent(names: Sequence[str] | None, device: str) -> str:
    """Say who could take part if installed, an empty string if none."""
    every = peers.CUDA_PEERS if device == "cuda" else peers.PEERS
    absent = [peer.title for peer in every if names is None and not peer.installed]
    return f"Not installed, so not compared: {', '.join(absent)}." if absent else ""


def _announcement(chosen: Sequence[Peer], part: Part, dtype: str) -> str:
    others = [
        peer.title for peer in chosen if peer.package and peer.why_not(dtype, part.tail) is None
    ]
    beside = f"beside {counted(len(others), 'other optimizer')} ({', '.join(others)})"
    return (
        f"Measuring the time of {part.what} ({dtype}) on {counted(len(part.shapes), 'workload')}: "
        f"fastadam {beside if others else 'alone'}. Use the machine for nothing else meanwhile."
    )


def _workloads(args: argparse.Namespace) -> tuple[list[str], tuple[int, ...]]:
    known = workloads.CUDA if args.device == "cuda" else workloads.CPU
    default = known.quick if args.quick else known.tail if args.tail else known.step
    named = list(dict.fromkeys(args.workload or default))
    if args.sizes is not None:
        return named, args.sizes
    if args.workload:
        return named, ()
    if args.tail:
        return named, () if args.quick else known.tail_sizes
    return named, known.quick_sizes if args.quick else known.sizes


def _parts(args: argparse.Namespace) -> list[Part]:
    """Return what to measure; on a CUDA device, one command answers all questions."""
    parts = [Part(args.tail, *_workloads(args))]
    if args.device == "cuda" and not (args.tail or args.workload or args.sizes):
        tail = argparse.Namespace(**{**vars(args), "tail": True})
        parts.append(Part(True, *_workloads(tail)))
    return parts


def _measure(chosen: Sequence[Peer], part: Part, args: argparse.Namespace, rounds: int) -> Session:
    shapes = part.shapes
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
            tail=part.tail,
            dtype=args.dtype,
            rounds=rounds,
            max_memory=args.max_memory,
            device=args.device,
            on_event=on_event,
        )


def _settings(args: argparse.Namespace, parts: Sequence[Part], rounds: int) -> dict[str, Any]:
    settings = {
        **{name: getattr(args, name) for name in ("tail", "dtype", "max_memory")},
        "rounds": rounds,
        **peers.HYPERPARAMETERS,
        **(peers.TAIL if any(part.tail for part in parts) else {}),
    }
    return settings | {"device": "cuda"} if args.device == "cuda" else settings


def _save(args: argparse.Namespace, path: Path, content: Callable[[Path], object]) -> None:
    outputs.save(path, content)
    if args.json != STDOUT:
        say(f"Saved {path}")
