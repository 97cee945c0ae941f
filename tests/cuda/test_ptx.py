"""Whole steps taken by the PTX that numba-cuda compiles, run on the host: the CPU's bits.

A dozen cases in every run, all of them where FASTADAM_TEST_FULL=1.
"""

import functools
import itertools
import math
import os

import numpy as np
import pytest

pytest.importorskip("numba_cuda", exc_type=ImportError)
pytest.importorskip("cuda.bindings.nvjitlink", exc_type=ImportError)

from numba import config

if config.ENABLE_CUDASIM:
    pytest.skip("reads what is compiled", allow_module_level=True)

from gpu_tools import DTYPES, MODES, Twins, attempt, bits, check_state, same_run
from in_place import Arrays, in_place, program_of
from lazy_driver import Driver

import fastadam
from fastadam import schedules

HOPPER, AMPERE = (9, 0), (8, 0)
FULL = os.environ.get("FASTADAM_TEST_FULL") == "1"
# A number in a list is the size of a view that begins one element into its buffer.
SHAPES = ((0,), (), (5,), (33, 9), [37], [4_099], "F", (2_051,))
EVERYTHING = MODES["everything"]
CASES = {}


def case(name, run, *, sample=False, multiprocessors=2, size=1 << 23):
    """Note a case: a function of what makes arrays, the device it runs on."""
    options = {"multiprocessors": multiprocessors, "size": size}
    marks = [] if sample else [pytest.mark.full]
    CASES[name] = pytest.param(run, options, id=name, marks=marks)


def runs(*arguments):
    """Return a case that takes such steps."""
    return lambda lib: same_run(lib, *arguments)


def pair(twins, **options):
    """Return an optimizer on the host, and one on the device."""
    return [fastadam.Adam(arrays, **options) for arrays in (twins.params, twins.owners)]


def step(opts, twins, grads=None, **options):
    """Take a step with both; what they tell, or raise, must be the same."""
    if grads is not None:
        twins.fill(grads)
    told = [
        repr(attempt(opt, each, options))
        for opt, each in zip(opts, (twins.grads, twins.owned_grads), strict=True)
    ]
    assert told[0] == told[1]


# Every option.

for dtype, dtypes in DTYPES.items():
    for mode in MODES if dtype == "both" else ("plain", "clip", "everything"):
        sample = dtype == "both" and mode in ("plain", "everything")
        case(f"{mode} {dtype}", runs(dtypes, mode, 4, 2, SHAPES), sample=sample)

# Every kernel of the update.

FLAGS = {"amsgrad": True, "ema_decay": 0.9, "zero_grad": True}
for on in itertools.chain.from_iterable(itertools.combinations(FLAGS, n) for n in range(4)):
    for decoupled in (False, True):  # L2, and what leaves it out
        options = {name: FLAGS[name] for name in on if name != "zero_grad"}
        options |= {"weight_decay": 0.1, "decoupled_weight_decay": decoupled}
        run = runs(
            ("f8", "f4"), (options, {"zero_grad": "zero_grad" in on}), 3, 3, (*SHAPES, (1_027,))
        )
        case(f"kernel {'+'.join(on) or 'plain'}{' decoupled' * decoupled}", run)

# Numbers of elements: around chunks, and what is left of each unrolled loop, for parts of
# 8192 elements and less.

for dtype in ("f4", "f8"):
    for size in (8_191, 8_192, 8_193, 16_385):
        case(
            f"chunks of {size} {dtype}",
            runs((dtype,), "everything", 2, 2, ((size,), [size])),
            sample=(dtype, size) == ("f8", 8_193),
        )
    for multiprocessors in (0, 1, 2, 132):
        case(
            f"{multiprocessors} multiprocessors {dtype}",
            runs((dtype,), "l2", 2, 2, ((1,), (1_023,), (1_025,), (2_049,), [4_099], (9_000,))),
            multiprocessors=multiprocessors,
        )
    for mode in ("plain", "everything"):
        case(
            f"elements left over {mode} {dtype}",
            runs((dtype,), mode, 3, 3, [[n] for n in range(100, 2_400, 128)]),
            multiprocessors=0,
            sample=(mode, dtype) == ("everything", "f4"),
        )


def alignments(lib, dtype, param, grad):
    """Four elements are taken at a time only where all of a tensor's arrays are aligned."""
    twins = Twins(lib, (dtype,), [param, param])
    twins.shapes = [grad, grad]
    twins.grads, twins.owned_grads = twins.make(twins.grads)
    opts = pair(twins, ema_decay=0.9)
    for _ in range(2):
        step(opts, twins, twins.draw())
    twins.check(*opts)


