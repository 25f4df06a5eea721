"""An embedding table that stays in host memory."""

import torch


class HostEmbedding(torch.nn.Module):
    """Only the looked-up rows are copied, to the device of `weight` [vocabulary, hidden].

    The table is no parameter: transformers takes a model's first one for the place of all.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.device = weight.device
        self.table = weight.detach().cpu()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids.cpu(), self.table).to(self.device)
