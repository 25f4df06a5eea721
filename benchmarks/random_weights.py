"""Fills a model with random weights, fast.

The same numbers are repeated: the time of a matrix product does not depend on them.
"""

import torch


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Overwrites all parameters with normal noise of standard deviation 0.02."""
    for parameter in model.parameters():
        fill_flat(parameter.detach().view(-1))


def fill_flat(flat: torch.Tensor) -> None:
    noise = torch.empty(2**20, dtype=flat.dtype).normal_(std=0.02)
    for start in range(0, len(flat), len(noise)):
        flat[start : start + len(noise)] = noise[: len(flat) - start]
