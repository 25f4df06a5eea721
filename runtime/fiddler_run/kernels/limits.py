"""Limits of these kernels. A machine profile records those that its times were taken with."""

# Tokens of a layer that take the decode path: the GPU sends them to the CPU's threads, and computes
# blocks where they lie. More take the prefill path.
MAX_DECODE_TOKENS = 256
# Tokens times blocks that one product of the prefill path computes: bounds the memory it takes.
MAX_TOKEN_BLOCKS = 2048
# Tokens of an expert up to which the CPU kernel is bound by memory.
MEMORY_BOUND_TOKENS = 16
