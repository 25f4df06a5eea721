"""Words for the parts of predicted times and of GPU memory."""

PARTS = {
    "head": "embedding, output head, sampling",
    "dense": "attention, routers, dispatch",
    "exchange": "states and sums on their way between ranks",
    "resident": "experts in GPU memory",
    "host": "experts in host memory",
    "disk": "experts on disk",
    "launch_overhead": "experts, where launching kernels takes longer than computing",
}
# GpuMemory's keys; the others are words already
PURPOSES = {"non_expert_weights": "non-expert weights", "kv_cache": "KV cache"}
