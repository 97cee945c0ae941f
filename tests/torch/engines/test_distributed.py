"""Torch's own distributed engines, over gloo: one run of several processes has all cases."""

import re
import sys
from pathlib import Path

import pytest
import ranks

HERE = Path(__file__).parent
FILES = [HERE / "data_parallel_cases.py", HERE / "dtensor_cases.py"]
CASES = [
    (name, int(size))
    for file in FILES
    for size, name in re.findall(r"^@ranks\((\d)\)\ndef (\w+)", file.read_text("utf-8"), re.M)
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the ranks are forks")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    pytest.importorskip("torch", exc_type=ImportError)
    return ranks.run(FILES, tmp_path_factory.mktemp("ranks"), seconds=240)


@pytest.mark.parametrize(("case", "size"), CASES)
def test_on_all_ranks(case, size, outcomes):
    found, output = outcomes
    said = [found.get(rank, {}).get(case, f"no word from it; {output}") for rank in range(size)]
    for rank in range(size):
        assert said[rank] == "passed", f"rank {rank}: {said[rank]}"
