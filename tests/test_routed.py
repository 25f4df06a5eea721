"""Jobs of the CPU kernel that wait for a GPU to name their tokens and experts; here the test plays the GPU."""

import random
import time

import numpy as np
import pytest
import torch

from fiddler_run.dispatch import LayerDispatch, Traffic, expert_groups
from fiddler_run.errors import FiddlerError
from fiddler_run.kernels import cpu
from fiddler_run.kernels.cpu import CompiledExperts, RoutedLayer, library
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.transfer import Mailbox

if library() is None:
    pytest.skip("the kernel is not built", allow_module_level=True)

HIDDEN, NEURONS, EXPERTS, TOP_K = 96, 64, 6, 2
TOLERANCE = 3e-3  # one rounding of the products to bfloat16


def applied(blocks: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return apply_blocks(blocks.float(), state.float()[None])[0]


class Layer:
    """Experts with up to four blocks in "GPU memory" and up to four in host memory, and what is needed to call them."""

    def __init__(self, rng: random.Random, share: float):
        def blocks() -> torch.Tensor:
            return torch.randn(rng.randint(0, 4), 3 * NEURONS * HIDDEN).mul_(0.1).bfloat16()

        self.resident, self.absent = ([blocks() for _ in range(EXPERTS)] for _ in range(2))
        self.routed = RoutedLayer(self.resident, self.absent, lambda _: share)
        self.dispatch = LayerDispatch(0, self.resident, self.absent, lambda _: share, None)
        places = [block for expert in (*self.resident, *self.absent) for block in expert]
        self.at = {block.data_ptr(): block for block in places}


class Gpu:
    """What a job gets from a GPU and gives to it."""

    def __init__(self, tokens: int, layer: Layer, mailbox: Mailbox):
        self.states = torch.randn(tokens, HIDDEN).bfloat16()
        self.index = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
        self.weights = torch.rand(tokens, TOP_K)
        self.layer, self.mailbox = layer, mailbox
        most = layer.routed.most_blocks(tokens * TOP_K)
        self.given = mailbox.routed(self.states, self.index, self.weights, EXPERTS, most)
        self.output = torch.full((tokens, HIDDEN), torch.nan)
        self.traffic = np.zeros(3, dtype=np.int64)

    def submit(self, kernel: CompiledExperts, job: int) -> None:
        kernel.submit_routed(self.layer.routed, self.given, NEURONS, self.traffic, self.output, self.mailbox.finished, job)

    def send(self, job: int) -> None:
        for to, tensor in zip((self.given.states, self.given.index, self.given.weights), self._tensors, strict=True):
            to.copy_(tensor)
        self.given.arrived[: len(self.states)] = job

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.states, self.index, self.weights

    def check(self) -> None:
        """The table's blocks and the CPU's output together are the layer's; the blocks are divided as Python divides them."""
        addresses, experts, first_block, first_choice, choices = self._table()
        sums = torch.zeros(self.index.shape + (HIDDEN,))
        for expert in range(EXPERTS):
            blocks = range(first_block[expert], first_block[expert + 1])
            assert all(experts[block] == expert for block in blocks)
            for choice in choices[first_choice[expert] : first_choice[expert + 1]]:
                token, place = divmod(choice, TOP_K)
                assert self.index[token, place] == expert
                for block in blocks:
                    sums[token, place] += applied(self.layer.at[addresses[block]][None], self.states[token])
        found = self.output + (sums * self.weights.unsqueeze(2)).sum(dim=1)
        expected = torch.zeros(self.states.shape)
        for token, place in np.ndindex(*self.index.shape):
            expert = self.index[token, place]
            for blocks in (self.layer.resident[expert], self.layer.absent[expert]):
                if len(blocks):
                    expected[token] += self.weights[token, place] * applied(blocks, self.states[token])
        assert (found - expected).norm() <= TOLERANCE * expected.norm()
        calls = self.layer.dispatch._split(expert_groups(self.index.numpy(), self.weights.numpy(), EXPERTS))
        wanted = Traffic(
            sum(call.expert.num_resident for call in calls),
            sum(call.num_streamed for call in calls),
            sum(call.num_on_cpu for call in calls),
        )
        assert Traffic(*self.traffic.tolist()) == wanted
        streamed = {call.expert.absent[n].data_ptr() for call in calls for n in range(call.num_streamed)}
        resident = {block.data_ptr() for call in calls for block in call.expert.resident}
        assert set(addresses) == streamed | resident
        assert sorted(choices) == list(range(self.index.numel()))

    def _table(self) -> list[list[int]]:
        most, table = self.given.max_blocks, self.given.table.tolist()
        num_blocks, rest = table[0], table[1:]
        sizes = most, most, EXPERTS + 1, EXPERTS + 1, self.index.numel()
        parts = torch.tensor(rest).split(sizes)
        addresses, experts, *others = (part.tolist() for part in parts)
        return [addresses[:num_blocks], experts[:num_blocks], *others]


def wait_for(flag: torch.Tensor, job: int) -> None:
    deadline = time.monotonic() + 60
    while flag.item() < job:
        assert time.monotonic() < deadline
        time.sleep(1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_cpu_and_gpu_together_compute_the_layer(tokens, share):
    torch.manual_seed(tokens)
    rng, kernel, mailbox = random.Random(tokens), CompiledExperts(2), Mailbox(torch.device("cpu"))
    for job in range(1, 9):
        gpu = Gpu(tokens, Layer(rng, share), mailbox)
        gpu.submit(kernel, job)
        gpu.send(job)
        wait_for(mailbox.finished, job)  # without any help
        assert gpu.given.described.item() == job
        kernel.wait()
        gpu.check()


def test_a_job_waits_for_each_of_its_tokens():
    torch.manual_seed(0)
    kernel, mailbox = CompiledExperts(2), Mailbox(torch.device("cpu"))
    gpu = Gpu(3, Layer(random.Random(0), 0.5), mailbox)
    gpu.submit(kernel, 5)
    gpu.send(5)
    kernel.wait()
    gpu.submit(kernel, 6)
    for missing in range(3):
        time.sleep(0.01)
        assert mailbox.finished.item() == 5
        gpu.given.arrived[missing] = 6 if missing < 2 else 7  # the flag of a later job serves, too
    wait_for(mailbox.finished, 6)
    kernel.wait()


def test_the_next_job_is_submitted_while_one_is_under_way():
    torch.manual_seed(1)
    kernel, mailboxes = CompiledExperts(3), [Mailbox(torch.device("cpu")) for _ in range(2)]
    layer, gpus = Layer(random.Random(1), 0.5), []
    for job in range(1, 1000):
        gpus.append(Gpu(1 + job % 3, layer, mailboxes[job % 2]))
        gpus[-1].submit(kernel, job)
        if job > 1:
            gpus[-2].send(job - 1)
            kernel.wait(1)
            if job % 50 < 2:
                gpus[-2].check()
            assert mailboxes[(job - 1) % 2].finished.item() == job - 1
    gpus[-1].send(job)
    kernel.wait()
    gpus[-1].check()
    started_s, finished_s = kernel.times_s()
    assert 0 < finished_s - started_s < time.perf_counter() - started_s


def test_a_gpu_that_sends_nothing(monkeypatch):
    monkeypatch.setattr(cpu, "PATIENCE_S", 0.05)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    kernel, mailbox = CompiledExperts(2), Mailbox(torch.device("cpu"))
    gpu = Gpu(1, Layer(random.Random(2), 0.5), mailbox)
    gpu.submit(kernel, 1)
    with pytest.raises(FiddlerError, match="the GPU does not answer"):
        kernel.wait()
    assert mailbox.finished.item() == gpu.given.described.item() == 1  # should it come back, it must not hang
    gpu.submit(kernel, 2)
    gpu.send(2)
    kernel.wait()
    gpu.traffic[:] = 0
    gpu.submit(kernel, 3)
    gpu.send(3)
    kernel.wait()
    gpu.check()
