"""RoutingTrace: which experts each token of recorded prompts chose; how one is recorded, and what is counted from it.

Rule: every token once a layer. Prompts are run one by one, so that there is no padding, and a recording that was cut between
two prompts goes on to the same trace.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Self

import numpy as np
import torch

from fiddler_opt.routing import Counts, PromptSet, Recorded, RoutedModel, RoutingProfile
from fiddler_run.errors import FiddlerError
from fiddler_run.files import write_whole
from fiddler_run.generate import Options, generate_ids
from fiddler_run.model import DispatchedMixtral
from fiddler_run.plan import ModelShape


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Tokens in the order in which they were routed, prompt after prompt; in one of unfinished work the last prompts are missing.

    `experts` uint8, or uint16 for more than 256 of them [tokens, layers, k], in the router's order; `prompt` int32 [tokens]
    counts over all sets; `decode` bool [tokens]; `prompt_sets` int32 [prompts]: each prompt's place in `set_names`;
    `fingerprint`: of the job that it records.
    """

    experts: np.ndarray
    prompt: np.ndarray
    decode: np.ndarray
    prompt_sets: np.ndarray
    set_names: list[str]
    fingerprint: str

    def save(self, path: str | Path) -> None:
        """Writes a compressed .npz whole or not at all.

        Raises:
            FiddlerError: the place cannot be written.
        """
        file = io.BytesIO()
        np.savez_compressed(file, **{field.name: np.asarray(getattr(self, field.name)) for field in fields(self)})
        write_whole(path, file.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """
        Raises:
            FiddlerError: the file cannot be read, or is not a routing trace.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise FiddlerError(f"{path}: cannot read: {error.strerror}") from None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = {field.name: file[field.name] for field in fields(cls)}
            names, fingerprint = arrays.pop("set_names").tolist(), arrays.pop("fingerprint").item()
            trace = cls(**arrays, set_names=names, fingerprint=fingerprint)
            trace._check()
        except Exception as error:  # damage surfaces as any of BadZipFile, zlib.error, KeyError, ValueError, TypeError ...
            raise FiddlerError(
                f"{path}: not a routing trace: {' '.join(str(error).split())}; remove it, and record one with `fiddler-opt profile`"
            ) from None
        return trace

    def _check(self) -> None:
        """
        Raises:
            ValueError: the arrays do not fit together.
        """
        tokens, prompts, sets = len(self.prompt), len(self.prompt_sets), len(self.set_names)
        starts = np.flatnonzero(np.diff(self.prompt, prepend=-1))
        fits = {
            "experts": self.experts.dtype in (np.uint8, np.uint16) and self.experts.ndim == 3 and len(self.experts) == tokens,
            "prompt": self.prompt.dtype == np.int32 and np.array_equal(self.prompt[starts], np.arange(prompts)),
            "decode": self.decode.dtype == bool and self.decode.shape == (tokens,) and not self.decode[starts].any(),
            "prompt_sets": self.prompt_sets.dtype == np.int32 and not np.any((self.prompt_sets < 0) | (self.prompt_sets >= sets)),
            "fingerprint": isinstance(self.fingerprint, str),
        }
        for name, fit in fits.items():
            if not fit:
                raise ValueError(f"{name} does not fit the rest")


@dataclass(frozen=True)
class RoutingJob:
    """What is to be recorded: the prompts of each set as token ids, and the most tokens to generate after each, greedily.

    `max_seq_len` is what model and plan have room for; no prompt is longer, and what is generated ends there.
    """

    shape: ModelShape
    sets: dict[str, list[list[int]]]
    output_tokens: int
    max_seq_len: int

    def prompts(self) -> list[tuple[int, list[int]]]:
        """Each prompt's place in `sets`, and its token ids, in the order of recording."""
        return [(number, ids) for number, prompts in enumerate(self.sets.values()) for ids in prompts]

    def new_tokens(self, prompt_tokens: int) -> int:
        return max(1, min(self.output_tokens, self.max_seq_len - prompt_tokens))

    def fingerprint(self) -> str:
        """Of all that decides the trace, but the rounding of the plan that computes it."""
        values = [self.shape.model_dump(), list(self.sets.items()), self.output_tokens, self.max_seq_len]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def resume(self, path: Path) -> RoutingTrace | None:
        """What `path` holds of this job's trace; None if there is no such file, or it is another job's.

        Raises:
            FiddlerError: the file cannot be read, or is not a routing trace.
        """
        trace = RoutingTrace.load(path) if path.exists() else None
        return trace if trace is not None and trace.fingerprint == self.fingerprint() else None


class RoutingRecorder:
    """Records a job's trace; `already` is a part of it that was recorded before.

    `done` prompts are recorded so far, of `total`.
    """

    def __init__(self, job: RoutingJob, already: RoutingTrace | None = None):
        self.job = job
        self._prompts, self._fingerprint = job.prompts(), job.fingerprint()
        self._dtype = np.uint8 if job.shape.num_experts <= 256 else np.uint16
        self.done, self.total = 0, len(self._prompts)
        self._parts = [(np.zeros((0, job.shape.num_layers, job.shape.num_experts_per_tok), self._dtype), *_rows(0, 0, 0))]
        if already is not None:
            assert already.fingerprint == self._fingerprint, "a trace of another job; RoutingJob.resume() returns none of these"
            self.done = len(already.prompt_sets)
            self._parts = [(already.experts, already.prompt, already.decode)]

    def run(self, model: DispatchedMixtral) -> Iterator[int]:
        """Runs the prompts that are still missing, by whatever plan the model was loaded; yields `done` after each.

        Stop at any of them, and go on as you like."""
        while self.done < self.total:
            _, ids = self._prompts[self.done]
            experts = self._route(model, ids)
            self._parts.append((experts, *_rows(self.done, len(ids), len(experts))))
            self.done += 1
            yield self.done

    def trace(self) -> RoutingTrace:
        """What is recorded so far. Takes time in proportion to all of it, so ask now and then, not after each prompt."""
        experts, prompt, decode = (np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))
        prompt_sets = np.array([number for number, _ in self._prompts[: self.done]], dtype=np.int32)
        return RoutingTrace(experts, prompt, decode, prompt_sets, list(self.job.sets), self._fingerprint)

    def _route(self, model: DispatchedMixtral, ids: list[int]) -> np.ndarray:
        """The experts [tokens, layers, k] that each token of a prompt and of its continuation chose."""
        modules = model.experts_modules()
        calls: list[list[np.ndarray]] = [[] for _ in modules]
        with ExitStack() as hooks:
            for module, of_layer in zip(modules, calls, strict=True):
                hooks.enter_context(module.register_forward_pre_hook(self._hook(of_layer)))
            options = Options(max_new_tokens=self.job.new_tokens(len(ids)))
            output, _ = generate_ids(model, torch.tensor([ids]), options, pad_token_id=0)  # one sequence needs no padding
        experts = np.stack([np.concatenate(of_layer) for of_layer in calls], axis=1)
        assert len(experts) == output.shape[1] - 1, "every token but the last passes each router once"
        return experts

    def _hook(self, calls: list[np.ndarray]):
        """Before an experts module: keeps its `top_k_index`, the second argument. A copy, for its memory may be used again."""
        return lambda _, arguments: calls.append(arguments[1].cpu().numpy().astype(self._dtype))


