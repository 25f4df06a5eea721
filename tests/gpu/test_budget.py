"""The GPU memory budget: a plan's total is never exceeded, and it caps PyTorch's allocator."""

import gc
from types import SimpleNamespace

import pytest
import torch
from conftest import make_plan, with_rank

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fiddler_opt.inputs.machine import Device
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.measure.device import describe_device
from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.generate import generate_ids
from fiddler_run.generation.perplexity import perplexity
from fiddler_run.generation.sampling import Options
from fiddler_run.plan.schema import Plan, Workload
from fiddler_run.system.process_settings import allowed_gpu_bytes
from gpu.conftest import CUDA, Wide, random_ids, solved


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def nothing_resident(spec: ModelSpec) -> Plan:
    """A plan with all experts in host memory."""
    return make_plan(spec.shape, [[0] * 8] * 3, block_neurons=spec.block_neurons)


@pytest.mark.parametrize(("beams", "batch"), [(1, 1), (4, 1), (1, 4)])
@pytest.mark.parametrize("extra_mb", [100, 400])
def test_peak_memory_stays_under_the_plan_total(wide: Wide, beams: int, batch: int, extra_mb: int):
    folder, spec, machine = wide
    workload = Workload(
        prompt_tokens=512, output_tokens=16, num_beams=beams, batch_size=batch, max_seq_len=1024
    )
    torch.cuda.empty_cache()
    machine = machine.model_copy(update={"device": Device(**describe_device(CUDA))})
    plan = solved(spec, machine, workload, gpu_bytes=2**31 + extra_mb * 10**6)
    torch.cuda.reset_peak_memory_stats()
    model, _ = load_model(plan, folder)
    ids = torch.randint(3, 700, (batch, 600), generator=torch.Generator().manual_seed(1))
    options = Options(max_new_tokens=16, num_beams=beams)
    _, measured = generate_ids(model, ids, options, min_new_tokens=16, pad_token_id=0)
    gpu = plan.rank.gpu_memory_bytes
    assert measured.peak_gpu_bytes <= gpu.total - gpu.reserve
    assert used_bytes() <= gpu.total
    fixed = gpu.non_expert_weights + gpu.experts + gpu.staging
    assert measured.peak_gpu_bytes - fixed <= gpu.kv_cache + gpu.activations


def test_perplexity_at_full_context_stays_under_the_plan_total(wide: Wide):
    folder, spec, machine = wide
    workload = Workload(
        prompt_tokens=512, output_tokens=16, num_beams=1, batch_size=1, max_seq_len=2048
    )
    torch.cuda.empty_cache()
    machine = machine.model_copy(update={"device": Device(**describe_device(CUDA))})
    plan = solved(spec, machine, workload, gpu_bytes=2**31 + 10**8)
    torch.cuda.reset_peak_memory_stats()
    model, _ = load_model(plan, folder)
    tokenizer = SimpleNamespace(bos_token_id=None, decode=lambda ids: "x" * len(ids))
    found = perplexity(model, tokenizer, random_ids(1, 3000, 1)[0].tolist())
    assert found.windows == 2
    assert found.value > 1
    gpu = plan.rank.gpu_memory_bytes
    assert torch.cuda.max_memory_reserved() <= gpu.total - gpu.reserve
    assert used_bytes() <= gpu.total


def test_allocation_beyond_the_cap_fails(wide: Wide):
    folder, spec, _ = wide
    plan = nothing_resident(spec)
    model, _ = load_model(plan, folder)
    allowed = allowed_gpu_bytes(model.device)  # of this plan and of other tests' models
    assert allowed >= plan.rank.gpu_memory_bytes.total
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(allowed, dtype=torch.uint8, device=CUDA)


def test_cap_is_the_sum_of_loaded_plans(wide: Wide):
    folder, spec, _ = wide
    plan = nothing_resident(spec)
    gc.collect()
    before = allowed_gpu_bytes(CUDA) or 0
    models = [load_model(plan, folder)[0] for _ in range(2)]
    assert allowed_gpu_bytes(CUDA) == before + 2 * plan.rank.gpu_memory_bytes.total
    del models
    gc.collect()
    assert (allowed_gpu_bytes(CUDA) or 0) == before


def test_plan_larger_than_free_memory_is_refused(wide: Wide):
    folder, spec, _ = wide
    plan = nothing_resident(spec)
    memory = plan.rank.gpu_memory_bytes.model_copy(update={"total": 10**13})
    with pytest.raises(FiddlerError, match="gpu_memory_bytes.total is 10000.00 GB, but .* GB free"):
        load_model(with_rank(plan, gpu_memory_bytes=memory), folder)
