"""Runs that are saved and gone on with, under every option. Run as a script, in a new process.

``resume_run.py straight FOLDER STEPS POINTS`` takes every run through all its steps, saves it at
some points, and writes down a digest of each step. ``resume_run.py resume FOLDER STEPS POINTS``
goes on from each of those files, and writes down the same. Nothing else is shared.
"""

import functools
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

import fastadam
from fastadam import schedules

# More than go through in one thread, and no whole number of vectors.
from fastadam.cpu import kernels

# More than go through in one thread, and no whole number of vectors.
LARGE = kernels.SERIAL_BELOW + 37
SMALL = [(3, 5), (), (0,), (18,)]
SHAPES = {
    "f4": [("f4", shape) for shape in SMALL],
    "f8": [("f8", shape) for shape in SMALL],
    "both": [("f4", (17,)), ("f8", (4, 3)), ("f4", ()), ("f8", (5,))],
    "large f4": [("f4", (LARGE,)), ("f4", (3,))],
    "large f8": [("f8", (LARGE,)), ("f8", ())],
    "large both": [("f4", (LARGE,)), ("f8", (LARGE,))],
}
# What a constructor must be told again; the rest is in the file.
STRUCTURE = ("amsgrad", "ema_decay")


def options_of(steps):
    """Return the options of each kind of run."""
    rise = schedules.warmup(schedules.cosine(steps - steps // 8), steps // 8)
    parts = (schedules.linear(steps // 3), steps // 3), (schedules.constant(0.5), 5)
    return {
        "plain": {},
        "amsgrad": {"amsgrad": True},
        "l2": {"weight_decay": 0.1},
        "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "maximize": {"maximize": True},
        "cosine": {"schedule": schedules.cosine(steps)},
        "warmup": {"schedule": rise},
        "chain": {"schedule": schedules.chain(*parts, schedules.cosine_restarts(7))},
        "clip": {"max_grad_norm": 0.5},
        "norm": {"max_grad_norm": np.inf},
        "skip": {"nonfinite": "skip"},
        "nan": {},
        "ema": {"ema_decay": 0.99},
        "grad_scale": {},
        "absent": {},
        "own grads": {},
        "groups": {},
        "changed": {},
        "everything": {
            "weight_decay": 0.1,
            "amsgrad": True,
            "schedule": rise,
            "max_grad_norm": 0.5,
            "nonfinite": "skip",
            "ema_decay": 0.9,
        },
    }


def cases():
    """Return the names of all runs: of the options, and of the shapes."""
    options = list(options_of(8))
    large = ("large f4", "large f8", "large both")
    return [
        (name, shapes)
        for k, name in enumerate(options)
        for shapes in ("f4", "f8", "both", large[2 if name == "everything" else k % 2])
    ]


@functools.cache
def draws(seed, dtype, shape):
    """Return numbers, the same under every NumPy, that nobody may write to."""
    generator = np.random.Generator(np.random.PCG64([seed, *shape, dtype == "f4"]))
    values = np.asarray(generator.integers(-(2**20), 2**20, shape) / 2**20, dtype)
    values.flags.writeable = False
    return values


class Run:
    """An optimizer, its parameters, and what is done to it at each step.

    A ``fresh`` one has other values, and hyperparameters of its own.
    """

    def __init__(self, name, shapes, steps, *, fresh):
        self.name, self.steps, self.shapes = name, steps, SHAPES[shapes]
        self.params = [np.array(draws(int(fresh), *each)) for each in self.shapes]
        if len(self.params) > 3:
            self.params[0] = np.asfortranarray(self.params[0])
        options = options_of(steps)[name]
        if fresh:
            own = {"lr": 0.5, "betas": (0.5, 0.6), "eps": 1e-3}
            options = {key: options[key] for key in STRUCTURE if key in options} | own
        self.grouped = name in ("groups", "everything")
        params = self.params
        if self.grouped:
            second = {"b": params[1]}, {"lr": 0.02, "betas": (0.5, 0.75)}
            groups = [(params[:1], {}), second, (params[2:], {"weight_decay": 0.2})]
            params = [{"params": p, **({} if fresh else own)} for p, own in groups]
        self.opt = fastadam.Adam(params, **options)
        state = self.opt.state
        self.arrays = [
            *self.params,
            *(a for s in state.values() for n, a in s.items() if n != "step"),
        ]
        self.bytes = [a.ravel("K").view(np.uint8) for a in self.arrays]

    def wrap(self, grads):
        return [grads[:1], {"b": grads[1]}, grads[2:]] if self.grouped else grads

    def change(self, step):
        """Set hyperparameters, on the way, in the runs that are about that."""
        opt = self.opt
        if self.name == "groups" and step % 10 == 4:
            opt.param_groups[1]["lr"] *= 0.75
            opt.param_groups[2]["betas"] = (0.5, 0.5 + 0.4 * step / self.steps)
        if self.name == "changed" and step == self.steps // 3:
            opt.lr, opt.max_grad_norm = 0.003, 0.25
            opt.param_groups[0].update(eps=1e-6, weight_decay=0.3, maximize=True)
        if self.name == "changed" and step == self.steps // 2:
            opt.schedule, opt.nonfinite = schedules.exponential(0.99), "skip"
        if self.name == "changed" and step == 2 * self.steps // 3:
            opt.max_grad_norm, opt.param_groups[0]["decoupled_weight_decay"] = None, True

    def step(self, step):
        """Take a step; return a digest of all that can be seen of it."""
        self.change(step)
        grads = [draws(100 + step % 5, *each) for each in self.shapes]
        # In the shapes' own memory order, and by another factor each step.
        grads = [
            np.copyto(g := np.empty_like(p), d) or g
            for p, d in zip(self.params, grads, strict=True)
        ]
        grads[0] *= grads[0].dtype.type(1 + step % 7)
        options = {}
        if self.name in ("skip", "everything") and step % 6 == 3:
            grads[step % 2][(0,) * grads[step % 2].ndim] = (np.nan, np.inf, -np.inf)[step % 3]
        if self.name == "nan" and step == self.steps // 2:
            grads[1][(0,) * grads[1].ndim] = np.nan
        if self.name in ("grad_scale", "everything"):
            options["grad_scale"] = (1.0, 3.0, 1024.0)[step % 3]
        if self.name in ("absent", "everything"):
            grads = [None if (step + k) % 4 == 0 else grad for k, grad in enumerate(grads)]
        if self.name == "own grads":
            for own, grad in zip(self.opt.grads, grads, strict=True):
                own += grad
            result = self.opt.step(zero_grad=step % 3 == 0)
            # They are no part of a checkpoint: all that would be left in them is taken out.
            for own in self.opt.grads:
                own[...] = 0
        else:
            result = self.opt.step(self.wrap(grads), **options)
        return result

    def digest(self, result):
        """Return one of all bits: arrays, counts, hyperparameters, and what the step returned."""
        opt = self.opt
        options = [[v for n, v in g.items() if n != "params"] for g in opt.param_groups]
        counts = opt.step_count, [s["step"] for s in opt.state.values()]
        told = result.step, result.lr.hex(), (result.grad_norm or 0.0).hex(), result.skipped
        settings = opt.schedule, opt.max_grad_norm, opt.nonfinite
        digest = hashlib.blake2b(repr((options, counts, told, settings)).encode(), digest_size=8)
        for array in self.bytes:
            digest.update(array)
        return digest.hexdigest()

    def go(self, first, points=(), path_of=None):
        """Take all steps from one on, and save before those that are points.

        Returns the digests: of each step, but of one in 16 where arrays are large.
        """
        digests = {}
        every = 16 if any(array.size > 1000 for array in self.params) else 1
        for step in range(first, self.steps):
            if step in points:
                fastadam.save(path_of(step), self.opt, extra={"step": step})
            result = self.step(step)
            if step % every == 0 or step == self.steps - 1:
                digests[step] = self.digest(result)
        return digests


def length_of(case, steps):
    """Return how many steps a run has: of many long ones, a part, where threads are started."""
    name, shapes = case
    return steps // 4 if shapes.startswith("large") and name != "everything" else steps


def points_of(case, steps, points):
    """Return where a run is saved: random, and for each run others."""
    seed = cases().index(case)
    return sorted(np.random.default_rng(seed).permutation(steps)[:points].tolist())


def main(mode, folder, steps, points):
    """Take all runs, as the module's docstring says; return digests by run and point."""
    found = {}
    for case in cases():
        length = length_of(case, steps)
        places = points_of(case, length, points)

        def path_of(step, case=case):
            return folder / f"{'-'.join(case)}-{step}.safetensors"

        if mode == "straight":
            run = Run(*case, length, fresh=False)
            found["/".join(case)] = {"0": run.go(0, places, path_of)}
        else:
            found["/".join(case)] = {}
            for place in places:
                run = Run(*case, length, fresh=True)
                assert fastadam.load(path_of(place), run.opt).extra == {"step": place}
                found["/".join(case)][place] = run.go(place)
    return found


if __name__ == "__main__":
    os.fsync = lambda _: None  # thousands of files, that no loss of power will be the end of
    folder = Path(sys.argv[2])
    found = main(sys.argv[1], folder, int(sys.argv[3]), int(sys.argv[4]))
    (folder / sys.argv[5]).write_text(json.dumps(found), encoding="utf-8")
