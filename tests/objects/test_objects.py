"""Objects with .data and .grad: the tutorial's own class of scalars, its loop, its numbers."""

import copy
import math
import os
import pickle
import signal
import warnings

import numpy as np
import pytest

import fastadam
from fastadam import schedules


class Value:
    """The tutorial's scalar: it remembers how it was made, and what depends on it how much."""

    def __init__(self, data, children=(), local_grads=()):
        self.data, self.grad = data, 0
        self._children, self._local_grads = children, local_grads

    def __add__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, (self, other), (1, 1))

    def __mul__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, (self, other), (other.data, self.data))

    def __pow__(self, other):
        return Value(self.data**other, (self,), (other * self.data ** (other - 1),))

    def log(self):
        return Value(math.log(self.data), (self,), (1 / self.data,))

    def exp(self):
        return Value(math.exp(self.data), (self,), (math.exp(self.data),))

    def relu(self):
        return Value(max(0, self.data), (self,), (float(self.data > 0),))

    def backward(self):
        order, seen = [], set()

        def visit(value):
            if value not in seen:
                seen.add(value)
                for child in value._children:
                    visit(child)
                order.append(value)

        visit(self)
        self.grad = 1
        for value in reversed(order):
            for child, local in zip(value._children, value._local_grads, strict=True):
                child.grad += local * value.grad


def loss_of(params, token, target):
    """A bigram model in the tutorial's manner: embedding, squared ReLU, softmax, log-loss."""
    embedding = params[4 * token : 4 * token + 4]
    hidden = [x.relu() ** 2 + x for x in embedding]
    head = params[20:]
    logits = []
    for k in range(5):
        total = hidden[0] * head[4 * k]
        for j in range(1, 4):
            total = total + hidden[j] * head[4 * k + j]
        logits.append(total)
    exps = [logit.exp() for logit in logits]
    total = exps[0]
    for e in exps[1:]:
        total = total + e
    return (exps[target] * total**-1).log() * -1


TOKENS = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 2), (2, 0)]


def fresh():
    rng = np.random.default_rng(42)
    return [Value(x) for x in rng.normal(0, 0.5, 40).tolist()]


def test_the_tutorials_loop():
    """1,000 steps: every loss and every parameter as the tutorial's own lines give them."""
    num_steps, lr, beta1, beta2, eps = 1000, 1e-2, 0.9, 0.95, 1e-8

    params = fresh()
    m = [0.0] * len(params)
    v = [0.0] * len(params)
    losses = []
    for step in range(num_steps):
        loss = loss_of(params, *TOKENS[step % len(TOKENS)])
        loss.backward()
        lr_t = lr * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for i, p in enumerate(params):
            m[i] = beta1 * m[i] + (1 - beta1) * p.grad
            v[i] = beta2 * v[i] + (1 - beta2) * p.grad**2
            m_hat = m[i] / (1 - beta1 ** (step + 1))
            v_hat = v[i] / (1 - beta2 ** (step + 1))
            p.data -= lr_t * m_hat / (v_hat**0.5 + eps)
            p.grad = 0
        losses.append(loss.data)

    ours = fresh()
    opt = fastadam.from_objects(ours, schedule=schedules.cosine(num_steps))
    for step in range(num_steps):
        loss = loss_of(ours, *TOKENS[step % len(TOKENS)])
        loss.backward()
        result = opt.step()
        assert result.step == step
        assert all(p.grad == 0 for p in ours)
        assert loss.data == pytest.approx(losses[step], rel=1e-12)
    for p, q in zip(ours, params, strict=True):
        assert type(p.data) is float
        assert p.data == pytest.approx(q.data, rel=1e-12, abs=1e-14)
    assert np.mean(losses[-50:]) < np.mean(losses[:50]) / 2
    assert opt.step_count == num_steps


class Box:
    def __init__(self, data, grad):
        self.data, self.grad = data, grad


