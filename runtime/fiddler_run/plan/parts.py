"""Names the parts of a decode step's time and of the time to first token."""

PARTS = {
    "head": "embedding, output head, sampling",
    "dense": "attention, routers, dispatch",
    "resident": "experts in GPU memory",
    "host": "experts in host memory",
    "disk": "experts on disk",
    "launch_overhead": "experts, where launching kernels takes longer than computing",
}
