"""Seeds, and the rule on optional packages: absent they skip a test, but not in CI."""

import os
import signal

import numpy as np
import pytest

try:
    from hypothesis import settings
except ImportError:  # the property tests skip themselves
    pass
else:
    settings.register_profile("fastadam", deadline=None, derandomize=True, max_examples=60)
    settings.load_profile("fastadam")

REQUIRE = os.environ.get("FASTADAM_TEST_REQUIRE") == "1"
# All that takes long, and as many random draws as were promised: as in CI.
FULL = os.environ.get("FASTADAM_TEST_FULL") == "1"
missing = []

# Python leaves Ctrl-C ignored where its parent ignored it, as a shell's background does,
# and then so do the processes that the tests start. Tests send Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked ``full``, unless that is asked for."""
    if not FULL:
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture
def rng():
    """The same draws whatever the order or the selection of the tests."""
    return np.random.default_rng(20261122)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Note the kernels that are called: which, for what dtype, with what options."""
    from fastadam.cpu import kernels
    from fastadam.state import roles

    calls = []

    def noting(kind, factory):
        def make(dtype, **options):
            kernel = factory(dtype, **options)

            names = [name for name in options if name != "roles" and options[name]]
            names[1:1] = [name for name in roles.OPTIONAL if name in options.get("roles", ())]

            def call(*arguments):
                calls.append((kind, dtype.name, *names))
                return kernel(*arguments)

            return call

        return make

    for kind in ("update", "sum"):
        factory = getattr(kernels, f"{kind}_kernel")
        monkeypatch.setattr(kernels, f"{kind}_kernel", noting(kind, factory))
    return calls


@pytest.fixture
def optional():
    """Import an optional package, or skip the test."""

    def load(name):
        return pytest.importorskip(name, exc_type=ImportError)

    return load


def note_missing(report):
    """Remember a test or module skipped for want of a package."""
    if report.skipped and "could not import" in str(report.longrepr):
        missing.append(report.nodeid)


pytest_runtest_logreport = note_missing
pytest_collectreport = note_missing


def pytest_sessionfinish(session):
    """With FASTADAM_TEST_REQUIRE=1, as in CI, fail if a package was missing."""
    if REQUIRE and missing:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if REQUIRE and missing:
        terminalreporter.section("required by FASTADAM_TEST_REQUIRE=1, but absent")
        for nodeid in missing:
            terminalreporter.line(nodeid)
