"""CUDA graphs of a model's decode step."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fiddler_opt.measure.machine import release_gpu_memory
from fiddler_run.generation.model import PlannedModel
from gpu.conftest import CUDA, exactly, random_ids


def eager_tokens(model: PlannedModel, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Generates by transformers' own forward pass: a hook rules out CUDA graphs."""
    with model.model.layers[0].register_forward_hook(lambda *_: None):
        return model.generate(ids, **exactly(ids, new_tokens))


def waits(model: PlannedModel) -> object:
    """Makes the forward pass wait for the GPU, which cannot be captured."""
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda states: forward(states) * states.isfinite().all().item()
    return norm


def test_unrecordable_model_runs_eagerly(
    wide_bfloat16: PlannedModel, caplog: pytest.LogCaptureFixture
):
    """And the memory of the failed capture can be used again."""
    model = wide_bfloat16
    ids = random_ids(1, 20, seed=1)
    expected = model.generate(ids, **exactly(ids, 8))
    model.session.forget_decode()
    norm = waits(model)
    try:
        assert torch.equal(model.generate(ids, **exactly(ids, 8)), expected)
    finally:
        del norm.forward
        model.session.forget_decode()
    assert "no CUDA graphs" in caplog.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    release_gpu_memory()
    cached = torch.empty(400 * 2**20, dtype=torch.uint8, device=CUDA)
    allowed = torch.cuda.memory_reserved() + 100 * 2**20
    total = torch.cuda.get_device_properties(CUDA).total_memory
    del cached
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        torch.empty(450 * 2**20, dtype=torch.uint8, device=CUDA)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_recorded_decode_matches_eager_decode(
    wide_bfloat16: PlannedModel, caplog: pytest.LogCaptureFixture
):
    """For one sequence and for three; both are recorded."""
    model = wide_bfloat16
    for sequences in (1, 3):
        ids = random_ids(sequences, 20, seed=1)
        recorded = model.generate(ids, **exactly(ids, 24))
        assert torch.equal(recorded, eager_tokens(model, ids, 24))
    assert len(model.session.decode._tapes) >= 2
    assert not caplog.text


def test_weights_replaced_after_recording_are_used(wide_bfloat16: PlannedModel):
    """Graphs read weights by address, and a replaced router has another address."""
    model = wide_bfloat16
    ids = random_ids(1, 12, seed=5)

    def logits() -> torch.Tensor:
        """Of the second token, from a tape; the tokens may be the same with other experts."""
        more = {"output_logits": True, "return_dict_in_generate": True}
        return model.generate(ids, **exactly(ids, 2), **more).logits[1]

    before = logits()
    routers = [layer.mlp.gate for layer in model.model.layers]
    kept = [router.weight for router in routers]
    try:
        for router in routers:
            router.weight = torch.nn.Parameter(router.weight.flip(0).clone(), requires_grad=False)
        after = logits()
        with model.model.layers[0].register_forward_hook(lambda *_: None):
            expected = logits()
    finally:
        for router, weight in zip(routers, kept, strict=True):
            router.weight = weight
    assert (after - expected).norm() <= 1e-2 * expected.norm()
    assert (after - before).norm() > 2e-2 * expected.norm()
    assert torch.equal(logits(), before)
