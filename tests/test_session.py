"""One generation at a time: whoever calls a model gets the answer that they would get alone."""

import contextlib
import gc
import os
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan, random_plan
from transformers import DynamicCache, MixtralForCausalLM, StoppingCriteria, TextIteratorStreamer

from fiddler_run import load_model, process_settings
from fiddler_run.generate import Options, generate
from fiddler_run.kernels.cpu import cpu_experts

TEXTS = ["Once upon a time", "def count", "3 + 4 =", "One bright morning"]
NEW_TOKENS = 16
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 2}


def loaded(dtype: str, seed: int = 3):
    threads = 1 if dtype == "float32" else 2  # PyTorch's threads of two models would wait for each other's cores
    return load_model(random_plan(demo_shape(dtype), random.Random(seed), max_threads=threads), DEMO)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model_and_tokenizer(request):
    return loaded(request.param)


def answer(model, tokenizer, text: str, **arguments) -> str:
    encoded = tokenizer(text, return_tensors="pt").to(model.device)
    output = model.generate(**encoded, **GREEDY, **arguments)
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :])


def streamed_answer(model, tokenizer, text: str) -> str:
    """As transformers recommends: `generate` in a thread of its own, its text read here."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=answer, args=(model, tokenizer, text), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    return "".join(pieces)


def begin_and_leave(model, tokenizer, text: str) -> threading.Thread:
    """A reader that takes one piece of a streamed answer and never comes back."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=answer, args=(model, tokenizer, text), kwargs={"streamer": streamer})
    thread.start()
    next(iter(streamer))
    return thread


