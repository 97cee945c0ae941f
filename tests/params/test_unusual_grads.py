"""Gradients that are not plain arrays of their own memory: taken, or refused, one by one."""

import math

import numpy as np
import pytest

import fastadam
from fastadam.cpu import gradients
from fastadam.objects import ObjectAdam
from fastadam.params import arrays

COUNT, PLACE = 1000, 400


class Subclass(np.ndarray):
    pass


class Interface:
    """What is no array, and says where one lies."""

    def __init__(self, array):
        self._array = array

    @property
    def __array_interface__(self):
        return self._array.__array_interface__


class DLPack:
    def __init__(self, array, device=None):
        self._array, self._device = array, device

    def __dlpack_device__(self):
        return self._device or self._array.__dlpack_device__()

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)


def memory_map(folder, values):
    array = np.memmap(folder / "grad", values.dtype, "w+", shape=values.shape)
    array[...] = values
    return array


def read_only(values):
    array = values.copy()
    array.flags.writeable = False
    return array


KINDS = {
    "subclass": lambda _, values: values.view(Subclass),
    "memmap": memory_map,
    "read-only": lambda _, values: read_only(values),
    "interface": lambda _, values: Interface(values),
    "dlpack": lambda _, values: DLPack(values),
}


@pytest.fixture
def seen(monkeypatch):
    """The gradients that are looked at in Python."""
    found = []

    def note(grad, *others):
        found.append(grad)
        return arrays.take_grad(grad, *others)

    monkeypatch.setattr(gradients, "take_grad", note)
    return found


def draw(rng, shape=(7,)):
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(COUNT)]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clip"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_costs_only_itself(rng, tmp_path, seen, kind, options):
    grads = draw(rng)
    params, twins = ([np.ones_like(g) for g in grads] for _ in range(2))
    opt, other = fastadam.Adam(params, **options), fastadam.Adam(twins, **options)
    unusual = [*grads]
    unusual[PLACE] = KINDS[kind](tmp_path, grads[PLACE])
    for _ in range(3):
        opt.step(unusual)
    assert len(seen) == (0 if kind == "read-only" else 3)
    assert all(grad is unusual[PLACE] for grad in seen)
    for _ in range(3):
        other.step(grads)
    assert b"".join(p.tobytes() for p in params) == b"".join(p.tobytes() for p in twins)


def test_a_numpy_scalar_costs_only_itself(rng, seen):
    """What arithmetic on arrays of no dimension gives, such as ``.sum()``."""
    grads = draw(rng, ())
    params = [np.zeros((), np.float32) for _ in grads]
    grads[PLACE] = grads[PLACE] * np.float32(1)
    assert isinstance(grads[PLACE], np.float32)
    opt = fastadam.Adam(params, lr=0.5)
    opt.step([np.asarray(grad) if k != PLACE else grad for k, grad in enumerate(grads)])
    assert len(seen) == 1
    assert params[PLACE] == pytest.approx(-0.5 * np.sign(grads[PLACE]), rel=1e-6)


def test_each_of_many_is_looked_at_once(rng, seen):
    grads = [Interface(grad) for grad in draw(rng)]
    opt = fastadam.Adam([np.zeros(7, np.float32) for _ in grads])
    opt.step(grads)
    assert len(seen) == COUNT


def test_gradients_may_change_their_kind(seen):
    """The one that was unusual is not so for good, and None is not."""
    params = [np.zeros(7, np.float32) for _ in range(3)]
    opt = fastadam.Adam(params)
    ones = [np.ones(7, np.float32) for _ in range(3)]
    opt.step([ones[0], Interface(ones[1]), ones[2]])
    opt.step(ones)
    opt.step([None, ones[1], Interface(ones[2])])
    opt.step([ones[0], None, ones[2]])
    assert len(seen) == 2
    assert [opt.state[k]["step"] for k in range(3)] == [3, 3, 4]


