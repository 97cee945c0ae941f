"""The recipe of docs/offload.md, docs/examples/cpu_offload.py, on the CPU."""

import contextlib
import importlib.util
import io
import weakref
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "cpu_offload.py"
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}
SMALL = 100  # elements in a bucket: the model below fills several


@pytest.fixture
def torch(optional):
    return optional("torch")


@pytest.fixture
def recipe(torch):  # noqa: ARG001 (which the script imports)
    spec = importlib.util.spec_from_file_location("cpu_offload", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plain(torch):  # noqa: ARG001
    from fastadam.torch import AdamW

    return AdamW


def new_model(torch, dtype="float32"):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(4)]
    return torch.nn.Sequential(*layers).to(getattr(torch, dtype))


def backward(torch, model, seed, layers=slice(None)):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 8, generator=draws).to(model[0].weight.dtype)
    for layer in list(model)[layers]:
        x = torch.tanh(layer(x))
    (x.float() ** 2).mean().backward()


def run(torch, model, opt, steps, accumulate=1):
    for step in steps:
        opt.zero_grad()
        for part in range(accumulate):
            backward(torch, model, 10 * step + part)
        opt.step()


def bits(model):
    return [param.detach().view(-1).float().numpy().tobytes() for param in model.parameters()]


def both(torch, recipe, plain):
    """Return two equal models, one with the plain optimizer and one with the recipe's."""
    models = new_model(torch), new_model(torch)
    optimizers = (
        plain(models[0].parameters(), **OPTIONS),
        recipe.CPUOffload(models[1].parameters(), bucket_size=SMALL, **OPTIONS),
    )
    assert len(optimizers[1].buckets) > 2
    return tuple(zip(models, optimizers, strict=True))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_same_bits_as_the_plain_optimizer(torch, recipe, plain, accumulate):
    pairs = both(torch, recipe, plain)
    for model, opt in pairs:
        run(torch, model, opt, range(5), accumulate)
    assert bits(pairs[0][0]) == bits(pairs[1][0]) != bits(new_model(torch))


def test_the_scripts_own_training(recipe, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cpu_offload.py", "--device=cpu", "--steps=3"])
    recipe.main()
    out = capsys.readouterr().out
    assert "all losses are equal" in out
    assert "bytes per parameter: 4 on the device, 16 on the host" in out


def test_groups_frozen_parameters_and_a_scheduler(torch, recipe, plain):
    """The groups cross the buckets, and what the scheduler sets reaches all of them."""
    results = []
    for make in (plain, lambda *a, **k: recipe.CPUOffload(*a, bucket_size=SMALL, **k)):
        model = new_model(torch)
        model[1].weight.requires_grad_(False)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.5},
            {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.1},
        ]
        opt = make(groups, **OPTIONS)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for step in range(3):
            run(torch, model, opt, [step])
            scheduler.step()
        results.append(bits(model))
    assert results[0] == results[1]


def test_parameters_without_a_gradient(torch, recipe, plain):
    """In one of two backwards, or in all of a step: as torch, no update and no decay."""
    pairs = both(torch, recipe, plain)
    for model, opt in pairs:
        run(torch, model, opt, [0])
        opt.zero_grad()
        backward(torch, model, 1, slice(2, None))
        backward(torch, model, 2, slice(1, None))
        opt.step()
        run(torch, model, opt, [3])
    assert bits(pairs[0][0]) == bits(pairs[1][0])


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3])
def test_clipping(torch, recipe, plain, max_grad_norm):
    model, other = new_model(torch), new_model(torch)
    opt = recipe.CPUOffload(
        model.parameters(), bucket_size=SMALL, max_grad_norm=max_grad_norm, **OPTIONS
    )
    run(torch, model, opt, [0])
    backward(torch, other, 0)
    norm = torch.nn.utils.get_total_norm([param.grad for param in other.parameters()])
    assert opt.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    reference = plain(other.parameters(), **OPTIONS)
    reference.grad_scale = ((opt.grad_norm.double() + 1e-6) / max_grad_norm).clamp(min=1.0)
    reference.step()
    assert bits(model) == bits(other)


