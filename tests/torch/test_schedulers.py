"""Torch's learning rate schedulers, and its averages of weights, over fastadam's optimizers."""

import copy
import functools
import io

import pytest

load = functools.partial(pytest.importorskip, exc_type=ImportError)
torch = load("torch")
lr_scheduler = load("torch.optim.lr_scheduler")
swa_utils = load("torch.optim.swa_utils")

from fastadam.torch import Adam, AdamW  # noqa: E402

STEPS = 60
MAKERS = {
    "LambdaLR": lambda s, opt: s.LambdaLR(opt, [lambda k: 0.95**k, lambda k: 1 / (1 + k)]),
    "MultiplicativeLR": lambda s, opt: s.MultiplicativeLR(opt, lambda k: 0.97),  # noqa: ARG005
    "StepLR": lambda s, opt: s.StepLR(opt, step_size=7, gamma=0.5),
    "MultiStepLR": lambda s, opt: s.MultiStepLR(opt, [5, 20, 21], gamma=0.3),
    "ConstantLR": lambda s, opt: s.ConstantLR(opt, factor=0.25, total_iters=9),
    "LinearLR": lambda s, opt: s.LinearLR(opt, start_factor=0.1, total_iters=40),
    "ExponentialLR": lambda s, opt: s.ExponentialLR(opt, gamma=0.93),
    "PolynomialLR": lambda s, opt: s.PolynomialLR(opt, total_iters=50, power=2.0),
    "CosineAnnealingLR": lambda s, opt: s.CosineAnnealingLR(opt, T_max=25, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda s, opt: s.CosineAnnealingWarmRestarts(opt, 8, T_mult=2),
    # These two write betas too.
    "CyclicLR": lambda s, opt: s.CyclicLR(opt, 1e-3, 0.1, step_size_up=6),
    "OneCycleLR": lambda s, opt: s.OneCycleLR(opt, [0.1, 0.2], total_steps=STEPS),
    "ReduceLROnPlateau": lambda s, opt: s.ReduceLROnPlateau(opt, patience=2, cooldown=1),
    "SequentialLR": lambda s, opt: s.SequentialLR(
        opt,
        [s.LinearLR(opt, 0.1, total_iters=10), s.CosineAnnealingLR(opt, 50)],
        milestones=[10],
    ),
    "ChainedScheduler": lambda s, opt: s.ChainedScheduler(
        [s.ConstantLR(opt, 0.1, total_iters=5), s.ExponentialLR(opt, 0.98)]
    ),
    "SWALR": lambda s, opt: swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=20),  # noqa: ARG005
}
# SequentialLR of torch 2.7 steps its first scheduler in a way that torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
PAIRS = [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)]
both = pytest.mark.parametrize(("cls", "theirs"), PAIRS, ids=["Adam", "AdamW"])
each_maker = pytest.mark.parametrize("name", MAKERS)


class Run:
    """Two groups, a gradient that oscillates, and a scheduler."""

    def __init__(self, cls, name, tensors=False):
        lrs = (0.01, 0.02)
        first, second = map(torch.tensor, lrs) if tensors else lrs
        self.params = [torch.linspace(-1, 1, 6).reshape(shape) for shape in ((2, 3), (6,))]
        groups = [{"params": self.params[:1]}, {"params": self.params[1:], "lr": second}]
        self.opt = cls(groups, lr=first)
        self.scheduler = MAKERS[name](lr_scheduler, self.opt)

    def step(self, k):
        for param in self.params:
            param.grad = torch.linspace(1, 2, 6).reshape(param.shape) * (1 - k % 3)
        self.opt.step()
        plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
        self.scheduler.step(*([1.0] if plateau else []))  # the loss never falls

    def rates(self):
        """Return what schedulers write, as numbers."""
        plain = [(group["lr"], *group["betas"]) for group in self.opt.param_groups]
        return [tuple(map(float, values)) for values in plain]


def test_every_scheduler_is_here():
    assert set(MAKERS) == set(lr_scheduler.__all__) - {"LRScheduler"} | {"SWALR"}


