"""state_dict, load_state_dict, groups added later, copies, pickles, repr."""

import copy
import pickle
import weakref

import numpy as np
import pytest

import fastadam
from fastadam import schedules


def advance(opt, params, rng, steps=5):
    for _ in range(steps):
        grads = {name: np.empty_like(param) for name, param in params.items()}
        for grad in grads.values():
            grad[...] = rng.standard_normal(grad.shape)
        opt.step(grads)


def make(rng, **options):
    params = {
        "w": rng.standard_normal((3, 4)),
        "b": rng.standard_normal(4).astype(np.float32),
        "f": np.asfortranarray(rng.standard_normal((2, 5))),
    }
    options = {"amsgrad": True, "weight_decay": 0.1, "schedule": schedules.cosine(50), **options}
    return params, fastadam.Adam(params, **options)


def bits(params, opt):
    state = opt.state_dict()
    arrays = [*params.values(), *(a for s in state["state"].values() for a in s.values())]
    return [np.asarray(a).tobytes() for a in arrays], state["step_count"]


def test_round_trip_goes_on_with_the_same_bits(rng):
    params, opt = make(rng)
    advance(opt, params, rng)
    saved = pickle.loads(pickle.dumps(opt.state_dict()))
    twin = {name: p.copy("K") for name, p in params.items()}
    other = fastadam.Adam(twin, lr=9.0, amsgrad=True, schedule=schedules.cosine(50))
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.01
    assert bits(twin, other) == bits(params, opt)
    advance(opt, params, np.random.default_rng(3))
    advance(other, twin, np.random.default_rng(3))
    assert bits(twin, other) == bits(params, opt)


def test_names_not_order_decide(rng):
    params, opt = make(rng)
    advance(opt, params, rng)
    turned = {name: params[name].copy("K") for name in reversed(params)}
    other = fastadam.Adam(turned, amsgrad=True)
    other.load_state_dict(opt.state_dict())
    for name in params:
        np.testing.assert_array_equal(other.state[name]["exp_avg"], opt.state[name]["exp_avg"])


def test_state_dict_is_a_copy_and_state_is_live(rng):
    params, opt = make(rng)
    advance(opt, params, rng, 1)
    saved, live = opt.state_dict(), opt.state["w"]["exp_avg"]
    before = saved["state"]["w"]["exp_avg"].copy()
    advance(opt, params, rng, 1)
    np.testing.assert_array_equal(saved["state"]["w"]["exp_avg"], before)
    assert live is opt.state["w"]["exp_avg"]
    assert (live != before).any()
    assert (saved["step_count"], saved["state"]["w"]["step"]) == (1, 1)


