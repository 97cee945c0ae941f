"""``fastadam info``: what a step would use on this machine, and what stands in its way."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from fastadam import machine
from fastadam.cli.common import columns, counted, in_rows, write
from fastadam.cpus import local_processes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "gather", "run"]

# CPUs kept busy by others from which a machine counts as busy: a short look sees less than that
# now and then on any machine.
BUSY = 0.5
# By these, libraries other than Numba count their threads; launchers set them to 1.
NOT_NUMBA = "OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS VECLIB_MAXIMUM_THREADS"
BINDING = "OMP_PROC_BIND OMP_PLACES GOMP_CPU_AFFINITY KMP_AFFINITY"

HELP = "show what fastadam uses on this machine"
DESCRIPTION = (
    "Show versions, SIMD, threads, GPU and compile cache as a step would find them here, and warn "
    "of settings that slow it down."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: argparse.Namespace) -> int:
    """Gather and print."""
    facts = gather()
    if args.json:
        write(json.dumps(facts, indent=1, allow_nan=False))
    else:
        write(_render(facts, columns(sys.stdout)))
    return 0


def gather() -> dict[str, Any]:
    """Find out what a step would use in this process.

    Compiles two small functions, launches Numba's threads, and looks for 0.3
    seconds at what else runs: between one and two seconds in all. A child
    forked afterwards may have one thread only.

    Returns
    -------
    dict
        Fit for JSON, with the keys

        ``versions``
            Name to version; in ``optional``, those that are installed.
        ``machine``
            ``system``, ``cpu`` (str); ``cpus``, ``cpus_allowed`` (int: in the
            machine, by this process's affinity); ``cpu_quota`` (float or
            None: CPUs' worth of time that the control group grants);
            ``busy_cpus`` (float or None: how many other processes keep busy).
        ``simd``
            ``summary`` (str); ``compiled_for`` (str or None: LLVM's name of
            the processor); ``instructions`` (str or None: the set it uses);
            ``float32_per_instruction`` (int, None if not known before run
            time); ``fma`` (bool: there is an instruction).
        ``threads``
            ``count`` (int: Numba's); ``used``, ``rule`` (int, str: at most so
            many take a step without ``num_threads``, and why); ``layer``,
            ``error`` (str or None: the layer, or why there is none);
            ``layers`` (dict of layer to bools
            ``available``, ``threads_after_fork``: whether a forked child's
            steps use several, and ``concurrent_functions``: whether parallel
            functions of your own can run in several Python threads; ``seen``
            (int: how many took part in a launch); ``on_cpus`` (int or None:
            CPUs that they may run on); ``main_bound`` (bool: the launch
            narrowed the main thread's affinity); ``parallel_from`` (int:
            elements from which a step uses several threads).
        ``gpu``
            ``used`` (bool: a step can run there), ``visible`` (list of str),
            ``devices`` (list of dict, as of `fastadam.machine.cuda_devices`),
            ``package`` (str or None: why numba-cuda cannot be used),
            ``summary`` (str).
        ``cache``
            ``folder`` (str or None), ``writable`` (bool), ``kernels`` (int),
            ``bytes`` (int).
        ``warnings``
            List of str.

    Examples
    --------
    >>> from fastadam.cli.info import gather
    >>> sorted(gather())
    ['cache', 'gpu', 'machine', 'simd', 'threads', 'versions', 'warnings']
    """
    facts: dict[str, Any] = {
        "versions": machine.versions(),
        # Before the launch, which may narrow the affinity, and leaves threads spinning.
        "machine": {**machine.processor(), "busy_cpus": machine.busy_cpus()},
        "simd": machine.simd(),
        "threads": machine.threads(),
        "gpu": machine.gpu(),
        "cache": machine.compile_cache(),
    }
    facts["warnings"] = _warnings(facts, os.environ)
    return facts


def _warnings(facts: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Name what serialises a step, oversubscribes the CPUs, or makes processes compile."""
    own, threads, cache = facts["machine"], facts["threads"], facts["cache"]
    cpus, allowed, quota = (own[key] for key in ("cpus", "cpus_allowed", "cpu_quota"))
    count, used = threads["count"], threads["used"]
    seen, on_cpus = threads["seen"], threads["on_cpus"]
    asked, limit = environ.get("NUMBA_NUM_THREADS"), environ.get("OMP_THREAD_LIMIT")
    binding = _settings(BINDING, environ) or "by default"
    found = []
    if facts["simd"]["compiled_for"] is None:
        return ["NUMBA_DISABLE_JIT is set: nothing is compiled, and a step fails"]
    if threads["error"] is not None:
        found.append(f"steps on several threads will fail: {threads['error']}")

    if allowed < cpus:
        found.append(
            f"the affinity of this process allows {allowed} of {cpus} CPUs: set by taskset, a"
            " container, a launcher, or OpenMP at its start"
        )
    if count < allowed:
        means = "every step is serial" if count == 1 else "the others stay idle"
        by = "" if asked is None else f" (NUMBA_NUM_THREADS={asked})"
        found.append(f"{count} of {allowed} CPUs used{by}: {means}")
    elif count > allowed:
        by = "" if asked is None else f" (NUMBA_NUM_THREADS={asked})"
        found.append(f"{count} threads share {allowed} CPUs{by}: large steps are slowed down")
    if quota is not None and max(1, int(quota)) < min(used, allowed):
        found.append(
            f"the control group (a container's CPU limit) grants the time of {quota:g} CPUs to"
            f" {used} threads: set NUMBA_NUM_THREADS={max(1, int(quota))}"
        )
    busy = own["busy_cpus"]
    if busy is not None and used > 1 and busy >= BUSY and busy + used > cpus + BUSY:
        free = max(1, min(used - 1, int(cpus - busy + BUSY)))
        fewer = "one thread" if free == 1 else f"{free} threads"
        found.append(
            f"the machine is busy: other processes keep about {busy:.1f} of {cpus} CPUs, and a"
            f" step in {used} threads is held up where one of them must share its CPU. Steps time"
            " themselves and take one thread where that is faster, so it costs little;"
            f" to always use {fewer}, set NUMBA_NUM_THREADS={free}"
        )
    if threads["layer"] is not None and seen < count:
        why = f" (OMP_THREAD_LIMIT={limit})" if limit and threads["layer"] == "omp" else ""
        found.append(f"only {seen} of {count} threads took part in a launch{why}")
    if on_cpus is not None and on_cpus < min(count, allowed):
        found.append(f"OpenMP binds {count} threads to {on_cpus} of {allowed} CPUs ({binding})")
    elif threads["main_bound"]:
        found.append(
            f"OpenMP binds the main thread too ({binding}): where it is loaded before Numba (by"
            " torch, say), and in child processes, Numba counts fewer CPUs; NUMBA_NUM_THREADS"
            " sets how many"
        )
    name, processes = local_processes(environ)
    if asked is not None and processes > 1 and processes * used > cpus:
        found.append(
            f"{processes} processes ({name}={environ[name]}) of {used} threads share {cpus}"
            f" CPUs: set NUMBA_NUM_THREADS={max(1, cpus // processes)}, or leave it unset"
        )
    # Numba reads none of these: it takes one thread for every CPU that the affinity allows.
    ignored = _settings(NOT_NUMBA, environ, unless=str(used))
    if ignored:
        found.append(
            f"{ignored}: does not reach Numba, a step takes {used}; num_threads and"
            " NUMBA_NUM_THREADS set how many"
        )

    if not cache["writable"]:
        where = "no folder for it" if cache["folder"] is None else "its folder cannot be written"
        found.append(
            f"compile cache: {where}, so that processes compile for themselves; set"
            " NUMBA_CACHE_DIR to a folder that can be written"
        )
    return found


def _settings(names: str, environ: Mapping[str, str], unless: str | None = None) -> str:
    """Return those of the variables that are set, but not to ``unless``, as ``A=1 B=2``."""
    values = ((name, environ.get(name)) for name in names.split())
    return " ".join(f"{name}={value}" for name, value in values if value not in (None, unless))


def _render(facts: Mapping[str, Any], columns: int | None) -> str:
    versions, own, simd = facts["versions"], facts["machine"], facts["simd"]
    threads, cache = facts["threads"], facts["cache"]
    optional = ", ".join(f"{name} {version}" for name, version in versions["optional"].items())
    quota, busy = own["cpu_quota"], own["busy_cpus"]
    kept_busy = None if busy is None else f"about {busy:.1f}" if busy >= 0.05 else "none"
    forced = _settings("NUMBA_CPU_NAME NUMBA_CPU_FEATURES NUMBA_ENABLE_AVX", os.environ)
    rows = [
        ("fastadam", versions["fastadam"]),
        ("Python", versions["python"]),
        ("NumPy", versions["numpy"]),
        ("Numba", f"{versions['numba']}, llvmlite {versions['llvmlite']}"),
        ("optional", optional or "none"),
        ("system", own["system"]),
        ("CPU", own["cpu"]),
        ("SIMD", simd["summary"]),
        ("", f"for {simd['compiled_for'] or 'no processor'}{f' ({forced})' if forced else ''}"),
        ("CPUs", f"{own['cpus']}, {own['cpus_allowed']} allowed"),
        ("", "" if quota is None else f"the time of {quota:g} granted"),
        ("", f"{kept_busy} kept busy by other processes" if kept_busy else ""),
        ("threads", f"{threads['used']} (tested: {threads['seen']} worked)"),
        ("", threads["rule"]),
    ]
    if threads["used"] > 1:
        rows.append(("", f"from {threads['parallel_from']:,} elements on; smaller steps take one"))
    for name, layer in threads["layers"].items():
        state = "available" if layer["available"] else "not available"
        state = "in use" if name == threads["layer"] else state
        fork = "several threads" if layer["threads_after_fork"] else "one thread"
        text = f"{name}, {state}: a forked child steps in {fork}"
        if not layer["available"]:
            absent = name == "tbb" and "tbb" not in versions["optional"]
            text = f"{name}: {'not installed' if absent else 'Numba cannot load it'}"
        elif not layer["concurrent_functions"]:
            text += "; parallel functions of your own must not run beside a step"
        rows.append(("layers" if name == "tbb" else "", text))
    gpu = facts["gpu"]
    rows += [("GPU", gpu["summary"]), ("", f"CUDA: {gpu['package']}" if gpu["package"] else "")]
    rows.append(("cache", cache["folder"] or "none"))
    if cache["folder"] is not None:
        writable = "writable" if cache["writable"] else "not writable"
        size = f"{cache['bytes'] / 2**20:.1f} MiB"
        rows.append(("", f"{writable}; {counted(cache['kernels'], 'kernel')}, {size}"))
    rows += [("warning", warning) for warning in facts["warnings"]]
    return "\n".join(in_rows([row for row in rows if row[1]], columns))
