"""What the optimizer keeps."""

import tracemalloc

import fastadam

from .common import DTYPES, draw


class State:
    """Bytes that stay allocated per parameter element: state, tables and all."""

    param_names = (
        "dtype",
        "amsgrad",
    )
    params = (DTYPES, [False, True])
    unit = "bytes/element"

    def track_bytes_per_element(self, dtype, amsgrad):
        params, grads = draw([(100_000,)], dtype)
        fastadam.Adam(params, amsgrad=amsgrad).step(grads)  # compile outside of the count
        tracemalloc.start()
        try:
            opt = fastadam.Adam(params, amsgrad=amsgrad)
            opt.step(grads)
            return tracemalloc.get_traced_memory()[0] / params[0].size
        finally:
            tracemalloc.stop()
