"""The same training run with fastadam and with a peer, each peer's conventions accounted for.

Every run draws its gradients from a seed, hands the same ones to both sides, and compares
after every step: parameters, moments and step counts. A difference is measured per element,
relative to the sizes of the terms that the element is the sum of, so that cancellation in
it is not held against either side:

- a parameter to ``|p_0| + |p_1 - p_0| + ...``, the way it has come;
- ``exp_avg_sq`` to the same average of ``g**2``, where to ``|g|`` L2 decay adds weight_decay
  times the above, and ``max_exp_avg_sq`` to the maximum of that;
- ``exp_avg`` to the same average of ``|g|`` or to the root of the average of ``g**2``, by which
  it is divided, whichever is larger.

Decoupled decay is a rounding of the parameter of its own in the peers, and one that leans the
same way for many steps while ``p * (1 - lr*weight_decay)`` hardly changes. In fastadam it is
part of an fma. Half a unit in the last place of the parameter is granted for each such step.
"""

import math
from itertools import product

import numpy as np
import pytest

import fastadam

LOOSE = {"float32": 1e-5, "float64": 1e-12}  # a peer that makes its scalars in float32
TIGHT = {"float32": 1e-6, "float64": 1e-12}

SHAPES = [(), (0,), (7,), (33, 5), (257,)]
# Each tensor's gradients have their own size. The third's are such that eps = 1e-8 counts.
SIZES = [1.0, 1.0, 1e-7, 30.0, 1e-3]

EITHER = pytest.mark.parametrize("dtype", ["float32", "float64"])
KERNEL = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def make_params(rng, dtype, shapes=SHAPES):
    return [np.asarray(rng.standard_normal(shape), dtype=dtype) for shape in shapes]


def make_grads(rng, params):
    """Sizes that differ over tensors, steps and elements, two decades each; some zeros."""
    grads = []
    for k, param in enumerate(params):
        size = SIZES[k % len(SIZES)] * 10.0 ** rng.uniform(-1, 1)
        grad = size * rng.standard_normal(param.shape) * 10.0 ** rng.uniform(-1, 1, param.shape)
        grad = np.asarray(grad * (rng.random(param.shape) < 0.9), dtype=param.dtype)
        if grad.size > 1:
            grad.flat[0] = 0.0  # never has a gradient: nothing, or only the decay, moves it
        grads.append(grad)
    return grads