def _rows(number: int, prompt_tokens: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """`prompt` and `decode` of one prompt's tokens."""
    return np.full(tokens, number, dtype=np.int32), np.arange(tokens) >= prompt_tokens


def routing_profile(trace: RoutingTrace, shape: ModelShape, command: str, output_tokens: int) -> RoutingProfile:
    """Counts a whole trace of a model of `shape`: each set by itself, prefill and decode apart."""
    groups = 2 * trace.prompt_sets[trace.prompt] + trace.decode  # [tokens]: 2 s is the prefill of set s, 2 s + 1 its decode
    follows = np.diff(trace.prompt, prepend=-1) == 0
    num_groups = 2 * len(trace.set_names)
    layers = [
        _count(trace.experts[:, layer].astype(np.int64), groups, follows, num_groups, shape.num_experts)
        for layer in range(shape.num_layers)
    ]
    tokens, followers = np.bincount(groups, minlength=num_groups), np.bincount(groups[follows], minlength=num_groups)

    def counts(group: int) -> Counts:
        rows = {key: {layer: found[key][group].tolist() for layer, found in enumerate(layers)} for key in layers[0]}
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
        recorded=Recorded(command=command, created=date.today().isoformat(), output_tokens=output_tokens),
        sets={
            name: PromptSet(prompts=int(prompts[number]), prefill=counts(2 * number), decode=counts(2 * number + 1))
            for number, name in enumerate(trace.set_names)
        },
    )


def _count(chosen: np.ndarray, groups: np.ndarray, follows: np.ndarray, num_groups: int, num_experts: int) -> dict[str, np.ndarray]:
    """One layer's counts per group of tokens: activations and reuse [groups, experts], pairs [groups, pairs].

    `chosen` int64 [tokens, k], `groups` [tokens], `follows` bool [tokens]: whether the token before is of the same sequence.
    """
    cells = groups[:, None] * num_experts + chosen
    again = (chosen[1:, :, None] == chosen[:-1, None, :]).any(axis=2) & follows[1:, None]
    by_expert = num_groups * num_experts
    first, second = np.triu_indices(chosen.shape[1], 1)
    ordered = np.sort(chosen, axis=1)
    couples = (groups[:, None] * num_experts + ordered[:, first]) * num_experts + ordered[:, second]
    matrix = np.bincount(couples.ravel(), minlength=by_expert * num_experts).reshape(num_groups, num_experts, num_experts)
    low, high = np.triu_indices(num_experts, 1)
    return {
        "activations": np.bincount(cells.ravel(), minlength=by_expert).reshape(num_groups, num_experts),
        "pairs": matrix[:, low, high],
        "reuse": np.bincount(cells[1:][again], minlength=by_expert).reshape(num_groups, num_experts),
    }
