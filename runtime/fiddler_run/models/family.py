"""The interface of a family of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from fiddler_run.models.config import ModelConfig
from fiddler_run.plan.shape import ModelShape

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel


class ExpertNames(NamedTuple):
    """The names of an expert's matrices in a checkpoint."""

    gate: str
    up: str
    down: str


class Segments(NamedTuple):
    """One decoder layer in a decode step: `before`, attention, `after`, `experts`, in this order.

    `before(cos, sin, *parts)` takes the rotary embedding and the addends of the residual stream. It
    returns the residual [sequences, 1, hidden], and query, key and value [sequences, heads, 1,
    head_dim]. `eager_attention` is the family's plain attention function, and `attention` the
    module that it takes as an argument. `after(residual, attended)`, with `attended` [sequences, 1,
    heads, head_dim], returns the residual, the experts' input [tokens, hidden], and the router's
    choice and weights [tokens, k]. `experts` is the module that computes them.
    """

    before: Callable
    attention: nn.Module
    eager_attention: Callable
    after: Callable
    experts: nn.Module


def sum_parts(parts: tuple[Tensor, ...]) -> Tensor:
    """The sum of the parts, in the shape of the first."""
    total, *others = parts
    for part in others:
        total = total + part.view_as(total)
    return total


class Family(ABC):
    """One `model_type` of transformers: its config.json, its checkpoint and its classes.

    `config`, `expert_prefix`, `expert_names`, `dense_name` and `expert_tensors` need no torch. The
    other methods import transformers when called.
    """

    model_type: ClassVar[str]

    @abstractmethod
    def config(self, raw: dict, origin: str) -> ModelConfig:
        """The model described by the content of a config.json that came from `origin`.

        Raises:
            FiddlerError: the runtime cannot run such a model.
        """

    @abstractmethod
    def expert_prefix(self, layer: int, expert: int) -> str:
        """What the names of an expert's tensors in a checkpoint begin with, without a dot."""

    @abstractmethod
    def expert_names(self, layer: int, expert: int) -> ExpertNames:
        """The names of an expert's matrices in a checkpoint."""

    @abstractmethod
    def dense_name(self, parameter: str) -> str:
        """The name in a checkpoint of a parameter outside the experts."""

    @abstractmethod
    def stock_class(self) -> type[PreTrainedModel]:
        """transformers' class for causal language modelling."""

    @abstractmethod
    def stock_config(self, config: ModelConfig) -> PreTrainedConfig:
        """transformers' config object."""

    @abstractmethod
    def experts_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The experts module of each layer of a model."""

    @abstractmethod
    def segments(self, layer: nn.Module) -> Segments | None:
        """The segments of a decoder layer. None if a part is not of the stock class."""

    def expert_tensors(self, shape: ModelShape) -> dict[str, list[int]]:
        """The names and shapes of all expert tensors in a checkpoint."""
        row = [shape.intermediate_size, shape.hidden_size]
        column = [shape.hidden_size, shape.intermediate_size]
        return {
            name: size
            for layer in range(shape.num_layers)
            for expert in range(shape.num_experts)
            for name, size in zip(self.expert_names(layer, expert), (row, row, column), strict=True)
        }
