"""What a hostile reader of the code came up with, and holds."""

import copy
import gc
import pickle
import threading
import warnings

import numpy as np
import pytest

import fastadam
from fastadam.cpu.gradients import Gradients


def test_a_group_added_while_kernels_are_compiled():
    opt = fastadam.Adam([np.zeros(100_000)], max_grad_norm=1.0)
    junk = []

    def progress(*_):
        opt.add_param_group({"params": [np.zeros(3)]})
        gc.collect()
        junk.extend(np.full(size, 0x4141414141) for _ in range(200) for size in (15, 16, 11))

    fastadam.compile(opt, progress=progress)
    assert opt.step_count == 0
    assert len(opt.param_groups) > 2


def test_compiling_during_a_step_changes_nothing():
    param, grad = np.zeros(400_000, np.float32), np.ones(400_000, np.float32)
    opt = fastadam.Adam(param, lr=0.1, eps=0.0)
    fastadam.compile(opt)
    stop = threading.Event()

    def others():
        while not stop.is_set():
            fastadam.compile(opt)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(20):
            opt.step(grad)
    finally:
        stop.set()
        thread.join()
    assert np.unique(param).size == 1


def test_threads_that_ask_for_grads_at_once_get_the_same():
    for _ in range(100):
        opt = fastadam.Adam([np.zeros(2)])
        barrier, found = threading.Barrier(2), []

        def ask(opt=opt, barrier=barrier, found=found):
            barrier.wait()
            try:
                found.append(opt.grads)
            except RuntimeError:  # the other is at it just now
                found.append(opt)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(each is opt.grads or each is opt for each in found)


class TestHyperparameters:
    def test_a_step_in_the_middle_of_a_write(self):
        opt = fastadam.Adam([np.zeros(3)], lr=0.1)

        def items():
            opt.step([np.ones(3)])
            yield "lr", 0.7

        opt.param_groups[0].update(items())
        assert opt.step([np.ones(3)]).lr == 0.7

    def test_augmented_assignment(self):
        opt = fastadam.Adam([np.zeros(3)], lr=0.1)
        opt.param_groups[0] |= {"lr": 0.5}
        assert opt.step([np.ones(3)]).lr == 0.5

    @pytest.mark.parametrize("change", [{"learning_rate": 1.0}, {"params": ()}])
    def test_a_group_more_makes_no_wrong_key_right(self, change):
        opt = fastadam.Adam([np.zeros(3)], lr=0.1)
        opt.param_groups[0].update(change)
        opt.add_param_group({"params": [np.zeros(2)]})
        with pytest.raises(ValueError, match=r"param_groups\[0\] must keep its keys"):
            opt.step([[np.ones(3)], [np.ones(2)]])

    def test_init_again(self):
        opt = fastadam.Adam([np.zeros(3)], lr=0.1)
        opt.step([np.ones(3)])
        opt.param_groups[0].__init__(lr=0.25)
        assert opt.step([np.ones(3)]).lr == 0.25

    def test_a_list_changed_in_place(self):
        param, same = np.zeros(3), np.zeros(3)
        opt, other = fastadam.Adam([param]), fastadam.Adam([same])
        betas = [0.5, 0.6]
        for each in (opt, other):
            each.param_groups[0]["betas"] = betas
            each.step([np.ones(3)])
        betas[0] = 0.9
        assert opt.param_groups[0]["betas"] == (0.5, 0.6)

    def test_grad_scale_is_read_once(self):
        class Moody(float):
            reads = 0

            def __float__(self):
                Moody.reads += 1
                return 2.0 * Moody.reads

        opt = fastadam.Adam([np.zeros(1)], max_grad_norm=np.inf)
        assert opt.step([np.full(1, 8.0)], grad_scale=Moody(2.0)).grad_norm == 4.0
        assert opt.state[0]["exp_avg"][0] == pytest.approx(0.4, rel=1e-15)

    def test_objects_forward_what_is_set(self):
        class Value:
            def __init__(self, data):
                self.data, self.grad = data, float("nan")

        opt = fastadam.from_objects([Value(1.0)])
        opt.max_grad_norm, opt.nonfinite = 2.0, "skip"
        assert (opt.optimizer.max_grad_norm, opt.optimizer.nonfinite) == (2.0, "skip")
        assert opt.step().skipped


class TestUnpickledArrays:
    """Their dtype is another object, which stands for the same."""

    def test_gradients_are_looked_at_in_compiled_code(self, monkeypatch):
        monkeypatch.setattr(Gradients, "take_unusual", None)
        params, grads = [np.zeros(2), np.zeros(3)], [np.ones(2), np.ones(3)]
        fastadam.Adam(params).step(pickle.loads(pickle.dumps(grads)))
        assert params[1].all()

    def test_optimizers_too(self, monkeypatch):
        opt = pickle.loads(pickle.dumps(fastadam.Adam([np.zeros(2), np.zeros(3)])))
        monkeypatch.setattr(Gradients, "take_unusual", None)
        assert opt.step([np.ones(2), np.ones(3)]).step == 0

    @pytest.mark.parametrize("dtype", [">f8", "<i8", "f4", "c8", "M8[s]", "O"])
    def test_other_dtypes_are_still_refused(self, dtype):
        param = np.zeros(2)
        with pytest.raises(TypeError, match="must be its parameter's"):
            fastadam.Adam([param]).step([np.ones(2).astype(dtype)])
        assert not param.any()


def reshape(array, shape):
    """Reshape in place, which NumPy allows, though from 2.5 on it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        array.shape = shape


def test_a_parameter_must_keep_its_shape():
    param = np.zeros(4)
    opt = fastadam.Adam([param], ema_decay=0.5)
    opt.step([np.ones(4)])
    before = param.copy()
    reshape(param, (2, 2))
    for grad in (np.ones(4), np.ones((2, 2))):
        with pytest.raises(ValueError, match="must keep the memory, the shape and the dtype"):
            opt.step([grad])
    reshape(param, (4,))
    np.testing.assert_array_equal(param, before)
    copy.deepcopy(opt).step([np.ones(4)])


def test_a_refused_assignment_leaves_no_gradients():
    opt = fastadam.Adam([np.zeros(2)])
    with pytest.raises(TypeError, match="grads must stay"):
        opt.grads = [np.ones(2)]
    with pytest.raises(ValueError, match="grads must be given"):
        opt.step()


class Touchy(np.ndarray):
    def __setitem__(self, place, value):
        raise RuntimeError("no")

    def __array_ufunc__(self, *args, **kwargs):
        raise RuntimeError("units")


def test_subclasses_have_no_say():
    opt = fastadam.Adam([np.zeros(2), np.zeros(2)], nonfinite="skip")
    plain, touchy = np.full(2, np.nan), np.full(2, 1e200).view(Touchy)
    assert opt.step([plain, touchy], zero_grad=True).skipped
    assert not plain.any()
    assert not touchy.view(np.ndarray).any()


def test_a_norm_beyond_float64_before_it_is_unscaled():
    opt = fastadam.Adam(np.zeros(3), max_grad_norm=1.0, nonfinite="skip")
    result = opt.step(np.full(3, 1.7e308), grad_scale=1e10)
    assert result.grad_norm == pytest.approx(1.7e298 * 3**0.5, rel=1e-15)
    assert not result.skipped
