"""Training with every scheduler: torch's losses, `fastadam.Adam`'s own bits, saved and resumed.

How near two runs must be
-------------------------
No two of torch's own implementations agree in the last bit, and training makes a difference
grow: in the transformer here one of 1e-7 becomes up to 1e-4 within 500 steps. So no fixed
tolerance is right. How fast differences grow is a property of the model, the data and the
learning rates: it is the same for any two runs that differ by rounding. Hence each case is trained
three times, with torch's for-loop, torch's fused Adam and ours, and what is compared is how far
the second and the third have come from the first, as the largest difference of losses so far.

- In the first steps nothing has had time to grow: all differences are a few rounding errors of
  the loss.
- Later, the one distance may be a small multiple of the other. Where single rounding errors have
  grown, their ratio is much like that of two random numbers, so that of one case says little:
  `RATIO` is generous. (A mistake in the formula of one part in a million is far beyond it: in
  float64 by a factor of 1e6.) The ratios of many cases, whose seeds differ, have a mean that says
  more: `MEAN_RATIO`.

That mean is not 1, since fused and for-loop share some of their rounding. Both round the
parameter after the decay, and again after the update; ours rounds once. And both compute
``1 - beta**t`` in float64 with the error of the power, ours without; that is the larger part
in float64. To the same training in float64, ours is as near as torch's are:
`test_no_further_from_float64_than_torch`.
"""

import collections
import functools
import io
import itertools
import os
import subprocess
import sys

import numba
import numpy as np
import pytest

import fastadam

torch = pytest.importorskip("torch", exc_type=ImportError)

import torch_training  # noqa: E402
from torch_training import SCHEDULERS, STEPS, Case, ours, torchs  # noqa: E402

# SequentialLR of torch 2.7 steps its first scheduler in a way that torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
EARLY = 20  # steps
NOISE = 12  # rounding errors of the first loss
RATIO = 16
MEAN_RATIO = 4

OPTIONS = (
    ("AdamW", ()),
    ("AdamW", (("amsgrad", True), ("weight_decay", 0.1))),
    ("Adam", (("weight_decay", 0.01), ("maximize", True))),
    ("Adam", ()),
    ("Adam", (("weight_decay", 0.1), ("decoupled_weight_decay", True))),
    ("AdamW", (("eps", 1e-3), ("maximize", True), ("amsgrad", True))),
)
DTYPES = ("float32", "float64")


