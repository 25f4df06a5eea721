"""Records which experts a model's router chooses for prompts, and counts the choices.

Every token counts once per layer. Prompts run one at a time: this avoids padding, and a recording
that is interrupted between two prompts resumes with an identical trace.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fiddler_opt.inputs.routing_profile import (
    Counts,
    PromptSet,
    Recorded,
    RoutedModel,
    RoutingProfile,
)
from fiddler_opt.measure.trace import RoutingTrace
from fiddler_run.generation.generate import generate_ids
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.sampling import Options
from fiddler_run.plan.shape import ModelShape


@dataclass(frozen=True)
class RoutingJob:
    """The prompts to record, as token ids by set, and the most tokens to generate after each.

    Generation is greedy. `max_seq_len` is the context that the model and the plan have room for. No
    prompt is longer, and generation stops there.
    """

    shape: ModelShape
    sets: dict[str, list[list[int]]]
    output_tokens: int
    max_seq_len: int

    def prompts(self) -> list[tuple[int, list[int]]]:
        """The index of each prompt's set and its token ids, in recording order."""
        return [
            (number, ids) for number, prompts in enumerate(self.sets.values()) for ids in prompts
        ]

    def new_tokens(self, prompt_tokens: int) -> int:
        return max(1, min(self.output_tokens, self.max_seq_len - prompt_tokens))

    def fingerprint(self) -> str:
        """A hash of everything that determines the trace, except rounding by the plan's split."""
        values = [
            self.shape.model_dump(),
            list(self.sets.items()),
            self.output_tokens,
            self.max_seq_len,
        ]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def resume(self, path: Path) -> RoutingTrace | None:
        """Loads the part of this job's trace in `path`. None if it is missing or another job's.

        Raises:
            FiddlerError: the file cannot be read, or is not a routing trace.
        """
        trace = RoutingTrace.load(path) if path.exists() else None
        return trace if trace is not None and trace.fingerprint == self.fingerprint() else None


class RoutingRecorder:
    """Records a job's trace. `done` of `total` prompts have been recorded."""

    def __init__(self, job: RoutingJob, already: RoutingTrace | None = None):
        """Prepares a recording.

        Args:
            already: the part of the trace that has been recorded before.
        """
        self.job = job
        self._prompts = job.prompts()
        self._fingerprint = job.fingerprint()
        self._dtype = np.uint8 if job.shape.num_experts <= 256 else np.uint16
        self.done = 0
        self.total = len(self._prompts)
        self._parts = [
            (
                np.zeros((0, job.shape.num_layers, job.shape.num_experts_per_tok), self._dtype),
                *_rows(0, 0, 0),
            )
        ]
        if already is not None:
            assert already.fingerprint == self._fingerprint, (
                "a trace of another job, which RoutingJob.resume() never returns"
            )
            self.done = len(already.prompt_sets)
            self._parts = [(already.experts, already.prompt, already.decode)]

    def run(self, model: PlannedModel) -> Iterator[int]:
        """Runs the missing prompts. Yields `done` after each.

        A caller may stop after any prompt and continue later.
        """
        while self.done < self.total:
            _, ids = self._prompts[self.done]
            experts = self._route(model, ids)
            self._parts.append((experts, *_rows(self.done, len(ids), len(experts))))
            self.done += 1
            yield self.done

    def trace(self) -> RoutingTrace:
        """The trace so far. This is a copy, so do not call it after each prompt."""
        experts, prompt, decode = (
            np.concatenate(arrays) for arrays in zip(*self._parts, strict=True)
        )
        prompt_sets = np.array([number for number, _ in self._prompts[: self.done]], dtype=np.int32)
        return RoutingTrace(
            experts, prompt, decode, prompt_sets, list(self.job.sets), self._fingerprint
        )

    def _route(self, model: PlannedModel, ids: list[int]) -> np.ndarray:
        """Experts [tokens, layers, k] chosen by each token of a prompt and its continuation."""
        modules = model.experts_modules()
        calls: list[list[np.ndarray]] = [[] for _ in modules]
        with ExitStack() as hooks:
            for module, of_layer in zip(modules, calls, strict=True):
                hooks.enter_context(module.register_forward_pre_hook(self._hook(of_layer)))
            options = Options(max_new_tokens=self.job.new_tokens(len(ids)))
            # A single sequence needs no padding.
            output, _ = generate_ids(model, torch.tensor([ids]), options, pad_token_id=0)
        experts = np.stack([np.concatenate(of_layer) for of_layer in calls], axis=1)
        assert len(experts) == output.shape[1] - 1, (
            "every token but the last passes each router once"
        )
        return experts

    def _hook(self, calls: list[np.ndarray]):
        """A hook before an experts module that copies its second argument, `top_k_index`."""
        return lambda _, arguments: calls.append(arguments[1].cpu().numpy().astype(self._dtype))