class Tracker:
    """Compare fastadam's side of a run with a peer's, in float64."""

    def __init__(self, opt, params, tolerance):
        self.opt, self.params, self.tolerance = opt, params, tolerance
        self.groups = [group for group in opt.param_groups for _ in group["params"]]
        self.half_ulp = np.finfo(params[0].dtype).eps / 2
        self.start()

    def start(self):
        """Begin here: the present values, alike on both sides, are the sizes of the terms."""
        self.last = [np.asarray(param, dtype=np.float64).copy() for param in self.params]
        self.scales = []
        for last, state in zip(self.last, self.opt.state.values(), strict=True):
            own = {k: np.abs(x, dtype=np.float64) for k, x in state.items() if k != "step"}
            self.scales.append({"params": np.abs(last), **own})
        self.granted = [np.zeros(last.shape) for last in self.last]

    def expect(self, grads):
        """Take the gradients, after any division, of the step to come."""
        for k, grad in enumerate(grads):
            if grad is None:
                continue
            scale, group = self.scales[k], self.groups[k]
            beta1, beta2 = group["betas"]
            terms = np.abs(grad, dtype=np.float64)
            if group["decoupled_weight_decay"]:
                self.granted[k] = self.granted[k] + self.half_ulp * np.abs(self.last[k])
            else:
                terms = terms + group["weight_decay"] * scale["params"]
            scale["exp_avg"] = beta1 * scale["exp_avg"] + (1 - beta1) * terms
            scale["exp_avg_sq"] = beta2 * scale["exp_avg_sq"] + (1 - beta2) * terms**2
            if "max_exp_avg_sq" in scale:
                scale["max_exp_avg_sq"] = np.maximum(scale["max_exp_avg_sq"], scale["exp_avg_sq"])

    def check(self, theirs, states):
        """Take the peer's parameters and, of each, its state: a dict, empty before its first."""
        ours = self.opt.state
        assert len(self.params) == len(theirs) == len(states) == len(ours)
        for k, (param, peer, state) in enumerate(zip(self.params, theirs, states, strict=True)):
            now = np.asarray(peer, dtype=np.float64)
            scale = self.scales[k]
            scale["params"] = scale["params"] + np.abs(now - self.last[k])
            self.last[k] = now.copy()
            self._agree(f"params[{k}]", param, peer, scale["params"], self.granted[k])
            if not state:
                state = {name: np.zeros(peer.shape) for name in ours[k]} | {"step": 0}
            assert ours[k].keys() == state.keys()
            assert ours[k]["step"] == state["step"], f"step of params[{k}]"
            divisor = np.sqrt(scale["exp_avg_sq"])
            sizes = {**scale, "exp_avg": np.maximum(scale["exp_avg"], divisor)}
            for name in state.keys() - {"step"}:
                self._agree(f"{name} of params[{k}]", ours[k][name], state[name], sizes[name])

    def _agree(self, what, ours, peer, scale, granted=0.0):
        assert ours.shape == peer.shape
        gap = np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(peer, dtype=np.float64))
        held = gap <= self.tolerance * scale + granted  # False for NaN
        if not held.all():
            pytest.fail(
                f"step {self.opt.step_count}: {what} differs in {np.sum(~held)} of {held.size}"
                f" elements, by up to {np.max(gap[~held]):.3g} where the terms are"
                f" {np.max(scale[~held]):.3g}; allowed is {self.tolerance:.3g} of that"
            )


class TorchPair:
    """fastadam's class and torch's of the same name, with the same parameters and options.

    With ``groups``, a list of (how many parameters, their own options), both are given groups.
    """

    def __init__(self, torch, name, params, *, fused, groups=None, schedule=None, **options):
        self.torch, self.counts = torch, [count for count, _ in groups or []]
        params = [param.copy("K") for param in params]
        self.theirs = [torch.tensor(param) for param in params]
        self.peer = getattr(torch.optim, name)(
            self._grouped(self.theirs, groups), foreach=False, fused=fused, **options
        )
        if schedule is None:
            self.scheduler = None
        else:
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.peer, schedule)
        self.opt = getattr(fastadam, name)(
            self._grouped(params, groups), schedule=schedule, **options
        )
        self.tracker = Tracker(self.opt, params, TIGHT[params[0].dtype.name])

    @staticmethod
    def _grouped(params, groups):
        if groups is None:
            return params
        rest = iter(params)
        return [{"params": [next(rest) for _ in range(n)], **options} for n, options in groups]

    def step(self, grads, grad_scale=1.0):
        """Step both sides; None for no gradient. torch divides by ``grad_scale`` itself."""
        divided = [None if g is None else g / g.dtype.type(grad_scale) for g in grads]
        self.tracker.expect(divided)
        self.step_torch(divided)
        self.step_ours(grads, grad_scale=grad_scale)

    def step_torch(self, grads):
        for tensor, grad in zip(self.theirs, grads, strict=True):
            tensor.grad = None if grad is None else self.torch.tensor(grad)
        self.peer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def step_ours(self, grads, **options):
        if self.counts:
            rest = iter(grads)
            grads = [[next(rest) for _ in range(count)] for count in self.counts]
        self.opt.step(grads, **options)

    def peer_states(self):
        states = [self.peer.state.get(tensor, {}) for tensor in self.theirs]
        return [
            {k: int(x.item()) if k == "step" else x.numpy() for k, x in state.items()}
            for state in states
        ]

    def check(self):
        self.tracker.check([tensor.numpy() for tensor in self.theirs], self.peer_states())


