"""The names model: its data, its gradient, and every loss of a training run."""

import doctest
import importlib
import importlib.resources
import math
from types import SimpleNamespace

import numpy as np
import pytest

import fastadam
from fastadam.demo import data

LR, BETAS, EPS, NUM_STEPS = 1e-2, (0.9, 0.95), 1e-8, 1000


class TutorialAdam:
    """The tutorial's loop as it stands there, in NumPy: shares no line with fastadam."""

    def __init__(self, params):
        self.params = params
        self.m = {name: np.zeros_like(p) for name, p in params.items()}
        self.v = {name: np.zeros_like(p) for name, p in params.items()}
        self.steps = 0

    def step(self, grads):
        step, (b1, b2) = self.steps, BETAS
        lr_t = LR * 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
        for name, p in self.params.items():
            g = grads[name]
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g**2
            m_hat = self.m[name] / (1 - b1 ** (step + 1))
            v_hat = self.v[name] / (1 - b2 ** (step + 1))
            p -= lr_t * m_hat / (np.sqrt(v_hat) + EPS)
        self.steps += 1
        return SimpleNamespace(step=step, lr=lr_t)


class ShadowedTutorialAdam(TutorialAdam):
    """Gives fastadam, on a copy of the parameters, the same gradients."""

    def __init__(self, params):
        super().__init__(params)
        self.shadow = {name: p.copy() for name, p in params.items()}
        self.shadow_optimizer = fast_adam(self.shadow)

    def step(self, grads):
        self.shadow_optimizer.step(grads)
        return super().step(grads)


def fast_adam(params):
    schedule = fastadam.schedules.cosine(NUM_STEPS)
    return fastadam.Adam(params, lr=LR, betas=BETAS, eps=EPS, schedule=schedule)


@pytest.fixture(scope="module")
def model():
    return importlib.import_module("fastadam.demo.model")


@pytest.fixture(scope="module")
def train():
    return importlib.import_module("fastadam.demo.train").train


@pytest.fixture(autouse=True)
def _needs_autograd(optional):
    optional("autograd")


@pytest.fixture(scope="module")
def run(model, train):
    """Train 1,000 float64 steps, once for each optimizer."""
    done = {}

    def once(make_optimizer):
        if make_optimizer not in done:
            params = model.init_params(np.random.default_rng(42))
            optimizer = make_optimizer(params)
            rng = np.random.default_rng(43)
            records = list(
                train(params, data.load_names(), optimizer, num_steps=NUM_STEPS, rng=rng)
            )
            done[make_optimizer] = optimizer, params, records
        return done[make_optimizer]

    return once


def random_params(model, rng, dtype=np.float64):
    """Parameters of a size at which every branch of the model matters."""
    shapes = model.SHAPES.items()
    return {name: rng.normal(0, 0.3, shape).astype(dtype) for name, shape in shapes}


def test_names():
    names = data.load_names()
    assert len(names) == 5163
    assert names == sorted(set(names))
    assert set("".join(names)) == set(data.ALPHABET)
    assert max(map(len, names)) == 11
    assert {"mary", "james", "patricia", "john"} <= set(names)
    source = importlib.resources.files("fastadam.demo").joinpath("NAMES.md").read_text("utf-8")
    assert "US Census Bureau" in source
    assert "public\ndomain" in source


def test_tokens():
    for name in ("a", "maria", "z" * 40):
        tokens = data.encode(name)
        assert tokens[0] == tokens[-1] == data.END
        assert len(tokens) == len(name) + 2
        assert data.decode(tokens) == name
    with pytest.raises(ValueError, match=r"letters a to z, got character '-' \(U\+002D\)"):
        data.encode("anne-marie")


def test_4192_parameters_in_9_arrays(model):
    params = model.init_params(np.random.default_rng(0), np.float32)
    assert {name: p.shape for name, p in params.items()} == model.SHAPES
    assert len(params) == 9
    assert sum(p.size for p in params.values()) == 4192
    assert all(p.dtype == np.float32 and p.flags.c_contiguous for p in params.values())
    drawn = np.concatenate([p.ravel() for p in params.values() if p.any()])
    assert drawn.std() == pytest.approx(0.02, rel=0.05)
    assert not params["attn_wo"].any()
    assert not params["mlp_fc2"].any()


def test_same_draws_for_both_dtypes(model):
    wide = model.init_params(np.random.default_rng(1), np.float64)
    narrow = model.init_params(np.random.default_rng(1), np.float32)
    for name, p in wide.items():
        np.testing.assert_array_equal(narrow[name], p.astype(np.float32))


def test_first_loss_is_near_a_uniform_guess(model):
    params = model.init_params(np.random.default_rng(0))
    assert float(model.loss(params, data.encode("maria"))) == pytest.approx(math.log(27), rel=0.05)