def test_twelve_threads_and_a_reader_who_leaves(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    alone = {text: answer(model, tokenizer, text) for text in TEXTS}
    assert len(set(alone.values())) == len(TEXTS)
    for _ in range(3):
        left = begin_and_leave(model, tokenizer, TEXTS[0])
        with ThreadPoolExecutor(12) as threads:
            asked = [
                (text, threads.submit(streamed_answer if number % 2 else answer, model, tokenizer, text))
                for number, text in enumerate(TEXTS * 3)
            ]
            for text, found in asked:
                assert found.result(timeout=120) == alone[text]
        left.join(timeout=60)
        assert not left.is_alive()


def test_a_forward_pass_beside_a_generation(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(TEXTS[1], return_tensors="pt").to(model.device)["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
    alone = answer(model, tokenizer, TEXTS[0])

    @torch.no_grad()
    def passes() -> list[torch.Tensor]:
        return [model(ids).logits for _ in range(20)]

    with ThreadPoolExecutor(2) as threads:
        beside = threads.submit(passes)
        assert answer(model, tokenizer, TEXTS[0]) == alone
        assert all(torch.equal(logits, expected) for logits in beside.result(timeout=60))


def test_layers_called_beside_a_generation(model_and_tokenizer):
    """Past the model's own `forward`, which lets one caller in at a time."""
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(TEXTS[1], return_tensors="pt").to(model.device)["input_ids"]

    @torch.no_grad()
    def states() -> torch.Tensor:
        return model.model(ids, past_key_values=DynamicCache(config=model.config)).last_hidden_state

    expected = states()
    alone = answer(model, tokenizer, TEXTS[0])
    with ThreadPoolExecutor(2) as threads:
        beside = threads.submit(lambda: [states() for _ in range(20)])
        assert answer(model, tokenizer, TEXTS[0]) == alone
        assert all(torch.equal(found, expected) for found in beside.result(timeout=60))


def test_jobs_of_layers_called_beside_turns():
    """Where nothing is streamed, a layer's result is its CPU job's alone: whoever has a turn must not take the job away."""
    plan = make_plan(demo_shape("bfloat16"), [[0] * 8] * 6, threads=2)
    memory = plan.gpu_memory_bytes.model_copy(update={"staging": 0})
    model, tokenizer = load_model(plan.model_copy(update={"gpu_memory_bytes": memory}), DEMO)
    layer = model.experts_modules()[0].dispatch
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
            found = [layer(states, index, weights) for _ in range(25)]
        finally:
            ended.set()
        beside.result(timeout=60)
    assert all(torch.equal(each, expected) for each in found)


def test_a_generation_within_a_generation(model_and_tokenizer):
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


def test_an_error_in_one_generation_leaves_the_next_one_right(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    alone = answer(model, tokenizer, TEXTS[0])
    steps = []

    class Break(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            steps.append(1)
            if len(steps) % 3 == 0:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            answer(model, tokenizer, TEXTS[1], stopping_criteria=[Break()])
        assert answer(model, tokenizer, TEXTS[0]) == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_models_draw_their_own_random_numbers(dtype):
    """Seeded samples of two models in two threads, which share the CPU's threads."""
    models = [loaded(dtype, seed) for seed in (1, 2)]

    def sampled(number: int) -> list[str]:
        texts = []
        for seed in range(6):
            pieces = []
            options = Options(max_new_tokens=12, temperature=1.3, top_p=0.95, seed=seed)
            generate(*models[number], TEXTS[number], options, pieces.append)
            texts.append("".join(pieces))
        return texts

    alone = [sampled(0), sampled(1)]
    assert len(set(alone[0])) > 1
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(sampled, (0, 1))) == alone


def test_a_seed_draws_what_transformers_would_draw():
    model, tokenizer = loaded("float32")
    pieces = []
    generate(model, tokenizer, TEXTS[0], Options(NEW_TOKENS, temperature=0.9, top_p=0.9, seed=5), pieces.append)
    stock = MixtralForCausalLM.from_pretrained(DEMO, dtype=torch.float32).to(model.device).eval()
    ids = tokenizer(TEXTS[0], return_tensors="pt").to(model.device)["input_ids"]
    torch.manual_seed(5)
    output = stock.generate(ids, do_sample=True, temperature=0.9, top_p=0.9, top_k=0, max_new_tokens=NEW_TOKENS, pad_token_id=2)
    assert "".join(pieces) == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def said_by_a_fork(say) -> str:
    """What `say()` returns in a forked process, which must end as any process does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = say()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_is_told(model_and_tokenizer):
    """It has none of the threads that compute, nor what another thread has locked."""
    model, tokenizer = model_and_tokenizer
    said = said_by_a_fork(lambda: answer(model, tokenizer, TEXTS[0]))
    assert said.startswith("FiddlerError: this model was loaded by process ")
    assert said.endswith('by the method "spawn", and load the model there')

    def settings_and_pool() -> str:
        with process_settings.while_running(1):
            return str(cpu_experts(2, False, 20, torch.bfloat16, 128, 32) is pool)

    pool = cpu_experts(2, False, 20, torch.bfloat16, 128, 32)
    with process_settings._lock:  # as another thread may
        assert said_by_a_fork(settings_and_pool) == "False"


def test_a_model_is_gone_with_its_last_reference():
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


def test_layers_never_hand_out_a_buffer_that_is_used_again(model_and_tokenizer):
    """Each layer's output and the router's choice are still what they were when the pass is over, in prompts and in decode."""
    model, tokenizer = model_and_tokenizer
    encoded = tokenizer(TEXTS[0], return_tensors="pt").to(model.device)
    kept, copies = [], []

    def keep(_, arguments, output):
        kept.extend((*arguments, output))
        copies.extend(tensor.clone() for tensor in (*arguments, output))

    hooks = [experts.register_forward_hook(keep) for experts in model.experts_modules()]
    try:
        model.generate(**encoded, **GREEDY)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(kept) == 4 * 6 * NEW_TOKENS
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))


def test_what_is_set_for_the_process_is_put_back(monkeypatch):
    before = torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()
    plan = make_plan(demo_shape("bfloat16"), [[4] * 8] * 6, threads=2)
    model, tokenizer = load_model(plan, DEMO)
    assert (torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()) == before
    seen = []

    class Look(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append((torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    monkeypatch.setattr(model.session, "_cpu_threads", 2)  # of so small a model it would be 1
    answer(model, tokenizer, TEXTS[0], stopping_criteria=[Look()])
    assert set(seen) == {(2, False)}
    assert (torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()) == before


def test_little_work_is_not_divided():
    assert process_settings.dense_threads(16, 83_902_464) == 16  # a layer of Mixtral-8x7B
    assert process_settings.dense_threads(16, 101_000) == 1  # of the demo model


def test_turns_of_two_threads_put_back_what_each_had():
    """PyTorch's number of threads is one of each thread."""
    before, cudnn = torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()
    entered, left = threading.Event(), threading.Event()
    found = []

    def first() -> None:
        with process_settings.while_running(before + 3):
            entered.set()
            time.sleep(0.05)
        found.append(torch.get_num_threads())
        left.set()

    def second() -> None:
        entered.wait()
        with process_settings.while_running(before + 2):
            left.wait()
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [before, before + 2, before]
    assert (torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()) == (before, cudnn)


def test_the_last_of_several_turns_puts_back():
    before = torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()
    first, second = (process_settings.while_running(threads) for threads in (before[0] + 1, before[0] + 2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    second.__exit__(None, None, None)
    assert (torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()) == before
