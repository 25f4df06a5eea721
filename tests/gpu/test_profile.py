"""Profiles of a machine with a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fiddler_opt.measure.machine import MachineBench, release_gpu_memory
from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.generate import generate_ids
from fiddler_run.generation.sampling import Options
from fiddler_run.plan.schema import Workload
from fiddler_run.weights.arena import Arena
from gpu.conftest import HASTY, Wide, profile_of, solved


def test_profile_times_the_decode_path(wide: Wide, tmp_path: Path):
    """In bfloat16, because float32, the dtype of `wide`, has no decode path."""
    _, spec, _ = wide
    spec = replace(spec, shape=spec.shape.model_copy(update={"dtype": "bfloat16"}))
    bench = MachineBench(spec, HASTY, None)
    assert bench._experts["experts"].engine.decode.takes(1)
    machine = profile_of(bench, tmp_path)
    assert {0.0, 1.0} < set(machine.host_expert_us[1])
    fastest_us = spec.expert_bytes / 1e13 * 1e6  # 10 TB/s
    assert min(machine.resident_expert_us.values()) > fastest_us
    assert min(machine.host_expert_us[1].values()) > machine.resident_expert_us[1]


def test_profile_and_plan_work_without_page_locking(
    wide: Wide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The profile records that nothing can be streamed, and its plans stream nothing."""
    folder, spec, _ = wide

    def refuse(arena: Arena) -> None:
        raise FiddlerError("refused")

    monkeypatch.setattr(Arena, "pin", refuse)
    bench = MachineBench(spec, HASTY, None)
    machine = profile_of(bench, tmp_path)
    del bench
    release_gpu_memory()
    assert not machine.streams
    assert machine.link.h2d_bytes_per_s > 1e9
    workload = Workload(
        prompt_tokens=300, output_tokens=8, num_beams=1, batch_size=1, max_seq_len=512
    )
    model, _ = load_model(solved(spec, machine, workload, gpu_bytes=2**31), folder)
    ids = torch.randint(3, 700, (1, 300), generator=torch.Generator().manual_seed(1))
    _, measured = generate_ids(
        model, ids, Options(max_new_tokens=8), min_new_tokens=8, pad_token_id=0
    )
    assert measured.prefill_traffic.streamed_blocks == measured.traffic.streamed_blocks == 0
