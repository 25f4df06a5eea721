"""Seeded sampling is reproducible and matches transformers."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import DEMO, demo_shape, random_plan
from seeds import spread

from fiddler_run import load_model
from fiddler_run.generation.answer import generate
from fiddler_run.generation.sampling import Options

TEXTS = ["Once upon a time", "def count"]
NEW_TOKENS = 16


@pytest.mark.parametrize("dtype", spread(["bfloat16", "float32"], 1))
def test_concurrent_models_draw_their_own_random_numbers(dtype):
    """Two models sample in two threads and share the CPU's threads."""
    threads = 1 if dtype == "float32" else 2
    plans = [random_plan(demo_shape(dtype), random.Random(seed), 128, threads) for seed in (1, 2)]
    models = [load_model(plan, DEMO) for plan in plans]

    def sampled(number: int) -> list[str]:
        texts = []
        for seed in range(3):
            pieces = []
            options = Options(max_new_tokens=8, temperature=1.3, top_p=0.95, seed=seed)
            generate(*models[number], TEXTS[number], options, pieces.append)
            texts.append("".join(pieces))
        return texts

    alone = [sampled(0), sampled(1)]
    assert len(set(alone[0])) > 1
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(sampled, (0, 1))) == alone


def test_seeded_samples_match_transformers(place, stock):
    model, tokenizer = place(random_plan(demo_shape(), random.Random(3), 128))
    drawn = {"temperature": 0.9, "top_p": 0.9}
    pieces = []
    options = Options(NEW_TOKENS, **drawn, seed=5)
    generate(model, tokenizer, TEXTS[0], options, pieces.append)
    encoded = tokenizer(TEXTS[0], return_tensors="pt").to(model.device)
    ids = encoded["input_ids"]
    arguments = {**drawn, "top_k": 0, "max_new_tokens": NEW_TOKENS, "pad_token_id": 2}
    output = stock.generate(ids, encoded["attention_mask"], seed=5, do_sample=True, **arguments)
    assert "".join(pieces) == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