DECAYS = {
    "none": ("Adam", {}),
    "l2": ("Adam", {"weight_decay": 0.1}),
    "decoupled": ("AdamW", {"weight_decay": 0.1}),
}
OPTIONS = [
    pytest.param(
        DECAYS[decay][0],
        {**DECAYS[decay][1], "amsgrad": amsgrad, "maximize": maximize},
        id=f"{decay}{'-amsgrad' * amsgrad}{'-maximize' * maximize}",
    )
    for decay, amsgrad, maximize in product(DECAYS, [False, True], [False, True])
]


@EITHER
@KERNEL
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_torch(optional, rng, name, options, fused, dtype):
    params = make_params(rng, dtype)
    common = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    pair = TorchPair(optional("torch"), name, params, fused=fused, **common, **options)
    for _ in range(60):
        pair.step(make_grads(rng, params))
        pair.check()


@EITHER
@KERNEL
@pytest.mark.parametrize(
    ("lr", "betas", "eps"),
    [
        (1e-3, (0.9, 0.999), 1e-8),
        (0.3, (0.8, 0.9), 1e-3),
        (1e-2, (0.99, 0.9), 1e-5),
        (1e-2, (0.0, 0.99), 1e-8),
    ],
)
def test_torch_hyperparameters(optional, rng, lr, betas, eps, fused, dtype):
    params = make_params(rng, dtype)
    common = {"lr": lr, "betas": betas, "eps": eps}
    pair = TorchPair(optional("torch"), "AdamW", params, fused=fused, **common)
    for _ in range(100):
        pair.step(make_grads(rng, params))
        pair.check()


@EITHER
@KERNEL
def test_torch_in_parallel_and_chunks(optional, rng, fused, dtype):
    params = make_params(rng, dtype, [(3,), (90_001,), (300, 100)])
    pair = TorchPair(
        optional("torch"), "AdamW", params, fused=fused, lr=1e-2, betas=(0.9, 0.95), amsgrad=True
    )
    for _ in range(20):
        pair.step(make_grads(rng, params))
        pair.check()


@EITHER
@KERNEL
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
def test_torch_groups_with_their_own_options(optional, rng, name, amsgrad, fused, dtype):
    params = make_params(rng, dtype, SHAPES + SHAPES + [(4, 3)])
    groups = [
        (5, {}),
        (5, {"lr": 0.05, "betas": (0.7, 0.99), "eps": 1e-4, "weight_decay": 0.2}),
        (1, {"weight_decay": 0.0, "maximize": True}),
    ]
    common = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.03, "amsgrad": amsgrad}
    pair = TorchPair(optional("torch"), name, params, fused=fused, groups=groups, **common)
    for _ in range(40):
        pair.step(make_grads(rng, params))
        pair.check()


@EITHER
@KERNEL
@pytest.mark.parametrize(("name", "options"), OPTIONS[::3])
def test_torch_parameters_without_a_gradient_for_some_steps(
    optional, rng, name, options, fused, dtype
):
    params = make_params(rng, dtype, [*SHAPES, (9,), (2, 2)])
    groups = [(4, {}), (3, {"lr": 0.1})]
    common = {"lr": 1e-2, "betas": (0.9, 0.95), "groups": groups}
    pair = TorchPair(optional("torch"), name, params, fused=fused, **common, **options)
    for k in range(40):
        grads = [None if rng.random() < 0.4 else grad for grad in make_grads(rng, params)]
        grads[-1] = None  # never any: no state in torch, zeros here
        if k < 15:
            grads[3] = None  # a late start, with the bias correction of a first step
        if k == 20 or all(grad is None for grad in grads):  # there must be one
            grads = [np.ones_like(params[0]), *[None] * (len(grads) - 1)]
        pair.step(grads)
        pair.check()
    steps = [state["step"] for state in pair.opt.state.values()]
    assert steps[-1] == 0
    assert len(set(steps)) > 3
    assert pair.opt.step_count == 40


