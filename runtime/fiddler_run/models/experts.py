"""The experts modules of a transformers model, whatever its family.

transformers dispatches those decorated with `use_experts_implementation`. Their parameters hold all
experts of a layer: `gate_up_proj` [experts, 2 * intermediate, hidden] or, without a gate, `up_proj`
[experts, intermediate, hidden], and `down_proj` [experts, hidden, intermediate], some of them
transposed or interleaved, which the decorator's flags tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu
from transformers import PreTrainedModel

from fiddler_run.errors import FiddlerError
from fiddler_run.plan.activation import SILU, Activation

RELU2 = Activation(function="relu2")
# the names that families give to the constants of an activation
LIMITS = ("limit", "swiglu_limit")
ALPHAS = ("alpha", "swiglu_alpha")

# gate [intermediate, hidden] or None, up [intermediate, hidden], down [hidden, intermediate]
Matrices = tuple[Tensor | None, Tensor, Tensor]


class Experts(NamedTuple):
    """What the experts of one layer have in common."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules inside a model, by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")
    }


def parameter_names(module: nn.Module) -> tuple[str, str]:
    """The names of a module's parameters: gate and up, or up alone; and down."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def strip(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Removes the parameters of all experts. Returns their shapes by name.

    Raises:
        FiddlerError: the kernels cannot compute the experts.
    """
    shapes = {}
    for name, module in experts_modules(model).items():
        problem = _problem(module)
        if problem is not None:
            raise FiddlerError(
                f"the experts of {model.config.model_type!r} {problem}, which is not supported"
            )
        for parameter in parameter_names(module):
            shapes[f"{name}.{parameter}"] = module._parameters.pop(parameter).shape
        module._is_hf_initialized = True  # transformers would initialise what is gone
    return shapes


def experts_of(module: nn.Module, shape: torch.Size) -> Experts:
    """A module's experts, by the shape of its first parameter."""
    experts, rows, columns = shape
    if module.is_transposed:
        rows, columns = columns, rows
    return Experts(experts, columns, rows // (1 + module.has_gate), activation_of(module))


def matrices(module: nn.Module, rows: Tensor, down: Tensor) -> Matrices:
    """One expert's matrices, from what a module stores of it, without the dimension of experts."""
    if module.is_transposed:
        rows = rows.mT
        down = down.mT
    if not module.has_gate:
        return None, rows.contiguous(), down.contiguous()
    gate, up = rows.chunk(2) if module.is_concatenated else (rows[::2], rows[1::2])
    return gate.contiguous(), up.contiguous(), down.contiguous()


def activation_of(module: nn.Module) -> Activation | None:
    """The activation of a module's experts. None if the kernels cannot compute it.

    It is tried on numbers, because families write the same one differently.
    """
    where = {"dtype": torch.float32, "device": "cpu"}
    gate = torch.linspace(-20, 20, 41, **where).repeat(3, 1)
    up = torch.tensor([-20.0, 1.0, 20.0], **where)[:, None].expand_as(gate)
    if not module.has_gate:
        return RELU2 if torch.allclose(module.act_fn(gate), relu(gate).square()) else None
    found = module._apply_gate(torch.cat((gate, up), dim=-1))
    tried = (each for each in _candidates(module) if torch.allclose(found, glu(each, gate, up)))
    return next(tried, None)


def _candidates(module: nn.Module) -> Iterator[Activation]:
    limits, alphas = (
        [usual, *(getattr(module, name) for name in names if hasattr(module, name))]
        for usual, names in ((None, LIMITS), (1.0, ALPHAS))
    )
    yield SILU
    for limit, offset in product(limits, (0.0, 1.0)):
        yield Activation(function="gelu_tanh", offset=offset, limit=limit)
        for alpha in alphas:
            yield Activation(function="silu", alpha=alpha, offset=offset, limit=limit)


def glu(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """What `Activation` defines, for activations with a gate."""
    gate = gate.clamp(max=activation.bound)
    up = up.clamp(-activation.bound, activation.bound) + activation.offset
    if activation.function == "gelu_tanh":
        return gelu(gate, approximate="tanh") * up
    return gate * torch.sigmoid(activation.alpha * gate) * up


def _problem(module: nn.Module) -> str | None:
    """Why the kernels cannot compute a module's experts. None if they can."""
    if module.has_bias:
        return "have biases"
    if getattr(module, "has_post_expert_norm", False):
        return "are normalised one by one"
    return None if activation_of(module) else "use an activation of their own"
