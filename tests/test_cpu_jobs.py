"""Jobs of the CPU kernel that wait for a GPU to send their tokens and experts."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from activations import with_each_activation
from hand_over import (
    CPU,
    HIDDEN,
    TOLERANCE,
    Gpu,
    Layer,
    compiled,
    make_engine,
    wait_for,
)
from seeds import spread

from fiddler_run.engine.buffers import PinnedBuffers
from fiddler_run.kernels.cpu_calls import CpuCall
from fiddler_run.kernels.decode_layer import DecodeLayer
from fiddler_run.kernels.library import library, supported_variants
from fiddler_run.kernels.limits import MAX_DECODE_TOKENS

if library() is None:
    pytest.skip("the kernel is not built", allow_module_level=True)


@pytest.mark.parametrize("share", spread([0.3, 0.0, 1.0], 1))
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_cpu_and_gpu_together_compute_the_layer(tokens, share):
    torch.manual_seed(tokens)
    rng = random.Random(tokens)
    kernel = compiled(2)
    buffers = PinnedBuffers(CPU)
    for job in range(1, 9):
        gpu = Gpu(tokens, Layer(rng, share), buffers)
        gpu.submit(kernel, job)
        gpu.send(job)
        wait_for(buffers.output_ready, job)  # without a call of `wait`
        assert gpu.inputs.table_ready.item() == job
        kernel.wait()
        gpu.check()


@with_each_activation
@pytest.mark.parametrize("variant", supported_variants())
def test_odd_shapes_are_computed(variant, activation):
    torch.manual_seed(0)
    rng = random.Random(0)
    kernel = compiled(3, variant, activation=activation)
    buffers = PinnedBuffers(CPU)
    shapes = (
        (1, 1, 1, False),
        (5, 1, 3, False),
        (5, 3, 4, True),
        (9, 9, 2, False),
        (5, 2, MAX_DECODE_TOKENS, True),
    )
    for job, (experts, top_k, tokens, alike) in enumerate(shapes, start=1):
        gpu = Gpu(tokens, Layer(rng, 0.6, experts), buffers, top_k, alike, activation)
        gpu.submit(kernel, job)
        gpu.send(job)
        kernel.wait()
        gpu.check()


def test_layer_streams_from_a_number_of_tokens_on():
    blocks = [torch.empty(2, 6), torch.empty(0, 6)]
    layer = DecodeLayer(blocks, blocks, lambda tokens: 0.0 if tokens < 48 else 0.2)
    assert [layer.streams(tokens) for tokens in (1, 47, 48, MAX_DECODE_TOKENS)] == [
        False,
        False,
        True,
        True,
    ]
    assert not DecodeLayer(blocks, [torch.empty(0, 6)] * 2, lambda _: 1.0).streams(
        MAX_DECODE_TOKENS
    )
    assert [layer.max_blocks(choices) for choices in (1, 2, 9)] == [4, 4, 4]


def test_job_waits_for_each_of_its_tokens():
    torch.manual_seed(0)
    kernel = compiled(2)
    buffers = PinnedBuffers(CPU)
    gpu = Gpu(3, Layer(random.Random(0), 0.5), buffers)
    gpu.submit(kernel, 5)
    gpu.send(5)
    kernel.wait()
    gpu.submit(kernel, 6)
    for missing in range(3):
        time.sleep(0.01)
        assert buffers.output_ready.item() == 5
        # the flag of a later job counts, too
        gpu.inputs.inputs_ready[missing] = 6 if missing < 2 else 7
    wait_for(buffers.output_ready, 6)
    kernel.wait()


def test_next_job_can_be_submitted_while_one_is_pending():
    torch.manual_seed(1)
    kernel = compiled(3)
    both = [PinnedBuffers(CPU) for _ in range(2)]
    layer = Layer(random.Random(1), 0.5)
    gpus = []
    for job in range(1, 1000):
        gpus.append(Gpu(1 + job % 3, layer, both[job % 2]))
        gpus[-1].submit(kernel, job)
        if job > 1:
            gpus[-2].send(job - 1)
            kernel.wait(1)
            if job % 50 < 2:
                gpus[-2].check()
            assert both[(job - 1) % 2].output_ready.item() == job - 1
    gpus[-1].send(job)
    kernel.wait()
    gpus[-1].check()
    started_s, finished_s = kernel.times_s()
    assert 0 < finished_s - started_s < time.perf_counter() - started_s


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_unknown_experts_add_nothing(tokens):
    """transformers marks experts of other processes by such indices."""
    torch.manual_seed(tokens)
    kernel = compiled(2)
    buffers = PinnedBuffers(CPU)
    engine = make_engine()
    layer = Layer(random.Random(tokens), 0.4, engine=engine)
    for job, outside in enumerate((layer.experts, layer.experts + 1, -1, 2**40), start=1):
        gpu = Gpu(tokens, layer, buffers)
        lost = torch.rand(gpu.index.shape) < 0.4
        lost[0, 0] = True
        gpu.index[lost] = outside
        gpu.submit(kernel, job)
        gpu.send(job)
        kernel.wait()
        by_both = gpu.sums() + gpu.output
        by_python = layer.layer(gpu.states, gpu.index, gpu.weights)
        expected = gpu.expected()
        for found in (by_both, by_python.float()):
            assert (found - expected).norm() <= 2 * TOLERANCE * expected.norm()


def test_index_may_have_any_integer_type():
    engine = make_engine()
    layer = Layer(random.Random(7), 0.4, engine=engine)
    states = torch.randn(5, HIDDEN).bfloat16()
    index = torch.randint(0, 6, (5, 2))
    weights = torch.rand(5, 2)
    expected = layer.layer(states, index, weights)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(layer.layer(states, index.to(dtype), weights), expected)


def test_jobs_of_both_kinds_from_several_threads_are_correct():
    torch.manual_seed(3)
    kernel = compiled(3)
    layer = Layer(random.Random(3), 0.5)
    call = CpuCall(layer.host[0][:1].repeat(2, 1), np.arange(2), np.ones(2, dtype=np.float32))
    states = torch.randn(2, HIDDEN).bfloat16()
    expected = kernel.apply(call.blocks, states)

    def routed() -> None:
        buffers = PinnedBuffers(CPU)
        for job in range(1, 300):
            gpu = Gpu(1 + job % 3, layer, buffers)
            gpu.send(job)
            gpu.submit(kernel, job)
            kernel.wait()
            wait_for(buffers.output_ready, job)
            if job % 50 == 0:
                gpu.check()

    def plain() -> None:
        for _ in range(300):
            assert torch.equal(kernel.apply(call.blocks, states), expected)

    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(work) for work in (routed, plain, routed)]:
            done.result(timeout=120)