def reference_logits(params, tokens):
    """The model once more, one position and one head at a time."""
    out, keys, values = [], [], []

    def norm(x):
        return x / np.sqrt(np.mean(x**2) + 1e-5)

    for position, token in enumerate(tokens):
        x = norm(params["wte"][token] + params["wpe"][position])
        h = norm(x)
        keys.append(params["attn_wk"] @ h)
        values.append(params["attn_wv"] @ h)
        query = params["attn_wq"] @ h
        heads = []
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            scores = np.array([query[part] @ key[part] / 2 for key in keys])
            weights = np.exp(scores) / np.exp(scores).sum()
            heads.append(sum(w * v[part] for w, v in zip(weights, values, strict=True)))
        x = x + params["attn_wo"] @ np.concatenate(heads)
        hidden = np.maximum(params["mlp_fc1"] @ norm(x), 0) ** 2
        x = x + params["mlp_fc2"] @ hidden
        out.append(params["lm_head"] @ x)
    return np.array(out)


@pytest.mark.parametrize("length", [1, 2, 16])
def test_logits_against_one_position_at_a_time(model, rng, length):
    params = random_params(model, rng)
    tokens = rng.integers(0, 27, length)
    expected = reference_logits(params, tokens)
    np.testing.assert_allclose(model.logits(params, tokens), expected, rtol=1e-11, atol=1e-12)


def test_loss_is_the_mean_over_positions_cut_to_the_context(model, rng):
    params = random_params(model, rng)
    for name in ("bo", "abcdefghijklmnopqrstuvwxyz"):
        tokens = data.encode(name)[:17]
        scores = reference_logits(params, tokens[:-1])
        probs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        expected = -np.mean([np.log(p[t]) for p, t in zip(probs, tokens[1:], strict=True)])
        assert float(model.loss(params, data.encode(name))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["a", "katarina", "abcdefghijklmnopqrs"])
def test_gradient_against_finite_differences(model, rng, name):
    params, tokens = random_params(model, rng), data.encode(name)
    value, grads = model.loss_and_grads(params, tokens)
    assert value == float(model.loss(params, tokens))
    h = 1e-5
    for key, p in params.items():
        for index in rng.choice(p.size, 12, replace=False):
            there = np.unravel_index(index, p.shape)
            kept = p[there]
            p[there] = kept + h
            above = float(model.loss(params, tokens))
            p[there] = kept - h
            below = float(model.loss(params, tokens))
            p[there] = kept
            expected = (above - below) / (2 * h)
            assert grads[key][there] == pytest.approx(expected, rel=1e-5, abs=1e-8), (key, there)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_fit_the_parameters(model, rng, dtype):
    params = random_params(model, rng, dtype)
    before = {name: p.copy() for name, p in params.items()}
    assert model.loss(params, data.encode("ada")).dtype == dtype
    value, grads = model.loss_and_grads(params, data.encode("ada"))
    assert isinstance(value, float)
    assert list(grads) == list(params)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert grad.shape == params[name].shape
        assert grad.flags.c_contiguous
        np.testing.assert_array_equal(params[name], before[name])


def test_large_parameters_overflow_nothing(model):
    params = random_params(model, np.random.default_rng(0), np.float32)
    params["lm_head"] *= 1e6
    value, grads = model.loss_and_grads(params, data.encode("ada"))
    assert math.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads.values())


def test_every_loss_equals_the_tutorials(run):
    # Training magnifies rounding: 1,000 steps make of one unit in the last place anything from
    # 1e-12 to 4e-9, depending on the seed. Two spellings of the tutorial's loop in plain NumPy,
    # or its loop in extended precision, part from it by as much as fastadam does. This seed is
    # one that magnifies little; the test after this one depends on no seed.
    ours, theirs = run(fast_adam)[2], run(ShadowedTutorialAdam)[2]
    assert [r.step for r in ours] == list(range(NUM_STEPS))
    np.testing.assert_allclose([r.loss for r in ours], [r.loss for r in theirs], rtol=0, atol=1e-9)
    np.testing.assert_allclose([r.lr for r in ours], [r.lr for r in theirs], rtol=1e-13)


def test_same_gradients_same_parameters(run):
    """Along the tutorial's own path nothing is magnified: 1,000 steps part by rounding alone."""
    optimizer, params, _ = run(ShadowedTutorialAdam)
    for name, p in params.items():
        np.testing.assert_allclose(optimizer.shadow[name], p, rtol=1e-13, atol=1e-13)


def test_it_learns(run):
    losses = [record.loss for record in run(fast_adam)[2]]
    first, last = np.mean(losses[:50]), np.mean(losses[-50:])
    assert last < first - 0.3
    assert last < math.log(27) - 0.7


def test_smoothed_loss(run):
    records = run(fast_adam)[2]
    assert records[0].smoothed_loss == pytest.approx(records[0].loss, rel=1e-12)
    weights = 0.98 ** np.arange(99, -1, -1)
    expected = np.average([r.loss for r in records[:100]], weights=weights)
    assert records[99].smoothed_loss == pytest.approx(expected, rel=1e-12)


