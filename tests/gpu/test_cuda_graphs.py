"""CUDA graphs of single functions and of a model's decode step."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fiddler_opt.measure.machine import release_gpu_memory
from fiddler_run.generation.cuda_graphs import Recorder
from fiddler_run.generation.model import PlannedModel
from gpu.conftest import CUDA, exactly, random_ids


def eager_tokens(model: PlannedModel, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Generates by transformers' own forward pass: a hook rules out CUDA graphs."""
    with model.model.layers[0].register_forward_hook(lambda *_: None):
        return model.generate(ids, **exactly(ids, new_tokens))


@torch.inference_mode()
def test_replayed_graphs_match_eager_results():
    """Inputs change with each replay, and one segment's outputs are the next one's inputs."""
    torch.manual_seed(0)
    first, second = (torch.randn(64, 64, device=CUDA) for _ in range(2))
    recorder = Recorder(CUDA)
    one = recorder.segment(lambda x: (x @ first, x.sum(dim=1)))
    two = recorder.segment(lambda x, y: x @ second + y[:, None])
    for rows in (1, 5, 1):
        for _ in range(3):
            states = torch.randn(rows, 64, device=CUDA)
            expected = states @ first @ second + states.sum(dim=1)[:, None]
            torch.testing.assert_close(two(*one(states)), expected, rtol=1e-3, atol=1e-2)
    assert recorder.active


def test_unrecordable_function_runs_eagerly(caplog: pytest.LogCaptureFixture):
    recorder = Recorder(CUDA)
    fine = recorder.segment(lambda x: x + 1)
    waits = recorder.segment(lambda x: x * x.sum().item())
    states = torch.full((2,), 3.0, device=CUDA)
    assert fine(states).tolist() == [4.0, 4.0]
    assert waits(states).tolist() == [18.0, 18.0]
    assert not recorder.active
    assert "no CUDA graphs" in caplog.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert fine(states * 2).tolist() == [7.0, 7.0]
    assert waits(states * 2).tolist() == [72.0, 72.0]


def test_cached_memory_can_be_freed_after_a_failed_recording():
    recorder = Recorder(CUDA)
    waits = recorder.segment(lambda x: x * x.sum().item())
    waits(torch.full((2,), 3.0, device=CUDA))
    assert not recorder.active
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
    """For one sequence and for three; the layers' segments are recorded for both shapes."""
    model = wide_bfloat16
    for sequences in (1, 3):
        ids = random_ids(sequences, 20, seed=1)
        recorded = model.generate(ids, **exactly(ids, 24))
        assert torch.equal(recorded, eager_tokens(model, ids, 24))
    segments = model.session.decode._layers[0]
    assert len(segments.before._recordings) >= 2
    assert len(segments.after._recordings) >= 2
    assert not caplog.text


def test_weights_replaced_after_recording_are_used(wide_bfloat16: PlannedModel):
    """Graphs read weights by address, and a replaced router has another address."""
    model = wide_bfloat16
    ids = random_ids(1, 12, seed=5)
    before = model.generate(ids, **exactly(ids, 12))
    routers = [layer.mlp.gate for layer in model.model.layers]
    kept = [router.weight for router in routers]
    try:
        for router in routers:
            router.weight = torch.nn.Parameter(router.weight.flip(0).clone(), requires_grad=False)
        after = model.generate(ids, **exactly(ids, 12))
        expected = eager_tokens(model, ids, 12)
    finally:
        for router, weight in zip(routers, kept, strict=True):
            router.weight = weight
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)
    assert torch.equal(model.generate(ids, **exactly(ids, 12)), before)
