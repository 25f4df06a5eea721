"""The hand-over between GPU and CPU on the decode path: flags in page-locked memory."""

import time

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fiddler_run.encodings.plain import Bf16
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.model import PlannedModel
from fiddler_run.kernels import gpu, triton_kernels
from fiddler_run.kernels.decode_layer import Job
from gpu.conftest import CUDA, exactly, random_ids


def new_flag() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, pin_memory=True)


def numbered(job: int) -> Job:
    return Job(torch.tensor([job - 3], device=CUDA), 3)


def test_gpu_waits_for_cpu_output():
    kernels = gpu.GpuKernels(Bf16(256, 32))
    output_ready = new_flag()
    gave_up = new_flag()
    cpu_output = torch.zeros((3, 256), pin_memory=True)
    results = torch.ones((3, 2, 256), device=CUDA)
    states = torch.zeros((3, 256), dtype=torch.bfloat16, device=CUDA)
    index = torch.zeros((3, 2), dtype=torch.int64, device=CUDA)

    def combined(job: int) -> torch.Tensor:
        kernels.wait(output_ready, gave_up, numbered(job))
        return kernels.combine(results, index, 1, cpu_output, states.dtype)

    combined(0)  # compiles the kernel
    torch.cuda.synchronize()
    output = combined(5)
    done = torch.cuda.current_stream().record_event()
    try:
        output_ready.fill_(4)
        time.sleep(0.2)
        assert not done.query()
        cpu_output.fill_(2.5)
    finally:
        output_ready.fill_(5)
    assert torch.equal(output.cpu(), torch.full((3, 256), 4.5, dtype=torch.bfloat16))
    assert gave_up.item() == 0


def test_gpu_stops_waiting_for_a_stopped_process(monkeypatch: pytest.MonkeyPatch):
    """The kernels end without reading the unwritten table, and later waits end at once."""
    kernels = gpu.GpuKernels(Bf16(256, 32))
    table_ready = new_flag()
    gave_up = new_flag()
    # Garbage, as in memory that was never written.
    table = torch.full((40,), 2**60, dtype=torch.int64).pin_memory()
    kernels.wait_for_table(table, table_ready, gave_up, numbered(0), CUDA)  # compiles the kernel
    torch.cuda.synchronize()
    monkeypatch.setattr(gpu, "GPU_TIMEOUT_S", 0.3)
    started = time.monotonic()
    copied = kernels.wait_for_table(table, table_ready, gave_up, numbered(7), CUDA)
    torch.cuda.synchronize()
    assert 0.2 < time.monotonic() - started < 5
    assert gave_up.item() == 7
    assert not copied.any()
    monkeypatch.setattr(gpu, "GPU_TIMEOUT_S", 30.0)
    kernels.wait_for_table(table, table_ready, gave_up, numbered(8), CUDA)
    torch.cuda.synchronize()
    assert time.monotonic() - started < 10


def test_gpu_timeout_is_reported_and_next_generation_is_correct(
    wide_bfloat16: PlannedModel, monkeypatch: pytest.MonkeyPatch
):
    """The CPU's threads never receive one of the jobs."""
    model = wide_bfloat16
    ids = random_ids(1, 8, seed=2)
    expected = model.generate(ids, **exactly(ids, 6))
    cpu = model.engine.resources.kernels.cpu
    submit = cpu.submit_routed
    calls = []

    def lose_third_job(*arguments) -> None:
        calls.append(1)
        if len(calls) != 3:
            submit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "GPU_TIMEOUT_S", 0.2)
        patch.setattr(cpu, "submit_routed", lose_third_job)
        message = "the GPU timed out after .* s waiting for this process"
        with pytest.raises(FiddlerError, match=message):
            model.generate(ids, **exactly(ids, 6))
    assert torch.equal(model.generate(ids, **exactly(ids, 6)), expected)


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_inputs_marked_ready_are_complete(tokens: int):
    kernels = gpu.GpuKernels(Bf16(4096, 32))
    host = [
        torch.zeros((tokens, 4096), dtype=torch.bfloat16, pin_memory=True),
        torch.zeros((tokens, 2), dtype=torch.int64, pin_memory=True),
        torch.zeros((tokens, 2), dtype=torch.float32, pin_memory=True),
    ]
    inputs_ready = torch.zeros(64, dtype=torch.int64, pin_memory=True)
    marks = inputs_ready.numpy()
    seen = [host[0].view(torch.int16).numpy(), host[1].numpy(), host[2].numpy()]
    for job in range(1, 200):
        value = job % 100
        tensors = tuple(
            torch.full(tensor.shape, value, dtype=tensor.dtype, device=CUDA) for tensor in host
        )
        wanted = (tensors[0].view(torch.int16)[0, 0].item(), value, value)
        kernels.publish_inputs(tensors, host, inputs_ready, numbered(job))
        deadline = time.monotonic() + 10
        while marks[:tokens].min() < job:
            assert time.monotonic() < deadline
        assert all((array == each).all() for array, each in zip(seen, wanted, strict=True))
    assert not marks[tokens:].any()


def test_no_kernel_is_compiled_during_decode(wide_bfloat16: PlannedModel):
    """New numbers of blocks, calls or jobs must not compile a variant, which takes a second."""
    kernels = (
        triton_kernels.publish_inputs,
        triton_kernels.wait,
        triton_kernels.read_table,
        triton_kernels.gate_up,
        triton_kernels.down,
        triton_kernels.combine,
    )

    def variants() -> list[int]:
        return [len(kernel.device_caches[0][0]) for kernel in kernels]

    before = variants()
    ids = random_ids(1, 20, seed=0)
    wide_bfloat16.generate(ids, **exactly(ids, 40))
    assert variants() == before