class TestRefused:
    def refuse(self, grad, error, message, **options):
        params = [np.ones(3, np.float32), np.ones((2, 2), np.float32)]
        opt = fastadam.Adam(params)
        ones = np.ones((2, 2), np.float32)
        with pytest.raises(error, match=message):
            opt.step([grad, ones], **options)
        assert all((param == 1.0).all() for param in params)
        assert opt.step_count == 0
        opt.step([np.ones(3, np.float32), ones])
        assert opt.step_count == 1

    def test_overlapping(self):
        """Also where only one of the two is unusual: what it shares memory with is named."""
        memory = np.ones(3, np.float32)
        params = [np.zeros(3, np.float32) for _ in range(2)]
        opt = fastadam.Adam(params)
        for grads in ([Interface(memory), memory], [memory, memory.view(Subclass)]):
            with pytest.raises(ValueError, match=r"^grads\[0\] and grads\[1\] must not share"):
                opt.step(grads)
        with pytest.raises(ValueError, match=r"^grads\[1\] must not share memory with params\[0"):
            opt.step([memory, Interface(params[0])])
        assert opt.step_count == 0

    @pytest.mark.parametrize("kind", ["read-only", "dlpack read-only", "scalar"])
    def test_read_only_where_it_is_to_be_zeroed(self, kind):
        grad = read_only(np.ones(3, np.float32))
        if kind == "scalar":
            opt = fastadam.Adam(np.ones(()))
            with pytest.raises(ValueError, match=r"^grads must be writable .*a NumPy scalar$"):
                opt.step(np.float64(2.0), zero_grad=True)
            return
        if kind != "read-only":
            if np.lib.NumpyVersion(np.__version__) < "2.1.0":
                pytest.skip("NumPy exports no read-only array")
            grad = DLPack(grad)
        self.refuse(
            grad, ValueError, r"^grads\[0\] must be writable .*a read-only array$", zero_grad=True
        )

    @pytest.mark.parametrize(
        ("grad", "error", "message"),
        [
            (Interface(np.ones(3)), TypeError, r"^grads\[0\]\.dtype must be its parameter's"),
            (Interface(np.ones(4, np.float32)), ValueError, r"^grads\[0\]\.shape must be"),
            (Interface(np.ones(6, np.float32)[::2]), ValueError, r"^grads\[0\] must be contiguo"),
            (DLPack(np.ones(3), (2, 0)), TypeError, r"on the CPU, got .*\.DLPack$"),
            (np.ma.ones(3), TypeError, r"^grads\[0\] must be a numpy.ndarray, .*MaskedArray$"),
            ([1.0, 1.0, 1.0], TypeError, r"^grads\[0\] must be a numpy.ndarray, .* got list$"),
        ],
        ids=["dtype", "shape", "strides", "device", "masked", "list"],
    )
    def test_what_does_not_fit(self, grad, error, message):
        self.refuse(grad, error, message)

    def test_what_would_be_copied(self):
        """An object that can be made an array of, but says nothing of its memory."""

        class Copied:
            @property
            def __array_interface__(self):
                raise AttributeError("no memory")

            def __array__(self, dtype=None, copy=None):
                return np.ones(3, np.float32)

        self.refuse(Copied(), TypeError, r"^grads\[0\] must be readable .* without a copy, got .*")

    def test_what_moves_another_gradient_while_it_is_read(self):
        grads = []

        class Moving:
            @property
            def __array_interface__(self):
                grads[1].resize(10, refcheck=False)
                self.kept = np.ones(3)
                return self.kept.__array_interface__

        grads[:] = Moving(), np.ones(1000)
        opt = fastadam.Adam([np.zeros(3), np.zeros(1000)])
        with pytest.raises(RuntimeError, match="must not change while a step looks at them"):
            opt.step(grads)
        assert opt.step_count == 0

    def test_what_cannot_be_read(self):
        class Broken:
            @property
            def __array_interface__(self):
                raise BufferError("gone")

        self.refuse(
            Broken(), TypeError, r"^grads\[0\] must be readable .* without a copy, got .*gone$"
        )


