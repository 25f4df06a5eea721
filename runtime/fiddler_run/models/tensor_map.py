"""Which tensors of a checkpoint make up each parameter, by transformers' own conversions.

Checkpoints name and store tensors unlike the model's parameters: under older names, one tensor for
each expert, or all experts of a layer in one. transformers knows a list of renamings and conversion
operations for each family. Here they are applied to the weights of a single expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import cached_property
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from fiddler_run.models.dispatched import DispatchedModel
from fiddler_run.models.experts import Matrices, experts_modules, matrices, parameter_names

LANGUAGE_PART = "language_model."  # in the names of a checkpoint with more than a language model
EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+(?=\.)")
# Reads a tensor by its name in the checkpoint or, with a number, that expert's part of it.
Read = Callable[[str, int | None], Tensor]


class Source(NamedTuple):
    """The tensors of a parameter.

    `names` holds their names by the converter's pattern and the expert's number. The number is None
    if a tensor holds all experts. Without a converter, the pattern is empty.
    """

    converter: WeightConverter | None
    names: dict[str, dict[int | None, str]]

    @property
    def is_per_expert(self) -> bool:
        return any(None not in numbers for numbers in self.names.values())

    @property
    def joins_rows(self) -> bool:
        """True if the conversion only puts matrices side by side: an expert's are its rows."""
        operations = self.converter.operations if self.converter else ()
        kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
        return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