def test_a_norm_that_is_not_finite(torch, recipe):
    """It is an error that changes nothing, and zero_grad drops the gradients."""
    model = new_model(torch)
    opt = recipe.CPUOffload(model.parameters(), bucket_size=SMALL, max_grad_norm=1.0)
    (model(torch.ones(1, 8)).sum() * float("inf")).backward()
    with pytest.raises(RuntimeError, match="non-finite"):
        opt.step()
    assert bits(model) == bits(new_model(torch))
    run(torch, model, opt, [0])
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_resumed(torch, recipe, dtype):
    """Also where buckets have another size, and the master holds more than the model."""
    model = new_model(torch, dtype)
    opt = recipe.CPUOffload(model.parameters(), bucket_size=SMALL, **OPTIONS)
    run(torch, model, opt, range(3))
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    run(torch, model, opt, range(3, 6))

    file.seek(0)
    saved_model, saved = torch.load(file, weights_only=True)
    resumed = new_model(torch, dtype)
    again = recipe.CPUOffload(resumed.parameters(), lr=1.0, bucket_size=10)
    resumed.load_state_dict(saved_model)
    again.load_state_dict(saved)
    run(torch, resumed, again, range(3, 6))
    assert bits(resumed) == bits(model)
    assert ("master" in saved["state"][0]) == (dtype == "bfloat16")


