"""Time of one step: sizes, numbers of tensors, threads, options, models."""

import numba
import numpy as np

import fastadam

from .common import BACKENDS, DTYPES, make, shapes_of


class _Step:
    # asv repeats setup before every sample: short samples, or it would take most of the time.
    sample_time = 0.05
    timeout = 300

    def prepare(self, *args, **kwargs):
        self.contender = make(*args, **kwargs)
        self.step, self.wait = self.contender.step, self.contender.wait

    def time_step(self, *_):
        self.step()
        self.wait()


class Size(_Step):
    """One array, from the cache to memory."""

    param_names = ("backend", "size", "dtype")
    params = (BACKENDS, [10**k for k in range(3, 8)], DTYPES)

    def setup(self, backend, size, dtype):
        self.prepare(backend, [(size,)], dtype)


class Tensors(_Step):
    """The same million elements, cut into ever more arrays."""

    param_names = ("backend", "tensors")
    params = (BACKENDS, [1, 10, 100, 1_000])

    def setup(self, backend, tensors):
        self.prepare(backend, tensors * [(1_000_000 // tensors,)])


class Workload(_Step):
    """The shapes of models."""

    param_names = ("backend", "workload")
    params = (BACKENDS, ["micro", "mlp", "many", "20M", "gpt2", "one-by-one"])

    def setup(self, backend, name):
        self.prepare(backend, name)


class Threads(_Step):
    """The same step on more and more threads."""

    param_names = ("threads", "size")
    params = ([1, 2, 4, 8, 16], [100_000, 1_000_000, 10_000_000])

    def setup(self, threads, size):
        if threads > numba.config.NUMBA_NUM_THREADS:
            raise NotImplementedError("more threads than processors")
        numba.set_num_threads(threads)
        self.prepare("fastadam", [(size,)])

    def teardown(self, *_):
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


# What the constructor is given, and what the step.
OPTIONS = {
    "none": ({}, {}),
    "weight_decay": ({"weight_decay": 0.01}, {}),
    "decoupled": ({"weight_decay": 0.01, "decoupled_weight_decay": True}, {}),
    "amsgrad": ({"amsgrad": True}, {}),
    "ema": ({"ema_decay": 0.999}, {}),
    "norm": ({"max_grad_norm": float("inf")}, {}),
    "clip": ({"max_grad_norm": 1.0}, {}),
    "skip": ({"nonfinite": "skip"}, {}),
    "grad_scale": ({}, {"grad_scale": 1024.0}),
    "zero_grad": ({}, {"zero_grad": True}),
    "schedule": ({"schedule": fastadam.schedules.cosine(10**9)}, {}),
    "fresh_grads": ({}, {}),
    "groups": ({}, {}),
}


class Options:
    """What a variant of the update costs."""

    param_names = ("option", "workload")
    params = (list(OPTIONS), ["micro", "mlp", "many"])
    # A gradient that has been set to 0 lets the averages decay: in 100 steps by 3e-5 and 6e-3,
    # in the thousands that a sample could hold, to denormal numbers, which are slow.
    number = 100
    timeout = 300

    def setup(self, option, name):
        from fastadam.bench.workloads import draw

        options, self.given = OPTIONS[option]
        params, grads = draw(shapes_of(name), "float32")
        if option == "groups":
            params, grads = (
                [{"params": params[:3]}, {"params": params[3:]}],
                [grads[:3], grads[3:]],
            )
        self.opt = fastadam.Adam(params, **options)
        # Two sets in turn, as from a function that returns new arrays. Without the option,
        # both are one.
        other = [np.copy(g) for g in grads] if option == "fresh_grads" else grads
        self.sets, self.turn = [grads, other], 0
        for _ in range(2):
            self.time_step()

    def time_step(self, *_):
        self.turn = 1 - self.turn
        self.opt.step(self.sets[self.turn], **self.given)


# Gradients, and moments as if loaded. A step makes the moments 0 that would be denormal.
NUMBERS = {
    "usual": (1.0, {}),
    "exp_avg 1e-42": (0.0, {"exp_avg": 1e-42}),
    "moments 1e-42": (0.0, {"exp_avg": 1e-42, "exp_avg_sq": 1e-42}),
    "gradients 1e-20": (1e-20, {}),  # whose squares are denormal: slow
}


class Denormal(_Step):
    """Steps with numbers that are denormal; with moments that are, no slower than usual."""

    param_names = ("numbers", "size")
    params = (list(NUMBERS), [30_000, 1_000_000])

    def setup(self, numbers, size):
        scale, moments = NUMBERS[numbers]
        param = np.random.default_rng(0).uniform(0.1, 1.0, size).astype("float32")
        self.grad = param * np.float32(scale)
        self.opt = fastadam.Adam(param)
        state = self.opt.state_dict()
        for name, value in moments.items():
            state["state"][0][name][...] = value
        self.opt.load_state_dict(state)
        for _ in range(2):
            self.time_step()

    def time_step(self, *_):
        self.opt.step(self.grad)


class Functional:
    """`functional.adam` beside `Adam.step`, of which it is to cost no more.

    "calls" is as of an engine with an optimizer for each of 100 parameters, called in turn.
    """

    param_names = ("way", "shapes")
    params = (["Adam.step", "functional"], ["micro", "many", "20M", "calls"])
    sample_time = 0.05
    timeout = 300

    def setup(self, way, name):
        from fastadam import functional
        from fastadam.bench.workloads import draw

        lists = [[(4,)]] * 100 if name == "calls" else [shapes_of(name)]
        self.calls = []
        for shapes in lists:
            params, grads = draw(shapes, "float32")
            if way == "Adam.step":
                self.calls.append((fastadam.Adam(params).step, (grads,), {}))
                continue
            state = [[np.zeros_like(param) for param in params] for _ in range(2)]
            steps = np.zeros(len(params), dtype=np.int64)
            self.calls.append((functional.adam, (params, grads, *state), {"steps": steps}))
        for _ in range(2):
            self.time_step()

    def time_step(self, *_):
        for step, arguments, options in self.calls:
            step(*arguments, **options)
