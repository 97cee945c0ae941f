"""What torch's own tests ask of Adam and AdamW, asked of fastadam's classes.

The table is that of the installed torch, `torch.testing._internal.common_optimizers`: its
inputs, error inputs, schedulers, flags and tolerances, with fastadam's class in the place of
torch's. The driver (`optims`, `instantiate_device_type_tests`, `TestCase`) is torch's too.

The tests that use the table are in torch's repository (test/test_optim.py, and
TestDifferentiableOptimizer of test/optim/test_optim.py), not in its package. Those below are
written anew. Each has the name of torch's, and asks for the same; where "is as torch's" stands
below, it asks for more. Each runs for float64 beside float32; and lr and betas are given as
tensors too, what torch's table has for CUDA only.

Left out:

- test_rosenbrock_sparse: of optimizers that take sparse gradients. That Adam refuses them is
  asked in its place.
- test_second_order_optims_return_consistent_types: of LBFGS.
- test_defaults_changed_to_foreach: that torch's own function does the work.
- test_forloop_goes_right_direction_multigpu, test_state_dict_with_cuda_params,
  test_cpu_load_state_dict, test_fused_cpu_matches_cuda: between the CPU and CUDA devices.
- test_peak_memory_foreach: how much CUDA memory torch's foreach takes.
- test_foreach_large_tensor, test_fused_large_tensor: 64 GB of memory.
- Of test_mixed_device_dtype, the second device; of test_set_default_dtype_works_with_foreach,
  CUDA. The rest of both is below.
- capturable=True: for CUDA graphs, torch's step refuses it on the CPU.
- Optimizers whose step torch.compile compiles (test/inductor/test_compiled_optimizers.py).
"""

import copy
import functools
import io
import itertools
import pickle

import pytest

# torch.testing._internal needs expecttest, which torch does not bring.
load = functools.partial(pytest.importorskip, exc_type=ImportError)
torch = load("torch")
table = load("torch.testing._internal.common_optimizers")
devices = load("torch.testing._internal.common_device_type")
utils = load("torch.testing._internal.common_utils")
hooks = load("torch.optim.optimizer")

from fastadam.torch import Adam, AdamW  # noqa: E402

Parameter = torch.nn.Parameter
optims, parametrize = table.optims, utils.parametrize
REALS = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
FLAGS = ("foreach", "fused", "differentiable")
EXACT = {"rtol": 0.0, "atol": 0.0}
PARTIAL = ("differentiable",)  # what torch's tests leave out where parameters are leaves


def with_class(cls):
    """Return torch's entry of the class of this name, with ours in its place."""
    (theirs,) = (info for info in table.optim_db if info.name == cls.__name__)
    ours = copy.copy(theirs)
    ours.optim_cls = cls
    ours.torchs = theirs.optim_cls
    return ours


INFOS = [with_class(Adam), with_class(AdamW)]


def tensor_kwargs(info, dtype):
    """Return the inputs with tensors that torch has for CUDA, as the CPU takes them.

    For parameters of float64, in float64: torch computes with a tensor in its own dtype.
    """
    wide = dtype in (torch.float64, torch.complex128)
    for given in info.optim_inputs_func("cuda"):
        kwargs = {name: value for name, value in given.kwargs.items() if name != "capturable"}
        if torch.is_tensor(kwargs.get("lr")):
            if wide:
                kwargs["lr"] = kwargs["lr"].double()
                if "betas" in kwargs:
                    kwargs["betas"] = tuple(beta.double() for beta in kwargs["betas"])
            yield kwargs


def base_kwargs(info, device, dtype):
    """Return every input without foreach, fused and differentiable."""
    plain = [given.kwargs for given in info.optim_inputs_func(device, dtype)]
    return [*plain, *tensor_kwargs(info, dtype)]


def all_kwargs(info, device, dtype, skip=PARTIAL):
    """Return every input, with each flag that it may have."""
    every = table._get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info, skip)
    found = [given.kwargs for given in every]
    for given, fused in itertools.product(tensor_kwargs(info, dtype), (False, True)):
        if not (fused and "fused" in skip):
            found.append({**given, "fused": fused})
    return copy.deepcopy(found)