def test_states_are_the_plain_optimizers(torch, recipe, plain):
    """A run begun with either goes on with the other, to the same bits."""
    (model, opt), (offloaded, offload) = both(torch, recipe, plain)
    run(torch, model, opt, range(2))
    offloaded.load_state_dict(model.state_dict())
    offload.load_state_dict(deepcopy(opt.state_dict()))  # torch keeps the tensors that it loads
    run(torch, offloaded, offload, range(2, 4))
    back = new_model(torch)
    back.load_state_dict(offloaded.state_dict())
    last = plain(back.parameters())
    last.load_state_dict(offload.state_dict())
    run(torch, back, last, range(4, 6))
    run(torch, model, opt, range(2, 6))
    assert bits(back) == bits(model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bfloat16_with_a_float32_master(torch, recipe, plain, accumulate):
    """The master is updated with what the float32 sum of the gradients says, then rounded."""
    model, twin = new_model(torch, "bfloat16"), new_model(torch, "bfloat16")
    opt = recipe.CPUOffload(model.parameters(), bucket_size=SMALL, **OPTIONS)
    masters = [torch.nn.Parameter(param.detach().float()) for param in twin.parameters()]
    reference = plain(masters, **OPTIONS)
    run(torch, model, opt, range(3), accumulate)
    for step in range(3):
        reference.zero_grad()
        for part in range(accumulate):
            twin.zero_grad()
            backward(torch, twin, 10 * step + part)
            for param, master in zip(twin.parameters(), masters, strict=True):
                grad = param.grad.float()
                master.grad = grad if part == 0 else master.grad + grad
        reference.step()
        with torch.no_grad():
            for param, master in zip(twin.parameters(), masters, strict=True):
                param.copy_(master)
    assert bits(model) == bits(twin)
    held = {slot.param: slot.master for bucket in opt.buckets for slot in bucket.slots}
    ours = torch.nn.ParameterList([held[param] for param in model.parameters()])
    assert bits(ours) == bits(torch.nn.ParameterList(masters)) != bits(model)


def test_an_error_in_the_worker_is_raised_in_step(torch, recipe, monkeypatch):
    """The parameters are as they were, and after zero_grad one can go on."""
    model = new_model(torch)
    before = bits(model)
    opt = recipe.CPUOffload(model.parameters(), **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "receive", lambda *_: 1 / 0)
        backward(torch, model, 0)
    with pytest.raises(ZeroDivisionError):
        opt.step()
    assert bits(model) == before
    run(torch, model, opt, [0])
    other = new_model(torch)
    run(torch, other, recipe.CPUOffload(other.parameters(), **OPTIONS), [0])
    assert bits(model) == bits(other) != before


class Stream:
    """Work that is put off until something waits for it: the slowest GPU there can be."""

    current = None

    def __init__(self):
        self.work, self.done = [], 0

    def add(self, work):
        self.work.append(work)

    def run(self, end):
        while self.done < end:
            self.done += 1
            self.work[self.done - 1]()

    def wait_event(self, event):
        self.add(event.synchronize)

    def wait_stream(self, other):
        event = Event()
        event.record(other)
        self.wait_event(event)


class Compute(Stream):
    """Where the model runs: at once, as it does on the CPU."""

    def add(self, work):
        work()


class Event:
    def record(self, stream):
        self.stream, self.end = stream, len(stream.work)

    def synchronize(self):
        self.stream.run(self.end)


@contextlib.contextmanager
def entered(stream):
    before, Stream.current = Stream.current, stream
    yield
    Stream.current = before


@pytest.fixture
def copies_are_late(torch, monkeypatch):
    """Return what puts off the recipe's copies, and the worker's jobs, until they are waited for.

    What is copied is not kept alive by that, as a CUDA copy does not.
    """
    copy = torch.Tensor.copy_

    def copy_late(target, source, non_blocking=False):
        if not non_blocking:
            return copy(target, source)
        held = weakref.ref(source)

        def work():
            assert held() is not None, "freed before it was copied"
            with torch.no_grad():
                copy(target, held())

        return Stream.current.add(work)

    def switch():
        Stream.current = Compute()
        monkeypatch.setattr(torch.Tensor, "copy_", copy_late)
        monkeypatch.setattr(torch.cpu, "Stream", Stream)
        monkeypatch.setattr(torch.cpu, "Event", Event)
        monkeypatch.setattr(torch.cpu, "stream", entered)
        monkeypatch.setattr(torch.cpu, "current_stream", lambda: Stream.current)

    return switch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_copies_as_late_as_can_be(torch, recipe, copies_are_late, accumulate, dtype):
    """Whatever is used has been waited for, and nothing is freed too early, as CUDA needs it."""
    model = new_model(torch, dtype)
    opt = recipe.CPUOffload(model.parameters(), bucket_size=SMALL, **OPTIONS)
    run(torch, model, opt, range(4), accumulate)
    copies_are_late()
    other = new_model(torch, dtype)
    opt = recipe.CPUOffload(other.parameters(), bucket_size=SMALL, **OPTIONS)
    opt.worker = SimpleNamespace(submit=lambda *job: SimpleNamespace(result=partial(*job)))
    run(torch, other, opt, range(4), accumulate)
    assert len(opt.down.work) == 2 * 4 * accumulate * 8  # each gradient waits, and is copied
    assert bits(other) == bits(model)


def test_a_step_waits_for_the_copies_of_the_step_before(
    torch, recipe, copies_are_late, monkeypatch
):
    """Where no backward lies between them, and the device has not even begun with the first."""
    copies_are_late()
    model = new_model(torch)
    opt = recipe.CPUOffload(model.parameters(), bucket_size=SMALL, **OPTIONS)
    run(torch, model, opt, [0])
    monkeypatch.setattr(Compute, "add", lambda *_: None)
    opt.step()
    count = len(opt.up.work)
    assert opt.up.done < count
    opt.step()
    assert opt.up.done == count < len(opt.up.work)


def test_the_device_holds_gradients_of_two_buckets(torch, recipe):
    model, alive, most = new_model(torch), [], 0
    opt = recipe.CPUOffload(model.parameters(), bucket_size=SMALL, **OPTIONS)

    def count(_):
        nonlocal most
        most = max(most, sum(grad() is not None for grad in alive))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
        param.register_hook(lambda grad: alive.append(weakref.ref(grad)))
    backward(torch, model, 0)
    assert len(alive) == 8
    assert all(param.grad is None for param in model.parameters())
    sizes = [len(bucket.slots) for bucket in opt.buckets]
    assert most <= 2 * max(sizes) < 8
    opt.step()
    assert not any(grad() is not None for grad in alive)