def cases_of(model, schedulers, first):
    """Return a case for each, in float32 and float64 by turns, with all options by turns."""
    return [
        Case(model, name, *OPTIONS[k % len(OPTIONS)], DTYPES[k % 2 ^ k // len(OPTIONS) % 2], k)
        for k, name in enumerate(schedulers, first)
    ]


USUAL = [
    *cases_of("mlp", SCHEDULERS, 0),
    *cases_of("conv", ["OneCycleLR", "ReduceLROnPlateau"], 20),
    *cases_of("transformer", ["ConstantLR", "SequentialLR"], 30),
]
MORE = [
    *cases_of("conv", SCHEDULERS, 200),
    *cases_of("transformer", SCHEDULERS, 300),
]
CASES = [*USUAL, *(pytest.param(case, marks=pytest.mark.full) for case in MORE)]

# Arguments that torch's optimizers have not.
EXTRAS = [
    Case("mlp", "CyclicLR", "AdamW", (("max_grad_norm", 0.3), ("ema_decay", 0.9)), "float32", 40),
    Case("mlp", "OneCycleLR", "Adam", (("max_grad_norm", 0.3), ("amsgrad", True)), "float64", 41),
    Case("mixed", "StepLR", "AdamW", (("max_grad_norm", 0.3),), "float64", 42),
    Case("transformer", "LinearLR", "AdamW", (("ema_decay", 0.99),), "float64", 43),
    Case("wide", "CosineAnnealingLR", "AdamW", (("max_grad_norm", 0.3),), "float32", 44),
]


def name_of(case):
    options = "-".join(name for name, _ in case.options)
    return "-".join(filter(None, (*case[:3], options, case.dtype, str(case.seed))))


@pytest.fixture(autouse=True)
def one_thread():
    """Torch's sums have the same bits in every run, and steps take one thread."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


class Mirror:
    """`fastadam.Adam` over NumPy copies of a torch optimizer's parameters.

    Its rates are those that torch's scheduler has set, or, with ``schedule``, its own.
    """

    def __init__(self, training, schedule=None):
        self.theirs, self.scheduled = training.optimizer, schedule is not None
        # Torch's defaults, and what the case sets.
        options = {"betas": (0.9, 0.999), "eps": 1e-8, **dict(training.case.options)}
        groups = [
            {
                "params": [param.detach().numpy().copy("K") for param in group["params"]],
                "lr": group.get("initial_lr", group["lr"]),
                "weight_decay": group["weight_decay"],
            }
            for group in self.theirs.param_groups
        ]
        self.opt = getattr(fastadam, training.case.optimizer)(groups, schedule=schedule, **options)

    def step(self):
        """Take a step with the gradients and rates that torch's optimizer is about to use."""
        grads = []
        for own, group in zip(self.opt.param_groups, self.theirs.param_groups, strict=True):
            if not self.scheduled:
                own["lr"], own["betas"] = group["lr"], group["betas"]
            there = [param.grad for param in group["params"]]
            grads.append([None if g is None else g.numpy().copy("K") for g in there])
        self.opt.step(grads)

    def differences(self):
        """Return the names of all that has other bits there than here."""
        params = [param for group in self.theirs.param_groups for param in group["params"]]
        arrays = [array for group in self.opt.param_groups for array in group["params"]]
        averages = [None] * len(params)
        if self.opt.ema_decay is not None:
            averages = self.theirs.ema_params
        wrong = []
        states = self.opt.state.values()
        for k, (param, array, average, own) in enumerate(
            zip(params, arrays, averages, states, strict=True)
        ):
            state = self.theirs.state.get(param) or {"step": 0}
            if int(state["step"]) != own["step"]:
                wrong.append(f"step {k}")
            pairs = {"param": (param.detach(), array)}
            if own["step"]:
                names = [name for name in own if name not in ("step", "ema")]
                pairs |= {name: (state[name], own[name]) for name in names}
            if average is not None:
                pairs["ema"] = (average, own["ema"])
            wrong += [
                f"{name} {k}"
                for name, (a, b) in pairs.items()
                if a.numpy().tobytes() != b.tobytes()
            ]
        return wrong


Ours = collections.namedtuple("Ours", "losses rates difference half whole")


def save(training):
    buffer = io.BytesIO()
    torch.save(training.saved(), buffer)
    return buffer.getvalue()


@functools.cache
def run_ours(case):
    """Train with ours, and beside it with NumPy's, and save it at half and at the end."""
    training = ours(case)
    mirror = Mirror(training)
    difference = half = None
    for step in range(STEPS):
        if step == STEPS // 2:
            half = save(training)
        training.backward()
        mirror.step()
        training.update()
        if step % 10 == 9 and difference is None and (wrong := mirror.differences()):
            difference = step, wrong
    return Ours(training.losses, training.rates, difference, half, save(training))


@functools.cache
def run_torchs(case, fused):
    training = torchs(case, foreach=False, fused=fused).go()
    return training.losses, training.rates


def distance(losses, others):
    """Return the largest difference up to each step."""
    return np.maximum.accumulate(np.abs(np.subtract(losses, others)))


def distances(case):
    """Return how far ours, and torch's fused Adam, come from torch's for-loop; in its noise."""
    loop, fused = run_torchs(case, False)[0], run_torchs(case, True)[0]
    unit = np.finfo(case.dtype).eps * max(1.0, loop[0])
    return distance(run_ours(case).losses, loop) / unit, distance(fused, loop) / unit


def check_near(own, fused):
    assert own[:EARLY].max() <= NOISE
    assert (own <= NOISE + RATIO * fused).all(), (own[-1], fused[-1])


def mean_ratio(pairs):
    return np.exp(np.mean([np.log((1 + own[-1]) / (1 + fused[-1])) for own, fused in pairs]))


def test_every_scheduler_is_here():
    assert set(SCHEDULERS) == {*torch.optim.lr_scheduler.__all__, "SWALR"}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_losses_are_torchs(case):
    check_near(*distances(case))


@pytest.mark.parametrize("case", USUAL, ids=name_of)
def test_training_works_and_the_scheduler_acts_as_on_torchs(case):
    """Else the comparisons compare nothing: losses fall, and what is scheduled changes."""
    run = run_ours(case)
    assert np.mean(run.losses[-50:]) < 0.7 * np.mean(run.losses[:50])
    assert run.rates == run_torchs(case, False)[1]
    assert len({str(rates) for rates in run.rates}) > 1


@pytest.mark.parametrize(
    "cases", [USUAL, pytest.param([*USUAL, *MORE], marks=pytest.mark.full)], ids=["usual", "more"]
)
def test_in_the_mean_losses_are_as_near_as_torchs_own(cases):
    assert mean_ratio(map(distances, cases)) < MEAN_RATIO


@pytest.mark.full
def test_no_further_from_float64_than_torch():
    """All from the same parameters of float32, over the same data."""
    pairs = []
    for seed, (model, scheduler) in enumerate(
        itertools.product(("conv", "transformer"), ("ConstantLR", "OneCycleLR", "StepLR"))
    ):
        case = Case(model, scheduler, seed=400 + seed)
        start, exact = torchs(case), torchs(case._replace(dtype="float64"), foreach=False)
        exact.model.load_state_dict(start.model.state_dict())
        exact.images = start.images.double()
        exact.go()
        unit = np.finfo("float32").eps
        pairs.append(
            [
                distance(losses, exact.losses) / unit
                for losses in (run_ours(case).losses, run_torchs(case, False)[0])
            ]
        )
    assert mean_ratio(pairs) < 1.5


@pytest.mark.parametrize("case", [*CASES, *EXTRAS], ids=name_of)
def test_bits_are_those_of_numpys(case):
    """All along, with the same gradients: parameters, moments, averages and counts."""
    assert run_ours(case).difference is None


def test_a_schedule_has_the_bits_of_a_lambda_lr():
    """The same function as both: it is multiplied with each group's rate there and here."""
    training = ours(Case("mlp", "LambdaLR", "AdamW", (("weight_decay", 0.1),)))
    mirror = Mirror(training, schedule=fastadam.schedules.cosine(STEPS))
    for _ in range(STEPS):
        training.backward()
        mirror.step()
        training.update()
        assert mirror.differences() == []


def test_skipped_steps_have_the_bits_of_numpys():
    """Where gradients are infinite, with ``nonfinite="skip"``."""
    case = Case("mlp", "StepLR", "AdamW", (("nonfinite", "skip"), ("ema_decay", 0.9)))
    training = ours(case)
    mirror = Mirror(training)
    for step in range(60):
        training.backward()
        before = mirror.opt.param_groups[0]["params"][0].copy()
        if step % 7 == 3:
            training.model.last.weight.grad[1, 2] = np.inf
        mirror.step()
        training.update()
        assert mirror.differences() == []
        assert (mirror.opt.param_groups[0]["params"][0] == before).all() == (step % 7 == 3)


def bits(saved):
    """Return every value in what has been saved, by the way to it; a tensor's bits."""
    if isinstance(saved, torch.Tensor):
        return {(): (saved.dtype, saved.shape, saved.numpy().tobytes())}
    if isinstance(saved, dict | list | tuple):
        pairs = saved.items() if isinstance(saved, dict) else enumerate(saved)
        return {(key, *way): value for key, own in pairs for way, value in bits(own).items()}
    return {(): saved}


@pytest.mark.parametrize(
    "cases",
    [[*USUAL[::4], *EXTRAS], pytest.param([*USUAL, *EXTRAS, *MORE[::3]], marks=pytest.mark.full)],
    ids=["usual", "more"],
)
def test_resumed_in_a_fresh_process(cases, tmp_path):
    """From a file of half the run, with other threads: all of it, to the last bit, at the end."""
    for k, case in enumerate(cases):
        (tmp_path / f"{k}.saved").write_bytes(run_ours(case).half)
    subprocess.run(
        [sys.executable, "-W", "error", torch_training.__file__, str(tmp_path)],
        env={**os.environ, "NUMBA_NUM_THREADS": "3"},
        check=True,
        timeout=300,
    )
    for k, case in enumerate(cases):
        resumed = bits(torch.load(tmp_path / f"{k}.resumed", weights_only=True))
        straight = bits(torch.load(io.BytesIO(run_ours(case).whole), weights_only=True))
        assert resumed == straight, name_of(case)
        assert len(resumed) > STEPS


@pytest.mark.parametrize(
    "case",
    [
        Case("mlp", "OneCycleLR", "AdamW", (("amsgrad", True),), "float64", 50),
        Case("mlp", "SequentialLR", "Adam", (("weight_decay", 0.01),), "float32", 51),
        Case("transformer", "CyclicLR", "AdamW", (("maximize", True),), "float64", 52),
    ],
    ids=name_of,
)
def test_state_goes_to_ours_and_back_to_torchs(case):
    """A third of the steps each: the losses, the counts and the kinds of state are torch's."""
    whole = torchs(case, foreach=False).go(300)
    fused = torchs(case, fused=True).go(300)
    parts = torchs(case, foreach=False).go(100)
    parts = ours(case).load(parts.saved()).go(200)
    parts = torchs(case).load(parts.saved()).go(300)
    unit = np.finfo(case.dtype).eps * max(1.0, whole.losses[0])
    check_near(
        distance(parts.losses, whole.losses) / unit, distance(fused.losses, whole.losses) / unit
    )
    found, expected = parts.optimizer.state_dict(), whole.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for key, own in expected["state"].items():
        assert found["state"][key].keys() == own.keys()
        for name, tensor in own.items():
            other = found["state"][key][name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        assert found["state"][key]["step"] == own["step"]


@pytest.mark.parametrize(
    "flags", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str
)
def test_flags_change_no_bit(flags):
    case = Case("mlp", "LinearLR", "AdamW", (("amsgrad", True),))
    plain, flagged = ours(case).go(60), ours(case, **flags).go(60)
    assert bits(flagged.saved()["model"]) == bits(plain.saved()["model"])
    assert flagged.losses == plain.losses
