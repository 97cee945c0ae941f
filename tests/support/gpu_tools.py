"""What the tests on a GPU need. As a script: few steps of every option, for compute-sanitizer."""

import functools
import importlib.util
import itertools
import warnings

import numpy as np
import pytest

import fastadam
from fastadam import schedules

DTYPES = {"float32": ("f4",), "float64": ("f8",), "both": ("f8", "f4")}
# Options of the optimizer, and of its step.
MODES = {
    "plain": ({}, {}),
    "l2": ({"weight_decay": 0.1}, {}),
    "decoupled": ({"weight_decay": 0.1, "decoupled_weight_decay": True}, {}),
    "amsgrad": ({"amsgrad": True, "betas": (0.9, 0.999), "lr": 1e-3}, {}),
    "maximize": ({"maximize": True, "eps": 1e-3}, {"grad_scale": 1.5}),
    "schedule": ({"schedule": schedules.cosine(900)}, {}),
    "measure": ({"max_grad_norm": float("inf")}, {}),
    "clip": ({"max_grad_norm": 1.0}, {"grad_scale": 3.0}),
    "skip": ({"nonfinite": "skip"}, {}),
    "raise": ({"nonfinite": "raise"}, {}),
    "ema": ({"ema_decay": 0.9}, {}),
    "zero_grad": ({}, {"zero_grad": True}),
    "everything": (
        {
            "weight_decay": 0.1,
            "amsgrad": True,
            "schedule": schedules.warmup(schedules.cosine(900), steps=20),
            "max_grad_norm": 1.0,
            "nonfinite": "skip",
            "ema_decay": 0.9,
        },
        {"grad_scale": 2.0, "zero_grad": True},
    ),
}
# Empty, of no dimension, odd, aligned, in Fortran order, of several chunks, of two parts of a
# norm. A number is the size of a view that begins one element into its buffer.
SHAPES = ((0,), (), (5,), (33, 9), [37], [4_097], "F", (70_001,))


@functools.cache
def has_device():
    """Whether there is a GPU to test on; imports nothing of CUDA before a driver is found."""
    from fastadam.machine import cuda_devices

    if importlib.util.find_spec("numba_cuda") is None or not cuda_devices()[1]:
        return False
    from numba import config, cuda

    return not config.ENABLE_CUDASIM and cuda.is_available()


def needs_device():
    """Return the mark of a module of such tests, or skip the module."""
    if not has_device():
        pytest.skip("no CUDA device", allow_module_level=True)
    return pytest.mark.gpu


def library(name):
    """Return how arrays of a library are made, or skip the test."""
    if name == "numba":
        return Numba()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it has to say of its own packages
        module = pytest.importorskip(name, exc_type=ImportError)
    if name == "torch" and not module.cuda.is_available():
        pytest.skip("no CUDA device for torch")
    return Torch(module) if name == "torch" else CuPy(module)


class Numba:
    """Arrays of Numba: one way to make them, to fill them and to read them."""

    def __init__(self):
        from numba import cuda

        self.cuda = cuda

    def put(self, array):
        return self.cuda.to_device(array)

    def fill(self, owner, array):
        owner.copy_to_device(array)

    def get(self, owner):
        return owner.copy_to_host()

    def synchronize(self):
        self.cuda.synchronize()


class CuPy:
    """The same for CuPy's."""

    def __init__(self, cupy):
        self.cupy = cupy

    def put(self, array):
        return self.cupy.asarray(array, order="K")

    def fill(self, owner, array):
        owner.set(array)

    def get(self, owner):
        return owner.get(order="A")

    def synchronize(self):
        self.cupy.cuda.Device().synchronize()


class Torch:
    """The same for torch's, that need a gradient if asked."""

    def __init__(self, torch, device="cuda", requires_grad=False):
        self.torch, self.device, self.requires_grad = torch, device, requires_grad

    def put(self, array):
        tensor = self.torch.from_numpy(np.array(array, order="K")).to(self.device)
        return tensor.requires_grad_(self.requires_grad)

    def fill(self, owner, array):
        with self.torch.no_grad():
            owner.copy_(self.torch.from_numpy(np.array(array, order="K")))

    def get(self, owner):
        return owner.detach().cpu().numpy()

    def synchronize(self):
        self.torch.cuda.synchronize()


