"""What each field of the device's own tables is; those all backends share: `update.layout`."""

# Bytes from one tensor's scalars to the next one's: 12 of any type, and a cache line.
ROW_BYTES = 128

# What a kernel is given the address of: for each dtype a table of these. Addresses, and how
# long the tables are; of the norm there is a part for each `WARPS` chunks.
(
    TENSORS, TENSOR_COUNT, GRADS, ROWS, HYPER, SCALE, STEP_COUNT, CHUNKS, CHUNK_COUNT, SUMS,
    LARGEST, PART_COUNT, IS_DOUBLE, CONTEXT_COUNT,
) = range(14)  # fmt: skip
CONTEXT_SIZE = 16

# The cells of `HYPER`, float64: what the gradients are multiplied by, the norm they are
# scaled down to, whether a step is skipped that is not finite. Then the table of groups.
FACTOR, MAX_NORM, MAY_SKIP, HYPER_GROUPS = range(4)

# The cells of a step's result: norm, 1.0 if it was skipped, steps so far (int64).
NORM, SKIPPED, COUNT = range(3)
RESULT_SIZE = 4
