"""One generation at a time: every caller gets the answer that it would get alone."""

import contextlib
import gc
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan, random_plan, with_rank
from models import answer
from seeds import spread
from transformers import DynamicCache, StoppingCriteria, TextIteratorStreamer

from fiddler_run import load_model

TEXTS = ["Once upon a time", "def count", "3 + 4 =", "One bright morning"]


def loaded(dtype: str, seed: int = 3):
    """A model with a random placement.

    float32 has one thread: PyTorch threads of two models would wait for each other's cores.
    """
    threads = 1 if dtype == "float32" else 2
    plan = random_plan(demo_shape(dtype), random.Random(seed), 128, max_threads=threads)
    return load_model(plan, DEMO)


@pytest.fixture(scope="module", params=spread(["bfloat16", "float32"], 1))
def model_and_tokenizer(request):
    return loaded(request.param)


def begin_streaming(model, tokenizer, text: str) -> tuple[threading.Thread, TextIteratorStreamer]:
    """Starts `generate` in a thread, as transformers recommends; returns thread and streamer."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    arguments = {"streamer": streamer}
    thread = threading.Thread(target=answer, args=(model, tokenizer, text), kwargs=arguments)
    thread.start()
    return thread, streamer


def streamed_answer(model, tokenizer, text: str) -> str:
    thread, streamer = begin_streaming(model, tokenizer, text)
    pieces = list(streamer)
    thread.join()
    return "".join(pieces)


def abandon_stream(model, tokenizer, text: str) -> threading.Thread:
    """Starts a streamed answer, reads one piece and drops the rest; returns its thread."""
    thread, streamer = begin_streaming(model, tokenizer, text)
    next(iter(streamer))
    return thread


def test_concurrent_callers_get_the_answers_they_get_alone(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    alone = {text: answer(model, tokenizer, text) for text in TEXTS}
    assert len(set(alone.values())) == len(TEXTS)
    for _ in range(2):
        abandoned = abandon_stream(model, tokenizer, TEXTS[0])
        with ThreadPoolExecutor(12) as threads:
            ways = (answer, streamed_answer) * 6
            asked = [
                (text, threads.submit(way, model, tokenizer, text))
                for way, text in zip(ways, TEXTS * 3, strict=True)
            ]
            for text, found in asked:
                assert found.result(timeout=120) == alone[text]
        abandoned.join(timeout=60)
        assert not abandoned.is_alive()


def test_forward_passes_during_a_generation_are_correct(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(TEXTS[1], return_tensors="pt").to(model.device)["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
    alone = answer(model, tokenizer, TEXTS[0])

    @torch.no_grad()
    def passes() -> list[torch.Tensor]:
        return [model(ids).logits for _ in range(8)]

    with ThreadPoolExecutor(2) as threads:
        beside = threads.submit(passes)
        assert answer(model, tokenizer, TEXTS[0]) == alone
        assert all(torch.equal(logits, expected) for logits in beside.result(timeout=60))


def test_layers_called_during_a_generation_are_correct(model_and_tokenizer):
    """The calls bypass the model's own `forward`, which admits one caller at a time."""
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(TEXTS[1], return_tensors="pt").to(model.device)["input_ids"]

    @torch.no_grad()
    def states() -> torch.Tensor:
        return model.model(ids, past_key_values=DynamicCache(config=model.config)).last_hidden_state

    expected = states()
    alone = answer(model, tokenizer, TEXTS[0])
    with ThreadPoolExecutor(2) as threads:
        beside = threads.submit(lambda: [states() for _ in range(8)])
        assert answer(model, tokenizer, TEXTS[0]) == alone
        assert all(torch.equal(found, expected) for found in beside.result(timeout=60))


def test_turns_do_not_take_jobs_of_directly_called_layers():
    """Nothing is streamed: the result is the CPU job's alone, and a turn must not abandon it."""
    plan = make_plan(demo_shape("bfloat16"), [[0] * 8] * 6, threads=2)
    memory = plan.rank.gpu_memory_bytes.model_copy(update={"staging": 0})
    model, tokenizer = load_model(with_rank(plan, gpu_memory_bytes=memory), DEMO)
    layer = model.layers[0]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2000, 128, generator=generator).bfloat16()
    weights, index = torch.rand(2000, 8, generator=generator).topk(2)
    expected = layer(states, index, weights)
    ended = threading.Event()

    def turns() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            with contextlib.suppress(KeyError), model.session.turn():
                time.sleep(0.0005)
                if number % 3 == 0:
                    raise KeyError

    with ThreadPoolExecutor(2) as threads:
        beside = threads.submit(turns)
        try:
            found = [layer(states, index, weights) for _ in range(10)]
        finally:
            ended.set()
        beside.result(timeout=60)
    assert all(torch.equal(each, expected) for each in found)


def test_nested_generations_are_correct(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    alone = [answer(model, tokenizer, text) for text in TEXTS[:2]]
    within = []

    class Ask(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if len(within) < 2:
                within.append(answer(model, tokenizer, TEXTS[1]))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    assert answer(model, tokenizer, TEXTS[0], stopping_criteria=[Ask()]) == alone[0]
    assert within == [alone[1]] * 2


def test_generation_after_an_interrupt_is_correct(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    alone = answer(model, tokenizer, TEXTS[0])
    steps = []

    class Break(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            steps.append(1)
            if len(steps) % 3 == 0:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            answer(model, tokenizer, TEXTS[1], stopping_criteria=[Break()])
        assert answer(model, tokenizer, TEXTS[0]) == alone


def test_model_is_freed_with_its_last_reference():
    """Its memory must not wait for the garbage collector: the next model needs it."""
    model, tokenizer = loaded("bfloat16")
    answer(model, tokenizer, TEXTS[0])
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_layers_do_not_return_reused_buffers(model_and_tokenizer):
    """Outputs and router choices keep their values after the pass, in prefill and decode."""
    model, tokenizer = model_and_tokenizer
    encoded = tokenizer(TEXTS[0], return_tensors="pt").to(model.device)
    kept = []
    copies = []

    def keep(_, arguments, output):
        kept.extend((*arguments, output))
        copies.extend(tensor.clone() for tensor in (*arguments, output))

    hooks = [experts.register_forward_hook(keep) for experts in model.experts_modules()]
    try:
        model.generate(**encoded, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(kept) == 4 * 6 * 8
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