@both
@each_maker
@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
def test_rates_are_as_with_torchs_class(cls, theirs, name, tensors):
    """To the bit; and so the parameters are torch's, within what rounding explains.

    In the usual order of steps there is no warning: it would be an error here.
    """
    ours, torchs = Run(cls, name, tensors), Run(theirs, name, tensors)
    seen = [ours.rates()]
    for k in range(STEPS):
        assert ours.rates() == torchs.rates()
        ours.step(k)
        torchs.step(k)
        seen.append(ours.rates())
    assert len(set(map(str, seen))) > 1  # the scheduler does something
    # Before torch 2.10 a scheduler may put a float in a tensor's place.
    kinds = [type(run.opt.param_groups[1]["lr"]) for run in (ours, torchs)]
    assert kinds[0] is kinds[1]
    torch.testing.assert_close(ours.params, torchs.params, rtol=1e-5, atol=1e-6)


@both
@each_maker
def test_saved_and_resumed_with_its_scheduler(cls, theirs, name):  # noqa: ARG001
    """The same bits as straight through. With pickle: a LambdaLR leaves out its functions."""
    straight, saved = Run(cls, name), Run(cls, name)
    for k in range(STEPS):
        straight.step(k)
        if k < STEPS // 2:
            saved.step(k)
    file = io.BytesIO()
    states = saved.opt.state_dict(), saved.scheduler.state_dict()
    torch.save([*states, saved.params], file)
    file.seek(0)
    opt_state, scheduler_state, params = torch.load(file, weights_only=False)
    resumed = Run(cls, name)
    for param, old in zip(resumed.params, params, strict=True):
        param.copy_(old)
    resumed.opt.load_state_dict(opt_state)
    resumed.scheduler.load_state_dict(scheduler_state)
    for k in range(STEPS // 2, STEPS):
        resumed.step(k)
    assert resumed.rates() == straight.rates()
    for param, expected in zip(resumed.params, straight.params, strict=True):
        assert torch.equal(param, expected)


@both
def test_a_scheduler_before_the_optimizer_warns(cls, theirs):  # noqa: ARG001
    """Torch counts the calls of `step` through a wrapper around it."""
    run = Run(cls, "StepLR")
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        run.scheduler.step()
    run = Run(cls, "StepLR")
    run.step(0)
    assert run.opt._opt_called


@both
def test_a_scheduler_sees_a_copy_of_the_optimizer(cls, theirs):  # noqa: ARG001
    """An optimizer that is copied with its scheduler goes on with the copy's rates."""
    run = Run(cls, "ExponentialLR")
    run.step(0)
    other = copy.deepcopy(run)
    assert other.scheduler.optimizer is other.opt
    for each in (run, other):
        each.params = [p for group in each.opt.param_groups for p in group["params"]]
        each.step(1)
    assert other.rates() == run.rates()
    for param, expected in zip(other.params, run.params, strict=True):
        assert torch.equal(param, expected)


def model_and_data():
    torch.manual_seed(20261130)
    # No bias: in front of a norm its gradient is rounding alone, of which Adam makes whole steps.
    linear = torch.nn.Linear(4, 5, bias=False)
    model = torch.nn.Sequential(linear, torch.nn.BatchNorm1d(5))
    return model, [torch.randn(8, 4) for _ in range(6)]


def train(model, opt, data, after_step):
    for batch in data:
        opt.zero_grad()
        model(batch).pow(3).mean().backward()
        opt.step()
        after_step()


@both
def test_stochastic_weight_averaging(cls, theirs):
    """AveragedModel, SWALR and update_bn, one after the other as in torch's guide."""
    averages = []
    for each in (cls, theirs):
        model, data = model_and_data()
        opt = each(model.parameters(), lr=0.1)
        average = swa_utils.AveragedModel(model)
        scheduler = swa_utils.SWALR(opt, swa_lr=0.02, anneal_epochs=3)

        def after_step(average=average, model=model, scheduler=scheduler):
            average.update_parameters(model)
            scheduler.step()

        train(model, opt, data, after_step)
        swa_utils.update_bn(data, average)
        assert average.n_averaged == len(data)
        assert not torch.equal(average.module[0].weight, model[0].weight)
        averages.append(average.state_dict())
    torch.testing.assert_close(averages[0], averages[1], rtol=1e-4, atol=1e-5)


@both
def test_ema_decay_is_the_average_of_averaged_model(cls, theirs):  # noqa: ARG001
    """Begun before the first step: AveragedModel copies at its first update."""
    model, data = model_and_data()
    opt = cls(model.parameters(), lr=0.1, ema_decay=0.75)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)
    train(model, opt, data, lambda: average.update_parameters(model))
    torch.testing.assert_close(opt.ema_params, list(average.module.parameters()))
    assert not torch.equal(opt.ema_params[0], model[0].weight)
