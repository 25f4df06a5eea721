"""A session owns the state that generations of one model change, and runs one at a time."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import Cache, PreTrainedModel

from fiddler_run.engine.cuda_graphs import Capture
from fiddler_run.engine.resources import Resources
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.cache import KeyValueCache
from fiddler_run.generation.decode_step import DecodeStep
from fiddler_run.generation.prefill import forgets_between_chunks, prefill, require_chunks
from fiddler_run.system.process_settings import allowed_gpu_bytes, while_running


class Prefix(NamedTuple):
    """The first tokens of a prompt that need not be computed again.

    `arguments` are for `generate()`. `keep` takes all tokens after the generation.
    """

    tokens: int
    arguments: dict[str, object]
    keep: Callable[[list[int]], None]


class Session:
    """The KV cache and decode step of one model, and the turn to use them and its engine.

    Whoever uses them holds `turn()`; other threads wait.
    """

    def __init__(
        self, model: PreTrainedModel, resources: Resources, cpu_threads: int | None = None
    ):
        """Prepares the session. Call `make_cache` next.

        Args:
            model: an instance of `PlannedModel`.
            cpu_threads: for PyTorch's operations. None: unchanged.
        """
        # A strong reference would form a cycle: 90 GB would wait for the garbage collector.
        self._to_model = weakref.ref(model)
        self._resources = resources
        self._cpu_threads = cpu_threads
        self.cache: KeyValueCache | None = None
        self._decode: DecodeStep | None = None
        self.make_capture: Callable[[], Capture] | None = None  # see `DecodeStep`
        # layers that are called outside the model also wait for the turn
        self._lock = resources.lock
        self._depth = 0  # a generation calls the model, and may itself run inside another one
        self._cache_is_taken = False
        self._pid = os.getpid()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits until no other thread has the turn, then holds it.

        Raises:
            FiddlerError: this is a forked process, or CPU and GPU timed out waiting for each other.
        """
        if os.getpid() != self._pid:
            raise FiddlerError(
                f"this model was loaded by process {self._pid}, whose threads a forked process does"
                ' not have; start processes by the method "spawn", and load the model there'
            )
        with self._lock:
            self._depth += 1
            try:
                if self._depth > 1:
                    yield
                else:
                    with self._outermost_turn():
                        yield
            finally:
                self._depth -= 1

    @contextmanager
    def _outermost_turn(self) -> Iterator[None]:
        # a job of a layer that was called outside the model; later jobs belong to this turn
        self._resources.jobs.finish()
        if self._decode is not None and not self._decode.is_current(self._model):
            self.forget_decode()
        try:
            with while_running(self._cpu_threads):
                yield
            self._resources.settle()
        except BaseException:
            self._resources.abandon()
            raise

    @property
    def _model(self) -> PreTrainedModel:
        return self._to_model()

    @property
    def decode(self) -> DecodeStep:
        """The model's decode step, made on first use."""
        if self._decode is None:
            self._decode = DecodeStep(self._model, self.make_capture)
        return self._decode

    def make_cache(self, sequences: int, max_tokens: int) -> None:
        """Makes a KV cache for `sequences` of `max_tokens`."""
        self.cache = KeyValueCache(self._model.config, sequences, max_tokens)

    @property
    def is_timed(self) -> bool:
        """True while work is recorded on the timeline."""
        return self._resources.timeline.on

    def forget_decode(self) -> None:
        """Drops the decode step and the cache, because a weight or a layer has changed."""
        self._decode = None
        if self.cache is not None:
            self.cache.tokens = []

    @contextmanager
    def prefix_kept(self, prompt: list[int]) -> Iterator[Prefix]:
        """A turn to continue a prompt. The cache keeps what it shares with the previous one."""
        with self.turn():
            free = not self._cache_is_taken and self._model._supports_default_dynamic_cache()
            if not free or forgets_between_chunks(self._model):
                yield Prefix(0, {}, lambda _: None)
                return
            cache = self.cache

            def keep(tokens: list[int]) -> None:
                if cache.get_seq_length() == len(tokens) - 1:  # the last one has not been passed
                    cache.tokens = tokens[:-1]

            self._cache_is_taken = True
            try:
                yield Prefix(cache.keep_prefix(prompt), {"past_key_values": cache}, keep)
            finally:
                self._cache_is_taken = False

    @contextmanager
    def generation(self, arguments: dict, inputs: torch.Tensor | None, config) -> Iterator[None]:
        """A call of `generate()`: makes it use the plan's cache and prefill chunks.

        Changes `arguments` in place.

        Raises:
            FiddlerError: it needs a cache that the plan has not counted, and GPU memory has no room
                for it.
        """
        taken = self._cache_is_taken
        try:
            self._follow_plan(arguments, inputs, config)
            yield
        finally:
            self._cache_is_taken = taken

    def _follow_plan(self, arguments: dict, inputs: torch.Tensor | None, config) -> None:

        def asked(name: str):
            given = arguments.get(name, getattr(config, name, None))
            return getattr(self._model.generation_config, name, None) if given is None else given

        plan = self._model.plan
        if plan is None or asked("use_cache") is False:
            return
        ids = arguments.get("input_ids", inputs)
        copies = max(asked("num_beams") or 1, asked("num_return_sequences") or 1)
        own_cache = self._may_use_own_cache(arguments, asked)
        if own_cache:
            self._cache_is_taken = True
            self.cache.reset(None if ids is None else len(ids) * copies)
            arguments["past_key_values"] = self.cache
        if ids is None:
            return
        tokens = (
            ids.shape[1] + asked("max_new_tokens")
            if asked("max_new_tokens")
            else asked("max_length") or ids.shape[1]
        )
        if arguments.get("past_key_values") is None or (
            own_cache and not self.cache.has_room(len(ids) * copies, tokens)
        ):
            self._require_room(len(ids) * copies, tokens)
        mask = arguments.get("attention_mask")
        usual = (
            mask is not None
            and mask.dim() == 2
            and not any(name in arguments for name in ("inputs_embeds", "position_ids"))
        )
        shared = copies > 1 and own_cache and usual and ids.shape[1] > 1
        at_once = plan.prefill_chunk_tokens * plan.workload.batch_size
        chunk = asked("prefill_chunk_size") or max(
            1, at_once // (len(ids) * (1 if shared else copies))
        )
        if shared:
            # once; transformers would run the prompt for each of its continuations
            self.cache.reset(len(ids))
            prefill(self._model, self.cache, ids[:, :-1], mask, chunk)
            self.cache.batch_repeat_interleave(copies)
            return
        if ids.shape[1] > chunk:
            require_chunks(self._model, ids.shape[1], chunk)
        cache = arguments.get("past_key_values")
        held = cache.get_seq_length() if isinstance(cache, Cache) else 0
        if usual and copies == 1 and 0 < held < ids.shape[1]:
            # transformers before 5.21 would split the whole prompt, also what the cache holds
            rest = (ids.shape[1] - held - 1) % chunk + 1
            prefill(self._model, cache, ids[:, :-rest], mask, chunk)
        elif ids.shape[1] > chunk:
            arguments["prefill_chunk_size"] = chunk

    def _may_use_own_cache(self, arguments: dict, asked) -> bool:
        """False if the caller provides or keeps the cache, or a generation is using it.

        Also False for a model with a cache of its own class.
        """
        other = arguments.get("past_key_values") is not None or asked("cache_implementation")
        handed_out = asked("return_dict_in_generate")
        return (
            not other
            and not handed_out
            and self._model._supports_default_dynamic_cache()
            and not self._cache_is_taken
        )

    def _require_room(self, sequences: int, tokens: int) -> None:
        device = self._model.device
        allowed = allowed_gpu_bytes(device) if device.type == "cuda" else None
        if allowed is None:
            return
        needed = 2 * self.cache.bytes_for(sequences, tokens)  # transformers appends by copying
        free = allowed - torch.cuda.memory_allocated(device)
        if needed > free:
            raise FiddlerError(
                f"a KV cache for {sequences} x {tokens} tokens besides the plan's needs"
                f" {needed / 1e9:.2f} GB of GPU memory, but {max(0, free) / 1e9:.2f} GB is free;"
                " plan with a larger --max-seq-len, --num-beams or --batch-size, and avoid"
                " return_dict_in_generate and cache_implementation"
            )
