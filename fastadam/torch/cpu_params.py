"""Parameters of a torch module on the CPU, as NumPy arrays over the same memory."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy.typing as npt


class CPUParams:
    """Parameters of a torch module on the CPU, as arrays that fastadam updates.

    Torch's parameters and these arrays share memory. The arrays hold on to
    where a parameter lay when this was made, and torch may give it other memory
    later: ``param.data = other``, ``module.to(...)`` and ``module.half()`` do.
    `grads` then raises, rather than let the optimizer go on in the old memory.

    Parameters
    ----------
    named_parameters : iterable of (str, tensor), or mapping
        As of ``module.named_parameters()``.

    Attributes
    ----------
    arrays : dict
        The parameters by name: what to give to `Adam`.

    Raises
    ------
    TypeError
        If there are no names, as of ``module.parameters()``.
    ValueError
        If a parameter is not on the CPU. (`Adam` takes CUDA tensors as they
        are.)

    Examples
    --------
    >>> import torch, fastadam                            # doctest: +SKIP
    >>> from fastadam.torch import CPUParams
    >>> model = torch.nn.Linear(3, 1)                     # doctest: +SKIP
    >>> params = CPUParams(model.named_parameters())      # doctest: +SKIP
    >>> opt = fastadam.Adam(params.arrays)                # doctest: +SKIP
    >>> model(torch.ones(3)).sum().backward()             # doctest: +SKIP
    >>> opt.step(params.grads()).step                     # doctest: +SKIP
    0
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Any]] | Mapping[str, Any]) -> None:
        given: Any = named_parameters
        pairs = list(given.items() if isinstance(given, Mapping) else _entries(given))
        for pair in pairs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise TypeError(_NAMED.format(f"a {type(pair).__qualname__} in it"))
        self._tensors = dict(pairs)
        for name, tensor in self._tensors.items():
            if tensor.device.type != "cpu":
                raise ValueError(f"{name!r} must be on the CPU, got one on {tensor.device}")
        self._places = {name: tensor.data_ptr() for name, tensor in self._tensors.items()}
        self.arrays = {name: tensor.detach().numpy() for name, tensor in self._tensors.items()}

    def grads(self) -> dict[str, npt.NDArray[Any] | None]:
        """Return every parameter's ``.grad`` as an array that shares its memory.

        Returns
        -------
        dict
            The gradients by name, None where torch has none: what to give to
            `Adam.step`.

        Raises
        ------
        ValueError
            If a parameter has been given other memory.
        """
        grads: dict[str, npt.NDArray[Any] | None] = {}
        for name, tensor in self._tensors.items():
            if tensor.data_ptr() != self._places[name]:
                raise ValueError(
                    f"{name!r} must keep the memory that it had when CPUParams was made, got"
                    f" other memory; param.data = other, module.to() and the like replace it:"
                    f" copy with param.data.copy_(other), or make CPUParams and the optimizer anew"
                )
            grad = tensor.grad
            grads[name] = None if grad is None else grad.numpy()
        return grads


_NAMED = "named_parameters must be pairs of name and tensor, got {}; give model.named_parameters()"


def _entries(given: Any) -> Iterable[Any]:
    # A module may be iterable, too.
    if hasattr(given, "named_parameters") or not isinstance(given, Iterable):
        raise TypeError(_NAMED.format(type(given).__qualname__))
    return given
