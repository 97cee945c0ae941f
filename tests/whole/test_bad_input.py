"""Refusals: the right error, naming argument, rule and value, and no byte changed."""

import collections
import math
import signal
import sys
import threading
from typing import ClassVar

import numpy as np
import pytest

import fastadam

F = np.float64


def read_only(array):
    array.flags.writeable = False
    return array


def unaligned(dtype):
    return np.zeros(8 * 3 + 1, np.uint8)[1:].view(dtype)


BAD_ARRAYS = {
    "list": ([1.0, 2.0], TypeError, "must be a numpy.ndarray, got list"),
    "integers": (np.zeros(3, np.int64), TypeError, "must be float32 or float64 .* got .*int64"),
    "half": (np.zeros(3, np.float16), TypeError, "must be float32 or float64 .* got .*float16"),
    "complex": (np.zeros(3, complex), TypeError, "must be float32 or float64 .* got .*complex128"),
    "bool": (np.zeros(3, bool), TypeError, "must be float32 or float64 .* got .*bool"),
    "object": (np.zeros(3, object), TypeError, "must be float32 or float64 .* got .*'O'"),
    "big-endian": (np.zeros(3, ">f8"), TypeError, "in native byte order, got .*'>f8'"),
    "record": (np.zeros(3, [("x", "f4")]), TypeError, "must be float32 or float64"),
    "long double": (np.zeros(3, np.longdouble), TypeError, "must be float32 or float64"),
    "masked": (np.ma.zeros(3), TypeError, "must be a numpy.ndarray, got numpy.ma"),
    "strided": (np.zeros(6)[::2], ValueError, r"must be contiguous.* got strides \(16,\)"),
    "reversed": (np.zeros(6)[::-1], ValueError, r"must be contiguous.* got strides \(-8,\)"),
    "broadcast": (np.broadcast_to(np.zeros(1), (4,)), ValueError, "must be writable"),
    "read-only": (read_only(np.zeros(3)), ValueError, "must be writable, got a read-only array"),
    "unaligned": (unaligned("f8"), ValueError, "must be aligned to its 8-byte elements"),
    "none": (None, TypeError, "got .*NoneType"),
    "string": ("abc", TypeError, "got .*str"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_params(case):
    array, error, message = BAD_ARRAYS[case]
    with pytest.raises(error, match=r"params\[1\].*" + message):
        fastadam.Adam([np.zeros(2), array])
    with pytest.raises(error, match=r"params\['w'\].*" + message):
        fastadam.Adam({"w": array})
    with pytest.raises(error, match=r"params\[0\]\['params'\]\[0\].*" + message):
        fastadam.Adam([{"params": [array]}])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (None, TypeError, "params must be an array, a sequence or a mapping .* got NoneType"),
        (3.0, TypeError, "params must be an array, a sequence or a mapping .* got float"),
        ("w", TypeError, "params must be an array, a sequence or a mapping .* got str"),
        ({1, 2}, TypeError, "params must be an array, a sequence or a mapping .* got set"),
        ({"params": [], "lr": 0.1}, TypeError, "params must be a list of group dicts, got one"),
        ({1: np.zeros(2)}, TypeError, "params must be keyed by str, got key 1"),
        ([{"lr": 0.1}], TypeError, r"params\[0\] must be a dict with 'params'"),
        ([{"params": []}, np.zeros(2)], TypeError, r"params\[1\] must be a dict with 'params'"),
        ([{"params": [], "lrr": 1}], ValueError, r"params\[0\] must have .* got \['lrr'\]"),
        ([{"params": [], "amsgrad": True}], ValueError, r"params\[0\] must .* got \['amsgrad'\]"),
        ([{"params": [], "lr": -1.0}], ValueError, r"params\[0\].lr must be finite and >= 0, got"),
        (
            [{"params": {"w": np.zeros(2)}}, {"params": {"w": np.zeros(2)}}],
            ValueError,
            r"names must differ between groups, got \['w'\]",
        ),
    ],
)
def test_bad_containers(params, error, message):
    with pytest.raises(error, match=message):
        fastadam.Adam(params)


SHARED = np.zeros(10)


