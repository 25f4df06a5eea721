"""Synthetic routing: a trace with a given skew and repetition, in place of a recorded one."""

import re
from dataclasses import dataclass
from typing import Self

import numpy as np

from fiddler_opt.measure.trace import RoutingTrace
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan

DECODE_TOKENS = 2_000  # at least, in all sequences; a hit rate is then known to about a percent
MAX_SKEW = 10.0


@dataclass(frozen=True)
class Synthetic:
    """Routing by two numbers.

    In each layer, the popularity of the experts falls as rank ** -skew; 0 is uniform. `repeat` is
    the fraction of tokens that choose at least one of the experts that the token before chose in
    the same layer. For Mixtral-8x7B, that is 0.46 if tokens are independent, and 0.45 to 0.67 in
    the published routing (Mixtral of Experts, arXiv 2401.04088, table 5).
    """

    skew: float
    repeat: float

    @classmethod
    def parse(cls, text: str, flag: str) -> Self:
        """Parses `SKEW,REPEAT`.

        Raises:
            FiddlerError: the text is not two numbers within their bounds.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*", text)
        if match is None or float(match[1]) > MAX_SKEW or float(match[2]) > 1:
            raise FiddlerError(
                f"{flag} {text}: not a skew from 0 to {MAX_SKEW:g} and a repetition from 0 to 1;"
                " write for example 0.5,0.6"
            )
        return cls(float(match[1]), float(match[2]))

    def trace(self, plan: Plan, seed: int = 0) -> RoutingTrace:
        """Sequences of the plan's workload, routed at random.

        The experts with the most resident blocks are the most popular; equal ones are ranked at
        random.

        Raises:
            FiddlerError: the model has too few experts for this repetition.
        """
        shape = plan.model
        if self.repeat < 1 and 2 * shape.num_experts_per_tok > shape.num_experts:
            raise FiddlerError(
                f"--synthetic: with {shape.num_experts_per_tok} of {shape.num_experts} experts per"
                " token, every token repeats one; give a repetition of 1"
            )
        workload = plan.workload
        decoded = max(1, workload.output_tokens - 1)  # the last token is not routed
        sequences = -(-DECODE_TOKENS // decoded)
        tokens = workload.prompt_tokens + decoded
        rng = np.random.default_rng(seed)
        weights = self._log_weights(plan, rng)
        chosen = np.empty((sequences, tokens, *weights.shape[:1], shape.num_experts_per_tok), int)
        for token in range(tokens):
            before = chosen[:, token - 1] if token else None
            chosen[:, token] = self._choose(weights, before, sequences, chosen.shape[-1], rng)
        dtype = np.uint8 if shape.num_experts <= 256 else np.uint16
        return RoutingTrace(
            experts=chosen.reshape(sequences * tokens, *chosen.shape[2:]).astype(dtype),
            prompt=np.repeat(np.arange(sequences, dtype=np.int32), tokens),
            decode=np.tile(np.arange(tokens) >= workload.prompt_tokens, sequences),
            prompt_sets=np.zeros(sequences, dtype=np.int32),
            set_names=["synthetic"],
            fingerprint="",
        )

    def _log_weights(self, plan: Plan, rng: np.random.Generator) -> np.ndarray:
        """Logarithms of the experts' popularity, [layers, experts]."""
        rows = []
        for row in plan.rank.resident_blocks.values():
            order = sorted(range(len(row)), key=lambda expert: (-row[expert], rng.random()))
            ranks = np.empty(len(row))
            ranks[order] = np.arange(1, len(row) + 1)
            rows.append(-self.skew * np.log(ranks))
        return np.array(rows)

    def _choose(
        self,
        weights: np.ndarray,
        before: np.ndarray | None,
        sequences: int,
        top_k: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """The experts of one token of each sequence, [sequences, layers, k].

        Adding Gumbel noise to logarithms and taking the largest draws without replacement. One of
        the experts `before` is forced in if the token repeats; all are kept out if it does not.
        """
        scores = weights + rng.gumbel(size=(sequences, *weights.shape))
        if before is not None:
            repeats = rng.random(before.shape[:2]) < self.repeat
            one = np.take_along_axis(before, rng.integers(top_k, size=(*before.shape[:2], 1)), 2)
            np.put_along_axis(
                scores,
                before,
                np.where(repeats[..., None], np.take_along_axis(scores, before, 2), -np.inf),
                2,
            )
            np.put_along_axis(scores, one, np.where(repeats[..., None], np.inf, -np.inf), 2)
        return np.argsort(-scores, axis=2)[..., :top_k]