@EITHER
@KERNEL
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_torch_lambda_lr(optional, rng, name, fused, dtype):
    """LambdaLR asks for factor 0 before the first step, as `schedule` is asked; 10 steps past."""
    params = make_params(rng, dtype)
    groups = [(2, {}), (3, {"lr": 0.1})]
    common = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    schedule = fastadam.schedules.cosine(40)
    pair = TorchPair(
        optional("torch"), name, params, fused=fused, groups=groups, schedule=schedule, **common
    )
    for _ in range(50):
        pair.step(make_grads(rng, params))
        pair.check()


@EITHER
@KERNEL
@pytest.mark.parametrize("grad_scale", [65536.0, 3.0, 1e-3])
@pytest.mark.parametrize(("name", "options"), OPTIONS[::5])
def test_grad_scale_is_a_division(optional, rng, name, options, grad_scale, fused, dtype):
    params = make_params(rng, dtype)
    common = {"lr": 1e-2, "betas": (0.9, 0.95)}
    pair = TorchPair(optional("torch"), name, params, fused=fused, **common, **options)
    for _ in range(30):
        pair.step(make_grads(rng, params), grad_scale)
        pair.check()


@EITHER
@pytest.mark.parametrize("grad_scale", [65536.0, 3.0])
@pytest.mark.parametrize(("name", "options"), OPTIONS[::5])
def test_grad_scale_is_that_of_torchs_fused_kernel(
    optional, rng, name, options, grad_scale, dtype
):
    """What torch.amp.GradScaler hands to a fused optimizer: its kernel divides."""
    torch = optional("torch")
    params = make_params(rng, dtype)
    common = {"lr": 1e-2, "betas": (0.9, 0.95)}
    pair = TorchPair(torch, name, params, fused=True, **common, **options)
    pair.peer.grad_scale = torch.tensor(grad_scale)
    pair.peer.found_inf = torch.tensor(0.0)
    for _ in range(30):
        grads = make_grads(rng, params)
        pair.tracker.expect([grad / grad.dtype.type(grad_scale) for grad in grads])
        pair.step_torch(grads)
        pair.step_ours(grads, grad_scale=grad_scale)
        pair.check()


@EITHER
@KERNEL
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_torch_from_the_middle_of_its_run(optional, rng, name, options, betas, fused, dtype):
    """torch trains alone, with gradients missing at times; fastadam takes its state over."""
    params = make_params(rng, dtype)
    common = {"lr": 1e-2, "betas": betas, "fused": fused}
    first = TorchPair(optional("torch"), name, params, **common, **options)
    for _ in range(30):
        grads = make_grads(rng, params)
        first.step_torch([None if rng.random() < 0.2 else grad for grad in grads])

    reached = [tensor.numpy() for tensor in first.theirs]
    pair = TorchPair(optional("torch"), name, reached, **common, **options)
    pair.peer.load_state_dict(first.peer.state_dict())
    state_dict = pair.opt.state_dict()
    for k, state in enumerate(first.peer_states()):
        assert state["step"] > 10
        assert state_dict["state"][k].keys() == state.keys()
        state_dict["state"][k] = state
    state_dict["step_count"] = 30
    pair.opt.load_state_dict(state_dict)
    pair.tracker.start()
    pair.check()
    for _ in range(20):
        pair.step(make_grads(rng, params))
        pair.check()
    assert pair.opt.step_count == 50


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_defaults_differ_from_torchs_as_documented(optional, name):
    torch = optional("torch")
    theirs = getattr(torch.optim, name)([torch.zeros(1)]).defaults
    ours = getattr(fastadam, name)([np.zeros(1)]).param_groups[0]
    assert (theirs["lr"], theirs["betas"]) == (1e-3, (0.9, 0.999))
    assert (ours["lr"], ours["betas"]) == (1e-2, (0.9, 0.95))
    same = {"eps", "weight_decay", "decoupled_weight_decay", "maximize"}
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert ours.keys() == same | {"lr", "betas", "params"}
    assert not theirs["amsgrad"]
    assert "max_exp_avg_sq" not in getattr(fastadam, name)([np.zeros(1)]).state[0]


def optax_adam(optax, lr, betas, eps):
    return optax.adam(lr, *betas, eps)


def optax_adamw(optax, lr, betas, eps):
    return optax.adamw(lr, *betas, eps, weight_decay=0.1)


