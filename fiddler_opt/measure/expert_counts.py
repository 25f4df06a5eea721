"""Writes how often experts are called as SGLang's recorder of expert distributions does."""

import io
from pathlib import Path

import torch

from fiddler_run.system.files import write_whole


def save_expert_counts(
    counts: list[list[int]], layers: list[int], num_layers: int, path: str | Path
) -> None:
    """Writes `logical_count` [1, num_layers, experts] to a .pt file.

    Args:
        counts: of each expert of the layers with experts.
        layers: the numbers of these layers.
        num_layers: decoder layers; those without experts have counts of zero.

    Raises:
        FiddlerError: the file cannot be written.
    """
    whole = torch.zeros((1, num_layers, len(counts[0])), dtype=torch.int64)
    whole[0, layers] = torch.tensor(counts)
    file = io.BytesIO()
    torch.save({"logical_count": whole}, file)
    write_whole(path, file.getvalue())