class TensorMap:
    """The sources of all parameters of a model in a checkpoint with tensors of these names."""

    def __init__(self, model: DispatchedModel, names: Iterable[str]):
        self._modules = [*experts_modules(model).items()]
        self._expert_shapes = model.expert_shapes
        self._config = model.config
        state = model.state_dict()
        self._shapes = {name: tensor.shape for name, tensor in state.items()} | self._expert_shapes
        self._tied = set(model.all_tied_weights_keys)
        self._optional = [*(model._keys_to_ignore_on_load_missing or ())]
        transforms = get_model_conversion_mapping(model)
        self._renamings, self._converters = _by_kind(transforms)
        self._prefix = model.base_model_prefix
        self.sources: dict[str, Source] = {}
        by_pattern = {
            pattern: each for each in self._converters for pattern in each.source_patterns
        }
        for name in sorted(names):
            target, pattern = self._renamed(name)
            if target in self._shapes:
                source = Source(by_pattern.get(pattern), {})
                number = EXPERT_NUMBER.search(name) if target in self._expert_shapes else None
                found = self.sources.setdefault(target, source).names.setdefault(pattern or "", {})
                found[int(number[0]) if number else None] = name

    def dense_targets(self) -> list[str]:
        """The parameters outside the experts that have sources."""
        return [target for target in self.sources if target not in self._expert_shapes]

    def dense_names(self) -> list[str]:
        """The names of the tensors outside the experts."""
        return [
            name
            for target in self.dense_targets()
            for numbers in self.sources[target].names.values()
            for name in numbers.values()
        ]

    def dense(self, target: str, read: Read) -> dict[str, Tensor]:
        """The parameters that a target's tensors make up: itself, and sometimes others."""
        source = self.sources[target]
        pieces = {
            pattern: [read(name, None) for name in numbers.values()]
            for pattern, numbers in source.names.items()
        }
        return self._converted(source, target, pieces)

    def expert(self, layer: int, expert: int, read: Read) -> Matrices:
        """The matrices of an expert of the layer's experts module, counted from 0."""
        name, module = self._modules[layer]
        rows, (down,) = (
            self._rows(f"{name}.{parameter}", expert, read) for parameter in parameter_names(module)
        )
        return (*rows, down) if len(rows) == 2 else matrices(module, *rows, down)

    def expected(self, dense_only: bool = False) -> dict[str, list[int] | None]:
        """The shape of each tensor that the checkpoint should hold. None: a conversion decides it.

        Tensors that are missing are named as transformers would write them. With `dense_only`,
        those of experts are left out.
        """
        expected: dict[str, list[int] | None] = {}
        covered = self._tied | (self._expert_shapes.keys() if dense_only else set())
        for target, source in self.sources.items():
            covered.update(_targets(target, source))
            stored = self._stored_shape(target, source)
            for numbers in source.names.values():
                wanted: Iterable[int | None] = numbers
                if target in self._expert_shapes and None not in numbers:
                    wanted = range(self._shapes[target][0])
                like = next(iter(numbers.values()))
                for number in wanted:
                    name = numbers.get(number) or EXPERT_NUMBER.sub(str(number), like)
                    expected[name] = stored
        for target in self._shapes.keys() - covered:
            if not any(re.search(pattern, target) for pattern in self._optional):
                expected[self._original(target)] = list(self._shapes[target])
        return expected

    def conversion_problem(self, shape_of: Callable[[str], list[int]]) -> str | None:
        """Why a parameter's tensors do not make it up, by their shapes. None if all do."""
        seen: set = set()
        for target, source in self.sources.items():
            if self._stored_shape(target, source) is not None:
                continue  # `expected` has it

            def read(name: str, number: int | None) -> Tensor:
                shape = shape_of(name)
                return torch.empty(shape if number is None else [1, *shape[1:]], device="meta")

            names = [name for numbers in source.names.values() for name in numbers.values()]
            key = id(source.converter), str([shape_of(name) for name in names])
            if key not in seen:
                seen.add(key)
                problem = self._misfit(target, source, read)
                if problem is not None:
                    return f"tensor {names[0]} {problem}"
        return None

    def _misfit(self, target: str, source: Source, read: Read) -> str | None:
        is_expert = target in self._expert_shapes
        try:
            found = (
                {target: self._rows(target, 0, read)[0][None]}
                if is_expert
                else self.dense(target, read)
            )
        except (RuntimeError, IndexError, ValueError) as error:
            return f"cannot be converted: {str(error).splitlines()[0]}"
        for name, tensor in found.items():
            wanted = [1, *self._shapes[name][1:]] if is_expert else list(self._shapes[name])
            if list(tensor.shape) != wanted:
                return f"makes up {name} in shape {list(tensor.shape)}, not {wanted}"
        return None

    def _rows(self, target: str, expert: int, read: Read) -> list[Tensor]:
        """One expert's part of a parameter, without the dimension of experts, in pieces of rows."""
        source = self.sources[target]
        pieces = {
            pattern: read(numbers[expert], None)
            if expert in numbers
            else read(numbers[None], expert)
            for pattern, numbers in source.names.items()
        }
        if source.joins_rows and source.is_per_expert:
            return [pieces[pattern] for pattern in source.converter.source_patterns]
        found = self._converted(source, target, {key: [each] for key, each in pieces.items()})
        return [found[target].squeeze(0)]

    def _converted(
        self, source: Source, target: str, pieces: dict[str, list[Tensor]]
    ) -> dict[str, Tensor]:
        if source.converter is None:
            return {target: pieces[""][0]}
        converter = deepcopy(source.converter)
        for pattern, tensors in pieces.items():
            converter.collected_tensors[pattern] = tensors
        shapes = self._shapes
        of_one_expert = target in self._expert_shapes

        def parameter(name: str) -> SimpleNamespace:
            shape = shapes[name]
            return SimpleNamespace(shape=torch.Size([1, *shape[1:]]) if of_one_expert else shape)

        model = SimpleNamespace(get_parameter=parameter, config=self._config)
        found = converter.convert(target, model=model, config=self._config)
        return {name: each[0] if isinstance(each, list) else each for name, each in found.items()}

    def _stored_shape(self, target: str, source: Source) -> list[int] | None:
        """The shape of each tensor of a source. None if a conversion decides it."""
        shape = list(self._shapes[target])
        if source.converter is None:
            return shape
        if target not in self._expert_shapes or not source.joins_rows:
            return None
        return [shape[1] // len(source.converter.source_patterns), *shape[2:]]

    def _renamed(self, name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._shapes
        )
        if target not in self._shapes and name in self._shapes:
            target, pattern = rename_source_key(name, [], [], self._prefix, self._shapes)
        if target not in self._shapes and LANGUAGE_PART in name:
            return self._renamed(name.replace(LANGUAGE_PART, "", 1))
        return target, pattern

    def _original(self, target: str) -> str:
        """A parameter's name in a checkpoint as transformers would write it."""
        name, _ = rename_source_key(target, *self._reversed, reverse=True)
        return name.replace(".*.", ".0.")

    @cached_property
    def _reversed(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        transforms = (*self._renamings, *self._converters)
        return _by_kind([each.reverse_transform() for each in transforms])


def _by_kind(
    transforms: list[WeightTransform],
) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    return renamings, converters


def _targets(target: str, source: Source) -> list[str]:
    """All parameters that a source makes up."""
    patterns = source.converter.target_patterns if source.converter else [target]
    return [target.replace(patterns[0], pattern) for pattern in patterns]