def optax_l2(optax, lr, betas, eps):
    return optax.chain(optax.add_decayed_weights(0.1), optax.adam(lr, *betas, eps))


def optax_maximize(optax, lr, betas, eps):
    return optax.chain(optax.scale(-1.0), optax.adam(lr, *betas, eps))


OPTAX = [
    pytest.param(optax_adam, {}, id="adam"),
    pytest.param(optax_adamw, {"weight_decay": 0.1, "decoupled_weight_decay": True}, id="adamw"),
    pytest.param(optax_l2, {"weight_decay": 0.1}, id="l2"),
    pytest.param(optax_maximize, {"maximize": True}, id="maximize"),
]


@EITHER
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize("num_steps", [None, 40], ids=["constant", "cosine"])
@pytest.mark.parametrize(("make", "options"), OPTAX)
def test_optax(optional, rng, make, options, num_steps, betas, dtype):
    """optax makes ``1 - beta**t`` in float32: its first updates are off by 1e-5 of themselves.

    The parameters therefore start away from zero, so as not to be first updates and no more.
    """
    jax, optax = optional("jax"), optional("optax")
    lr, eps = 1e-2, 1e-8
    params = [np.asarray(p + np.copysign(0.1, p), dtype) for p in make_params(rng, dtype)]
    with jax.enable_x64(dtype == "float64"), jax.default_device(jax.devices("cpu")[0]):
        peer_lr = lr if num_steps is None else optax.cosine_decay_schedule(lr, num_steps)
        schedule = None if num_steps is None else fastadam.schedules.cosine(num_steps)
        peer = make(optax, peer_lr, betas, eps)
        theirs = [jax.numpy.array(param) for param in params]
        opt = fastadam.Adam(params, lr, betas, eps, schedule=schedule, **options)
        tracker = Tracker(opt, params, LOOSE[dtype])

        @jax.jit
        def update(theirs, state, grads):
            updates, state = peer.update(grads, state, theirs)
            return optax.apply_updates(theirs, updates), state

        state = peer.init(theirs)
        for step in range(50):
            grads = make_grads(rng, params)
            theirs, state = update(theirs, state, [jax.numpy.array(grad) for grad in grads])
            tracker.expect(grads)
            opt.step(grads)
            moments = {name: optax.tree.get(state, name) for name in ("mu", "nu")}
            assert theirs[0].dtype == moments["nu"][0].dtype == dtype
            tracker.check(
                [np.asarray(tensor) for tensor in theirs],
                [
                    {"step": step + 1, "exp_avg": np.asarray(m), "exp_avg_sq": np.asarray(v)}
                    for m, v in zip(moments["mu"], moments["nu"], strict=True)
                ],
            )


@pytest.mark.parametrize(
    ("lr", "betas", "eps"),
    [(1e-3, (0.9, 0.999), 1e-8), (1e-2, (0.9, 0.95), 1e-8), (0.1, (0.5, 0.9), 1e-3)],
)
def test_scikit_learn(optional, rng, lr, betas, eps):
    """Its eps stands beside the raw root: `eps / sqrt(1 - beta2**t)` beside the corrected one."""
    module = optional("sklearn.neural_network._stochastic_optimizers")
    params = make_params(rng, "float64")
    theirs = [param.copy() for param in params]
    peer = module.AdamOptimizer(theirs, lr, *betas, eps)
    opt = fastadam.Adam(params, lr, betas, eps)
    tracker = Tracker(opt, params, TIGHT["float64"])
    for step in range(1, 101):
        grads = make_grads(rng, params)
        peer.update_params(theirs, grads)
        opt.param_groups[0]["eps"] = eps / math.sqrt(1.0 - betas[1] ** step)
        tracker.expect(grads)
        opt.step(grads)
        states = [
            {"step": peer.t, "exp_avg": np.asarray(m), "exp_avg_sq": np.asarray(v)}
            for m, v in zip(peer.ms, peer.vs, strict=True)
        ]
        tracker.check(theirs, states)
