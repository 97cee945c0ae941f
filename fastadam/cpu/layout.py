"""What each field of the CPU's own tables is; those that all backends share: `update.layout`."""

# What a kernel is given the address of: for each dtype, where the tables are and how long
# they are, all int64. The first thirteen are the same for all dtypes.
(
    TENSORS, TENSOR_COUNT, GROUPS, GROUP_COUNT, STEP_COUNT,
    # Where the steps of each tensor are counted, and how many int64 from one count to the next:
    # in the table of tensors, or in an array of the user's.
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

# The two numbers in the table COUNTS.
COUNTS_ADDRESS, COUNTS_WIDTH = range(2)

# A row to a parameter, in the table SEEN: id() of the parameter; what it must keep, the number of
# its dimensions, the address of those, the flag of its memory order or 0 if it has neither, the
# address of its strides in elements, and what NumPy and DLPack say of its dtype; bytes; of the
# gradient that is looked at, the address; a permutation that sorts those.
OBJECT, NDIM, SHAPE, MEMORY_ORDER, STRIDES, DTYPE_MARK, ELEMENT, BYTES, FOUND, ORDER = range(10)
SEEN_COLUMNS = 10

# The kinds of array that `tensors` knows, id() of each, and DLPack's function for torch's, 0 if
# there is none.
KNOWN_NDARRAY, KNOWN_TENSOR, KNOWN_PARAMETER, KNOWN_EXCHANGE = range(4)
KNOWN_SIZE = 4

# The ends of an interval of memory.
START, END = range(2)
