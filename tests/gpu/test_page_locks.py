"""Page-locked host memory: host blocks lie in it, and it stays locked while it is in use."""

import gc
import random

import pytest
import torch
from conftest import random_plan

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.weights.arena import Arena
from gpu.conftest import CUDA, Wide

CPU = torch.device("cpu")
BLOCK_BYTES = 4 * 10**6


def test_refused_page_lock_leaves_no_cuda_error():
    arena = Arena(2, BLOCK_BYTES, CPU)
    arena.pin()
    with pytest.raises(FiddlerError, match="cannot page-lock"):
        arena.pin()  # already locked
    assert torch.ones(3, device=CUDA).sum().item() == 3


def test_page_locks_live_as_long_as_views():
    arena = Arena(4, BLOCK_BYTES, CPU)
    view = arena.take(2)
    arena.pin()
    del arena
    gc.collect()
    assert view.is_pinned()
    view.fill_(3)
    assert view.to(CUDA, non_blocking=True).sum().item() == 3 * view.numel()


def test_host_blocks_are_page_locked(wide: Wide):
    folder, spec, _ = wide
    model, _ = load_model(random_plan(spec.shape, random.Random(1), spec.block_neurons), folder)
    experts = model.layers[0].experts
    assert all(expert.host.is_pinned() for expert in experts if expert.num_host)
    assert all(expert.resident.is_cuda for expert in experts if expert.num_resident)
