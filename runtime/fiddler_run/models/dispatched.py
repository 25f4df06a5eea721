"""A transformers causal language model without the parameters of its experts.

A subclass of the stock class. transformers passes the input of each experts module to whatever
serves it.
"""

from __future__ import annotations

from functools import cache, wraps

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from fiddler_run.models.config import ModelConfig
from fiddler_run.models.experts import experts_modules, strip
from fiddler_run.models.stock import naming, stock_class, stock_config

EXPERTS_IMPLEMENTATION = "fiddler"


def _run_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return module.planned(hidden_states, top_k_index, top_k_weights)


ExpertsInterface.register(EXPERTS_IMPLEMENTATION, _run_experts)


class DispatchedModel(PreTrainedModel):
    """What is common to all such subclasses; see `dispatched_class`.

    `expert_shapes` holds the shapes of the experts' parameters in the stock model, by name.
    """

    _can_compile_fullgraph = False

    def __init__(self, config, *arguments, **named):
        config._experts_implementation = EXPERTS_IMPLEMENTATION
        super().__init__(config, *arguments, **named)
        self.expert_shapes = strip(self)

    def forward(self, *arguments, **named):
        return super().forward(*arguments, **named)

    def experts_modules(self) -> list[nn.Module]:
        """The experts module of each layer that has one, in order."""
        return list(experts_modules(self).values())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers' own check looks for a decorator in this file's source
        return True

    def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
        # the prefill path reads the router's choice on the host, which cannot be captured
        return False

    def save_pretrained(self, *args, **kwargs):
        raise NotImplementedError(
            "the experts are not part of this module; copy the checkpoint it was loaded from"
        )


@cache
def dispatched_class(
    stock: type[PreTrainedModel], base: type[DispatchedModel] = DispatchedModel
) -> type[DispatchedModel]:
    """A subclass of `base` and a stock class.

    It has the stock class's name and module, by which transformers finds the renamings of a
    checkpoint's tensors.
    """

    @wraps(stock.forward)  # `generate()` reads its signature
    def forward(self, *arguments, **named):
        return base.forward(self, *arguments, **named)

    members = {"__module__": stock.__module__, "forward": forward}
    return type(stock.__name__, (base, stock), members)


def skeleton(
    config: ModelConfig, dtype: torch.dtype, base: type[DispatchedModel] = DispatchedModel
) -> DispatchedModel:
    """The model of a config.json, without data, in `dtype`.

    Raises:
        FiddlerError: transformers rejects the config, or the kernels cannot compute the experts.
    """
    of_stock = stock_config(config)
    wanted = dispatched_class(stock_class(of_stock, config.origin), base)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), naming(config.origin):
            model = wanted(of_stock)
    finally:
        torch.set_default_dtype(before)
    _keep_precision(model, dtype)
    model.config.dtype = dtype
    return model


def _keep_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives the parameters that transformers keeps in float32 that dtype."""
    patterns = model._get_dtype_plan(dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(pattern in name for pattern in patterns):
            tensor.data = tensor.data.float()
