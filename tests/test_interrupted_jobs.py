"""Jobs of the CPU kernel that time out, are interrupted, or are abandoned."""

import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hand_over import (
    CPU,
    HIDDEN,
    Gpu,
    Layer,
    compiled,
    random_blocks,
    wait_for,
)

from fiddler_run.engine.buffers import PinnedBuffers
from fiddler_run.errors import FiddlerError
from fiddler_run.kernels import decode_layer
from fiddler_run.kernels.cpu import CompiledExperts
from fiddler_run.kernels.cpu_calls import CpuCall, CpuCalls
from fiddler_run.kernels.library import library

if library() is None:
    pytest.skip("the kernel is not built", allow_module_level=True)


def test_silent_gpu_times_out(monkeypatch):
    monkeypatch.setattr(decode_layer, "GPU_TIMEOUT_S", 0.05)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    kernel = compiled(2)
    buffers = PinnedBuffers(CPU)
    gpu = Gpu(1, Layer(random.Random(2), 0.5), buffers)
    gpu.submit(kernel, 1)
    with pytest.raises(FiddlerError, match="timed out waiting for the GPU"):
        kernel.wait()
    # a GPU that comes back must not hang
    assert buffers.output_ready.item() == gpu.inputs.table_ready.item() == 1
    gpu.submit(kernel, 2)
    wait_for(buffers.output_ready, 2)
    gpu.submit(kernel, 3)  # finishes the previous job
    gpu.send(3)
    with pytest.raises(FiddlerError, match="timed out waiting for the GPU"):
        kernel.wait()
    gpu.traffic[:] = 0
    gpu.submit(kernel, 4)
    gpu.send(4)
    kernel.wait()
    gpu.check()


def test_timeout_is_raised_for_the_model_whose_job_it_was(monkeypatch):
    """Two models share the pool; the GPU sends nothing for one of them."""
    monkeypatch.setattr(decode_layer, "GPU_TIMEOUT_S", 0.05)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    kernel = compiled(2)
    both = [PinnedBuffers(CPU) for _ in range(2)]
    silent, other = (Gpu(1, Layer(random.Random(2), 0.5), buffers) for buffers in both)
    silent.submit(kernel, 1)
    other.submit(kernel, 1)
    other.send(1)
    kernel.wait(0, both[1].output_ready)
    other.check()
    kernel.abandon(both[1].output_ready)
    with pytest.raises(FiddlerError, match="timed out waiting for the GPU"):
        kernel.wait(0, both[0].output_ready)
    kernel.wait(0, both[0].output_ready)  # it is raised once


def interrupt_soon() -> threading.Timer:
    """Sends SIGINT to this process after 0.2 s."""
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_interrupt_ends_the_wait_for_a_silent_gpu():
    """The job ends long before it times out, without a result, and the next one is correct."""
    kernel = compiled(2)
    buffers = PinnedBuffers(CPU)
    gpu = Gpu(1, Layer(random.Random(2), 0.5), buffers)
    for job in range(1, 4):
        gpu.submit(kernel, 2 * job - 1)
        started = time.monotonic()
        timer = interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            kernel.wait()
        timer.join()
        kernel.abandon(buffers.output_ready)
        assert time.monotonic() - started < decode_layer.GPU_TIMEOUT_S / 3
        # a GPU that comes back must not hang
        assert buffers.output_ready.item() == gpu.inputs.table_ready.item() == 2 * job - 1
        gpu.traffic[:] = 0
        gpu.submit(kernel, 2 * job)
        gpu.send(2 * job)
        kernel.wait()
        gpu.check()


def submit_repeatedly(kernel: CompiledExperts, *job) -> None:
    for _ in range(1000):
        kernel.wait()
        kernel.submit(*job)


def test_interrupt_ends_a_long_job():
    """No GPU is involved: the caller of `wait` computes a part of the job."""
    blocks = random_blocks(4)
    tokens = 60_000
    call = CpuCall(blocks, np.arange(tokens), np.ones(tokens, dtype=np.float32))
    calls = CpuCalls.of([call])
    states = torch.randn(tokens, HIDDEN).bfloat16()
    output = torch.empty(tokens, HIDDEN)
    finished = torch.zeros(1, dtype=torch.int64)
    for threads in (1, 2):
        kernel = compiled(threads, "portable")
        kernel.submit(calls, states, output, finished, threads)
        timer = interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            submit_repeatedly(kernel, calls, states, output, finished, threads)
        timer.join()
        kernel.abandon(finished)
        expected = kernel.apply(blocks, states[:3])
        assert torch.equal(kernel.apply(blocks, states[:3]), expected)


def test_job_of_another_model_is_not_abandoned():
    """Two models share the pool; one of them is interrupted."""
    kernel = compiled(2)
    both = [PinnedBuffers(CPU) for _ in range(2)]
    layer = Layer(random.Random(4), 0.5)
    gpus = [Gpu(2, layer, buffers) for buffers in both]
    for gpu in gpus:
        gpu.submit(kernel, 1)
    helper = threading.Timer(0.1, gpus[1].send, (1,))
    helper.start()
    kernel.abandon(both[0].output_ready)
    helper.join()
    kernel.wait()
    gpus[1].check()
