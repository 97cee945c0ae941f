"""What the optimizer keeps."""

import tracemalloc

import numpy as np

import fastadam

from .common import DTYPES

OPTIONS = {
    "none": {},
    "amsgrad": {"amsgrad": True},
    "ema": {"ema_decay": 0.999},
    "both": {"amsgrad": True, "ema_decay": 0.999},
}


class State:
    """Bytes that stay allocated per parameter element: state, tables and all."""

    param_names = ("dtype", "option", "tensors")
    params = (DTYPES, list(OPTIONS), [1, 1_000])
    unit = "bytes/element"

    def track_bytes_per_element(self, dtype, option, tensors):
        params = [np.ones(100_000 // tensors, dtype) for _ in range(tensors)]
        grads = [np.ones_like(param) for param in params]
        fastadam.Adam(params, **OPTIONS[option]).step(grads)  # compile outside of the count
        tracemalloc.start()
        try:
            opt = fastadam.Adam(params, **OPTIONS[option])
            opt.step(grads)
            return tracemalloc.get_traced_memory()[0] / 100_000
        finally:
            tracemalloc.stop()
