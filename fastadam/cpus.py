"""The CPUs of this process, and how many threads a step takes of them.

This is the one place that decides the number. Numba alone takes a thread for each CPU that
the process may run on. Where a launcher starts several processes on a machine, that is too
many: each would take all CPUs, and wait for the others.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")  # where proc and sys are mounted

_SLURM = "SLURM_STEP_TASKS_PER_NODE"
# Where launchers say how many processes they have started on this machine: torchrun,
# DeepSpeed's launcher, Open MPI, MPICH and Intel MPI, MVAPICH2, HPE's PALS, and srun. The first
# that is set is taken: torchrun may itself run under srun. Slurm's other variables, such as
# SLURM_NTASKS_PER_NODE, are about the job: they are also set where one process runs alone.
LOCAL_PROCESSES = (
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "PALS_LOCAL_SIZE",
    _SLURM,
)


def text_of(path: Path) -> str:
    """Return what is in a file of the system, nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups: each of them can set a limit.

    A container may show only its own, at the top.
    """
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        # Version 2 names no controllers.
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            yield group
            if group == top:
                break


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many CPUs' worth of time the control groups grant, None for no limit."""
    quotas = map(_group_quota, control_groups("cpu", root))
    return min((quota for quota in quotas if quota), default=None)


def _group_quota(group: Path) -> float | None:
    # Version 2: "50000 100000", or "max 100000".
    words = text_of(group / "cpu.max").split()
    words = words or [text_of(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    try:
        quota, period = map(int, words)
    except ValueError:
        return None
    return quota / period if quota > 0 else None


def affinity(task: int | str = 0) -> set[int]:
    """Return the CPUs on which a process or thread may run, none where nothing tells."""
    try:
        return set(os.sched_getaffinity(int(task)))
    except (AttributeError, OSError):  # only Linux has it; a thread may be gone
        return set()


def cpus_allowed() -> int:
    """Return on how many CPUs this process may run."""
    return len(affinity()) or os.cpu_count() or 1


def local_processes(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return the variable in which a launcher counts its processes here, and their number.

    Nothing and 1 where no launcher says.
    """
    for name in LOCAL_PROCESSES:
        text = environ.get(name, "")
        if name == _SLURM:
            number = _tasks_of_node(text, environ.get("SLURM_NODEID", ""))
        else:
            number = int(text) if text.isdecimal() else 0
        if number > 0:
            return name, number
    return "", 1


def _tasks_of_node(text: str, node: str) -> int:
    """Return how many tasks Slurm has started on a node, of a list such as "4(x2),1"."""
    left, count = int(node) if node.isdecimal() else 0, 0
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        count, left = int(number), left - int(times or 1)
        if left < 0:
            break
    return count


def launcher_cpus(variable: str, root: Path = ROOT) -> int:
    """Return how many CPUs the processes of a job share here: those of their launcher.

    What this buys: CPUs that the whole job may use are told from those to which a launcher
    has bound this process alone. The launcher is the next process above this one that was
    started without the variable. A script that starts Python has it, and is none.
    """
    cpus = os.cpu_count() or 1
    pid, mark = os.getppid(), variable.encode() + b"="
    while pid > 0:
        cpus = len(affinity(pid)) or cpus
        try:
            environ = (root / f"proc/{pid}/environ").read_bytes().split(b"\0")
            if not any(entry.startswith(mark) for entry in environ):
                break
            pid = int((root / f"proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # not ours to read
            break
    on_node = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if variable == _SLURM and on_node.isdecimal():  # of this step; its launcher may have more
        cpus = min(cpus, int(on_node))
    return cpus


# Files of the system are read once in a process: there may be an optimizer for each parameter.
_quota, _launcher_cpus = functools.cache(cpu_quota), functools.cache(launcher_cpus)


class Share(NamedTuple):
    """How many threads a step takes unless it is told otherwise, and why."""

    threads: int
    rule: str


def default_threads() -> Share:
    """Return how many threads a step takes where nobody has asked for a number.

    Numba counts the CPUs that the process may run on, and so do we: once, when Numba is
    imported. What the user has set there is taken as it is. It does not read
    OMP_NUM_THREADS, which torchrun sets to 1, nor do we.
    """
    from numba import config

    most: int = config.NUMBA_NUM_THREADS
    if "NUMBA_NUM_THREADS" in os.environ or most != config.NUMBA_DEFAULT_NUM_THREADS:
        return Share(most, f"NUMBA_NUM_THREADS={most}")
    name, processes = local_processes()
    # The CPUs of the job, which its processes share; of a lone process its own.
    cpus, of = (_launcher_cpus(name) if processes > 1 else most), ""
    quota = _quota()
    if quota is not None and int(quota) < cpus:
        cpus, of = max(1, int(quota)), f"the time of {quota:g} CPUs"
    share = max(1, cpus // processes)
    if processes == 1:
        why = f"a control group grants {of}" if of else "one for each CPU allowed"
        return Share(min(share, most), why)
    several = f"{processes} processes ({name}={os.environ[name]})"
    if share < most:
        return Share(share, f"{several} share {of or f'{cpus} CPUs'}")
    return Share(most, f"the CPUs to which this one of {several} is bound")


def thread_count(asked: int | None) -> int:
    """Return how many threads a step takes: so many, or as many as Numba has."""
    if asked is None:
        return default_threads().threads
    from numba import config

    most: int = config.NUMBA_NUM_THREADS
    return min(asked, most)
