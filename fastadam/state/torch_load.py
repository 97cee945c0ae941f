"""What `torch.load` has to be told before it takes a state_dict of ours."""

from typing import Any

import numpy as np


def allow_arrays_in_torch_load() -> None:
    """Have ``torch.load(weights_only=True)``, torch's default, take arrays of float32 and float64.

    Those of a ``state_dict`` that ``torch.save`` has written. Does nothing if
    torch cannot be imported. Said each time: libraries that allow arrays for a
    while, such as transformers, take back all that they have allowed.
    """
    try:
        import torch
    except (ImportError, OSError):  # OSError: a library of torch's is missing
        return
    rebuild: Any = np.zeros(0).__reduce__()[0]
    dtypes = [type(np.dtype(name)) for name in ("float32", "float64")]
    # Of torch 2.4; older versions refuse nothing.
    add: Any = getattr(getattr(torch, "serialization", None), "add_safe_globals", None)
    if add is not None:
        add([rebuild, np.ndarray, np.dtype, *dtypes])
