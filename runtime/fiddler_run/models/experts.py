"""The experts modules of a transformers model, whatever its family.

transformers dispatches those decorated with `use_experts_implementation`. Their parameters hold all
experts of a layer: `gate_up_proj` [experts, 2 * intermediate, hidden] and `down_proj` [experts,
hidden, intermediate], some of them transposed or interleaved, which the decorator's flags tell.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from fiddler_run.errors import FiddlerError

PARAMETERS = ("gate_up_proj", "down_proj")
# Parameters whose experts the kernels cannot compute
UNSUPPORTED = ("up_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")

# gate [intermediate, hidden], up [intermediate, hidden], down [hidden, intermediate]
Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ExpertsShape(NamedTuple):
    """The sizes of the experts of one layer."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules inside a model, by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")
    }


def strip(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Removes the parameters of all experts. Returns their shapes by name.

    Raises:
        FiddlerError: the kernels cannot compute them.
    """
    shapes = {}
    for name, module in experts_modules(model).items():
        problem = _problem(module)
        if problem is not None:
            raise FiddlerError(
                f"the experts of {model.config.model_type!r} {problem}, which is not supported"
            )
        for parameter in PARAMETERS:
            shapes[f"{name}.{parameter}"] = module._parameters.pop(parameter).shape
        module._is_hf_initialized = True  # transformers would initialise what is gone
    return shapes


def shape_of(module: nn.Module, gate_up: torch.Size) -> ExpertsShape:
    """The sizes of a module's experts, by the shape of its `gate_up_proj`."""
    experts, rows, columns = gate_up
    if module.is_transposed:
        rows, columns = columns, rows
    return ExpertsShape(experts, columns, rows // 2)


def matrices(module: nn.Module, gate_up: torch.Tensor, down: torch.Tensor) -> Matrices:
    """One expert's matrices, from what a module stores of it, without the dimension of experts."""
    if module.is_transposed:
        gate_up, down = gate_up.mT, down.mT
    if module.is_concatenated:
        gate, up = gate_up.chunk(2)
    else:
        gate, up = gate_up[::2], gate_up[1::2]
    return gate.contiguous(), up.contiguous(), down.contiguous()


def _problem(module: nn.Module) -> str | None:
    """Why the kernels cannot compute a module's experts. None if they can."""
    for name in UNSUPPORTED:
        if name in module._parameters:
            return "have no gate" if name == "up_proj" else "have biases"
    if getattr(module, "has_post_expert_norm", False):
        return "are normalised one by one"
    return None if _is_silu(module) else "use another activation than silu"


def _is_silu(module: nn.Module) -> bool:
    """True if the module computes silu(gate) * up. Tries it: families write it differently."""
    gate = torch.linspace(-20, 20, 41, device="cpu").repeat(3, 1)
    up = torch.tensor([-20.0, 1.0, 20.0], device="cpu")[:, None].expand_as(gate)
    found = module._apply_gate(torch.cat((gate, up), dim=-1))
    return torch.allclose(found, silu(gate) * up)
