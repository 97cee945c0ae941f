"""Seeds, the optional-package rule, and nothing else."""

import importlib
import os

import numpy as np
import pytest

try:
    from hypothesis import settings
except ImportError:  # the property tests skip themselves
    pass
else:
    settings.register_profile("fastadam", deadline=None, derandomize=True, max_examples=60)
    settings.load_profile("fastadam")


@pytest.fixture
def rng():
    """The same draws whatever the order or the selection of the tests."""
    return np.random.default_rng(20261122)


@pytest.fixture
def optional():
    """Import an optional package, or skip; with FASTADAM_TEST_REQUIRE=1, as in CI, fail."""

    def load(name):
        if os.environ.get("FASTADAM_TEST_REQUIRE") == "1":
            return importlib.import_module(name)
        return pytest.importorskip(name, exc_type=ImportError)

    return load