def test_a_run_in_two_parts(run, model, train):
    """The second part, of another generator, gives the records of one run to the last bit."""
    names, whole = data.load_names(), run(fast_adam)[2]
    params = model.init_params(np.random.default_rng(42))
    optimizer = fast_adam(params)
    rngs = np.random.default_rng(43), np.random.default_rng(43)
    parts = list(train(params, names, optimizer, num_steps=7, rng=rngs[0]))
    parts += train(
        params,
        names,
        optimizer,
        num_steps=12,
        rng=rngs[1],
        first_step=7,
        average=parts[-1].average,
    )
    for one, other in zip(parts, whole[:12], strict=True):
        assert (one.step, one.loss, one.smoothed_loss, one.lr) == (
            *(other.step, other.loss, other.smoothed_loss, other.lr),
        )


def test_sampled_names_are_seeded_and_mostly_end(model, run):
    _, params, _ = run(fast_adam)
    draws = [
        [model.sample(params, rng) for _ in range(20)]
        for rng in (np.random.default_rng(s) for s in (7, 7, 8))
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 10
    assert np.mean([len(name) < 16 for name in draws[0]]) > 0.7
    assert set("".join(draws[0])) <= set(data.ALPHABET)


def test_a_name_stops_where_the_context_ends(model):
    params = model.init_params(np.random.default_rng(0))
    params["lm_head"][:] = 0
    params["lm_head"][0] = 100 * np.sign(params["wte"].sum(axis=0))
    names = {model.sample(params, np.random.default_rng(s), temperature=1e3) for s in range(30)}
    assert max(map(len, names)) <= 16
    for key in ("wte", "wpe"):
        params[key][:] = np.abs(params[key])
    params["lm_head"][0] = 100
    assert model.sample(params, np.random.default_rng(0)) == "a" * 16


def test_every_name_comes_once_a_round(train, monkeypatch):
    seen = []
    names = ["ada", "bo", "cy"]

    def loss_and_grads(_params, tokens):
        seen.append(data.decode(tokens))
        return 1.0, {}

    monkeypatch.setattr("fastadam.demo.train.loss_and_grads", loss_and_grads)
    still = SimpleNamespace(step=lambda _grads: SimpleNamespace(lr=0.0))
    list(train({}, names, still, num_steps=7, rng=np.random.default_rng(0)))
    assert sorted(seen[:3]) == names
    assert seen[3:6] == seen[:3]
    assert seen[6] == seen[0]


def test_no_names(train):
    with pytest.raises(ValueError, match="names must hold at least one name"):
        list(train({}, [], None, num_steps=1, rng=np.random.default_rng(0)))


def test_divergence_is_told_and_nothing_is_updated(model, train):
    params = model.init_params(np.random.default_rng(0))
    params["lm_head"][:] = np.inf
    with pytest.raises(FloatingPointError, match="loss of step 0 must be finite, got nan"):
        list(train(params, ["ada"], None, num_steps=1, rng=np.random.default_rng(0)))
    with pytest.raises(FloatingPointError, match="logits must be finite"):
        model.sample(params, np.random.default_rng(0))


def test_text_curve():
    from fastadam.demo.figures import text_curve

    lines = text_curve([1.5] * 3, width=5, height=4, ascii_only=True).splitlines()
    assert lines[0] == "1.50 |*****"
    assert text_curve([2.0], width=4, height=2).splitlines()[0] == "2.00 ┤⠉⠉⠉⠉"
    # The two ends of a straight line, and no column without a dot.
    dots = text_curve(range(200, 0, -1), width=50, height=5).splitlines()
    assert len(dots) == 7
    assert dots[0].startswith("199.50 ┤⠉")
    assert dots[4].startswith("  1.50 ┤")
    assert dots[4].endswith("⣀")
    assert all(any(len(row) > 8 + i and row[8 + i] != "⠀" for row in dots[:5]) for i in range(50))
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="values must be finite numbers, at least one"):
            text_curve(bad)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_save_plot(optional, run, tmp_path, ending):
    optional("matplotlib")
    from fastadam.demo.figures import save_plot

    path = tmp_path / f"loss.{ending}"
    save_plot(run(fast_adam)[2], path, title="a title")
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(magic)


@pytest.mark.parametrize("name", ["data", "figures", "model", "train"])
def test_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(f"fastadam.demo.{name}"))
    assert failed == 0
    assert tried > 0


@pytest.mark.parametrize("name", ["data", "figures", "model", "train"])
def test_docstrings(name):
    module = importlib.import_module(f"fastadam.demo.{name}")
    for public in module.__all__:
        member = getattr(module, public)
        if getattr(member, "__module__", None) == module.__name__:
            assert member.__doc__, public