@pytest.mark.parametrize(
    "params",
    [
        [SHARED, SHARED],
        [SHARED[:6], SHARED[5:]],
        [SHARED[2:4], np.ones(3), SHARED],
        [SHARED, SHARED.reshape(2, 5)],
        [SHARED, SHARED.view(np.float32)],
    ],
)
def test_params_that_share_memory(params):
    with pytest.raises(ValueError, match=r"params\[0\] and params\[[12]\] must not share memory"):
        fastadam.Adam(params)


def test_neighbours_do_not_overlap():
    fastadam.Adam([SHARED[:5], SHARED[5:], SHARED[3:3], SHARED[5:5]])


HYPERPARAMETERS = [
    ("lr", -0.1, ValueError, "lr must be finite and >= 0, got -0.1"),
    ("lr", math.nan, ValueError, "lr must be finite and >= 0, got nan"),
    ("lr", math.inf, ValueError, "lr must be finite and >= 0, got inf"),
    ("lr", "0.1", TypeError, "lr must be a real number, got '0.1'"),
    ("lr", None, TypeError, "lr must be a real number, got None"),
    ("lr", True, TypeError, "lr must be a real number, got True"),
    ("lr", 1j, TypeError, "lr must be a real number, got 1j"),
    ("lr", np.ones(2), TypeError, "lr must be a real number, got array"),
    ("lr", 10**400, ValueError, "lr must be finite"),
    ("betas", (1.0, 0.9), ValueError, r"betas\[0\] must be in \[0, 1\), got 1.0"),
    ("betas", (0.9, 1.5), ValueError, r"betas\[1\] must be in \[0, 1\), got 1.5"),
    ("betas", (-0.1, 0.9), ValueError, r"betas\[0\] must be in \[0, 1\), got -0.1"),
    ("betas", (0.9, math.nan), ValueError, r"betas\[1\] must be in \[0, 1\), got nan"),
    ("betas", (10**400, 0.9), ValueError, r"betas\[0\] must be in \[0, 1\)"),
    ("betas", ("a", 0.9), TypeError, r"betas\[0\] must be a real number, got 'a'"),
    ("betas", 0.9, TypeError, "betas must be a pair of real numbers, got 0.9"),
    ("betas", (0.9,), TypeError, "betas must be a pair of real numbers, got"),
    ("eps", -1e-8, ValueError, "eps must be finite and >= 0, got -1e-08"),
    ("eps", math.nan, ValueError, "eps must be finite and >= 0, got nan"),
    ("weight_decay", -1, ValueError, "weight_decay must be finite and >= 0, got -1"),
    ("weight_decay", math.inf, ValueError, "weight_decay must be finite and >= 0, got inf"),
    (
        "decoupled_weight_decay",
        1,
        TypeError,
        "decoupled_weight_decay must be True or False, got 1",
    ),
    ("maximize", "yes", TypeError, "maximize must be True or False, got 'yes'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), HYPERPARAMETERS)
def test_hyperparameters(name, value, error, message):
    with pytest.raises(error, match=r"^" + message):
        fastadam.Adam([np.zeros(2)], **{name: value})
    with pytest.raises(error, match=r"^params\[0\]\." + message):
        fastadam.Adam([{"params": [np.zeros(2)], name: value}])
    param, grad = np.ones(2), np.ones(2)
    opt = fastadam.Adam([param])
    opt.param_groups[0][name] = value
    with pytest.raises(error, match=r"^param_groups\[0\]\." + message):
        opt.step([grad])
    assert opt.step_count == 0
    np.testing.assert_array_equal(param, 1.0)
    opt.param_groups[0][name] = fastadam.Adam([]).param_groups[0][name]
    opt.step([grad])


def test_an_array_on_a_device_beside_one_in_memory():
    """It is refused without what CUDA needs, which need not be installed."""

    class OnDevice:
        __cuda_array_interface__: ClassVar = {"shape": (3,), "typestr": "<f8", "data": (64, False)}

    with pytest.raises(ValueError, match=r"^params\[1\] must be in the host's memory, as params"):
        fastadam.Adam([np.zeros(3), OnDevice()])
    opt = fastadam.Adam([np.zeros(3)])
    with pytest.raises(ValueError, match=r"^params\[1\]\['params'\] .* got one on a CUDA device$"):
        opt.add_param_group({"params": OnDevice()})
    assert len(opt.param_groups) == 1


def test_amsgrad_and_schedule_of_the_wrong_kind():
    with pytest.raises(TypeError, match="amsgrad must be True or False, got 1"):
        fastadam.Adam([], amsgrad=1)
    for schedule in (0.5, fastadam.schedules.cosine):
        with pytest.raises(TypeError, match=r"schedule must be None or callable with a step, got"):
            fastadam.Adam([], schedule=schedule)


def test_numpy_numbers_are_numbers():
    opt = fastadam.Adam(np.zeros(2), lr=np.float32(0.5), betas=[np.float64(0.5), 0])
    assert opt.param_groups[0]["betas"] == (0.5, 0.0)


def test_eps_that_the_dtype_rounds_to_zero():
    with pytest.raises(ValueError, match="eps must not round to 0 in float32, got 1e-50"):
        fastadam.Adam(np.zeros(2, np.float32), eps=1e-50)
    fastadam.Adam(np.zeros(2), eps=1e-50)
    fastadam.Adam(np.zeros(2, np.float32), eps=0.0)


P = np.ones((3, 4))
BAD_GRADS = {
    "count": ([P], ValueError, "grads must have 2 entries .* got 1"),
    "too many": ([P, P, P], ValueError, "grads must have 2 entries .* got 3"),
    "none": (
        None,
        ValueError,
        "grads must have a gradient for each parameter, .* got None; has the",
    ),
    "mapping": ({"a": P}, TypeError, "grads must be a sequence, as params is, got dict"),
    "array": (
        np.ones((2, 3, 4)),
        TypeError,
        "grads must be a sequence, as params is, got ndarray",
    ),
    "dtype": ([None, np.ones((3, 4), "f4")], TypeError, r"grads\[1\].dtype must be .*float64.*32"),
    "integers": (
        [None, np.ones((3, 4), int)],
        TypeError,
        r"grads\[1\].dtype must be .* got .*int",
    ),
    "big-endian": ([np.ones((3, 4), ">f8"), None], TypeError, r"grads\[0\].dtype must .*>f8"),
    "shape": ([P.copy(), np.ones((4, 3))], ValueError, r"grads\[1\].shape must be .*\(4, 3\)"),
    "flat": ([P.copy(), np.ones(12)], ValueError, r"grads\[1\].shape must be .*\(12,\)"),
    "scalar": (
        [1.0, None],
        TypeError,
        r"grads\[0\] must be a numpy.ndarray, .* got float",
    ),
    "list": (
        [[1.0] * 4] * 2,
        TypeError,
        r"grads\[0\] must be a numpy.ndarray, .* got list",
    ),
    "fortran": (
        [None, np.asfortranarray(P)],
        ValueError,
        r"grads\[1\] must be laid out in C order",
    ),
    "strided": ([np.ones((3, 8))[:, ::2], None], ValueError, r"grads\[0\] must be contiguous"),
    "masked": ([np.ma.ones((3, 4)), None], TypeError, r"grads\[0\] must be a numpy.ndarray"),
}


@pytest.fixture
def pair():
    """Two parameters after one step, and a function that finds whether anything changed."""
    params = [np.full((3, 4), 2.0), np.full((3, 4), 3.0)]
    opt = fastadam.Adam(params, lr=0.1, amsgrad=True)
    opt.step([np.ones((3, 4)), np.full((3, 4), -1.0)])

    def picture():
        state = opt.state_dict()
        arrays = [a for s in state["state"].values() for a in s.values()]
        return [np.array(a).tobytes() for a in (*params, *arrays)], opt.step_count

    return opt, params, picture


@pytest.mark.parametrize("case", BAD_GRADS)
def test_bad_grads_change_nothing(pair, case):
    opt, _, picture = pair
    grads, error, message = BAD_GRADS[case]
    before = picture()
    with pytest.raises(error, match=message):
        opt.step(grads)
    assert picture() == before
    opt.step([np.ones((3, 4)), np.ones((3, 4))])


def test_what_makes_a_gradient_that_fits():
    wide, f = np.ones((3, 8)), np.asfortranarray(np.ones((3, 4)))
    for param, grad, remedy in [
        (np.ones((3, 4), "f4"), np.ones((3, 4)), "numpy.asarray(grad, numpy.float32)"),
        (np.ones((3, 4)), wide[:, ::2], "numpy.ascontiguousarray(grad)"),
        (np.ones((3, 4)), f, "numpy.ascontiguousarray(grad)"),
        (f.copy("F"), wide[:, ::2], "numpy.asfortranarray(grad)"),
        (f.copy("F"), np.ones((3, 4)), "numpy.asfortranarray(grad)"),
    ]:
        opt = fastadam.Adam(param)
        with pytest.raises((TypeError, ValueError)) as caught:
            opt.step(grad)
        assert str(caught.value).endswith(f"; {remedy} makes such a copy")
        opt.step(eval(remedy, {"numpy": np, "grad": grad}))


def test_grads_that_share_memory(pair):
    opt, params, picture = pair
    shared = np.ones((6, 4))
    before = picture()
    for grads, message in [
        ([params[0], None], r"grads\[0\] must not share memory with params\[0\]"),
        ([None, params[0]], r"grads\[1\] must not share memory with params\[0\]"),
        ([opt.state[1]["exp_avg_sq"], None], r"grads\[0\] .* with params\[1\]\.exp_avg_sq"),
        ([shared[:3], shared[2:5]], r"grads\[0\] and grads\[1\] must not share memory"),
        ([shared[:3], shared[:3]], r"grads\[0\] and grads\[1\] must not share memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            opt.step(grads)
    assert picture() == before
    opt.step([shared[:3], shared[3:]])


def test_zero_grad_of_a_read_only_gradient(pair):
    opt, _, picture = pair
    grads = [np.ones((3, 4)), read_only(np.ones((3, 4)))]
    opt.step(grads)
    before = picture()
    with pytest.raises(ValueError, match=r"grads\[1\] must be writable for zero_grad=True"):
        opt.step(grads, zero_grad=True)
    assert picture() == before
    assert grads[0].all()


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (0.0, ValueError, "grad_scale must be finite and > 0, got 0.0"),
        (-1.0, ValueError, "grad_scale must be finite and > 0, got -1.0"),
        (math.nan, ValueError, "grad_scale must be finite and > 0, got nan"),
        (math.inf, ValueError, "grad_scale must be finite and > 0, got inf"),
        ("2", TypeError, "grad_scale must be a real number, got '2'"),
        (
            1e-320,
            ValueError,
            r"1/grad_scale must be in \[2.225e-308, 1.798e\+308\], .* got 1e-320",
        ),
        (1e308, ValueError, r"1/grad_scale must be in .* got 1e\+308"),
        (1 / sys.float_info.max, ValueError, "1/grad_scale must be in .* got 5.56"),
        (True, TypeError, "grad_scale must be a real number, got True"),
        (np.ones(2), TypeError, "grad_scale must be a real number, got array"),
    ],
)
def test_grad_scale(pair, scale, error, message):
    opt, _, picture = pair
    before = picture()
    with pytest.raises(error, match=message):
        opt.step([np.ones((3, 4)), None], grad_scale=scale)
    assert picture() == before


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (math.nan, ValueError, r"schedule\(1\) must be finite and >= 0, got nan"),
        (-0.5, ValueError, r"schedule\(1\) must be finite and >= 0, got -0.5"),
        (math.inf, ValueError, r"schedule\(1\) must be finite and >= 0, got inf"),
        (None, TypeError, r"schedule\(1\) must be a real number, got None"),
        (1e308, ValueError, r"lr \* schedule\(1\) must not exceed"),
    ],
)
def test_schedules_that_return_nonsense(pair, factor, error, message):
    opt, _, picture = pair
    opt.lr = 1e10
    opt.schedule = lambda _step: factor
    before = picture()
    with pytest.raises(error, match=message):
        opt.step([np.ones((3, 4)), None])
    assert picture() == before