def test_jax(optional):
    """Its arrays are immutable: gradients need only be read, once they have been made."""
    jax = optional("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        made = jax.jit(lambda x: x @ x)(jax.numpy.ones((700, 700), np.float32))
        param = np.zeros((700, 700), np.float32)
        opt = fastadam.Adam(param, lr=0.5)
        opt.step(made)
        assert opt.state[0]["exp_avg"][3, 5] == pytest.approx(70.0)
        assert (param == param[0, 0]).all()
        with pytest.raises(ValueError, match=r"^grads must be writable for zero_grad=True"):
            opt.step(made, zero_grad=True)
        with pytest.raises(TypeError, match="JAX arrays cannot be updated in place"):
            fastadam.Adam(made)


def test_torch(optional):
    torch = optional("torch")
    param, grad = np.zeros((2, 3), np.float32), torch.ones(2, 3)
    opt = fastadam.Adam({"w": param}, lr=0.5)
    opt.step({"w": grad}, zero_grad=np.lib.NumpyVersion(np.__version__) >= "2.1.0")
    assert param == pytest.approx(-0.5)
    with pytest.raises(TypeError, match=r"^grads\['w'\] must be readable .*require gradient"):
        opt.step({"w": torch.ones(2, 3, requires_grad=True)})


class TestCompiledSearch:
    """NaN, and the largest element, are found by kernels, not by NumPy in each gradient."""

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_a_skipped_step(self, rng, kernel_calls, dtype):
        grads = [rng.standard_normal(5).astype(dtype) for _ in range(20)]
        grads[13][2] = np.nan
        opt = fastadam.Adam([np.zeros(5, dtype) for _ in grads], nonfinite="skip")
        result = opt.step(grads)
        assert (result.skipped, result.step) == (True, 0)
        assert math.isnan(result.grad_norm)
        name = np.dtype(dtype).name
        largest = ("sum", name, "largest")
        assert kernel_calls == [("sum", name), *([largest] * (2 if dtype == np.float64 else 1))]

    @pytest.mark.parametrize("where", [0, 8191, 8192, 30_000, 65_600])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_the_first_is_named(self, dtype, value, where):
        """Of several, in several chunks and dtypes, by any number of threads."""
        params = [np.zeros(9, np.float64), np.zeros(65_700, dtype), np.zeros(9, np.float32)]
        grads = [np.ones_like(param) for param in params]
        grads[1][where], grads[1][where + 50], grads[2][1] = value, np.inf, np.nan
        opt = fastadam.Adam(params, nonfinite="raise")
        with pytest.raises(FloatingPointError, match=rf"got {value} at grads\[1\]\[{where}\]$"):
            opt.step(grads)
        grads[0][4] = np.inf
        with pytest.raises(FloatingPointError, match=r"got inf at grads\[0\]\[4\]$"):
            opt.step(grads)

    def test_zeros_in_float32_take_one_pass(self, kernel_calls):
        opt = fastadam.Adam([np.ones(5, np.float32)], max_grad_norm=1.0)
        assert math.copysign(1.0, opt.step([np.full(5, -0.0, np.float32)]).grad_norm) == 1.0
        assert kernel_calls == [("sum", "float32"), ("update", "float32")]

    @pytest.mark.parametrize("values", [[0.0, -0.0], [-0.0, -0.0], []], ids=str)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_the_norm_of_zeros_is_positive(self, dtype, values):
        opt = fastadam.Adam([np.ones(len(values), dtype)], max_grad_norm=1.0)
        norm = opt.step([np.array(values, dtype)]).grad_norm
        assert (norm, math.copysign(1.0, norm)) == (0.0, 1.0)


CASES = {
    "nan beside small": ({"nonfinite": "skip"}, [np.nan, 1e-30], 1e20),
    "nan is named": ({"nonfinite": "raise"}, [np.nan, 1e-30], 1e20),
    "large, unscaled": ({"nonfinite": "raise"}, [3e38, 1.0], 1e-3),
    "clipped away": ({"max_grad_norm": 1e-30}, [1e30, 1e-30], 1e30),
    "infinite": ({"max_grad_norm": 1.0}, [np.inf, 1.0], 1.0),
    "zeros": ({"max_grad_norm": 1.0, "nonfinite": "skip"}, [0.0, 0.0], 1.0),
    "small": ({"ema_decay": 0.9, "eps": 1e-38}, [1e-40, 1e-20], 1.0),
    "huge": ({"lr": 1e30, "weight_decay": 1e-30}, [1e38, -1e38], 1.0),
}


class TestErrstate:
    """The user's is for the user's arithmetic."""

    @pytest.mark.parametrize("name", CASES)
    def test_of_a_step(self, name):
        options, values, scale = CASES[name]
        found = []
        for errors in ("ignore", "raise"):
            params = [np.ones(2, np.float32), np.ones((), np.float64)]
            grads = [np.array(values, np.float32), np.float64(values[0])]
            with np.errstate(all=errors):
                opt = fastadam.Adam(params, **options)
                for _ in range(3):
                    try:
                        result = opt.step(grads, grad_scale=scale)
                    except FloatingPointError as error:
                        result = str(error)
                opt.load_state_dict(opt.state_dict())
            found.append((repr(result), *(param.tobytes() for param in params)))
        assert found[0] == found[1]
        assert "encountered" not in found[0][0]  # NumPy's own word

    def test_of_objects(self):
        class Value:
            def __init__(self, data, grad):
                self.data, self.grad = data, grad

        with np.errstate(all="raise"):
            opt = ObjectAdam([Value(np.ones(2, np.float32), 1e300), Value(1.0, 1e-310)])
            opt.step()
        assert opt.step_count == 1

    def test_an_eps_that_rounds_to_zero_is_refused_by_us(self):
        with (
            np.errstate(all="raise"),
            pytest.raises(ValueError, match=r"^eps must not round to 0"),
        ):
            fastadam.Adam(np.zeros(2, np.float32), eps=1e-50)
        smallest = 2.0**-149
        fastadam.Adam(np.zeros(2, np.float32), eps=smallest)
        with pytest.raises(ValueError, match=r"^eps must not round to 0"):
            fastadam.Adam(np.zeros(2, np.float32), eps=smallest / 2)
