"""An embedding table in host memory."""

import torch


class HostEmbedding(torch.nn.Module):
    """Copies only the looked-up rows, to the device of `weight` [vocabulary, hidden].

    The table is not a parameter, because transformers derives a model's device from its first one.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.device = weight.device
        self.table = weight.detach().cpu()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids.cpu(), self.table).to(self.device)
