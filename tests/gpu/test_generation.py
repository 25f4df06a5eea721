"""Whole generations on the GPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.model import PlannedModel
from gpu.conftest import CUDA, exactly, random_ids


def test_generation_is_deterministic(wide_bfloat16: PlannedModel):
    ids = random_ids(2, 30, seed=1)
    first, second = (wide_bfloat16.generate(ids, **exactly(ids, 30)) for _ in range(2))
    assert torch.equal(first, second)


def test_concurrent_generations_match_sequential_ones(wide_bfloat16: PlannedModel):
    """On the default CUDA stream, and with one stream per thread."""
    prompts = [random_ids(1, 9 + number, seed=number) for number in range(3)]

    def generated(ids: torch.Tensor) -> torch.Tensor:
        return wide_bfloat16.generate(ids, pad_token_id=0, **exactly(ids, 12))

    def on_a_stream(ids: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            output = generated(ids)
            torch.cuda.current_stream().synchronize()
            return output

    alone = [generated(ids) for ids in prompts]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(6) as threads:
        for run in (generated, on_a_stream):
            found = list(threads.map(run, prompts * 4))
            assert all(torch.equal(*pair) for pair in zip(found, alone * 4, strict=True))


def test_kv_cache_beyond_the_plan_is_refused(wide_bfloat16: PlannedModel):
    """The request is refused up front: it would run out of memory half-way."""
    ids = torch.randint(3, 700, (1, 8), device=CUDA)
    few = wide_bfloat16.generate(
        ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=0
    )
    assert few.sequences.shape == (1, 12)
    many = ids.expand(4000, -1)
    message = "a KV cache for 4000 x .* tokens besides the plan's needs .* GB"
    with pytest.raises(FiddlerError, match=message):
        wide_bfloat16.generate(
            many,
            attention_mask=torch.ones_like(many),
            max_new_tokens=2000,
            do_sample=False,
            pad_token_id=0,
        )