def edit(state, path, value):
    *parents, last = path
    for key in parents:
        state = state[key]
    if value is KeyError:
        del state[last]
    else:
        state[last] = value


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        (["state", "w"], KeyError, ValueError, "state has no 'w'"),
        (["state", "x"], {}, ValueError, "state has 'x', which the optimizer has not"),
        (["state", "w", "exp_avg"], KeyError, ValueError, r"state\['w'\] has no 'exp_avg'"),
        (["state", "w", "max_exp_avg_sq"], KeyError, ValueError, "has no 'max_exp_avg_sq'"),
        (["state", "w", "momentum"], 1, ValueError, "has 'momentum', which the optimizer has not"),
        (
            ["state", "w", "exp_avg"],
            np.zeros(12),
            ValueError,
            r"\(12,\), not .*\(3, 4\)",
        ),
        (
            ["state", "b", "exp_avg"],
            np.zeros(4),
            ValueError,
            r"is .*float64.* \(4,\), not .*float32",
        ),
        (
            ["state", "w", "step"],
            -1,
            ValueError,
            r"\['step'\] must be an integer >= 0 and under .*, not -1",
        ),
        (
            ["state", "w", "step"],
            1.5,
            ValueError,
            r"\['step'\] must be an integer >= 0 and under .*, not 1.5",
        ),
        (["state", "w"], 3, ValueError, r"state\['w'\] is no mapping"),
        (
            ["step_count"],
            None,
            ValueError,
            "step_count must be an integer >= 0 and under .*, not None",
        ),
        (["step_count"], KeyError, ValueError, "step_count must be an integer >= 0"),
        (["param_groups"], [], ValueError, "param_groups has 0 groups, not 1"),
        (["param_groups", 0, "lr"], np.nan, ValueError, r"param_groups'\]\[0\].lr must be finite"),
        (["param_groups", 0, "lr"], KeyError, ValueError, r"param_groups\[0\] has no lr"),
        (["param_groups", 0, "betas"], (2, 0), ValueError, r"betas\[0\] must be in \[0, 1\)"),
        (["param_groups", 0, "params"], ["w"], ValueError, r"has other parameters: \['w'\], not"),
        (["param_groups", 0, "params"], [np.zeros(3)], ValueError, "has other parameters"),
        (["param_groups"], None, TypeError, r"state_dict\['param_groups'\] must be a list"),
        (["param_groups"], "abc", TypeError, r"state_dict\['param_groups'\] must be a list"),
        (["param_groups"], [3], ValueError, r"param_groups\[0\] is no mapping"),
        (["param_groups", 0, "params"], 3, ValueError, "has other parameters: 3, not"),
        (["state", "w", "exp_avg"], [[1.0], [1.0, 2.0]], ValueError, "'exp_avg'] is no array"),
        (["state", "w", "step"], 2**62, ValueError, "must be an integer >= 0 and under 2"),
        (["state"], None, TypeError, r"state_dict\['state'\] must be a mapping"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(rng, path, value, error, message):
    params, opt = make(rng)
    advance(opt, params, rng)
    state = opt.state_dict()
    advance(opt, params, rng)
    before, lr = bits(params, opt), opt.lr
    edit(state, path, value)
    with pytest.raises(error, match=message):
        opt.load_state_dict(state)
    assert (bits(params, opt), opt.lr) == (before, lr)


def test_every_mismatch_is_in_one_message(rng):
    _, opt = make(rng)
    state = opt.state_dict()
    del state["state"]["w"]
    state["state"]["b"]["step"] = -3
    with pytest.raises(ValueError, match=r"state has no 'w'; state\['b'\]\['step'\] must be"):
        opt.load_state_dict(state)
    with pytest.raises(TypeError, match="state_dict must be a mapping, got list"):
        opt.load_state_dict([])


def test_add_param_group_keeps_what_there_is(rng):
    first, second = rng.standard_normal(6), rng.standard_normal(3).astype(np.float32)
    alone = first.copy()
    opt, reference = fastadam.Adam([first]), fastadam.Adam([alone])
    for step in range(8):
        grad = rng.standard_normal(6)
        if step == 4:
            opt.add_param_group({"params": {"late": second}, "lr": 0.5})
        if step < 4:
            opt.step([grad])
        else:
            opt.step([[grad], {"late": np.ones(3, np.float32)}])
        reference.step([grad])
    np.testing.assert_array_equal(first, alone)
    assert {key: s["step"] for key, s in opt.state.items()} == {0: 8, "late": 4}
    assert [group["lr"] for group in opt.param_groups] == [0.01, 0.5]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_updates_the_copies_of_the_arrays(rng, duplicate):
    params, opt = make(rng)
    advance(opt, params, rng)
    twin, other = duplicate((params, opt))
    assert bits(twin, other) == bits(params, opt)
    before = bits(params, opt)
    advance(other, twin, np.random.default_rng(5))
    assert bits(params, opt) == before
    assert bits(twin, other) != before
    advance(opt, params, np.random.default_rng(5))
    assert bits(twin, other) == bits(params, opt)


def test_lr_and_schedule_can_be_changed():
    param = np.zeros(2)
    opt = fastadam.Adam(param, lr=0.1)
    assert opt.step(np.ones(2)).lr == 0.1
    opt.lr = 0.3
    assert opt.step(np.ones(2)).lr == 0.3
    opt.schedule = lambda step: 1 / step
    assert opt.step(np.ones(2)) == fastadam.StepResult(step=2, lr=0.15)
    opt.param_groups[0]["lr"] = 1
    assert opt.step(np.ones(2)).lr == pytest.approx(1 / 3)
    assert opt.lr == 1


def test_repr_tells(rng):
    params, opt = make(rng, lr=0.125)
    advance(opt, params, rng, 3)
    text = repr(opt)
    for part in ("Adam(3 parameters, 26 elements", "float64, float32", "step_count=3", "lr=0.125"):
        assert part in text
    assert "schedule=cosine(num_steps=50" in text
    assert "weight_decay=0.1" in text
    assert repr(fastadam.AdamW([])).startswith("AdamW(0 parameters")


def test_adamw_is_adam_with_decoupled_decay(rng):
    one, two = np.ones(5), np.ones(5)
    first = fastadam.AdamW(one)
    second = fastadam.Adam(two, weight_decay=1e-2, decoupled_weight_decay=True)
    for _ in range(3):
        grad = rng.standard_normal(5)
        first.step(grad)
        second.step(grad)
    np.testing.assert_array_equal(one, two)
    assert isinstance(first, fastadam.Adam)


def test_live_state_can_be_loaded():
    opt = fastadam.Adam([np.zeros(2), np.zeros(2)])
    opt.step([np.ones(2), np.full(2, 2.0)])
    swapped = opt.state_dict()
    swapped["state"] = {0: opt.state[1], 1: opt.state[0]}
    opt.load_state_dict(swapped)
    assert [opt.state[k]["exp_avg"][0] for k in (0, 1)] == pytest.approx([0.2, 0.1])
    views = {k: {**s, "exp_avg": s["exp_avg"][:]} for k, s in opt.state.items()}
    opt.load_state_dict({**swapped, "state": {0: views[1], 1: views[0]}})
    assert [opt.state[k]["exp_avg"][0] for k in (0, 1)] == pytest.approx([0.1, 0.2])


def test_state_unpickled_into_read_only_memory_is_copied():
    params = np.ones(4)
    opt = fastadam.Adam(params, amsgrad=True)
    opt.step(np.ones(4))
    buffers = []
    data = pickle.dumps((params, opt), protocol=5, buffer_callback=buffers.append)
    frozen = [bytes(b) for b in buffers[1:]]
    twin, other = pickle.loads(data, buffers=[bytearray(buffers[0]), *frozen])
    kept = [bytes(bytearray(b)) for b in frozen]
    other.step(np.ones(4))
    assert frozen == kept
    opt.step(np.ones(4))
    np.testing.assert_array_equal(twin, params)


def test_a_shallow_copy_is_refused():
    with pytest.raises(TypeError, match=r"use copy.deepcopy"):
        copy.copy(fastadam.Adam([np.zeros(2)]))


def test_gradients_are_not_kept_alive():
    opt = fastadam.Adam(np.zeros(4))
    grad = np.ones(4)
    seen = weakref.ref(grad)
    opt.step(grad)
    del grad
    assert seen() is None
    opt.step(np.ones(4))
