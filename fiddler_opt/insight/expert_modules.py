"""Where experts are in a transformers model: the numbers of their layers, and a device_map.

Names come from transformers' own classes, imported only if they are needed.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import TYPE_CHECKING

from fiddler_opt.solve.problem import Problem

if TYPE_CHECKING:
    from fiddler_run.models.dispatched import DispatchedModel

GPU = 0


def expert_layers(problem: Problem) -> list[int]:
    """The numbers of the decoder layers that have experts, in order."""
    count = problem.model.shape.num_layers
    if problem.model.config.raw.get("num_hidden_layers") == count:
        return list(range(count))
    # the first number in a name is the layer's
    return [
        next(int(part) for part in name.split(".") if part.isdigit())
        for name in _experts_names(_model(problem))
    ]


def num_decoder_layers(problem: Problem) -> int:
    """The number of decoder layers, with and without experts."""
    count = problem.model.config.raw.get("num_hidden_layers")
    return count if count is not None else _model(problem).config.num_hidden_layers


def device_map(problem: Problem, on_gpu: Container[int]) -> dict[str, int | str]:
    """The device of each module: 0, or "cpu" for the experts of some layers.

    Modules are named by their outermost parent that is on one device as a whole.

    Args:
        on_gpu: the layers, counted among those with experts, whose experts are on the GPU.
    """
    model = _model(problem)
    names = _experts_names(model)
    on_cpu = {name for number, name in enumerate(names) if number not in on_gpu}
    return dict(_devices(model, "", on_cpu)) if on_cpu else {"": GPU}


def _devices(module, name: str, on_cpu: set[str]) -> Iterator[tuple[str, int | str]]:
    if name in on_cpu:
        yield name, "cpu"
        return
    prefix = f"{name}." if name else ""
    if not any(other.startswith(prefix) for other in on_cpu):
        yield name, GPU
        return
    for own, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield prefix + own, GPU
    for child, inner in module.named_children():
        yield from _devices(inner, prefix + child, on_cpu)


def _model(problem: Problem) -> DispatchedModel:
    """The model without data and without the parameters of experts."""
    from fiddler_run.models.measured import described

    model = problem.model
    found, _, _ = described(model.config, model.shape.name, model.shape.dtype)
    return found


def _experts_names(model: DispatchedModel) -> list[str]:
    from fiddler_run.models.experts import experts_modules

    return list(experts_modules(model))