def test_a_schedule_that_raises(pair):
    opt, _, picture = pair
    opt.schedule = lambda _step: 1 / 0
    before = picture()
    with pytest.raises(ZeroDivisionError):
        opt.step([np.ones((3, 4)), None])
    assert picture() == before


def test_names():
    params = {"a": np.zeros(2), "b": np.zeros(2)}
    opt = fastadam.Adam(params)
    grad = np.ones(2)
    for grads, message in [
        ({"a": grad}, "missing 'b'"),
        ({"a": grad, "c": grad}, "missing 'b'; unknown 'c'"),
        ({"a": grad, "b": None, "c": grad}, "unknown 'c'"),
        (dict.fromkeys("abcdefghi", grad), "unknown 'c', 'd', 'e', 'f', 'g' and 2 more"),
    ]:
        rule = r"grads must have the names of params \(None where there is no gradient\): "
        with pytest.raises(ValueError, match=f"^{rule}{message}$"):
            opt.step(grads)
    with pytest.raises(TypeError, match="grads must be a mapping by name, as params is, got list"):
        opt.step([grad, grad])
    opt.step({"b": None, "a": grad})


def test_groups_of_grads():
    opt = fastadam.Adam([{"params": [np.zeros(2)]}, {"params": {"b": np.zeros(3)}}])
    for grads, error, message in [
        ([np.ones(2)], ValueError, "grads must have one entry for each of 2 groups, got 1"),
        (
            {"b": np.ones(3)},
            TypeError,
            "grads must be a sequence with one entry a group, got dict",
        ),
        ([[np.ones(2)], [np.ones(3)]], TypeError, r"grads\[1\] must be a mapping by name"),
        ([[], {"b": None}], ValueError, r"grads\[0\] must have 1 entries"),
        ([[np.ones(2)], {"b": np.ones(2)}], ValueError, r"grads\[1\]\['b'\].shape must be"),
    ]:
        with pytest.raises(error, match=message):
            opt.step(grads)
    assert opt.step_count == 0