for dtype in ("f4", "f8"):
    for name, param, grad in (("param", [130], (130,)), ("grad", (130,), [130])):
        run = functools.partial(alignments, dtype=dtype, param=param, grad=grad)
        case(f"only the {name} is not aligned {dtype}", run)

# Numbers: at the ends of the range, not finite, and anywhere.

FACTORS = {
    "f8": (5e-324, 1e-310, 1e-300, 1e-170, 1e-140, 1e140, 1e155, 1e170, 1e302),
    "f4": (1e-44, 1e-38, 1e-30, 1e20, 3e36),
}
for dtype, factors in FACTORS.items():
    for factor in factors:
        for mode in ("amsgrad", "clip", "everything"):
            case(
                f"{mode} times {factor:g} {dtype}",
                runs((dtype,), mode, 3, 3, ((5,), (1_300,)), factor),
                sample=mode == "everything" and factor in (1e-44, 1e-170, 1e170),
            )


# Of an array of 1300: each turn of a warp, of what is left of its turns, and the last element.
PLACES = [*range(0, 512, 33), 512, *range(1_024, 1_300, 33), 1_299]


def not_finite(lib, dtypes, nonfinite, bad, places):
    """A NaN or an infinity, in one place after another."""
    twins = Twins(lib, dtypes, ((3,), (1_300,), (33,)))
    opts = pair(twins, **{**EVERYTHING[0], "max_grad_norm": 2.0, "nonfinite": nonfinite})
    for place in places:
        drawn = twins.draw()
        drawn[1][place] = bad
        step(opts, twins, drawn, zero_grad=True)
    twins.check(*opts)


for dtype, dtypes in DTYPES.items():
    for nonfinite in ("skip", "raise", "propagate"):
        for bad in (math.nan, math.inf, -math.inf):
            everywhere = nonfinite == "skip" and bad != math.inf
            case(
                f"{bad} {nonfinite} {dtype}",
                functools.partial(
                    not_finite,
                    dtypes=dtypes,
                    nonfinite=nonfinite,
                    bad=bad,
                    places=PLACES if everywhere else (0, 513, 1_299),
                ),
                sample=(dtype, nonfinite) == ("both", "skip") and math.isnan(bad),
            )


def not_finite_somewhere(lib, dtype, sizes, which):
    """A NaN in one array after another: wherever it is when warps, and parts, are compared."""
    twins = Twins(lib, (dtype,), sizes)
    opts = pair(twins, max_grad_norm=2.0, nonfinite="raise")
    for k in which:
        drawn = twins.draw()
        if k is not None:
            drawn[k][-1] = math.nan
        step(opts, twins, drawn)
    twins.check(*opts)


for dtype in ("f4", "f8"):
    run = functools.partial(
        not_finite_somewhere, dtype=dtype, sizes=[(3,)] * 22, which=[*range(22), None]
    )
    case(f"nan in each of 22 arrays {dtype}", run)


def of_zeros(twins):
    """Let all parameters be 0."""
    twins.params, twins.owners = twins.make([np.zeros_like(array) for array in twins.params])
    return twins


def whole_updates(lib, dtype, mode, weight_decay):
    """From parameters of 0, which become the update: not a digit of it is lost in their sum."""
    for seed in (1, 2):
        twins = of_zeros(Twins(lib, (dtype,), ((1_027,), [1_030], [300], [900]), seed))
        opts = pair(twins, **{**MODES[mode][0], "weight_decay": weight_decay})
        step(opts, twins, zero_grad=mode == "everything")
        twins.check(*opts)


def smallest_normal_numbers(lib, dtype, mode, weight_decay):
    """Moments that are as large as the smallest normal number, or just less: these become 0."""
    tiny = np.finfo(dtype).tiny
    less, root = np.nextafter(tiny, dtype(0)), np.sqrt(tiny)
    near = np.array([tiny, -tiny, less, -less, root, np.nextafter(root, dtype(0)), 0, 1], dtype)
    # So that a gradient is its moments, and parameters, of which L2 adds a part, stay 0.
    options = {**MODES[mode][0], "betas": (0.0, 0.0), "lr": 0.0, "max_grad_norm": None}
    twins = of_zeros(Twins(lib, (dtype,), ((1_027,), [1_030])))
    opts = pair(twins, **{**options, "weight_decay": weight_decay})
    for _ in range(3):
        drawn = [twins.rng.choice(near, array.shape) for array in twins.grads]
        step(opts, twins, drawn, zero_grad=mode == "everything")
        twins.check(*opts)


