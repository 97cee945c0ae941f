"""What each column of the tables is: the kernels of every backend read them by these names."""

from ..state.roles import NAMES

# A row of the table of tensors, one to each parameter, of int64. Addresses, 0 for none: the
# parameter, its gradient, and its state in the order of `roles.ROLES`.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, EMA = ADDRESSES = range(2 + len(NAMES))
# Elements; the group; the dtype, a place in `Rows.dtypes`; steps so far; the row of scalars.
SIZE, GROUP, DTYPE, STEP, ROW = range(len(ADDRESSES), len(ADDRESSES) + 5)
TENSOR_COLUMNS = ROW + 1

# A row of a table of chunks: which tensor, bytes from its start, elements.
CHUNK_TENSOR, CHUNK_OFFSET, CHUNK_SIZE = range(3)
CHUNK_COLUMNS = 3
# Elements in a chunk, the unit of work of a thread and of a sum: under 1 microsecond.
CHUNK = 8192

# A group's row of float64: the first arguments of `formula.step_scalars`.
LR, BETA1, BETA2, EPS, L2, WEIGHT_DECAY, GRAD_FACTOR, ONE_MINUS_EMA_DECAY = range(8)
GROUP_COLUMNS = 8

# A row of one step's scalars: what `formula.step_scalars` returns.
(
    S_GRAD_FACTOR, S_L2, S_DECAY, S_BETA1, S_ONE_MINUS_BETA1, S_BETA2, S_ONE_MINUS_BETA2,
    S_STEP_SIZE, S_INV_SQRT_BIAS2, S_EPS, S_ONE_MINUS_EMA_DECAY, S_TINY,
) = range(12)  # fmt: skip
SCALARS = 12
