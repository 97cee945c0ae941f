"""``fastadam bench``: fastadam beside every other optimizer that is installed."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadam.bench import arrays, load, peers, report, session, tables, workloads
from fastadam.bench.child import ChildError
from fastadam.bench.contenders import HYPERPARAMETERS, TAIL
from fastadam.bench.plot import save_plot
from fastadam.bench.report import Part
from fastadam.cli.common import (
    CommandError,
    check_files,
    check_picture,
    counted,
    output_path,
    progress_bar,
    require,
    save,
    say,
    whole_number,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fastadam.bench.load import Row, UnderLoad
    from fastadam.bench.peers import Peer
    from fastadam.bench.session import Session

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "measure fastadam beside other optimizers on this machine"
DESCRIPTION = (
    "Measure the time of a step beside every other optimizer that is installed, and beside the "
    "times in which this machine can move as much memory, without arithmetic and with a square "
    "root and a division for each element. Takes minutes; DeepSpeed compiles its extension the "
    "first time."
)
ROUNDS, QUICK_ROUNDS = 15, 7
STDOUT = Path("-")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
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
    names = [peer.name for peer in peers.PEERS]
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
        "threads, in one, and if torch is installed of fastadam.torch and torch's fused Adam; "
        "goes with --sizes, --peer, --dtype and --json",
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
        type=byte_size,
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


def byte_size(text: str) -> int:
    """Argument type: a number of bytes, with K, M, G or T for powers of 1,024.

    Examples
    --------
    >>> from fastadam.cli.bench import byte_size
    >>> byte_size("1.5G")
    1610612736
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    number = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"must be a size in bytes such as 500M or 4G, got {text!r}"
        )
    return number


def _json_path(text: str) -> Path:
    return STDOUT if text == "-" else output_path(text)


def run(args: argparse.Namespace) -> int:
    """Measure, show, and save what was asked for.

    Raises
    ------
    CommandError
        If the request contradicts itself, an optional package or the device
        is missing, a process ended, or nothing could be measured.
    """
    if args.load is not None:
        return _run_load(args)
    chosen = _peers(args.peer, args.device)
    parts = _parts(args)
    check_picture(args.plot)
    check_files({"--plot": args.plot, "--json": None if args.json == STDOUT else args.json})
    require("rich", *(["matplotlib"] if args.plot else []), extra="bench")
    if args.device == "cuda":
        missing = arrays.why_no_device()
        if missing is not None:
            raise CommandError(f"--device cuda must find a CUDA device, got none: {missing}")
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    found = session.Session(args.device)
    for part in parts:
        if args.json != STDOUT:
            say(_announcement(chosen, part, args.dtype))
        _measure(found, chosen, part, args, rounds)
    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    facts = report.to_dict(found, _settings(args, parts, rounds), shapes)
    if not facts["results"]:
        reasons = "; ".join(report.not_measured(found.missing, parts))
        raise CommandError(f"nothing could be measured: {reasons}", status=1)

    def show() -> None:
        tables.show(found, parts, facts)
        # Who is not installed takes part nowhere, unless he is asked for: then it says why not.
        absent = [peer.title for peer in _peers_on(args.device) if not peer.installed]
        if absent and args.peer is None:
            say(f"Not installed, so not compared: {', '.join(absent)}.")

    _output(args, facts, show)
    if args.plot is not None:
        _plot(args, found, parts[0], facts)
    return 0


def _output(args: argparse.Namespace, facts: Mapping[str, Any], show: Callable[[], None]) -> None:
    text = json.dumps(facts, indent=1, allow_nan=False)
    if args.json == STDOUT:
        write(text)
        return
    show()
    if args.json is not None:
        save(args.json, text)
        say(f"Saved {args.json}")


def _plot(args: argparse.Namespace, found: Session, part: Part, facts: Mapping[str, Any]) -> None:
    where = f"{facts['machine']['cpu']}, {found.threads.get('fastadam')} threads"
    where = facts["device"]["name"] if args.device == "cuda" else where
    title = f"fastadam bench: {part.what}, {args.dtype}\n{where}"
    results = found.results(part.tail)
    save(
        args.plot,
        lambda path: save_plot(results, path, names=part.named, sizes=part.sizes, title=title),
    )
    if args.json != STDOUT:
        say(f"Saved {args.plot}")


def _peers_on(device: str) -> list[Peer]:
    return [peer for peer in peers.PEERS if device in peer.devices]


