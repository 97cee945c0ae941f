"""How many threads a step takes by default: on made-up machines, under made-up launchers."""

import json
import os
import subprocess
import sys

import numba
import pytest

from fastadam import cpus


@pytest.fixture
def machine(monkeypatch):
    """A machine of 16 CPUs, without launchers or limits; `run` changes what it is given."""

    def run(environ=None, *, most=16, launcher=16, quota=None):
        for name in (*cpus.LOCAL_PROCESSES, "SLURM_NODEID", "NUMBA_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (environ or {}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", most)
        bound = most if "NUMBA_NUM_THREADS" not in (environ or {}) else 16
        monkeypatch.setattr(numba.config, "NUMBA_DEFAULT_NUM_THREADS", bound)
        monkeypatch.setattr(cpus, "_launcher_cpus", lambda _: launcher)
        monkeypatch.setattr(cpus, "_quota", lambda: quota)
        return cpus.default_threads()

    return run


TORCHRUN = {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("environ", "options", "expected"),
    [
        ({}, {}, 16),
        ({"OMP_NUM_THREADS": "1"}, {}, 16),
        (TORCHRUN, {}, 4),
        ({"LOCAL_WORLD_SIZE": "1"}, {}, 16),
        ({"LOCAL_WORLD_SIZE": "5"}, {}, 3),
        ({"LOCAL_WORLD_SIZE": "64"}, {}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, {}, 2),
        ({"MPI_LOCALNRANKS": "8"}, {}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "8"}, {}, 2),
        # Bound to their share, to a core each, to a memory node that 2 of 4 share.
        (TORCHRUN, {"most": 4}, 4),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, {"most": 1}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, {"most": 8}, 4),
        # The whole job has a part of the machine.
        (TORCHRUN, {"most": 8, "launcher": 8}, 2),
        # What a control group grants.
        ({}, {"quota": 2.5}, 2),
        ({}, {"quota": 0.5}, 1),
        ({}, {"quota": 99.0}, 16),
        (TORCHRUN, {"quota": 9.0}, 2),
        # The user's own word is not divided.
        ({"NUMBA_NUM_THREADS": "8", **TORCHRUN}, {"most": 8, "quota": 2.0}, 8),
        # What no launcher writes.
        ({"LOCAL_WORLD_SIZE": "0"}, {}, 16),
        ({"LOCAL_WORLD_SIZE": "many"}, {}, 16),
        ({"LOCAL_WORLD_SIZE": "", "MPI_LOCALNRANKS": "4"}, {}, 4),
    ],
)
def test_default(machine, environ, options, expected):
    assert machine(environ, **options).threads == expected


@pytest.mark.parametrize(
    ("environ", "options", "rule"),
    [
        ({}, {}, "one for each CPU allowed"),
        ({}, {"quota": 2.5}, "a control group grants the time of 2.5 CPUs"),
        ({}, {"most": 3, "quota": 3.5}, "one for each CPU allowed"),
        (TORCHRUN, {}, "4 processes (LOCAL_WORLD_SIZE=4) share 16 CPUs"),
        (TORCHRUN, {"quota": 9.5}, "4 processes (LOCAL_WORLD_SIZE=4) share the time of 9.5 CPUs"),
        (
            TORCHRUN,
            {"most": 2},
            "the CPUs to which this one of 4 processes (LOCAL_WORLD_SIZE=4) is bound",
        ),
        ({"NUMBA_NUM_THREADS": "8", **TORCHRUN}, {"most": 8}, "NUMBA_NUM_THREADS=8"),
    ],
)
def test_rule(machine, environ, options, rule):
    assert machine(environ, **options).rule == rule


@pytest.mark.parametrize(
    ("text", "node", "tasks"),
    [
        ("4", "0", 4),
        ("4(x3)", "2", 4),
        ("4(x2),1", "1", 4),
        ("4(x2),1", "2", 1),
        ("2,3,4(x2)", "1", 3),
        ("4(x2),1", "", 4),
        ("4", "7", 4),
        ("none", "0", 1),
    ],
)
def test_tasks_of_slurm(text, node, tasks):
    environ = {"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": node}
    assert cpus.local_processes(environ)[1] == tasks


def test_the_innermost_launcher_counts():
    """torchrun under srun: of one task on each machine, four processes."""
    environ = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "LOCAL_WORLD_SIZE": "4"}
    assert cpus.local_processes(environ) == ("LOCAL_WORLD_SIZE", 4)
    # Of the job, and set as well where Python runs alone in it.
    assert cpus.local_processes({"SLURM_NTASKS_PER_NODE": "8"}) == ("", 1)


