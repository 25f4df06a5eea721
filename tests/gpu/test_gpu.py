"""What only a CUDA device can show. The other tests run there too: their plans' GPU part is then in GPU memory."""

import random

import pytest
import torch
from conftest import make_plan, random_plan

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fiddler_opt.bench_machine import describe_device, measure_machine
from fiddler_opt.compiler import compile_plan
from fiddler_opt.model import ModelSpec
from fiddler_opt.routing import Routing
from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.generate import Options, generate
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.plan import Workload
from fiddler_run.timeline import Timeline
from fiddler_run.transfer import StagingRing

CUDA = torch.device("cuda")
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 768,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
}


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.fixture(scope="module")
def wide(random_checkpoint):
    """A wider model (0.85 GB of experts in float32) and this machine's profile of it."""
    folder, _ = random_checkpoint(**WIDE)
    spec = ModelSpec.load(str(folder))
    torch.cuda.set_per_process_memory_fraction(1.0)
    return folder, spec, measure_machine(spec, "test", lambda step: None)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("extra_mb", [100, 400])
def test_peak_memory_stays_under_the_plans_total(wide, beams, extra_mb):
    folder, spec, machine = wide
    workload = Workload(prompt_tokens=512, output_tokens=16, num_beams=beams, max_seq_len=1024)
    made = dict.fromkeys(("command", "machine", "machine_sha256", "machine_source", "routing", "created"), "test")
    empty = 2**31 + extra_mb * 10**6
    torch.cuda.empty_cache()
    machine = machine.model_copy(update={"device": describe_device(CUDA)})
    plan = compile_plan(spec, machine, Routing.uniform(spec), workload, empty, made)
    torch.cuda.reset_peak_memory_stats()
    model, tokenizer = load_model(plan, folder)
    measured = generate(model, tokenizer, "7 " * 300, Options(max_new_tokens=16, num_beams=beams), lambda text: None)
    gpu = plan.gpu_memory_bytes
    assert measured.peak_gpu_bytes <= gpu.total - gpu.reserve
    assert used_bytes() <= gpu.total
    fixed = gpu.non_expert_weights + gpu.experts + gpu.staging
    assert measured.peak_gpu_bytes - fixed <= gpu.kv_cache + gpu.activations


def test_the_cap_is_real(wide):
    folder, spec, _ = wide
    plan = make_plan(spec.shape, [[0] * 8] * 3, block_neurons=spec.block_neurons)
    load_model(plan, folder)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(plan.gpu_memory_bytes.total, dtype=torch.uint8, device=CUDA)


def test_a_plan_larger_than_the_free_memory(wide):
    folder, spec, _ = wide
    plan = make_plan(spec.shape, [[0] * 8] * 3, block_neurons=spec.block_neurons)
    memory = plan.gpu_memory_bytes.model_copy(update={"total": 10**13})
    with pytest.raises(FiddlerError, match="gpu_memory_bytes.total is 10000.00 GB, but .* GB free"):
        load_model(plan.model_copy(update={"gpu_memory_bytes": memory}), folder)


def test_streamed_blocks_are_the_resident_ones_bit_for_bit():
    """A ring of three slots reused a thousand times: no copy overtakes the computation that still reads its slot."""
    torch.manual_seed(0)
    hidden, neurons = 512, 256
    blocks = torch.randn(40, 3 * neurons * hidden, dtype=torch.bfloat16).mul_(0.05)
    torch.cuda.cudart().cudaHostRegister(blocks.data_ptr(), blocks.nbytes, 0)
    try:
        resident = blocks.to(CUDA)
        ring = StagingRing(3, blocks.shape[1], torch.bfloat16, CUDA)
        states = torch.randn(5, hidden, dtype=torch.bfloat16, device=CUDA)
        expected = [apply_blocks(resident[i : i + 1], states) for i in range(40)]
        rng = random.Random(0)
        order = [rng.randrange(40) for _ in range(1000)]
        torch.cuda._sleep(int(2e8))  # a tenth of a second for the host to queue ahead of the device
        results = [apply_blocks(staged, states) for staged in ring.stream([blocks[i] for i in order], Timeline(CUDA))]
        assert all(torch.equal(result, expected[i]) for i, result in zip(order, results, strict=True))
    finally:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(blocks.data_ptr())


def test_host_memory_of_absent_experts_is_page_locked(wide):
    folder, spec, _ = wide
    model, _ = load_model(random_plan(spec.shape, random.Random(1), spec.block_neurons), folder)
    dispatch = model.experts_modules()[0].dispatch
    assert all(blocks.is_pinned() for blocks in dispatch.absent if len(blocks))
    assert all(blocks.is_cuda for blocks in dispatch.resident if len(blocks))