def _peers(names: Sequence[str] | None, device: str = "cpu") -> list[Peer]:
    """Return the contenders; those of fastadam's own always take part, and first."""
    if names and "none" in names and set(names) != {"none"}:
        others = ", ".join(name for name in names if name != "none")
        raise CommandError(f"--peer none must not be given with others, got {others}")
    theirs = _peers_on(device)
    known = [peer.name for peer in theirs]
    for name in names or ():
        if name not in (*known, "none"):
            raise CommandError(
                f"--peer must be one of {', '.join(known)} with --device {device}, got {name}"
            )
    ours = [peer for peer in peers.OWN if device in peer.devices]
    ours.sort(key=lambda peer: peer.name not in peers.ROOFLINES)
    wanted = [peer for peer in theirs if (peer.installed if names is None else peer.name in names)]
    return ours + wanted


def _announcement(chosen: Sequence[Peer], part: Part, dtype: str) -> str:
    others = [
        peer.title for peer in chosen if peer.package and peer.why_not(dtype, part.tail) is None
    ]
    beside = f"beside {counted(len(others), 'other optimizer')} ({', '.join(others)})"
    return (
        f"Measuring the time of {part.what} ({dtype}) on {counted(len(part.shapes), 'workload')}: "
        f"fastadam {beside if others else 'alone'}. Use the machine for nothing else meanwhile."
    )


def _parts(args: argparse.Namespace) -> list[Part]:
    """Return what to measure; on a CUDA device, one command answers all questions."""
    both = args.device == "cuda" and not (args.tail or args.workload or args.sizes)
    return [_part(args, tail) for tail in ((False, True) if both else (args.tail,))]


def _part(args: argparse.Namespace, tail: bool) -> Part:
    known = workloads.DEFAULTS[args.device]
    named = args.workload or (known.quick if args.quick else known.tail if tail else known.step)
    if args.sizes is not None:
        sizes = args.sizes
    elif args.workload or (tail and args.quick):
        sizes = ()
    elif tail:
        sizes = known.tail_sizes
    else:
        sizes = known.quick_sizes if args.quick else known.sizes
    shapes = {name: workloads.WORKLOADS[name] for name in named}
    return Part(tail, {**shapes, **{str(size): [(size,)] for size in sizes}})


def _bar(**options: Any) -> Any:
    from rich import progress

    status = progress.TextColumn("{task.fields[status]}")
    return progress_bar(20, status, progress.TimeElapsedColumn(), transient=True, **options)


def _measure(
    found: Session, chosen: Sequence[Peer], part: Part, args: argparse.Namespace, rounds: int
) -> None:
    with _bar() as bar:
        task = bar.add_task("bench", total=len(chosen) * len(part.shapes), status="starting")
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
                finished.update((peer.name, name) for name in part.shapes)
            bar.update(task, completed=len(finished), status=status)

        session.measure(
            found,
            chosen,
            part.shapes,
            tail=part.tail,
            dtype=args.dtype,
            rounds=rounds,
            max_memory=args.max_memory,
            on_event=on_event,
        )


def _settings(args: argparse.Namespace, parts: Sequence[Part], rounds: int) -> dict[str, Any]:
    settings = {
        **{name: getattr(args, name) for name in ("tail", "dtype", "max_memory")},
        "rounds": rounds,
        **HYPERPARAMETERS,
        **(TAIL if any(part.tail for part in parts) else {}),
    }
    return settings | {"device": "cuda"} if args.device == "cuda" else settings


# Beside busy processes


def _run_load(args: argparse.Namespace) -> int:
    _check_load(args)
    require("rich", extra="bench")
    if args.json != STDOUT:
        say(
            f"Measuring steps beside {tables.busy_processes(args.load)}: about a minute for "
            "each size. Use the machine for nothing else meanwhile."
        )
    try:
        found = _measure_load(args)
    except ChildError as error:
        raise CommandError(f"could not be measured: {error}", status=1) from error
    facts = report.load_to_dict(found, {"load": args.load, "dtype": args.dtype})
    _output(args, facts, lambda: tables.show_load(facts))
    return 0


def _check_load(args: argparse.Namespace) -> None:
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
    others = [name for name in args.peer or () if name not in (*load.TORCHS, "none")]
    if others:
        raise CommandError(f"--load must not be given with --peer {others[0]}")


def _measure_load(args: argparse.Namespace) -> UnderLoad:
    # Drawn between the turns, by this thread: nothing else runs within them.
    with _bar(auto_refresh=False) as bar:
        task = bar.add_task("bench", total=None, status="starting")

        def on_turn(done: int, total: int, row: Row, contender: str) -> None:
            status = f"{row.size:,} elements: {peers.by_name(contender).title}"
            bar.update(task, completed=done, total=total, status=status, refresh=True)

        return load.measure(
            args.load,
            sizes=args.sizes or load.SIZES,
            dtype=args.dtype,
            beside=[n for n in load.TORCHS if args.peer is None or n in args.peer],
            on_turn=on_turn,
        )
