"""What each field of the CPU's own tables is; those that all backends share: `update.layout`."""

# What a kernel is given the address of: for each dtype, where the tables are and how long
# they are, all int64. The first thirteen are the same for all dtypes.
(
    TENSORS, TENSOR_COUNT, GROUPS, GROUP_COUNT, STEP_COUNT,
    # Where the steps of each tensor are counted: see below.
    COUNTS,
    # For `numpy_structs.look`: what is known of parameters and gradients, the memory that is ours,
    # the ids of numpy.ndarray and of None, and the gradients that Python must check: how many,
    # then their places.
    SEEN, OWN_MEMORY, OWN_COUNT, NDARRAY, NONE, ODD,
    # For `lists.look`.
    KNOWN,
    CHUNKS, CHUNK_COUNT, ROWS, SUMS, OWN_DTYPE,
    # For `thread_choice`.
    CURSORS, THREADS, WORK, UPDATE_CHOICE, SUM_CHOICE, BALANCE, WORTH_SEVERAL,
) = range(25)  # fmt: skip
CONTEXT_SIZE = 25

# A row to a thread, in a cache line of its own: its next chunk, and when it was done.
CURSOR_BYTES = 64
NEXT, DONE = range(2)

# The numbers in the table COUNTS: where the steps of each tensor are counted, in the table of
# tensors or in an array of the user's, and how many int64 from one count to the next; whether the
# user has a float for each, whose place is in SEEN, to be written too.
COUNTS_ADDRESS, COUNTS_WIDTH, COUNTS_AS_FLOATS = range(3)
COUNTS_SIZE = 3

# A row to a parameter, in the table SEEN: id() of the parameter; what it must keep, the number of
# its dimensions, the address of those, the flag of its memory order or 0 if it has neither, the
# address of its strides in elements, and what NumPy and DLPack say of its dtype; bytes; of the
# gradient that is looked at, the address; a permutation that sorts those; of the user's count of
# steps, the address, and its bytes.
(
    OBJECT, NDIM, SHAPE, MEMORY_ORDER, STRIDES, DTYPE_MARK, ELEMENT, BYTES, FOUND, ORDER,
    COUNT_PLACE, COUNT_BYTES,
) = range(12)  # fmt: skip
SEEN_COLUMNS = 12

# The kinds of array that `tensors` knows, id() of each; DLPack's function for torch's, 0 if there
# is none; what NumPy says of float32 and of float64.
KNOWN_NDARRAY, KNOWN_TENSOR, KNOWN_PARAMETER, KNOWN_EXCHANGE, KNOWN_SINGLE, KNOWN_DOUBLE = range(6)
KNOWN_SIZE = 6

# The ends of an interval of memory.
START, END = range(2)