def _rows(number: int, prompt_tokens: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The trace's `prompt` and `decode` rows for the tokens of one prompt."""
    return np.full(tokens, number, dtype=np.int32), np.arange(tokens) >= prompt_tokens


def routing_profile(
    trace: RoutingTrace, shape: ModelShape, command: str, output_tokens: int
) -> RoutingProfile:
    """Counts a complete trace of a model of `shape`, with prefill and decode of each set apart."""
    # [tokens]: 2 s for prefill of set s, 2 s + 1 for its decode
    groups = 2 * trace.prompt_sets[trace.prompt] + trace.decode
    follows = np.diff(trace.prompt, prepend=-1) == 0
    num_groups = 2 * len(trace.set_names)
    count = partial(_count, groups=groups, follows=follows, num_groups=num_groups, shape=shape)
    layers = [count(trace.experts[:, layer].astype(np.int64)) for layer in range(shape.num_layers)]
    tokens = np.bincount(groups, minlength=num_groups)
    followers = np.bincount(groups[follows], minlength=num_groups)

    def counts(group: int) -> Counts:
        rows = {
            key: {n: found[key][group].tolist() for n, found in enumerate(layers) if key in found}
            for key in ("activations", "pairs", "reuse")
        }
        return Counts(tokens=int(tokens[group]), followers=int(followers[group]), **rows)

    prompts = np.bincount(trace.prompt_sets, minlength=len(trace.set_names))
    return RoutingProfile(
        version=2,
        model=RoutedModel(
            name=Path(shape.name).name,
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.num_experts_per_tok,
        ),
        recorded=Recorded(
            command=command, created=date.today().isoformat(), output_tokens=output_tokens
        ),
        sets={
            name: PromptSet(
                prompts=int(prompts[number]),
                prefill=counts(2 * number),
                decode=counts(2 * number + 1),
            )
            for number, name in enumerate(trace.set_names)
        },
    )


def _count(
    chosen: np.ndarray, groups: np.ndarray, follows: np.ndarray, num_groups: int, shape: ModelShape
) -> dict[str, np.ndarray]:
    """Counts of one layer by group: [groups, experts] and, for top-2, `pairs` [groups, pairs].

    Args:
        chosen: int64 [tokens, k], the chosen experts.
        groups: [tokens], the group of each token.
        follows: bool [tokens], True if the previous token belongs to the same sequence.
    """
    experts = shape.num_experts
    cells = groups[:, None] * experts + chosen
    again = (chosen[1:, :, None] == chosen[:-1, None, :]).any(axis=2) & follows[1:, None]

    def by_group(found: np.ndarray, *lengths: int) -> np.ndarray:
        size = num_groups * math.prod(lengths)
        return np.bincount(found.ravel(), minlength=size).reshape(num_groups, *lengths)

    counts = {
        "activations": by_group(cells, experts),
        "reuse": by_group(cells[1:][again], experts),
    }
    if shape.num_experts_per_tok == 2:  # the cost model uses pairs only for top-2
        first, second = np.sort(chosen, axis=1).T
        couples = (groups * experts + first) * experts + second
        low, high = np.triu_indices(experts, 1)
        counts["pairs"] = by_group(couples, experts, experts)[:, low, high]
    return counts
