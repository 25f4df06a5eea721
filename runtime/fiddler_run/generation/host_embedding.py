"""An embedding table in host memory."""

import torch
from torch import nn


class HostEmbedding(nn.Module):
    """Copies only the looked-up rows, to the device where the stock embedding was."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.device = next(stock.parameters()).device
        # Not a submodule: transformers derives a model's device from its first parameter.
        self._stock = [stock.cpu()]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._stock[0](ids.cpu()).to(self.device)