class Linear:
    """A parameter of two axes and one of one, and a loss that has a gradient in all of them."""

    def __init__(self, device, dtype, contiguous=True):
        shapes = ((10, 5), (10,)) if contiguous else ((10, 5, 2), (10, 2))
        params = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        if not contiguous:
            params = [param[..., 0] for param in params]
        self.weight, self.bias = self.params = list(map(Parameter, params))
        self.input = torch.randn(5, device=device, dtype=dtype)

    def twin(self):
        return copy.deepcopy(self)

    def loss(self):
        return (self.weight.mv(self.input) + self.bias).pow(2).sum()

    def closure(self, opt):
        def run():
            opt.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return run


def train(opt, closure, steps, schedulers=()):
    for _ in range(steps):
        loss = opt.step(closure)
        for scheduler in schedulers:
            args = (
                (loss.item(),)
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                else ()
            )
            scheduler.step(*args)


def conv(device, dtype):
    """Return a model whose parameters have four axes and one, and its input."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2))
    return model.to(device, dtype), torch.rand(1, 4, 16, 16, device=device, dtype=dtype)


def model_closure(opt, model, given):
    def run():
        opt.zero_grad()
        loss = model(given).sum()
        loss.backward()
        return loss

    return run


def named(params, names):
    return [(f"name{k}", param) for k, param in enumerate(params)] if names else list(params)


def without_names(state_dict):
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Torch's threads wait for each other: on a busy machine it takes forty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestOptimRenewed(utils.TestCase):
    """The class has the name of torch's, because the table's tolerances go by it."""

    exact_dtype = True

    def compare(self, actual, expected, **tolerances):
        """Compare as torch's tests do: within what the dtype, or the table, allows."""
        self.assertEqual(actual, expected, **tolerances)  # noqa: PT009

    def goes_right(self, before, after, kwargs):
        assert before != after
        assert (after > before) == kwargs.get("maximize", False)

    @optims(INFOS, dtypes=REALS)
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        """The flags are for the tests to set."""
        for kwargs in base_kwargs(optim_info, device, dtype):
            assert not set(FLAGS) & set(kwargs)

    @optims(INFOS, dtypes=REALS)
    def test_errors(self, device, dtype, optim_info):
        """Type and message are torch's, or the warning is."""
        errors = optim_info.optim_error_inputs_func(device=device, dtype=dtype)
        assert len(errors) > 10
        for error in errors:
            params = error.optimizer_error_input.params
            kwargs = error.optimizer_error_input.kwargs
            warns = issubclass(error.error_type, Warning)
            expect = pytest.warns if warns else pytest.raises
            opt = None
            if error.error_on is table.OptimizerErrorEnum.STEP_ERROR:
                opt = optim_info.optim_cls(params, **kwargs)
            with expect(error.error_type, match=error.error_regex):
                if opt is None:
                    optim_info.optim_cls(params, **kwargs)
                else:
                    opt.step()

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @optims(INFOS, dtypes=REALS)
    def test_forloop_goes_right_direction(
        self, device, dtype, optim_info, contiguous, with_lrsched
    ):
        """And is as torch's."""
        for constructors in optim_info.scheduler_inputs if with_lrsched else [()]:
            for kwargs in base_kwargs(optim_info, device, dtype):
                problems = [Linear(device, dtype, contiguous)]
                problems.append(problems[0].twin())
                before = problems[0].loss()
                for problem, cls in zip(
                    problems, (optim_info.optim_cls, optim_info.torchs), strict=True
                ):
                    # Schedulers write into an lr that is a tensor.
                    opt = cls(problem.params, **copy.deepcopy(kwargs), foreach=False)
                    schedulers = [make(opt) for make in constructors]
                    train(opt, problem.closure(opt), 20, schedulers)
                self.goes_right(before, problems[0].loss(), kwargs)
                self.compare(problems[0].params, problems[1].params)

    @optims(INFOS, dtypes=REALS)
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        """Only one of two groups has an lr of its own."""
        for constructors in optim_info.scheduler_inputs:
            problem = Linear(device, dtype)
            before = problem.loss()
            opt = optim_info.optim_cls(
                [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
            )
            train(opt, problem.closure(opt), 20, [make(opt) for make in constructors])
            self.goes_right(before, problem.loss(), {})

    @parametrize("num_dim", [0, 1, 2])
    @optims(INFOS, dtypes=REALS)
    def test_tensor_lr(self, device, dtype, optim_info, num_dim):
        """Of any number of axes; a float64 tensor gives the bits of a float."""
        for kwargs in all_kwargs(optim_info, device, dtype):
            kwargs.pop("lr", None)
            for lr_dtype, tolerance in ((torch.float32, {}), (torch.float64, EXACT)):
                lr = torch.full((1,) * num_dim, 1e-3, dtype=lr_dtype)
                if kwargs.get("foreach"):
                    with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
                        optim_info.optim_cls([torch.ones(1)], lr=lr, **kwargs)
                    continue
                problem = Linear(device, dtype)
                other = problem.twin()
                for each, given in ((problem, 1e-3), (other, lr)):
                    opt = optim_info.optim_cls(each.params, lr=given, **kwargs)
                    train(opt, each.closure(opt), 5)
                self.compare(problem.params, other.params, **tolerance)

    @optims(INFOS, dtypes=REALS)
    def test_rosenbrock_sparse(self, device, dtype, optim_info):
        """Adam refuses sparse gradients: torch's exception, and nothing has changed."""
        for kwargs in all_kwargs(optim_info, device, dtype):
            params = [torch.full((2,), 1.5, device=device, dtype=dtype) for _ in range(2)]
            before = copy.deepcopy(params)
            opt = optim_info.optim_cls(params, **kwargs)
            params[0].grad = torch.ones_like(params[0])
            params[1].grad = torch.sparse_coo_tensor([[0]], [1.0], (2,), dtype=dtype)
            with pytest.raises(RuntimeError, match="does not support sparse gradients"):
                opt.step()
            self.compare(params, before, **EXACT)
            assert not opt.state

    @optims(INFOS, dtypes=(torch.complex64, torch.complex128))
    def test_complex(self, device, dtype, optim_info):
        """A complex parameter is updated as the pairs of reals are, beside a real one."""
        real = torch.float32 if dtype == torch.complex64 else torch.float64
        for kwargs in all_kwargs(optim_info, device, dtype, skip=("differentiable", "fused")):
            ours = [
                torch.randn(shape, device=device, dtype=each, requires_grad=True)
                for shape, each in (((10, 5), dtype), ((10,), dtype), ((10, 5), real))
            ]
            reals = [as_real(param).detach().clone().requires_grad_() for param in ours]
            opts = [optim_info.optim_cls(params, **kwargs) for params in (ours, reals)]
            for _ in range(3):
                for param, pairs in zip(ours, reals, strict=True):
                    pairs.grad = torch.randn_like(pairs)
                    whole = torch.view_as_complex(pairs.grad) if param.is_complex() else pairs.grad
                    param.grad = whole.clone()
                for opt in opts:
                    opt.step()
                self.compare([as_real(param) for param in ours], reals, **EXACT)
            for param, pairs in zip(ours, reals, strict=True):
                for name, value in opts[0].state[param].items():
                    self.compare(as_real(value), opts[1].state[pairs][name], **EXACT)

    @optims(INFOS, dtypes=(torch.complex64, torch.complex128))
    def test_complex_2d(self, device, dtype, optim_info):
        """A complex parameter is updated as its real and its imaginary part are."""
        for kwargs in all_kwargs(optim_info, device, dtype, skip=("differentiable", "fused")):
            whole = torch.randn(2, device=device, dtype=dtype, requires_grad=True)
            parts = [part.detach().clone().requires_grad_() for part in (whole.real, whole.imag)]
            opts = [optim_info.optim_cls(params, **kwargs) for params in ([whole], parts)]
            for _ in range(3):
                for opt, values in zip(opts, (whole, None), strict=True):
                    opt.zero_grad()
                    # Read again: the optimizer before has its own step behind it.
                    x, y = torch.complex(*parts) if values is None else values
                    ((1 - x) ** 2 + 100 * (y - x**2) ** 2).abs().backward()
                parts_of_grad = whole.grad.real, whole.grad.imag
                self.compare([part.grad for part in parts], list(parts_of_grad))
                for part, grad in zip(parts, parts_of_grad, strict=True):
                    part.grad = grad.clone()
                for opt in opts:
                    opt.step()
                self.compare([whole.real, whole.imag], parts, **EXACT)

    def matches_torchs_forloop(self, device, dtype, optim_info, flag):
        """Compare what ours with a flag does with torch's plain loop.

        Among it are a step without gradients, a layer that is frozen for two steps, and a
        parameter of no axes.
        """
        kinds = ((optim_info.optim_cls, True), (optim_info.torchs, False))
        for given in optim_info.optim_inputs_func(device, dtype):
            runs = []
            for cls, value in kinds:
                torch.manual_seed(1)
                model = torch.nn.Sequential(
                    torch.nn.Linear(2, 3),
                    torch.nn.Sigmoid(),
                    torch.nn.Linear(3, 1),
                    torch.nn.Sigmoid(),
                ).to(device, dtype)
                scalar = torch.zeros((), device=device, dtype=dtype, requires_grad=True)
                scalar.grad = torch.ones_like(scalar)
                params = [*model.parameters(), scalar]
                runs.append((model, params, cls(params, **{**given.kwargs, flag: value})))
            data = torch.linspace(0.1, 0.6, 6, device=device, dtype=dtype).reshape(3, 2)
            for k in range(7):
                for model, _, opt in runs:
                    opt.zero_grad()
                    model[2].requires_grad_(k not in (3, 4))
                    if k != 2:
                        model(data).sum().backward()
                    opt.step()
                (_, ours, opt), (_, theirs, torchs) = runs
                for param, expected in zip(ours, theirs, strict=True):
                    self.compare(param, expected)
                    own, other = opt.state[param], torchs.state[expected]
                    assert list(own) == list(other)
                    for name in other:
                        self.compare(own[name], other[name])
                        # Or what lies within the tolerances adds up.
                        own[name].copy_(other[name])
                    param.data.copy_(expected.data)

    @optims(INFOS, dtypes=(*REALS, *HALVES))
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        self.matches_torchs_forloop(device, dtype, optim_info, "fused")

    @optims(INFOS, dtypes=REALS)
    def test_foreach_matches_forloop(self, device, dtype, optim_info):
        self.matches_torchs_forloop(device, dtype, optim_info, "foreach")

    @parametrize("impl", ["foreach", "fused"])
    @optims(INFOS)
    def test_mixed_device_dtype(self, device, dtype, optim_info, impl):  # noqa: ARG002
        """Parameters of every dtype in one group; one of integers, that has no gradient."""
        dtypes = (torch.float64, torch.float32, *HALVES)
        start = [torch.rand(2, 3, device=device, dtype=each) for each in dtypes]
        start.append(torch.randint(1024, (2, 3), device=device))
        grads = [torch.rand_like(param) for param in start[:-1]]
        # Of halves torch's loop rounds each intermediate result, its fused kernel the last.
        reference, steps = ("fused", 7) if impl == "fused" else ("foreach", 1)
        for given in optim_info.optim_inputs_func(device):
            runs = []
            for cls, flag in (
                (optim_info.optim_cls, {impl: True}),
                (optim_info.torchs, {reference: impl == "fused"}),
            ):
                params = copy.deepcopy(start)
                for param, grad in zip(params, grads, strict=False):
                    param.grad = grad.clone()
                opt = cls(params, **given.kwargs, **flag)
                for _ in range(steps):
                    opt.step()
                runs.append((params, opt))
            (ours, opt), (theirs, torchs) = runs
            for param, expected in zip(ours, theirs, strict=True):
                rtol, atol = (
                    5 * each
                    for each in torch.testing._comparison.get_tolerances(
                        expected.dtype, rtol=None, atol=None
                    )
                )
                self.compare(param, expected, rtol=rtol, atol=atol)
                for name, value in torchs.state.get(expected, {}).items():
                    self.compare(opt.state[param][name], value, rtol=rtol, atol=atol)

    @optims(INFOS, dtypes=(torch.float64,))
    def test_set_default_dtype_works_with_foreach(self, device, dtype, optim_info):
        """Steps are counted in float32, unless more is the default."""
        before = torch.get_default_dtype()
        for default in (torch.float64, torch.float16, torch.float32):
            torch.set_default_dtype(default)
            try:
                for kwargs in all_kwargs(optim_info, device, dtype):
                    param = torch.ones(2, device=device, dtype=dtype)
                    param.grad = torch.ones_like(param)
                    opt = optim_info.optim_cls([param], **kwargs)
                    opt.step()
                    double = default == torch.float64 and not kwargs.get("fused")
                    expected = torch.float64 if double else torch.float32
                    assert opt.state[param]["step"].dtype == expected
                    assert opt.state[param]["exp_avg"].dtype == dtype
            finally:
                torch.set_default_dtype(before)

    @optims(INFOS, dtypes=REALS)
    def test_fused_error_on_params_on_meta(self, device, dtype, optim_info):
        """They are refused with torch's type and a message of our own; with memory, they go."""
        for fused in (True, None):
            with torch.device("meta"):
                model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).to(dtype)
            opt = optim_info.optim_cls(model.parameters(), fused=fused)
            for param in model.parameters():
                param.grad = torch.rand_like(param)
            with pytest.raises(RuntimeError, match="meta has no memory"):
                opt.step()
            assert not opt.state
            opt.zero_grad()
            model.to_empty(device=device)  # other parameters, of which this optimizer has none
            opt.step()
            opt = optim_info.optim_cls(model.parameters(), fused=fused)
            for param in model.parameters():
                param.grad = torch.rand_like(param)
            opt.step()
            assert len(opt.state) == 4

    @optims(INFOS, dtypes=REALS)
    def test_fused_does_not_step_if_foundinf(self, device, dtype, optim_info):
        """Neither parameters nor counts move, whatever is in the gradients."""
        for kwargs in all_kwargs(optim_info, device, dtype):
            for scale in (None, torch.ones((1,), device=device)):
                params = [torch.ones((1,), device=device, dtype=dtype) for _ in range(5)]
                for param in params:
                    param.grad = torch.full_like(param, torch.inf)
                opt = optim_info.optim_cls(params, **kwargs)
                opt.grad_scale, opt.found_inf = scale, torch.ones((), device=device)
                opt.step()
                self.compare(params, [torch.ones(1, dtype=dtype)] * 5, **EXACT)
                assert all(own["step"] == 0 for own in opt.state.values())

    @parametrize("fused", [True, False])
    @optims(INFOS)
    def test_grad_scaling_autocast_fused_optimizers(self, device, dtype, optim_info, fused):  # noqa: ARG002
        """In autocast, with a scaler: as torch's, also where gradients overflow."""
        for given in optim_info.optim_inputs_func(device):
            runs = []
            for cls in (optim_info.optim_cls, optim_info.torchs):
                torch.manual_seed(1)
                model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
                opt = cls(model.parameters(), **{**given.kwargs, "lr": 0.1}, fused=fused)
                scaler = torch.amp.GradScaler(device, init_scale=128.0, growth_interval=2)
                for k in range(6):
                    opt.zero_grad()
                    data = torch.rand(8, 8, generator=torch.Generator().manual_seed(k))
                    with torch.autocast(device, dtype=torch.bfloat16):
                        loss = model(data).pow(2).mean()
                    scaler.scale(loss).backward()
                    if k == 3:
                        model[1].weight.grad.fill_(torch.inf)
                    scaler.step(opt)
                    scaler.update()
                runs.append((list(model.parameters()), scaler.get_scale(), opt))
            (ours, scale, opt), (theirs, expected, _) = runs
            assert scale == expected
            assert {int(own["step"]) for own in opt.state.values()} == {5}
            # Once bfloat16 has rounded, two roundings of a parameter may be far apart.
            self.compare(ours, theirs, rtol=1e-4, atol=1e-4)

    @optims(INFOS, dtypes=REALS)
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        """One of two groups has none."""
        for kwargs in all_kwargs(optim_info, device, dtype):
            problem = Linear(device, dtype)
            other = {**copy.deepcopy(kwargs), "weight_decay": 0.0}
            opt = optim_info.optim_cls(
                [{"params": [problem.weight], **kwargs}, {"params": [problem.bias], **other}]
            )
            before = problem.loss()
            train(opt, problem.closure(opt), 20)
            self.goes_right(before, problem.loss(), kwargs)

    @optims(INFOS, dtypes=REALS)
    def test_param_groups_lr(self, device, dtype, optim_info):
        """A group without an lr has the outer one: next to none."""
        for kwargs in all_kwargs(optim_info, device, dtype):
            problem = Linear(device, dtype)
            still = Parameter(torch.randn(2, device=device, dtype=dtype))
            before, old = problem.loss(), still.detach().clone()
            kwargs = {"lr": 1e-3, **kwargs}
            opt = optim_info.optim_cls(
                [{"params": problem.params, **kwargs}, {"params": [still]}], lr=1e-28
            )
            for _ in range(20):
                problem.closure(opt)()
                still.grad = torch.rand_like(still)
                opt.step()
            self.goes_right(before, problem.loss(), kwargs)
            self.compare(still, old)

    @optims(INFOS, dtypes=REALS)
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for kwargs in all_kwargs(optim_info, device, dtype, skip=()):
            params = [torch.randn(2, 3, device=device, dtype=dtype) for _ in range(2)]
            before = copy.deepcopy(params)
            opt = optim_info.optim_cls(params, **kwargs)
            assert opt.step(lambda: torch.ones(1)) == 1
            self.compare(params, before, **EXACT)
            assert not opt.state

    @optims(INFOS, dtypes=REALS)
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        """Without decay. The step counts, all the same."""
        for kwargs in all_kwargs(optim_info, device, dtype, skip=()):
            kwargs["weight_decay"] = 0.0
            param = torch.randn((5, 1), device=device, dtype=dtype, requires_grad=True)
            before = param.detach().clone()
            leaf = param.clone() if kwargs.get("differentiable") else param
            opt = optim_info.optim_cls([leaf], **kwargs)
            leaf.grad = torch.zeros_like(leaf)
            opt.step(lambda: torch.ones(1))
            self.compare(leaf, before, **EXACT)
            assert opt.state[leaf]["step"] == 1

    @optims(INFOS, dtypes=REALS)
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        """And says what torch's says."""
        params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
        for kwargs in all_kwargs(optim_info, device, dtype, skip=()):
            opts = [cls(params, **kwargs) for cls in (optim_info.optim_cls, optim_info.torchs)]
            assert repr(opts[0]) == repr(opts[1])

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims(INFOS, dtypes=REALS)
    def test_state_dict_deterministic(
        self, device, dtype, optim_info, is_named_optim0, is_named_optim1
    ):
        """Two optimizers with one state take the same steps, to the bit."""
        for kwargs in all_kwargs(optim_info, device, dtype):
            problem = Linear(device, dtype)
            opt = optim_info.optim_cls(named(problem.params, is_named_optim0), **kwargs)
            train(opt, problem.closure(opt), 10)
            twin = problem.twin()
            other = optim_info.optim_cls(named(twin.params, is_named_optim1), **kwargs)
            other.load_state_dict(copy.deepcopy(opt.state_dict()))
            for _ in range(10):
                opt.step(problem.closure(opt))
                other.step(twin.closure(other))
                self.compare(problem.params, twin.params, **EXACT)
            states = [without_names(each.state_dict()) for each in (opt, other)]
            self.compare(states[0], states[1], **EXACT)
            # A group that is there twice looks the same twice.
            other.param_groups.extend(other.param_groups)
            again = without_names(other.state_dict())["param_groups"]
            self.compare(again, states[0]["param_groups"] * 2, **EXACT)

    @optims(INFOS, dtypes=REALS)
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        """From before there were the flags."""
        for kwargs in all_kwargs(optim_info, device, dtype):
            model, data = conv(device, dtype)
            opt = optim_info.optim_cls(model.parameters(), **kwargs)
            closure = model_closure(opt, model, data)
            train(opt, closure, 3)
            old = copy.deepcopy(opt.state_dict())
            for group in old["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    del group[flag]
            opt.load_state_dict(old)
            train(opt, closure, 1)
            assert {int(own["step"]) for own in opt.state.values()} == {4}

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims(INFOS, dtypes=REALS)
    def test_can_load_from_to_named_state_dict(
        self, device, dtype, optim_info, is_named_optim0, is_named_optim1
    ):
        """Names last, whichever of the two optimizers has them."""
        for kwargs in all_kwargs(optim_info, device, dtype):
            model, data = conv(device, dtype)

            def make(names):
                params = model.named_parameters() if names else model.parameters()  # noqa: B023
                return optim_info.optim_cls(params, **kwargs)  # noqa: B023

            opt, other = make(is_named_optim0), make(is_named_optim1)
            train(opt, model_closure(opt, model, data), 3)
            other.load_state_dict(copy.deepcopy(opt.state_dict()))
            train(other, model_closure(other, model, data), 1)
            (group,) = other.state_dict()["param_groups"]
            names = [name for name, _ in model.named_parameters()]
            expected = names if is_named_optim0 or is_named_optim1 else None
            assert group.get("param_names") == expected

    @parametrize("is_named_optim", [True, False])
    @optims(INFOS, dtypes=REALS)
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named_optim):
        for kwargs in all_kwargs(optim_info, device, dtype):
            problem = Linear(device, dtype)
            opt = optim_info.optim_cls(named(problem.params, is_named_optim), **kwargs)
            train(opt, problem.closure(opt), 3)
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            for weights_only in (False, True):
                file.seek(0)
                loaded = torch.load(file, weights_only=weights_only)
                self.compare(loaded, opt.state_dict(), **EXACT)

    @optims(INFOS, dtypes=REALS)
    def test_load_nontensor_step(self, device, dtype, optim_info):
        """As torch's own state had it before 1.12."""
        for kwargs in all_kwargs(optim_info, device, dtype):
            params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
            for param in params:
                param.grad = torch.rand_like(param)
            opt = optim_info.optim_cls(params, **kwargs)
            train(opt, None, 3)
            old = copy.deepcopy(opt.state_dict())
            for own in old["state"].values():
                own["step"] = own["step"].item()
            opt.load_state_dict(old)
            train(opt, None, 1)
            for own in opt.state.values():
                self.compare(own["step"], torch.tensor(4.0))

    def hooked(self, device, dtype, optim_info):
        for kwargs in all_kwargs(optim_info, device, dtype, skip=()):
            param = torch.rand(2, 3, device=device, dtype=dtype, requires_grad=True)
            yield optim_info.optim_cls([param], **kwargs)

    @optims(INFOS, dtypes=REALS)
    def test_state_dict_pre_hook(self, device, dtype, optim_info):
        for opt in self.hooked(device, dtype, optim_info):
            opt.register_state_dict_pre_hook(add_test)
            assert opt.state_dict()["state"]["test"] == 1

    @optims(INFOS, dtypes=REALS)
    def test_state_dict_post_hook(self, device, dtype, optim_info):
        for opt in self.hooked(device, dtype, optim_info):
            opt.register_state_dict_post_hook(take_test)
            assert opt.state_dict()["had_test"] is False

    @optims(INFOS, dtypes=REALS)
    def test_state_dict_pre_post_hook(self, device, dtype, optim_info):
        for opt in self.hooked(device, dtype, optim_info):
            opt.register_state_dict_pre_hook(add_test)
            opt.register_state_dict_post_hook(take_test)
            found = opt.state_dict()
            assert found["had_test"] is True
            assert "test" not in found["state"]

    @optims(INFOS, dtypes=REALS)
    def test_load_state_dict_pre_hook_and_prepend(self, device, dtype, optim_info):
        """A hook that changes the state dict, and before it one that returns another."""
        for opt in self.hooked(device, dtype, optim_info):
            state_dict = opt.state_dict()
            opt.register_load_state_dict_pre_hook(set_lr)
            opt.load_state_dict(state_dict)
            assert opt.param_groups[0]["lr"] == 0.002
            opt.register_load_state_dict_pre_hook(other_lr, prepend=True)
            opt.load_state_dict(state_dict)
            assert opt.param_groups[0]["lr"] == 0.002

    @optims(INFOS, dtypes=REALS)
    def test_load_state_dict_post_hook(self, device, dtype, optim_info):
        for opt in self.hooked(device, dtype, optim_info):
            opt.register_load_state_dict_post_hook(note_lr)
            opt.load_state_dict(opt.state_dict())
            assert not opt.state["lr_was_other"]

    @optims(INFOS, dtypes=REALS)
    def test_load_state_dict_pre_post_hook(self, device, dtype, optim_info):
        for opt in self.hooked(device, dtype, optim_info):
            opt.register_load_state_dict_pre_hook(other_lr)
            opt.register_load_state_dict_post_hook(note_lr)
            opt.load_state_dict(opt.state_dict())
            assert opt.state["lr_was_other"]

    @parametrize("when", ["pre", "post"])
    @optims(INFOS, dtypes=REALS)
    def test_step_hook(self, device, dtype, optim_info, when):
        """test_step_pre_hook and test_step_post_hook: once a step, until the hook is removed."""
        for opt in self.hooked(device, dtype, optim_info):
            calls = []

            def closure():
                return 1.0

            register = getattr(opt, f"register_step_{when}_hook")
            handle = register(lambda opt, args, kwargs: calls.append((opt, args, kwargs)))  # noqa: B023
            opt.step()
            opt.step(closure)
            # The first argument is the optimizer, in torch too.
            assert calls == [(opt, (opt,), {}), (opt, (opt, closure), {})]
            handle.remove()
            opt.step()
            assert len(calls) == 2

    @optims(INFOS, dtypes=REALS)
    def test_step_all_hooks(self, device, dtype, optim_info):
        """Global before local before the step; local before global after it."""
        for opt in self.hooked(device, dtype, optim_info):
            order = []

            def note(name):
                return lambda *_: order.append(name)  # noqa: B023

            other = torch.optim.SGD([torch.ones(1)])
            handles = [
                hooks.register_optimizer_step_pre_hook(note("global pre")),
                hooks.register_optimizer_step_post_hook(note("global post")),
            ]
            for each in (opt, other):
                handles += [
                    each.register_step_pre_hook(note("pre")),
                    each.register_step_post_hook(note("post")),
                ]
            try:
                for each in (opt, other, opt):
                    each.step()
            finally:
                for handle in handles:
                    handle.remove()
            assert order == ["global pre", "pre", "post", "global post"] * 3
            opt.step()
            assert len(order) == 12

    @optims(INFOS, dtypes=REALS)
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        """And so does pickle; both copies take the same steps, to the bit."""
        for kwargs in all_kwargs(optim_info, device, dtype):
            params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
            for param in params:
                param.grad = torch.rand_like(param)
            opt = optim_info.optim_cls(params, **kwargs)
            train(opt, None, 3)
            copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
            opt.step()
            for each in copies:
                assert public(each) == public(opt)
                own = each.param_groups[0]["params"]
                for param, old in zip(own, params, strict=True):
                    param.grad = old.grad
                each.step()
                self.compare(own, params, **EXACT)
                self.compare(each.state_dict(), opt.state_dict(), **EXACT)

    @optims(INFOS, dtypes=REALS)
    def test_non_empty_state(self, device, dtype, optim_info):
        for kwargs in all_kwargs(optim_info, device, dtype):
            model = torch.nn.Linear(5, 5).to(device, dtype)
            opt = optim_info.optim_cls(model.parameters(), **kwargs)
            train(opt, model_closure(opt, model, torch.rand(2, 5, device=device, dtype=dtype)), 1)
            assert [set(own) for own in opt.state.values()] == [
                {"step", "exp_avg", "exp_avg_sq"}
                | ({"max_exp_avg_sq"} if kwargs.get("amsgrad") else set())
            ] * 2

    @optims(INFOS, dtypes=(torch.float64,))
    def test_differentiable(self, device, dtype, optim_info):
        """TestDifferentiableOptimizer's test_adam and test_adamw: gradients of a whole step."""
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        for given in optim_info.optim_inputs_func(device, dtype):

            def step(param, grad, *moments):
                param = param.clone()
                param.grad = grad
                opt = optim_info.optim_cls([param], **given.kwargs, differentiable=True)  # noqa: B023
                opt.state[param].update(
                    {name: moment.clone() for name, moment in zip(names, moments, strict=False)},
                    step=torch.tensor(10.0, dtype=dtype),
                )
                opt.step()
                own = (value for value in opt.state[param].values() if value.requires_grad)
                return (param, *own)

            count = 5 if given.kwargs.get("amsgrad") else 4
            values = [torch.rand(4, device=device, dtype=dtype) for _ in range(count)]
            assert torch.autograd.gradcheck(step, [value.requires_grad_() for value in values])


def as_real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def public(opt):
    return {name for name in vars(opt) if not name.startswith("_")}


def add_test(opt):
    opt.state["test"] = 1


def take_test(opt, state_dict):  # noqa: ARG001
    state_dict["had_test"] = state_dict["state"].pop("test", None) is not None
    return state_dict


def set_lr(opt, state_dict):  # noqa: ARG001
    state_dict["param_groups"][0]["lr"] = 0.002


def other_lr(opt, state_dict):  # noqa: ARG001
    other = copy.deepcopy(state_dict)
    other["param_groups"][0]["lr"] = 0.003
    return other


def note_lr(opt):
    opt.state["lr_was_other"] = opt.param_groups[0]["lr"] == 0.003


devices.instantiate_device_type_tests(TestOptimRenewed, globals(), only_for="cpu")