def test_arrays_are_updated_and_gradients_zeroed_in_place():
    data, grad = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    box, number = Box(data, grad), Box(2, 3)
    opt = fastadam.from_objects([box, number], lr=0.5)
    opt.step(grad_scale=2.0)
    assert box.data is data
    assert box.grad is grad
    np.testing.assert_allclose(data, 0.5)
    assert not grad.any()
    assert number.data == pytest.approx(1.5)
    assert number.grad == 0


def test_a_gradient_that_is_a_number_is_reset_too():
    box = Box(np.ones(3), 5.0)
    fastadam.from_objects([box], lr=0.5).step()
    np.testing.assert_allclose(box.data, 0.5)
    assert box.grad == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_trains_the_copied_objects(duplicate):
    objects = [Box(1.0, 1.0), Box(np.ones(2), np.ones(2)), Box(2.0, None)]
    opt = fastadam.from_objects(objects, amsgrad=True, schedule=schedules.cosine(10))
    opt.step()
    twins, other = duplicate((objects, opt))
    for things, optimizer in ((objects, opt), (twins, other)):
        things[0].grad = 0.5
        things[1].grad += 0.25
        assert optimizer.step().step == 1
    assert twins[0].data == objects[0].data < 0.99
    np.testing.assert_array_equal(twins[1].data, objects[1].data)
    assert twins[1].data is not objects[1].data
    assert twins[2].data == 2.0


def test_objects_that_cannot_be_written():
    class Frozen:
        data, grad = property(lambda _: 1.0), 0.0

    with pytest.raises(TypeError, match=r"params\[1\] must let .data and .grad be set"):
        fastadam.from_objects([Box(1.0, 1.0), Frozen()])


def test_a_gradient_that_is_the_number_zero():
    box = Box(np.ones(3), 0)
    opt = fastadam.from_objects([box])
    opt.step()
    np.testing.assert_array_equal(box.data, 1.0)
    assert opt.state_dict()["state"][0]["step"] == 1


def test_none_leaves_an_object_alone():
    first, second, third = Box(1.0, None), Box(np.ones(2), None), Box(1.0, 1.0)
    opt = fastadam.from_objects([first, second, third], lr=0.5)
    opt.step()
    assert (first.data, first.grad, second.grad) == (1.0, None, None)
    assert third.data == pytest.approx(0.5)
    assert [s["step"] for s in opt.state_dict()["state"].values()] == [0, 0, 1]


def test_a_value_set_from_outside_is_used():
    box = Box(1.0, 1.0)
    opt = fastadam.from_objects([box], lr=0.5)
    opt.step()
    box.data, box.grad = 10.0, 1.0
    opt.step()
    assert box.data == pytest.approx(9.5)


def test_delegated_attributes():
    opt = fastadam.from_objects([Box(1.0, 1.0)], lr=0.5, weight_decay=0.1, amsgrad=True)
    opt.lr = 0.25
    assert opt.param_groups[0]["lr"] == opt.lr == 0.25
    opt.schedule = schedules.constant(0.5)
    assert opt.step().lr == 0.125
    assert opt.schedule == schedules.constant(0.5)
    other = fastadam.from_objects([Box(1.0, 1.0)], amsgrad=True)
    other.load_state_dict(opt.state_dict())
    assert other.step_count == 1
    assert repr(opt).startswith("from_objects(Adam(1 parameter,")


@pytest.mark.parametrize(
    ("objects", "error", "message"),
    [
        (3, TypeError, "params must be a sequence of objects with .data and .grad, got int"),
        ({"a": Box(1.0, 0)}, TypeError, "params must be a sequence of objects .* got dict"),
        ([1.0], TypeError, r"params\[0\] must have .data and .grad, got float"),
        ([Box("x", 0)], TypeError, r"params\[0\].data must be a real number or a numpy.ndarray"),
        ([Box(None, 0)], TypeError, r"params\[0\].data must be a real number or a numpy.ndarray"),
        ([Box(np.ones(2, int), 0)], TypeError, r"params\[0\].dtype must be float32 or float64"),
    ],
)
def test_bad_objects(objects, error, message):
    with pytest.raises(error, match=message):
        fastadam.from_objects(objects)


