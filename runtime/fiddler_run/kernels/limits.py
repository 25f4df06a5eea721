"""Limits of these kernels. A machine profile records the limits its times were taken with."""

# The most tokens of a layer that take the decode path, in which the GPU sends them to the CPU's
# threads. More take the prefill path.
MAX_DECODE_TOKENS = 256
# The most tokens times blocks in one product of the prefill path, which bounds its memory.
MAX_TOKEN_BLOCKS = 2048
# The most blocks that the prefill path decodes at once, if decoding copies them: their weights stay
# in the GPU's cache until they are multiplied, and take little memory.
MAX_DECODED_BLOCKS = 8
# The most tokens times weights of an expert for which the prefill path computes experts together. A
# matrix product of more is faster than the kernels for many experts, and takes longer to compute
# than to launch.
MAX_GROUPED_WORK = 2**33
# The most tokens of an expert for which the CPU kernel is memory-bound.
MEMORY_BOUND_TOKENS = 16