@pytest.fixture
def ancestors(monkeypatch, tmp_path):
    """Make processes 100, 99 and so on, each the parent of the one before."""

    def make(*processes):
        allowed = {}
        monkeypatch.setattr(cpus.os, "getppid", lambda: 100)
        for pid, (environ, count) in zip(range(100, 0, -1), processes, strict=False):
            folder = tmp_path / f"proc/{pid}"
            folder.mkdir(parents=True)
            allowed[pid] = set(range(count))
            parent = pid - 1 if len(allowed) < len(processes) else 0
            (folder / "stat").write_text(f"{pid} (a) b) S {parent} 1 1 0")
            if environ is not None:
                (folder / "environ").write_bytes(environ)
        monkeypatch.setattr(cpus, "affinity", lambda pid: allowed.get(pid, set()))
        return tmp_path

    return make


MARKED, PLAIN = b"HOME=/\0LOCAL_WORLD_SIZE=4\0", b"XLOCAL_WORLD_SIZE=4\0HOME=/\0"


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([(PLAIN, 16), (PLAIN, 64)], 16),
        ([(MARKED, 4), (PLAIN, 16), (PLAIN, 64)], 16),  # by way of a script
        ([(MARKED, 4), (None, 16), (PLAIN, 64)], 16),  # another user's
        ([(MARKED, 4), (MARKED, 8)], 8),  # a container's first process
    ],
)
def test_cpus_of_the_launcher(ancestors, processes, expected):
    assert cpus.launcher_cpus("LOCAL_WORLD_SIZE", ancestors(*processes)) == expected


def test_cpus_of_a_launcher_that_is_not_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(cpus.os, "getppid", lambda: 0)
    monkeypatch.setattr(cpus.os, "cpu_count", lambda: 24)
    assert cpus.launcher_cpus("LOCAL_WORLD_SIZE", tmp_path) == 24


def test_slurm_says_what_a_step_has(monkeypatch, ancestors):
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "6")
    root = ancestors((None, 64))
    assert cpus.launcher_cpus("SLURM_STEP_TASKS_PER_NODE", root) == 6
    assert cpus.launcher_cpus("LOCAL_WORLD_SIZE", root) == 64


CHILD = """
import json, os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as a launcher does for it
from fastadam import cpus
print(json.dumps([cpus.default_threads(), cpus.launcher_cpus("LOCAL_WORLD_SIZE")]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone binds processes")
@pytest.mark.parametrize("script", [False, True], ids=["python", "script"])
def test_a_bound_process_does_not_divide_again(script):
    """This process is the launcher; it starts one of two, bound to one of its CPUs."""
    allowed = os.sched_getaffinity(0)
    command = [sys.executable, "-c", CHILD]
    if script:
        command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", *command]
    env = {name: value for name, value in os.environ.items() if name != "NUMBA_NUM_THREADS"}
    for name in cpus.LOCAL_PROCESSES:
        env.pop(name, None)
    out = subprocess.check_output(command, env=env | {"LOCAL_WORLD_SIZE": "2"})
    (threads, _), launcher = json.loads(out)
    assert (threads, launcher) == (1, len(allowed))


# Quotas of control groups.


def fake_system(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def test_lowest_quota_of_the_groups_above(tmp_path):
    group = "sys/fs/cgroup/a/"
    files = {"proc/self/cgroup": "0::/a/b\n", group + "b/cpu.max": "max 100000\n"}
    fake_system(tmp_path, files)
    assert cpus.cpu_quota(tmp_path) is None
    (tmp_path / group / "cpu.max").write_text("150000 100000\n")
    assert cpus.cpu_quota(tmp_path) == 1.5


def test_quota_in_an_old_container(tmp_path):
    group = "sys/fs/cgroup/cpu,cpuacct/"
    files = {
        "proc/self/cgroup": "3:cpuset:/x\n2:cpu,cpuacct:/not/shown/in/a/container\n",
        group + "cpu.cfs_period_us": "100000\n",
        group + "cpu.cfs_quota_us": "-1\n",
    }
    fake_system(tmp_path, files)
    assert cpus.cpu_quota(tmp_path) is None
    (tmp_path / group / "cpu.cfs_quota_us").write_text("50000\n")
    assert cpus.cpu_quota(tmp_path) == 0.5


def test_no_quota_where_nothing_tells(tmp_path):
    assert cpus.cpu_quota(tmp_path) is None
