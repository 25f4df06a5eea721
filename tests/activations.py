"""Activations that the kernels are tested with."""

import pytest
import torch

from fiddler_run.plan.activation import SILU, Activation

ACTIVATIONS = {
    "silu": SILU,
    # As gpt_oss, but with a limit that many of the tests' values exceed.
    "clamped": Activation(function="silu", alpha=1.702, offset=1.0, limit=0.5),
    "gelu_tanh": Activation(function="gelu_tanh"),
}
RELU2 = Activation(function="relu2")  # of experts without a gate
with_each_activation = pytest.mark.parametrize(
    "activation", ACTIVATIONS.values(), ids=list(ACTIVATIONS)
)


def exact_glu(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The formula, in the dtype of its arguments."""
    gate = gate.clamp(max=activation.bound)
    up = up.clamp(-activation.bound, activation.bound)
    if activation.function == "gelu_tanh":
        acted = torch.nn.functional.gelu(gate, approximate="tanh")
    else:
        acted = gate * torch.sigmoid(activation.alpha * gate)
    return acted * (up + activation.offset)
