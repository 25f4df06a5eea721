"""The compiled CPU kernel against float64, for every instruction set of this CPU."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from activations import exact_glu, with_each_activation
from hand_over import BLOCKS, CPU, HIDDEN, NEURONS, TOLERANCE, compiled, random_blocks

from fiddler_run.encodings.plain import Bf16, Fp32
from fiddler_run.kernels import library as kernel_library
from fiddler_run.kernels import table
from fiddler_run.kernels.cpu import CompiledExperts, PyTorchExperts
from fiddler_run.kernels.cpu_calls import CpuCall, CpuCalls
from fiddler_run.kernels.library import library, supported_variants
from fiddler_run.kernels.table import kernels_for
from fiddler_run.plan.activation import Activation

if library() is None:
    pytest.skip("the kernel is not built", allow_module_level=True)


def exact(calls: list[CpuCall], states: torch.Tensor, activation: Activation) -> torch.Tensor:
    output = torch.zeros(states.shape, dtype=torch.float64)
    for call in calls:
        rows = torch.from_numpy(call.rows)
        x = states[rows].double()
        for block in call.blocks.view(torch.bfloat16).double():
            gate, up, down = block.split(NEURONS * HIDDEN)
            gate = gate.view(NEURONS, HIDDEN)
            up = up.view(NEURONS, HIDDEN)
            down = down.view(HIDDEN, NEURONS)
            product = exact_glu(activation, x @ gate.T, x @ up.T)
            output.index_add_(
                0, rows, product @ down.T * torch.from_numpy(call.weights).double().unsqueeze(1)
            )
    return output


def random_calls(rng: random.Random, tokens: int) -> list[CpuCall]:
    """Calls of all sizes, some without blocks; a token may be in several of them or in none."""
    calls = []
    for _ in range(rng.randint(1, 4)):
        rows = np.array(sorted(rng.sample(range(tokens), rng.randint(1, tokens))), dtype=np.int64)
        calls.append(
            CpuCall(
                random_blocks(rng.randint(0, 3)), rows, np.random.rand(len(rows)).astype(np.float32)
            )
        )
    return calls


@with_each_activation
@pytest.mark.parametrize("variant", supported_variants())
@pytest.mark.parametrize("tokens", [1, 2, 5, 7, 12, 17, 33, 70])
def test_kernel_matches_float64(variant, tokens, activation):
    torch.manual_seed(tokens)
    rng = random.Random(tokens)
    kernel = compiled(2, variant, activation=activation)
    for _ in range(4):
        calls = random_calls(rng, tokens)
        states = torch.randn(tokens, HIDDEN).bfloat16()
        output = torch.full(states.shape, torch.nan)
        kernel.submit(CpuCalls.of(calls), states, output)
        kernel.wait()
        expected = exact(calls, states, activation)
        assert (output - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("variant", supported_variants())
def test_bits_do_not_depend_on_the_number_of_threads(variant):
    torch.manual_seed(0)
    for tokens in (1, 9, 40):
        calls = random_calls(random.Random(tokens), tokens)
        states = torch.randn(tokens, HIDDEN).bfloat16()
        outputs = []
        for threads in (1, 2, 3, 7):
            kernel = compiled(threads, variant)
            for _ in range(5):
                outputs.append(torch.empty(states.shape))
                kernel.submit(CpuCalls.of(calls), states, outputs[-1])
                kernel.wait()
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_back_to_back_jobs_are_correct():
    """Threads that wake late must neither enter a job that is over nor miss one."""
    torch.manual_seed(1)
    kernel = compiled(3, spin_us=0)
    rng = random.Random(1)
    jobs = [
        (random_calls(rng, tokens), torch.randn(tokens, HIDDEN).bfloat16())
        for tokens in (1, 1, 3, 8, 1, 14)
    ]
    expected = []
    for calls, states in jobs:
        expected.append(torch.empty(states.shape))
        kernel.submit(CpuCalls.of(calls), states, expected[-1])
        kernel.wait()
    for step in range(3000):
        (calls, states) = jobs[step % len(jobs)]
        right = expected[step % len(jobs)]
        output = torch.empty(states.shape)
        kernel.submit(CpuCalls.of(calls), states, output)
        if step % 7:
            kernel.wait()
            assert torch.equal(output, right)
    kernel.wait()


@with_each_activation
def test_nan_is_propagated(activation):
    states = torch.ones(20, HIDDEN).bfloat16()
    states[:, 3] = torch.nan
    kernels = [compiled(1, variant, activation=activation) for variant in supported_variants()]
    for kernel in (*kernels, PyTorchExperts(BLOCKS, activation)):
        for tokens in (1, len(states)):
            assert kernel.apply(random_blocks(1), states[:tokens]).isnan().all()


def test_pytorch_computes_blocks_that_the_kernel_cannot():
    assert isinstance(kernels_for(BLOCKS, CPU, 1).cpu, CompiledExperts)
    for blocks in (Fp32(64, 64), Bf16(24, 64), Bf16(64, 16)):
        assert isinstance(kernels_for(blocks, CPU, 1).cpu, PyTorchExperts)


def test_missing_kernel_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(kernel_library, "library", lambda: None)
    monkeypatch.setattr(table, "compiled", cache(kernel_library.compiled.__wrapped__))
    for _ in range(3):
        assert isinstance(kernels_for(BLOCKS, CPU, 1).cpu, PyTorchExperts)
    (record,) = caplog.records
    assert record.message.startswith("the CPU kernel is not built;")


def test_finished_job_is_marked():
    finished = torch.zeros(1, dtype=torch.int64)
    for kernel in (compiled(1), compiled(3), PyTorchExperts(BLOCKS)):
        states = torch.randn(2, HIDDEN).bfloat16()
        output = torch.empty(2, HIDDEN)
        calls = CpuCalls.of(random_calls(random.Random(0), 2))
        kernel.submit(calls, states, output, finished, 7)
        kernel.wait()
        assert finished.item() == 7
        finished.zero_()


def test_job_finishes_without_a_wait():
    """A GPU that waits for the mark relies on this."""
    kernel = compiled(2)
    finished = torch.zeros(1, dtype=torch.int64)
    assert kernel.finishes_alone
    kernel.submit(
        CpuCalls.of(random_calls(random.Random(0), 2)),
        torch.randn(2, HIDDEN).bfloat16(),
        torch.empty(2, HIDDEN),
        finished,
        1,
    )
    deadline = time.monotonic() + 60
    while finished.item() != 1:
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    kernel.wait()


def test_two_threads_share_a_pool():
    kernel = compiled(2)
    torch.manual_seed(2)
    inputs = [(random_blocks(2), torch.randn(3, HIDDEN).bfloat16()) for _ in range(2)]
    expected = [kernel.apply(*each) for each in inputs]

    def wrong(number: int) -> int:
        return sum(
            not torch.equal(kernel.apply(*inputs[number]), expected[number]) for _ in range(2000)
        )

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(wrong, (0, 1))) == [0, 0]


def test_deleted_pool_finishes_its_job():
    """A GPU may be waiting for it."""
    finished = torch.zeros(1, dtype=torch.int64)
    output = torch.full((2, HIDDEN), torch.nan)
    kernel = compiled(2)
    calls = CpuCalls.of(random_calls(random.Random(0), 2))
    kernel.submit(calls, torch.randn(2, HIDDEN).bfloat16(), output, finished, 1)
    del kernel
    assert finished.item() == 1
    assert not output.isnan().any()


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="sse1: not one of "):
        compiled(1, "sse1")


def test_pool_reads_any_number_of_bytes():
    kernel = compiled(2)
    for size in (1, 63, 2**18, 2**18 + 3, 10**6 + 1):
        kernel.pool.read(torch.zeros(size, dtype=torch.uint8))