def test_add_param_group_refused_changes_nothing():
    params = [np.zeros(3)]
    opt = fastadam.Adam(params)
    for group, error, message in [
        ({"params": [params[0]]}, ValueError, "must not share memory"),
        ({"params": [np.zeros(2, int)]}, TypeError, "float32 or float64"),
        ({"params": [np.zeros(2)], "lr": math.nan}, ValueError, r"params\[1\].lr must be finite"),
        ([np.zeros(2)], TypeError, r"params\[1\] must be a dict with 'params'"),
    ]:
        with pytest.raises(error, match=message):
            opt.add_param_group(group)
    assert len(opt.param_groups) == 1
    opt.step([np.ones(3)])


def test_setting_lr_and_schedule():
    opt = fastadam.Adam([{"params": []}, {"params": [], "lr": 1.0}])
    with pytest.raises(ValueError, match="lr must be finite and >= 0, got nan"):
        opt.lr = math.nan
    assert [group["lr"] for group in opt.param_groups] == [0.01, 1.0]
    with pytest.raises(TypeError, match="schedule must be None or callable"):
        opt.schedule = 1.0


def test_arrays_in_use_cannot_be_moved():
    """The kernel knows addresses: a resize would leave it a pointer to freed memory."""
    param, grad = np.zeros(10), np.ones(10)
    opt = fastadam.Adam(param)
    opt.step(grad)
    for array in (param, opt.state[0]["exp_avg"], opt.state[0]["exp_avg_sq"]):
        with pytest.raises(ValueError, match="cannot resize"):
            array.resize(10**6, refcheck=False)
    grad.resize(10**6, refcheck=False)
    with pytest.raises(ValueError, match=r"grads.shape must be its parameter's, \(10,\)"):
        opt.step(grad)
    assert opt.step_count == 1


