"""An adapter that save, load and compile have never heard of."""

import numpy as np
import pytest

import fastadam
from fastadam.adapter import Adapter

pytest.importorskip("safetensors", exc_type=ImportError)


class ListAdam(Adapter):
    """Adam over lists of numbers, by name."""

    def __init__(self, lists, **options):
        super().__init__()
        self.lists = lists
        self.arrays = {name: np.array(numbers, float) for name, numbers in lists.items()}
        self.optimizer = fastadam.Adam(self.arrays, **options)

    def _check(self):
        for name, numbers in self.lists.items():
            if len(numbers) != self.arrays[name].size:
                raise ValueError(f"{name} must keep its length")

    def _pull(self):
        self._check()
        for name, numbers in self.lists.items():
            self.arrays[name][:] = numbers

    def _push(self):
        for name, array in self.arrays.items():
            self.lists[name][:] = array.tolist()


@pytest.fixture
def opt():
    return ListAdam({"w": [1.0, 2.0], "b": [3.0]}, lr=0.5)


def test_saved_as_the_owner_has_it_and_loaded_into_the_owner(opt, tmp_path):
    opt.lists["w"][0] = 7.0
    fastadam.save(tmp_path / "run.safetensors", opt)
    new = ListAdam({"w": [0.0, 0.0], "b": [0.0]})
    fastadam.load(tmp_path / "run.safetensors", new, params=False)
    assert new.lists == {"w": [0.0, 0.0], "b": [0.0]}
    fastadam.load(tmp_path / "run.safetensors", new)
    assert new.lists == {"w": [7.0, 2.0], "b": [3.0]}
    assert new.optimizer.lr == 0.5


def test_what_the_owner_cannot_give_changes_nothing(opt, tmp_path):
    path = tmp_path / "run.safetensors"
    fastadam.save(path, ListAdam({"w": [5.0, 6.0], "b": [7.0]}))
    good = path.read_bytes()
    opt.lists["b"].append(4.0)
    for use in (fastadam.save, fastadam.load):
        with pytest.raises(ValueError, match="b must keep its length"):
            use(path, opt)
    assert path.read_bytes() == good
    assert opt.lists == {"w": [1.0, 2.0], "b": [3.0, 4.0]}
    assert opt.optimizer.lr == 0.5


def test_neither_saved_nor_loaded_while_it_is_used(opt, tmp_path):
    with opt._turn():
        for use in (fastadam.save, fastadam.load):
            with pytest.raises(RuntimeError, match="in the middle of its own step, save or load"):
                use(tmp_path / "run.safetensors", opt)
    fastadam.save(tmp_path / "run.safetensors", opt)


def test_compiled(opt):
    done = []
    fastadam.compile(opt, progress=lambda *counts: done.append(counts))
    assert done[-1][0] == done[-1][1] > 0