class Twins:
    """The same parameters and gradients on the host and on a device."""

    def __init__(self, lib, dtypes, shapes=SHAPES, seed=7):
        self.lib, self.rng = lib, np.random.default_rng(seed)
        self.shapes = shapes
        self.dtypes = [dtypes[k % len(dtypes)] for k in range(len(shapes))]
        self.params, self.owners = self.make(self.draw())
        self.grads, self.owned_grads = self.make(self.draw())

    def draw(self):
        """Return an array for each shape."""
        drawn = []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            size = (13, 21) if shape == "F" else tuple(shape)
            array = np.asarray(self.rng.standard_normal(size)).astype(dtype)
            drawn.append(np.array(array, order="F" if shape == "F" else "C"))
        return drawn

    def make(self, arrays):
        """Return copies, and copies on the device; a list as a shape stands for a view."""
        owners = []
        for shape, array in zip(self.shapes, arrays, strict=True):
            if isinstance(shape, list):
                padded = np.concatenate([np.zeros(1, array.dtype), array])
                owners.append(self.lib.put(padded)[1:])
            else:
                owners.append(self.lib.put(array))
        return [np.array(array, order="K") for array in arrays], owners

    def fill(self, arrays):
        """Write gradients, on both sides; leave the values as they are where one is None."""
        for grad, owner, array in zip(self.grads, self.owned_grads, arrays, strict=True):
            if array is not None:
                grad[...] = array
                if array.size:
                    self.lib.fill(owner, array)

    def check(self, host, device):
        """Compare every bit of parameters, gradients, state and counts."""
        for k, (mine, theirs) in enumerate(zip(self.params, self.owners, strict=True)):
            assert bits(mine) == bits(self.lib.get(theirs)), f"params[{k}]"
        for k, (mine, theirs) in enumerate(zip(self.grads, self.owned_grads, strict=True)):
            assert bits(mine) == bits(self.lib.get(theirs)), f"grads[{k}]"
        check_state(host, device)


def attempt(opt, grads, step_options):
    """Return what a step told, or what it raised where gradients are not finite."""
    try:
        return opt.step(grads, **step_options)
    except FloatingPointError as error:
        return error


def check_state(host, device):
    """Compare two optimizers' ``state_dict``, wherever they keep it."""
    mine, theirs = host.state_dict(), device.state_dict()
    assert mine["step_count"] == theirs["step_count"]
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, state in mine["state"].items():
        assert state.keys() == theirs["state"][key].keys()
        for name, value in state.items():
            assert bits(value) == bits(theirs["state"][key][name]), (key, name)


def bits(array):
    """Return shape, dtype and bytes; NaN has only one pattern here, none being promised."""
    array = np.array(array)
    if array.dtype.kind == "f":
        array[np.isnan(array)] = np.nan
    return array.shape, array.dtype, array.tobytes()


def same_run(lib, dtypes, mode, steps, every, shapes=SHAPES, factor=1.0, bad=()):
    """Take steps on the host and on the device; compare from time to time.

    Gradients are multiplied by ``factor``; those of the steps of ``bad`` hold NaN or
    infinity. Some gradients are None at times.
    """
    options, step_options = MODES[mode] if isinstance(mode, str) else mode
    twins = Twins(lib, dtypes, shapes)
    host = fastadam.Adam(twins.params, **options)
    device = fastadam.Adam(twins.owners, **options)
    drawn = [twins.draw() for _ in range(8)]
    results = []
    for step in range(steps):
        # Another scale each time, some below and some above what is clipped.
        scale = factor * 2.0 ** (step % 23 - 16)
        with np.errstate(all="ignore"):
            arrays = [(scale * a).astype(a.dtype) for a in drawn[step % len(drawn)]]
        if step in bad:
            arrays[-1 - step % 3].flat[0] = (np.nan, np.inf, -np.inf)[step % 3]
        twins.fill(arrays)
        absent = {step % len(shapes)} if step % 5 == 3 else set()
        mine, theirs = (
            [None if k in absent else grad for k, grad in enumerate(grads)]
            for grads in (twins.grads, twins.owned_grads)
        )
        results.append((attempt(host, mine, step_options), attempt(device, theirs, step_options)))
        if step % every == every - 1 or step == steps - 1:
            for expected, found in results:
                assert repr(expected) == repr(found)
            results.clear()
            twins.check(host, device)
    return host, device


@functools.cache
def spinner():
    from numba import cuda

    def spin(milliseconds):
        for _ in range(milliseconds):
            cuda.nanosleep(1_000_000)

    return cuda.jit("void(int64)")(spin)


def spin(stream, milliseconds=200):
    """Keep a stream of any library busy, given its handle."""
    from numba import cuda

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one thread is few: that is meant
        kernel = spinner()[1, 1, cuda.external_stream(stream) if stream else 0]
    kernel(milliseconds)


def spin_once():
    """Compile and load the kernel of `spin`, so that it starts at once from then on."""
    spin(0, 0)
    from numba import cuda

    cuda.synchronize()


def main():
    """Run every kernel there is, on arrays of every layout, and check what comes of it."""
    shapes = ((0,), (), (5,), (33, 9), [37], [4_097], "F", (17_000,))
    for mode, dtypes in itertools.product(MODES, DTYPES.values()):
        same_run(Numba(), dtypes, mode, 4, 4, shapes, bad=(2,) if mode == "everything" else ())
    # Squares that must be scaled.
    same_run(Numba(), ("f8",), MODES["clip"], 3, 3, shapes, factor=1e200)
    kernels = {"amsgrad": True, "ema_decay": 0.5}
    for options in ({}, *({name: kernels[name]} for name in kernels), kernels):
        for zero_grad in (False, True):
            same_run(Numba(), ("f8", "f4"), (options, {"zero_grad": zero_grad}), 2, 2, shapes)
    print("the same bits")


if __name__ == "__main__":
    main()