def test_the_same_object_twice():
    box = Box(1.0, 0)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[2\] must be different objects"):
        fastadam.from_objects([box, Box(1.0, 0), box])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda o: setattr(o[0], "grad", "x"),
            TypeError,
            r"params\[0\].grad must be a real number",
        ),
        (
            lambda o: setattr(o[0], "data", "x"),
            TypeError,
            r"params\[0\].data must be a real number",
        ),
        (
            lambda o: setattr(o[0], "grad", 10**400),
            ValueError,
            r"params\[0\].grad must fit a float",
        ),
        (lambda o: setattr(o[1], "grad", [1.0]), TypeError, r"params\[1\].grad must be a numpy"),
        (lambda o: setattr(o[1], "grad", np.ones(3)), ValueError, r"grads\[1\].shape must be"),
        (lambda o: setattr(o[1], "data", np.ones(2)), ValueError, r"params\[1\].data must stay"),
    ],
)
def test_bad_values_change_nothing(spoil, error, message):
    objects = [Box(1.0, 1.0), Box(np.ones(2), np.ones(2))]
    array, grad = objects[1].data, objects[1].grad
    opt = fastadam.from_objects(objects)
    spoil(objects)
    kept = objects[0].data, objects[0].grad
    with pytest.raises(error, match=message):
        opt.step()
    assert (objects[0].data, objects[0].grad) == kept
    np.testing.assert_array_equal(array, 1.0)
    np.testing.assert_array_equal(grad, 1.0)
    assert opt.step_count == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_before_the_writing_back_is_completed_in_the_child():
    """As another thread may, between the kernel's return and the first object's new value."""
    values = [Value(1.0), Value(2.0)]
    opt = fastadam.from_objects(values, lr=0.5)
    step = opt.optimizer._step_scheduled
    found = []

    def forking(*arguments, **options):
        result = step(*arguments, **options)
        with warnings.catch_warnings():  # of Python and of JAX: a fork beside other threads
            warnings.simplefilter("ignore")
            child = os.fork()
        if not child:
            right = [v.data for v in values] == [0.5000000025, 1.5000000025]
            os._exit(0 if right and opt.step_count == 1 else 1)
        found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert [v.data for v in values] == [1.0, 2.0]
        return result

    opt.optimizer._step_scheduled = forking
    for value in values:
        value.grad = 2.0
    opt.step()
    assert found == [0]
    assert [v.data for v in values] == [0.5000000025, 1.5000000025]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer on this system")
def test_a_schedule_may_be_interrupted():
    """It is the user's code: a handler that raises ends it before anything is taken."""

    class LateError(Exception):
        pass

    def raise_late(*_):
        raise LateError

    def schedule(_):
        signal.raise_signal(signal.SIGALRM)
        return 1.0

    value = Value(1.0)
    opt = fastadam.from_objects([value], lr=0.5, schedule=schedule)
    value.grad = 1.0
    before = signal.signal(signal.SIGALRM, raise_late)
    try:
        with pytest.raises(LateError):
            opt.step()
        assert (value.data, value.grad, opt.step_count) == (1.0, 1.0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_load_of_all_needs_nothing_of_what_it_replaces(tmp_path, optional):
    optional("safetensors")
    value = Value(1.0)
    opt = fastadam.from_objects([value], lr=0.5)
    value.grad = 1.0
    opt.step()
    fastadam.save(tmp_path / "run.safetensors", opt)
    saved, value.data = value.data, None
    fastadam.load(tmp_path / "run.safetensors", opt)
    assert value.data == saved
