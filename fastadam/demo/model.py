"""A character-level transformer with 4,192 parameters, and its gradient.

At each position of a name the model sees the letters so far and predicts
the next one. Comments give the axes of an array: T positions, C channels
(16), H heads (4, of C/H = 4 channels each).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastadam.demo.data import END, VOCAB_SIZE, decode

try:
    import autograd.numpy as anp
    from autograd import value_and_grad
    from autograd.tracer import getval
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'the names model needs autograd: pip install "fastadam[demo]"', name=error.name
    ) from error

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

__all__ = ["CONTEXT", "SHAPES", "Params", "init_params", "logits", "loss", "loss_and_grads"]
__all__ += ["sample"]

Params: TypeAlias = dict[str, NDArray[Any]]
"""Arrays by name; the names and shapes are those of `SHAPES`."""

# An array, or autograd's box around one, which notes down what is computed with it.
Traced: TypeAlias = Any

CONTEXT = 16  # positions; of a name of 16 letters or more the model sees the first 16
WIDTH = 16
HEADS = 4
MLP_WIDTH = 64

SHAPES = {
    "wte": (VOCAB_SIZE, WIDTH),  # token embedding
    "wpe": (CONTEXT, WIDTH),  # position embedding
    "lm_head": (VOCAB_SIZE, WIDTH),
    "attn_wq": (WIDTH, WIDTH),
    "attn_wk": (WIDTH, WIDTH),
    "attn_wv": (WIDTH, WIDTH),
    "attn_wo": (WIDTH, WIDTH),
    "mlp_fc1": (MLP_WIDTH, WIDTH),
    "mlp_fc2": (WIDTH, MLP_WIDTH),
}


def init_params(rng: np.random.Generator, dtype: DTypeLike = np.float64) -> Params:
    """Fresh parameters: normal with standard deviation 0.02.

    The two matrices that end a branch, ``attn_wo`` and ``mlp_fc2``, start
    at zero: at first attention and MLP add nothing to the residual
    stream, and training lets them in.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the draws, which do not depend on `dtype`.
    dtype : dtype, default float64
        float32 or float64.

    Returns
    -------
    dict of str to ndarray
        Nine C-contiguous arrays, 4,192 numbers in all.

    Examples
    --------
    >>> import numpy as np
    >>> from fastadam.demo.model import init_params
    >>> params = init_params(np.random.default_rng(42))
    >>> sum(array.size for array in params.values())
    4192
    """
    params = {name: rng.normal(0.0, 0.02, shape).astype(dtype) for name, shape in SHAPES.items()}
    params["attn_wo"][:] = 0
    params["mlp_fc2"][:] = 0
    return params


def logits(params: Params, tokens: NDArray[np.intp]) -> NDArray[Any]:
    """Scores of every possible next token, at every position.

    Parameters
    ----------
    params : dict of str to ndarray
        As from `init_params`.
    tokens : ndarray of intp, shape (T,)
        What was read so far, T at most 16. Row t of the result depends on
        tokens 0 to t only.

    Returns
    -------
    ndarray, shape (T, 27)
        Unnormalised log-probabilities, in the dtype of `params`.
    """
    x = params["wte"][tokens] + params["wpe"][: len(tokens)]  # (T, C)
    x = _rmsnorm(x)
    x = x + _attention(params, _rmsnorm(x))
    x = x + _mlp(params, _rmsnorm(x))
    scores: NDArray[Any] = x @ params["lm_head"].T
    return scores


def _attention(params: Params, x: Traced) -> Traced:
    q, k, v = (_split_heads(x @ params[name].T) for name in ("attn_wq", "attn_wk", "attn_wv"))
    _, length, head_width = q.shape
    scores = q @ anp.swapaxes(k, 1, 2) * head_width**-0.5  # (H, T, T): the row looks at the column
    # A position may not look at the letters after it: their weight is exp(-inf) = 0.
    future = np.triu(np.full((length, length), -np.inf, x.dtype), k=1)
    mixed = anp.exp(_log_softmax(scores + future)) @ v  # (H, T, C/H)
    return anp.swapaxes(mixed, 0, 1).reshape((length, WIDTH)) @ params["attn_wo"].T


def _split_heads(x: Traced) -> Traced:
    return anp.swapaxes(x.reshape((len(x), HEADS, WIDTH // HEADS)), 0, 1)  # (H, T, C/H)


def _mlp(params: Params, x: Traced) -> Traced:
    hidden = anp.maximum(x @ params["mlp_fc1"].T, 0.0)  # (T, 64)
    return (hidden * hidden) @ params["mlp_fc2"].T


def _rmsnorm(x: Traced) -> Traced:
    # Not anp.mean: its derivative divides by a NumPy integer, which turns float32 to float64.
    mean_square = anp.sum(x * x, axis=-1, keepdims=True) / WIDTH
    return x / anp.sqrt(mean_square + 1e-5)


def _log_softmax(x: Traced) -> Traced:
    # softmax(x) equals softmax(x - c) for any c. The maximum keeps exp from overflowing; getval
    # hides it from autograd, since c drops out of the derivative.
    x = x - np.max(getval(x), axis=-1, keepdims=True)
    return x - anp.log(anp.sum(anp.exp(x), axis=-1, keepdims=True))


def loss(params: Params, tokens: NDArray[np.intp]) -> Traced:
    """Cross-entropy of one name, the mean over its positions.

    Parameters
    ----------
    params : dict of str to ndarray
        As from `init_params`.
    tokens : ndarray of intp, shape (n + 2,)
        As from `encode`: a name between two end tokens. Only the first
        16 predictions count.

    Returns
    -------
    floating scalar
        In nats and in the dtype of `params`. A uniform guess among the
        27 tokens has log(27) = 3.296.
    """
    tokens = tokens[: CONTEXT + 1]
    inputs, targets = tokens[:-1], tokens[1:]
    log_probs = _log_softmax(logits(params, inputs))  # (T, 27)
    # Divided before the sum: NumPy 1 makes a float32 scalar over an integer a float64.
    return -anp.sum(log_probs[np.arange(len(targets)), targets] / len(targets))


_value_and_grad = value_and_grad(loss)


def loss_and_grads(params: Params, tokens: NDArray[np.intp]) -> tuple[float, Params]:
    """Loss of one name and its gradient.

    Parameters
    ----------
    params : dict of str to ndarray
        As from `init_params`; not modified.
    tokens : ndarray of intp, shape (n + 2,)
        As from `encode`.

    Returns
    -------
    value : float
        See `loss`.
    grads : dict of str to ndarray
        C-contiguous, with the names, shapes and dtypes of `params`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastadam.demo.data import encode
    >>> from fastadam.demo.model import init_params, loss_and_grads
    >>> params = init_params(np.random.default_rng(42))
    >>> value, grads = loss_and_grads(params, encode("ada"))
    >>> round(value, 1), grads["wte"].shape
    (3.3, (27, 16))
    """
    value, grads = _value_and_grad(params, tokens)
    # The gradient of a transposed matrix may come back transposed in memory.
    return float(value), {name: np.ascontiguousarray(grad) for name, grad in grads.items()}


def sample(params: Params, rng: np.random.Generator, temperature: float = 0.5) -> str:
    """Draw one name, letter by letter, until the end token or 16 letters.

    Parameters
    ----------
    params : dict of str to ndarray
        As from `init_params`, trained.
    rng : numpy.random.Generator
        Source of the draws.
    temperature : float, default 0.5
        Divides the logits: below 1 the likely letters become likelier.

    Returns
    -------
    str
        May be empty, if the end token came first.

    Raises
    ------
    FloatingPointError
        If the model gives infinity or NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from fastadam.demo.model import init_params, sample
    >>> rng = np.random.default_rng(42)
    >>> name = sample(init_params(rng), rng)
    >>> len(name) <= 16
    True
    """
    tokens = [END]
    while len(tokens) <= CONTEXT:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            last = logits(params, np.array(tokens, dtype=np.intp))[-1]
        if not np.isfinite(last).all():
            raise FloatingPointError("the model's logits must be finite, got infinity or NaN")
        # In float64, so that the probabilities sum to 1 as closely as rng.choice asks.
        probs = np.exp(_log_softmax(last.astype(np.float64) / temperature))
        token = int(rng.choice(VOCAB_SIZE, p=probs))
        if token == END:
            break
        tokens.append(token)
    return decode(tokens)
