"""A thousand answers of all kinds: memory and threads stay as they are."""

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import DEMO, demo_shape, random_plan
from ranks import shared_plan
from test_answer import PERSON, TEXT
from test_rank_failures import children

from fiddler_run import load_model
from fiddler_run.generation.answer import Piece, Request, answer
from fiddler_run.generation.grammar import Grammar
from fiddler_run.generation.sampling import Options

WORDS = TEXT.split()
ANSWERS = 1000
WARM_UP = 200  # answers after which libraries have allocated what they keep
MORE_BYTES = 10_000_000  # what the allocator may keep in fragments


class Usage(NamedTuple):
    """What a process holds: bytes of its own memory, and threads."""

    own_bytes: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        status = Path(f"/proc/{pid}/status").read_text()
        kilobytes = status.split("RssAnon:")[1].split()[0]
        return cls(int(kilobytes) * 1024, int(status.split("Threads:")[1].split()[0]))


def requests(tokenizer, rng: random.Random) -> Iterator[Request]:
    """Short and long prompts, greedy and sampled, with everything that a request can ask for."""
    while True:
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
        yield Request(
            tokenizer(text)["input_ids"],
            Options(
                max_new_tokens=rng.randint(1, 10),
                temperature=rng.choice([0.0, 0.8]),
                seed=rng.randrange(100),
                lookup=rng.random() < 0.2,
            ),
            stop=rng.choice([(), ("the", "park")]),
            top_logprobs=rng.choice([None, None, 0, 3]),
            grammar=Grammar(PERSON, "soak") if rng.random() < 0.05 else None,
        )


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_memory_and_threads_stay_flat(num_ranks):
    rng = random.Random(num_ranks)
    plan = random_plan(demo_shape(), rng)
    if num_ranks > 1:
        plan = shared_plan(plan, num_ranks, rng)
    others = set(children(os.getpid()))
    model, tokenizer = load_model(plan, DEMO)
    processes = [os.getpid(), *(set(children(os.getpid())) - others)]
    assert len(processes) == num_ranks
    before = []
    for number, request in zip(range(ANSWERS), requests(tokenizer, rng), strict=False):
        if number == WARM_UP:
            before = [Usage.of(pid) for pid in processes]
        cancelled = threading.Event()
        leaves = rng.random() < 0.1

        def on_piece(_: Piece, leaves: bool = leaves, left: threading.Event = cancelled) -> None:
            if leaves:
                left.set()

        answer(model, tokenizer, request, on_piece, cancelled)
    after = [Usage.of(pid) for pid in processes]
    for first, last in zip(before, after, strict=True):
        assert last.threads <= first.threads
        assert last.own_bytes - first.own_bytes < MORE_BYTES, (before, after)
    if model.peers is not None:
        model.peers.close()