@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")
def test_arrays_changed_between_steps(pair):
    """The same objects come back, but are not what they were."""
    opt, params, picture = pair
    grads = [np.ones((3, 4)), np.ones((3, 4))]
    opt.step(grads)
    before = picture()
    grads[1].shape = (4, 3)
    with pytest.raises(ValueError, match=r"grads\[1\].shape must be its parameter's"):
        opt.step(grads)
    grads[1] = np.ones((3, 4))
    grads[0].dtype = np.int64
    with pytest.raises(TypeError, match=r"grads\[0\].dtype must be its parameter's"):
        opt.step(grads)
    grads[0] = np.ones((3, 4))
    grads[0].flags.writeable = False
    with pytest.raises(ValueError, match=r"grads\[0\] must be writable for zero_grad=True"):
        opt.step(grads, zero_grad=True)
    params[1].flags.writeable = False
    with pytest.raises(ValueError, match=r"params\[1\] must be writable, got a read-only array"):
        opt.step(grads)
    assert picture() == before
    params[1].flags.writeable = True
    opt.step(grads)


def test_gradients_live_until_the_step_is_done():
    """A generator lets go of each array at once: the step must hold on to it."""
    params = [np.zeros(200_000) for _ in range(4)]
    opt = fastadam.Adam(params, lr=0.5)
    opt.step(np.full(200_000, k + 1.0) for k in range(4))
    for k, param in enumerate(params):
        np.testing.assert_allclose(param, -0.5)
        np.testing.assert_allclose(opt.state[k]["exp_avg"], 0.1 * (k + 1))

    grads, thief = [np.full(1000, 3.0)], []

    def steal(_step):
        grads.clear()
        thief.append([np.full(1000, -1e6) for _ in range(3)])
        return 1.0

    opt = fastadam.Adam([np.zeros(1000)], schedule=steal)
    opt.step(grads)
    np.testing.assert_allclose(opt.state[0]["exp_avg"], 0.3)