for run in (whole_updates, smallest_normal_numbers):
    for dtype in (np.float32, np.float64):
        for mode in ("plain", "everything"):
            for decay in (0.0, 0.1):
                case(
                    f"{run.__name__} {mode} {dtype.__name__} {decay}",
                    functools.partial(run, dtype=dtype, mode=mode, weight_decay=decay),
                )


def out_of_range_by_its_factor(lib):
    """A finite gradient that grad_scale makes infinite in its own type, beside another."""
    twins = Twins(lib, ("f4", "f8"), ((3,), (3,)))
    opts = pair(twins, nonfinite="skip", max_grad_norm=1.0)
    for scale in (0.5, 1.0, 0.999999999, 1.0000001, 2.0):
        for which in (0, 1):
            drawn = [np.ones(3, "f4"), np.ones(3)]
            drawn[which][1] = np.finfo(drawn[which].dtype).max
            step(opts, twins, drawn, grad_scale=scale)
    twins.check(*opts)


case("out of range by its factor", out_of_range_by_its_factor)


# Many steps, groups and arrays.


def large_step_counts(lib, dtype):
    """The bias corrections of every power of 2, and of other counts, to a billion and more."""
    twins = Twins(lib, (dtype,), [(4,)] * 40)
    opts = pair(twins, betas=(0.9, 1 - 1e-8), weight_decay=0.1)
    state = opts[0].state_dict()
    for k, own in enumerate(state["state"].values()):
        own["step"] = [2**k - 1, 3**k % 2**31, 10**7 + k, k][k % 4]
    for opt in opts:
        opt.load_state_dict(state)
    for _ in range(2):
        step(opts, twins)
    twins.check(*opts)


for dtype in ("f4", "f8"):
    run = functools.partial(large_step_counts, dtype=dtype)
    case(f"large step counts {dtype}", run, sample=dtype == "f8")

for mode in ("everything", "schedule"):
    case(f"fifty steps {mode}", runs(("f4", "f8"), mode, 50, 25, ((5,), [9])))


def groups(lib):
    rng = np.random.default_rng(5)
    starts = [rng.standard_normal(n).astype(d) for n, d in ((300, "f4"), (41, "f8"), (9, "f4"))]
    owners = [lib.put(start) for start in starts]

    def make(arrays):
        each = [
            {"params": arrays[:1], "lr": 0.1, "weight_decay": 0.1},
            {"params": {"w": arrays[1]}, "maximize": True, "betas": (0.5, 0.6)},
            {"params": {}},
        ]
        opt = fastadam.AdamW(each, schedule=schedules.linear(30), max_grad_norm=1.0)
        opt.add_param_group({"params": arrays[2:], "eps": 1e-4})
        return opt

    host, device = make(starts), make(owners)
    for step in range(4):
        drawn = [rng.standard_normal(start.shape).astype(start.dtype) for start in starts]
        host.param_groups[1]["lr"] = device.param_groups[1]["lr"] = 0.01 * step
        told = []
        for opt, (a, b, c) in ((host, drawn), (device, [lib.put(grad) for grad in drawn])):
            told.append(repr(opt.step([[a], {"w": None if step == 1 else b}, {}, [c]])))
        assert told[0] == told[1]
    assert [bits(start) for start in starts] == [bits(lib.get(owner)) for owner in owners]
    check_state(host, device)


case("groups", groups, sample=True)

for count in (257, 600, 1_100):  # more than the block that prepares has threads
    mode = "clip" if count == 600 else "raise"
    run = runs(("f4", "f8"), mode, 2, 2, [(k % 4,) for k in range(count)])
    case(f"{count} arrays", run, sample=count == 600)
case(  # more parts of a norm than are added at a time
    "thousands of arrays",
    functools.partial(
        not_finite_somewhere, dtype="f8", sizes=[(1,)] * (8 * 1024 + 77), which=[None, 8_200]
    ),
    size=1 << 25,
)


def run_on(capability, run, options, program_of=program_of):
    """Run a case; return the programs that took part."""
    driver = Driver(capability, **options)
    with in_place(driver, program_of):
        run(Arrays(driver))
    assert not driver.failures
    assert driver.launched
    return set(driver.launched)


@pytest.mark.parametrize(("run", "options"), CASES.values())
def test_same_bits(run, options):
    """As numba-cuda compiles it for an H100, and for an A100 where that is another text."""
    programs = run_on(HOPPER, run, options)
    if FULL and any(program_of(each.kernel, AMPERE).text != each.text for each in programs):
        run_on(AMPERE, run, options)
