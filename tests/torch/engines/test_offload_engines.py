"""Engines that keep optimizers on the CPU, with fastadam's AdamW where torch's would be."""

import copy
import gc
import json
import re
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)

import deepspeed_run  # noqa: E402
from offload_tools import (  # noqa: E402
    Hybrid,
    OnDevice,
    TorchOnThisCPU,
    Zero3,
    Zero3OnDisk,
    Zero12,
    new_params,
    train,
)

from fastadam.torch import AdamW  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs" / "engines_offload.md"
TORCHS = torch.optim.AdamW
SHAPES = [(16, 16), (16,), (9, 7), (1,)]
STEPS, SAVED_AT = 20, 10
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def groups_of(params):
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]


def block(language):
    """Return the page's last example in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)[-1]


def assert_close(params, others):
    """Each step rounds a parameter twice in torch, once here; and once more in bfloat16."""
    for param, other in zip(params, others, strict=True):
        eps = torch.finfo(param.dtype).eps
        rtol = max(1.5 * STEPS * torch.finfo(torch.float32).eps, eps)
        torch.testing.assert_close(param, other, rtol=rtol, atol=1e-6)


def assert_same(params, others):
    assert all(map(torch.equal, params, others))


def check_engine(make, new=lambda: new_params(SHAPES)):
    """Under an engine: what torch's AdamW does, and the same bits with state saved and loaded.

    ``make(params, adamw)`` returns the engine.
    """
    theirs, ours, resumed = new(), new(), new()
    train(theirs, make(theirs, TORCHS), range(STEPS))
    engine = make(ours, AdamW)
    train(ours, engine, range(SAVED_AT))
    with torch.no_grad():
        for param, other in zip(resumed, ours, strict=True):
            param.copy_(other)
    other = make(resumed, AdamW)
    other.load_state_dict(copy.deepcopy(engine.state_dict()))  # loading copies nothing
    for params, each in ((ours, engine), (resumed, other)):
        train(params, each, range(SAVED_AT, STEPS))
    assert_close(ours, theirs)
    assert_same(ours, resumed)
    return ours


@pytest.fixture(scope="module")
def deepspeed_found(tmp_path_factory):
    """What two ranks found; DeepSpeed is imported in them alone."""
    if sys.platform != "linux":
        pytest.skip("DeepSpeed is for Linux")
    pytest.importorskip("deepspeed", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("deepspeed")
    command = [sys.executable, deepspeed_run.__file__]
    logs = [folder / f"{rank}.log" for rank in range(2)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                ranks.append(
                    subprocess.Popen(
                        [*command, str(rank), "2", str(folder)],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        deadline = time.monotonic() + 240
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            if any(rank.poll() for rank in ranks):  # the other would wait for it
                break
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = "\n".join(log.read_text("utf-8", "replace")[-5_000:] for log in logs)
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("stage", "half"), deepspeed_run.CASES)
def test_deepspeed(stage, half, deepspeed_found):
    """ZeRO-Offload with two ranks, gradients clipped; saved by the engine, and loaded.

    Also what an engine with torch's class has saved.
    """
    for found in deepspeed_found:
        theirs, ours = found["torch", stage, half], found["fastadam", stage, half]
        straight, resumed = ours["straight"], ours["resumed"]
        assert_close(straight["params"], theirs["straight"]["params"])
        assert_close(ours["from torch"]["params"], theirs["straight"]["params"])
        assert_same(straight["params"], resumed["params"])
        assert len(straight["state"]) == 2
        for own, loaded in zip(straight["state"], resumed["state"], strict=True):
            assert sorted(own) == ["exp_avg", "exp_avg_sq", "step"]
            assert own["step"] == STEPS
            assert_same(own.values(), loaded.values())


def test_deepspeed_as_the_page_says():
    """The settings that the test runs with are those that a user copies."""
    said = json.loads(block("json"))
    for name in ("zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"):
        assert said[name] is deepspeed_run.CONFIG[name]
    assert said["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


@pytest.mark.parametrize("engine", [Zero12, Zero3, Zero3OnDisk])
def test_what_deepspeed_does_with_the_optimizer(engine):
    """Also on disk, which needs libaio and a compiler; and the bits are those of one AdamW."""
    params = check_engine(lambda ps, adamw: engine(adamw(groups_of(ps), **OPTIONS)))
    alone = new_params(SHAPES)
    train(alone, AdamW(groups_of(alone), **OPTIONS), range(STEPS))
    assert_same(params, alone)


def test_torchao(optional, monkeypatch):
    """CPUOffloadOptimizer, with streams that do all at once: 100 optimizers, one for the rest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optional("torchao.optim")
        import torchao.optim.cpu_offload as module
    monkeypatch.setattr(module, "get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(module, "torch", TorchOnThisCPU())

    def make(params, adamw):
        opt = module.CPUOffloadOptimizer(
            groups_of(params), optimizer_class=adamw, minimal_size=10, **OPTIONS
        )
        assert len(opt.optim_dict) == 100
        assert type(opt.d_opt) is adamw
        return opt

    check_engine(make, lambda: new_params([(1,), *[(16, 3)] * 100]))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("overlap", [False, True])
def test_megatron(half, overlap, monkeypatch):
    """HybridDeviceOptimizer, with parameters that only say they are on a device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(
            "megatron.core.optimizer.cpu_offloading.hybrid_optimizer", exc_type=ImportError
        )
    monkeypatch.setattr(module, "torch", TorchOnThisCPU())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)

    def make(params, adamw):
        opt = module.HybridDeviceOptimizer(
            groups_of(params),
            offload_fraction=1.0,
            cpu_optimizer_cls=adamw,
            param_update_in_fp32=half,
            overlap_cpu_optimizer_d2h_h2d=overlap,
            fused=True,  # as Megatron gives it, and
            bias_correction=True,
            **OPTIONS,
        )
        assert len(opt.cpu_optimizers) == (len(SHAPES) if overlap else 1)
        return opt

    dtype = torch.bfloat16 if half else torch.float32
    check_engine(make, lambda: new_params(SHAPES, dtype, OnDevice))


def test_what_megatron_does_with_the_optimizers():
    """Groups put in their place, and state that gets more in it than ours, at each step."""
    params, others = new_params(SHAPES), new_params(SHAPES)
    for each, adamw in ((params, AdamW), (others, TORCHS)):
        engine = Hybrid(groups_of(each), adamw, **OPTIONS)
        schedule = torch.optim.lr_scheduler.ExponentialLR(engine, 0.9)
        for step in range(STEPS):
            train(each, engine, [step])
            schedule.step()
    assert_close(params, others)


class InBackward:
    """An optimizer for each parameter, which steps as soon as its gradient is there."""

    def __init__(self, params, adamw, **options):
        self.optimizers = {param: adamw([param], **options) for param in params}
        for param in params:
            param.register_post_accumulate_grad_hook(self.step_of)

    def step_of(self, param):
        self.optimizers[param].step()
        self.optimizers[param].zero_grad()

    def step(self):
        pass

    zero_grad = step

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers.values()]

    def load_state_dict(self, state):
        for optimizer, own in zip(self.optimizers.values(), state, strict=True):
            optimizer.load_state_dict(own)


# One is large enough for a kernel with threads.
MANY = [(300, 300), *[(8, 5), (7,), (1,)] * 100]


def test_in_backward():
    """301 optimizers: as torch's, and the bits of one optimizer over all parameters."""
    params = check_engine(
        lambda ps, adamw: InBackward(ps, adamw, **OPTIONS), lambda: new_params(MANY)
    )
    assert all(param.grad is None for param in params)
    alone = new_params(MANY)
    train(alone, AdamW(alone, **OPTIONS), range(STEPS))
    assert_same(params, alone)


def test_in_backward_as_the_page_says():
    torch.manual_seed(0)
    names = {}
    exec(block("python"), names)
    assert names["loss"].item() < 0.5


def test_in_backward_in_threads():
    """Models trained at once in threads of their own, which step within `backward`."""
    models = [new_params(MANY) for _ in range(3)]
    engines = [InBackward(params, AdamW, **OPTIONS) for params in models]
    threads = [
        threading.Thread(target=train, args=(params, engine, range(5)))
        for params, engine in zip(models[1:], engines[1:], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    train(models[0], engines[0], range(5))
    for params in models[1:]:
        assert_same(params, models[0])


def test_hundreds_of_optimizers_keep_nothing_of_the_gradients():
    """Gradients lie elsewhere at each step; what is remembered of them must not pile up."""
    params = new_params([(3, 2)] * 300)
    optimizers = [AdamW([param]) for param in params]
    held = []

    def step():
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.ones(3, 2)
            optimizer.step()
        # Torch gives memory again that is free: the gradients of three steps are not.
        held[:] = [*held[-600:], *(param.grad for param in params)]

    def traced():
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        for _ in range(4):
            step()
        before = traced()
        for _ in range(6):
            step()
        # An object of 50 bytes for each step of each optimizer would be 90,000.
        assert traced() - before < 45_000
    finally:
        tracemalloc.stop()