def test_a_schedule_that_uses_the_optimizer(pair):
    opt, _, picture = pair
    grads = [np.ones((3, 4)), None]
    before = picture()
    for use in (
        lambda _step: opt.step(grads),
        lambda _step: opt.add_param_group({"params": []}),
        lambda _step: opt.state_dict(),
        lambda _step: opt.load_state_dict({}),
    ):
        opt.schedule = use
        with pytest.raises(RuntimeError, match="in the middle of its own step"):
            opt.step(grads)
    opt.schedule = None
    assert picture() == before


def test_one_optimizer_in_several_threads():
    """Each call is either done whole or refused."""
    param, done, refused = np.zeros(50_000), [], []
    opt = fastadam.Adam(param)

    def work():
        grad = np.ones_like(param)
        for _ in range(200):
            try:
                done.append(opt.step(grad).step)
            except RuntimeError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) + len(refused) == 800
    assert sorted(done) == list(range(len(done)))
    assert opt.step_count == opt.state[0]["step"] == len(done)


@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")
def test_parameters_changed_in_place():
    """What the optimizer was made for must still be there: the kernel knows its address."""
    for spoil in (
        lambda p: setattr(p, "dtype", np.int64),
        lambda p: setattr(p, "dtype", np.float32),
        lambda p: p.__setstate__((1, (2,), np.dtype("f8"), False, np.zeros(2).tobytes())),
    ):
        param = np.ones(4)
        opt = fastadam.Adam(param)
        spoil(param)
        before = param.copy()
        with pytest.raises((TypeError, ValueError), match=r"params(\.dtype)? must"):
            opt.step(np.ones_like(param))
        np.testing.assert_array_equal(param, before)
        assert opt.step_count == opt.state[0]["step"] == 0


