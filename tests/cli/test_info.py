"""``fastadam info``: every fact is there, and what slows a step is named."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest

import fastadam
from fastadam import cpus
from fastadam.cli import info

# Whatever the tests themselves run under must not reach the child.
UNSET = [
    *info.NOT_NUMBA.split(),
    *info.BINDING.split(),
    *cpus.LOCAL_PROCESSES,
    *("OMP_THREAD_LIMIT", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_DISABLE_JIT"),
    *("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX"),
]


def child(*arguments, **environment):
    env = {name: value for name, value in os.environ.items() if name not in UNSET}
    command = [sys.executable, "-m", "fastadam", "info", *arguments]
    done = subprocess.run(command, env=env | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def facts_of(**environment):
    return json.loads(child("--json", **environment))


def warned(facts, *words):
    return any(all(word in warning for word in words) for warning in facts["warnings"])


@pytest.fixture
def facts():
    """A machine of 8 CPUs on which all is well."""
    return {
        "machine": {"cpus": 8, "cpus_allowed": 8, "cpu_quota": None, "busy_cpus": 0.2},
        "simd": {"compiled_for": "znver4"},
        "threads": {
            "count": 8,
            "used": 8,
            "rule": "one for each CPU allowed",
            "layer": "omp",
            "error": None,
            "seen": 8,
            "on_cpus": 8,
            "main_bound": False,
        },
        "cache": {"folder": "/cache", "writable": True},
    }


class TestGather:
    def test_keys(self):
        facts = facts_of()
        assert list(facts) == [
            "versions",
            "machine",
            "simd",
            "threads",
            "gpu",
            "cache",
            "warnings",
        ]
        assert facts["versions"]["fastadam"] == fastadam.__version__
        assert {"python", "numpy", "numba", "llvmlite", "optional"} < set(facts["versions"])
        assert set(facts["threads"]["layers"]) == {"tbb", "omp", "workqueue"}
        assert facts["threads"]["layers"][facts["threads"]["layer"]]["available"]
        assert facts["threads"]["seen"] >= 1
        assert facts["simd"]["summary"]
        assert facts["gpu"].keys() == {"used", "visible", "devices", "package", "summary"}
        if not facts["gpu"]["visible"]:
            assert facts["gpu"]["used"] is False
            assert "CPU only" in facts["gpu"]["summary"]
        assert facts["cache"]["writable"] == (facts["cache"]["folder"] is not None)

    def test_text(self):
        lines = child().splitlines()
        keys = [line.split()[0] for line in lines if not line.startswith(" ")]
        assert [key for key in keys if key != "warning"] == [
            *("fastadam", "Python", "NumPy", "Numba", "optional", "system", "CPU", "SIMD"),
            *("CPUs", "threads", "layers", "GPU", "cache"),
        ]
        assert len({line.index(line[10:].lstrip()) for line in lines}) == 1  # one column

    def test_json_is_what_is_gathered(self, monkeypatch, capsys):
        monkeypatch.setattr(info, "gather", lambda: {"cache": {"folder": "/caf\xe9"}})
        assert info.run(Namespace(json=True)) == 0
        assert json.loads(capsys.readouterr().out) == {"cache": {"folder": "/caf\xe9"}}


class TestEnvironment:
    def test_one_numba_thread(self):
        facts = facts_of(NUMBA_NUM_THREADS="1", OMP_NUM_THREADS="1")
        assert facts["threads"]["count"] == facts["threads"]["seen"] == 1
        assert not warned(facts, "OMP_NUM_THREADS")
        if facts["machine"]["cpus_allowed"] > 1:
            assert warned(facts, "NUMBA_NUM_THREADS=1", "serial")

    def test_openmp_variables_do_not_reach_numba(self):
        facts = facts_of(NUMBA_NUM_THREADS="2", OMP_NUM_THREADS="1")
        assert facts["threads"]["count"] == facts["threads"]["seen"] == 2
        assert warned(facts, "OMP_NUM_THREADS=1", "does not reach Numba, a step takes 2")

    def test_one_of_several_processes(self):
        """What a launcher says is a rule, and no reason for a warning."""
        facts = facts_of(LOCAL_WORLD_SIZE="1000")
        assert facts["threads"]["used"] == 1
        if facts["machine"]["cpus_allowed"] > 1:
            assert facts["threads"]["rule"].startswith("1000 processes (LOCAL_WORLD_SIZE=1000) sh")
        assert not warned(facts, "processes (")

    def test_missing_layer(self):
        facts = facts_of(NUMBA_THREADING_LAYER="nosuch")
        assert facts["threads"]["layer"] is None
        assert warned(facts, "will fail", "nosuch")

    def test_jit_off(self):
        facts = facts_of(NUMBA_DISABLE_JIT="1")
        assert facts["simd"]["compiled_for"] is None
        assert warned(facts, "NUMBA_DISABLE_JIT")

    @pytest.mark.parametrize(
        ("name", "summary"),
        [
            ("x86-64", "SSE2, 1 float32 per instruction, no FMA instruction: exact but slow"),
            ("x86-64-v3", "AVX2, 8 float32 per instruction, FMA"),
        ],
    )
    def test_forced_processor(self, name, summary):
        machine = os.uname().machine if hasattr(os, "uname") else ""
        if machine != "x86_64":
            pytest.skip("x86-64 only")
        # Only compiled here: what a processor without AVX2 would be told.
        text = child(NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="", NUMBA_NUM_THREADS="1")
        assert f"SIMD      {summary}\n          for {name} (NUMBA_CPU_NAME={name}" in text


class TestWarnings:
    def test_none(self, facts):
        assert info._warnings(facts, {"OMP_NUM_THREADS": "8", "LOCAL_WORLD_SIZE": "1"}) == []

    @pytest.mark.parametrize(
        ("part", "change", "environ", "expected"),
        [
            (
                "machine",
                {"cpu_quota": 1.5},
                {"NUMBA_NUM_THREADS": "8"},
                "of 1.5 CPUs to 8 threads: set NUMBA_NUM_THREADS=1",
            ),
            ("machine", {"cpus": 16}, {}, "allows 8 of 16 CPUs"),
            (
                "machine",
                {"busy_cpus": 1.2},
                {},
                "keep about 1.2 of 8 CPUs, and a step in 8 threads",
            ),
            (
                "machine",
                {"busy_cpus": 1.2},
                {},
                "; to always use 7 threads, set NUMBA_NUM_THREADS=7",
            ),
            (
                "machine",
                {"busy_cpus": 11.0},
                {},
                "; to always use one thread, set NUMBA_NUM_THREADS=1",
            ),
            ("threads", {"count": 4, "used": 4}, {}, "4 of 8 CPUs used: the others stay idle"),
            ("threads", {"count": 16, "used": 16, "seen": 16}, {}, "16 threads share 8 CPUs"),
            ("threads", {"seen": 2}, {"OMP_THREAD_LIMIT": "2"}, "only 2 of 8 threads took part"),
            ("threads", {"on_cpus": 1}, {"OMP_PLACES": "{0}"}, "8 threads to 1 of 8 CPUs (OMP_PL"),
            ("threads", {"main_bound": True}, {"OMP_PROC_BIND": "1"}, "main thread too (OMP_PROC"),
            ("threads", {}, {"MKL_NUM_THREADS": "1"}, "MKL_NUM_THREADS=1: does not reach Numba"),
            (
                "threads",
                {},
                {"LOCAL_WORLD_SIZE": "4", "NUMBA_NUM_THREADS": "8"},
                "set NUMBA_NUM_THREADS=2, or leave it unset",
            ),
            (
                "threads",
                {},
                {"SLURM_STEP_TASKS_PER_NODE": "2(x3)", "NUMBA_NUM_THREADS": "8"},
                "2 processes (SLURM",
            ),
            ("cache", {"folder": None, "writable": False}, {}, "compile cache: no folder"),
            ("cache", {"writable": False}, {}, "cannot be written"),
        ],
    )
    def test_one(self, facts, part, change, environ, expected):
        facts[part] |= change
        (warning,) = info._warnings(facts, environ)
        assert expected in warning


class TestBusy:
    def test_not_where_there_is_room(self, facts):
        facts["machine"] |= {"busy_cpus": 3.0, "cpus": 16, "cpus_allowed": 16}
        assert not warned(facts | {"warnings": info._warnings(facts, {})}, "busy")
        facts["machine"]["busy_cpus"] = None
        assert not warned(facts | {"warnings": info._warnings(facts, {})}, "busy")

    def test_not_for_one_thread(self, facts):
        facts["threads"] |= {"count": 1, "used": 1, "seen": 1, "on_cpus": 1}
        facts["machine"]["busy_cpus"] = 8.0
        assert not warned(facts | {"warnings": info._warnings(facts, {})}, "busy")


class TestText:
    def test_absent_package_is_a_line(self, monkeypatch, capsys):
        facts = facts_of()
        facts["gpu"] = {"package": "not installed: pip install x", "summary": "no driver"}
        monkeypatch.setattr(info, "gather", lambda: facts)
        assert info.run(Namespace(json=False)) == 0
        out = capsys.readouterr().out
        assert "GPU       no driver\n          CUDA: not installed: pip install x\n" in out
