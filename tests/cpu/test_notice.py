"""The first compile of a process says what a user waits for: once, and where it is kept."""

import io
import logging
import sys
from pathlib import Path

import numba
import pytest
from numba import types

from fastadam.cpu import intrinsics, notice

FLOAT = (types.float64,)


def double(x):
    return x + x


def halve(x):
    return x / 2.0


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A process that has compiled nothing yet, and its empty cache."""
    monkeypatch.delenv("FASTADAM_QUIET", raising=False)
    monkeypatch.setattr(notice, "_told", False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def at_a_terminal(monkeypatch):
    """(Not a fixture: pytest gives each phase of a test a stderr of its own.)"""
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def test_one_line_on_a_terminal(cache, monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    assert intrinsics.kernel(double, FLOAT)(3.0) == 6.0
    assert intrinsics.kernel(halve, FLOAT)(3.0) == 1.5
    said = terminal.getvalue()
    (line,) = said.splitlines()
    assert line.startswith("fastadam: compiling for this processor, which takes some seconds, ")
    (path,) = cache.rglob("fastadam.double-*.nbc")
    assert line.endswith(f", once: the code is kept in {path.parent}")
    # As a later process, which finds the file.
    monkeypatch.setattr(notice, "_told", False)
    assert intrinsics.kernel(double, FLOAT)(3.0) == 6.0
    assert terminal.getvalue() == said
    assert (
        intrinsics.kernel(double, (types.int64,))(3) == 6
    )  # another type, for which there is none
    assert len(terminal.getvalue().splitlines()) == 2


@pytest.mark.usefixtures("cache")
def test_it_is_said_before_the_compiler_starts(monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    said = []
    make = intrinsics.KernelCache
    monkeypatch.setattr(
        intrinsics, "KernelCache", lambda *a, **k: Watched(make(*a, **k), said, terminal)
    )
    assert intrinsics.kernel(double, FLOAT)(3.0) == 6.0
    assert said == ["load", "", "save", terminal.getvalue()]
    assert said[-1].count("\n") == 1


class Watched:
    """A cache that notes what has been said when it is asked."""

    def __init__(self, cache, said, terminal):
        self.cache, self.said, self.terminal = cache, said, terminal
        self.cache_path = cache.cache_path

    def load_overload(self, *arguments):
        self.said += ["load", self.terminal.getvalue()]
        return self.cache.load_overload(*arguments)

    def save_overload(self, *arguments):
        self.said += ["save", self.terminal.getvalue()]
        self.cache.save_overload(*arguments)


@pytest.mark.usefixtures("cache")
def test_through_logging_and_nothing_where_nobody_looks(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, logger="fastadam"):
        intrinsics.kernel(double, FLOAT)(3.0)
        intrinsics.kernel(halve, FLOAT)(3.0)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("fastadam", logging.INFO)
    assert record.getMessage().startswith("compiling for this processor")
    assert sys.stderr.getvalue() == ""


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("setting", "lines"), [("1", 0), ("yes", 0), ("0", 1), ("", 1)])
def test_one_setting_turns_it_off(setting, lines, monkeypatch, caplog):
    terminal = at_a_terminal(monkeypatch)
    monkeypatch.setenv("FASTADAM_QUIET", setting)
    with caplog.at_level(logging.INFO, logger="fastadam"):
        intrinsics.kernel(double, FLOAT)(3.0)
    assert len(caplog.records) == len(terminal.getvalue().splitlines()) == lines


@pytest.mark.usefixtures("cache")
def test_where_the_code_cannot_be_kept(monkeypatch):
    terminal = at_a_terminal(monkeypatch)

    def refuse(*_, **__):
        raise RuntimeError("no locator")

    with monkeypatch.context() as patch:
        patch.setattr(intrinsics, "KernelCache", refuse)
        kernel = intrinsics.kernel(double, FLOAT)
    assert kernel(3.0) == 6.0
    assert terminal.getvalue().endswith(
        "in every process: the code cannot be kept, no folder is writable (NUMBA_CACHE_DIR can"
        " name another)\n"
    )


def test_where_the_folder_is_not_writable_any_more(cache, monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    monkeypatch.setattr(notice.os, "access", lambda path, _: Path(path) == cache / "other")
    assert intrinsics.kernel(double, FLOAT)(3.0) == 6.0
    assert "in every process: the code cannot be kept in " in terminal.getvalue()
    assert f"{cache}" in terminal.getvalue()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("stream", [None, "closed"])
def test_what_listens_cannot_stop_the_compiler(stream, monkeypatch):
    if stream == "closed":
        stream = Terminal()
        stream.close()

    class Broken(logging.Handler):
        def emit(self, record):  # noqa: ARG002
            raise RuntimeError("broken")

    log = logging.getLogger("fastadam")
    monkeypatch.setattr(log, "handlers", [Broken()])
    monkeypatch.setattr(log, "level", logging.INFO)
    monkeypatch.setattr(sys, "stderr", stream)
    assert intrinsics.kernel(double, FLOAT)(3.0) == 6.0