def test_other_kinds_that_compare_equal_are_seen():
    opt = fastadam.Adam(np.zeros(2), lr=1.0, maximize=True)
    opt.step(np.ones(2))
    for name, value in (("lr", True), ("maximize", 1), ("betas", (False, 0.95))):
        kept = opt.param_groups[0][name]
        opt.param_groups[0][name] = value
        with pytest.raises(TypeError, match=rf"param_groups\[0\].{name}"):
            opt.step(np.ones(2))
        opt.param_groups[0][name] = kept
    assert opt.step_count == 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer")
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True, "max_grad_norm": 1.0, "nonfinite": "skip", "ema_decay": 0.5}],
    ids=["plain", "tail"],
)
def test_interrupts_at_any_moment(options):
    """Ctrl-C leaves every dtype and every counter at the same step, and the optimizer usable."""
    params = [np.zeros(40, np.float32), np.zeros(30), np.zeros(3000, np.float32)]
    grads = [np.ones_like(param) for param in params]
    opt = fastadam.Adam(params, lr=0.01, **options)
    opt.step(grads)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    rng, interrupts = np.random.default_rng(0), 0
    try:
        while interrupts < 300:
            try:
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(20e-6, 200e-6)))
                while True:
                    opt.step(grads)
            except KeyboardInterrupt:
                interrupts += 1
            steps = {opt.step_count, *(s["step"] for s in opt.state.values())}
            assert len(steps) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, previous)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    count = opt.step_count
    assert opt.step(grads).step == count
    twins = [np.zeros_like(param) for param in params]
    expected = fastadam.Adam(twins, lr=0.01, **options)
    for _ in range(count + 1):
        expected.step(grads)
    for param, twin in zip(params, twins, strict=True):
        np.testing.assert_array_equal(param, twin)


def test_a_gradient_mapping_is_only_read():
    grads = collections.defaultdict(lambda: np.ones(2), {"w": np.ones(2), "bias": np.ones(2)})
    opt = fastadam.Adam({"w": np.zeros(2), "b": np.zeros(2)})
    with pytest.raises(ValueError, match="missing 'b'; unknown 'bias'"):
        opt.step(grads)
    assert set(grads) == {"w", "bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": 1e39}, "weight_decay must not exceed 3.403e.38, the largest float32"),
        ({"eps": 1e39}, "eps must not exceed 3.403e.38, the largest float32"),
        ({"lr": 1e39}, "lr must not exceed 3.403e.38, the largest float32"),
    ],
)
def test_what_overflows_float32(options, message):
    with pytest.raises(ValueError, match=message):
        fastadam.Adam(np.zeros(2, np.float32), **options)
    fastadam.Adam(np.zeros(2), **options)


def test_steps_that_overflow_float32():
    param = np.zeros(2, np.float32)
    opt = fastadam.Adam(param, lr=3e38)
    with pytest.raises(ValueError, match=r"lr \* schedule\(0\) must not exceed 3.403e\+37"):
        opt.step(np.ones(2, np.float32))
    for scale in (1e-39, 1e39):
        with pytest.raises(ValueError, match=r"1/grad_scale must be in \[1.175e-38, 3.403e\+38\]"):
            opt.step(np.ones(2, np.float32), grad_scale=scale)
    np.testing.assert_array_equal(param, 0)


def test_hyperparameters_that_are_missing_or_no_numbers(pair):
    opt, _, picture = pair
    grads, before = [np.ones((3, 4)), None], picture()
    with pytest.raises(TypeError, match="zero_grad must be True or False, got 'no'"):
        opt.step(grads, zero_grad="no")
    opt.param_groups[0]["lr"] = np.array([0.1, 0.2])
    with pytest.raises(TypeError, match=r"param_groups\[0\].lr must be a real number, got array"):
        opt.step(grads)
    del opt.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"param_groups\[0\] must have 'lr'"):
        opt.step(grads)
    assert "lr=None" in repr(opt)
    opt.param_groups[0]["lr"] = 0.1
    opt.param_groups[0]["LR"] = 7
    with pytest.raises(ValueError, match=r"must keep its keys and its 'params', got \['LR'\]"):
        opt.step(grads)
    del opt.param_groups[0]["LR"]
    kept = opt.param_groups[0]["params"]
    opt.param_groups[0]["params"] = (np.ones(2),)
    with pytest.raises(ValueError, match="must keep its keys and its 'params', got other params"):
        opt.step(grads)
    opt.param_groups[0]["params"] = kept
    assert picture() == before


def test_arrays_of_other_libraries_are_refused_with_a_hint(optional):
    torch = optional("torch")
    with pytest.raises(TypeError, match=r"got torch.Tensor; fastadam.torch.Adam .*CPUParams"):
        fastadam.Adam([torch.zeros(3)])
    tensor = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    fastadam.Adam([tensor.detach().numpy()], lr=0.5).step([np.ones(3)])
    assert tensor.tolist() == pytest.approx([-0.5] * 3)
