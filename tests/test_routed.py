"""Jobs of the CPU kernel that wait for a GPU to name their tokens and experts; here the test plays the GPU."""

import os
import random
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEMO, demo_shape, make_plan
from transformers import DynamicCache

from fiddler_opt.bench_experts import ExpertBench
from fiddler_opt.bench_timing import Stopwatch
from fiddler_opt.model import ModelSpec
from fiddler_run import load_model
from fiddler_run.balance import observe
from fiddler_run.dispatch import LayerDispatch, Traffic, expert_groups
from fiddler_run.errors import FiddlerError
from fiddler_run.executors import Executors
from fiddler_run.kernels import routed
from fiddler_run.kernels.cpu import CompiledExperts, CpuCall, library, supported_variants
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.kernels.routed import RoutedLayer
from fiddler_run.plan import MOST_ROUTED_TOKENS
from fiddler_run.timeline import Span
from fiddler_run.transfer import Mailbox

if library() is None:
    pytest.skip("the kernel is not built", allow_module_level=True)

HIDDEN, NEURONS = 96, 64
TOLERANCE = 3e-3  # one rounding of the products to bfloat16


def applied(blocks: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return apply_blocks(blocks.float(), state.float()[None])[0]


class Layer:
    """Experts with up to four blocks in "GPU memory" and up to four in host memory, and what is needed to call them."""

    def __init__(self, rng: random.Random, share: float, experts: int = 6, executors: Executors | None = None):
        def blocks() -> torch.Tensor:
            return torch.randn(rng.randint(0, 4), 3 * NEURONS * HIDDEN).mul_(0.1).bfloat16()

        def share_at(tokens: int) -> float:
            return share / tokens**0.1

        self.experts = experts
        self.resident, self.absent = ([blocks() for _ in range(experts)] for _ in range(2))
        self.routed = RoutedLayer(self.resident, self.absent, share_at)
        self.dispatch = LayerDispatch(0, self.resident, self.absent, share_at, executors)
        places = [block for expert in (*self.resident, *self.absent) for block in expert]
        self.at = {block.data_ptr(): block for block in places}


class Gpu:
    """What a job gets from a GPU and gives to it."""

    def __init__(self, tokens: int, layer: Layer, mailbox: Mailbox, top_k: int = 2, alike: bool = False):
        """`alike`: all tokens choose the same experts."""
        self.states = torch.randn(tokens, HIDDEN).bfloat16()
        self.index = torch.stack([torch.randperm(layer.experts)[:top_k] for _ in range(tokens)])
        if alike:
            self.index[:] = self.index[0].clone()
        self.weights = torch.rand(tokens, top_k)
        self.layer, self.mailbox = layer, mailbox
        most = layer.routed.most_blocks(tokens * top_k)
        self.given = mailbox.routed(self.states, self.index, self.weights, layer.experts, most)
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
        addresses, _, _, _, choices = self._table()
        found, expected = self.output + self.sums(), self.expected()
        assert (found - expected).norm() <= TOLERANCE * expected.norm()
        calls = self.layer.dispatch._split(expert_groups(self.index.numpy(), self.weights.numpy(), self.layer.experts))
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

    def sums(self) -> torch.Tensor:
        """What the table tells a GPU to compute."""
        addresses, experts, first_block, first_choice, choices = self._table()
        sums = torch.zeros(self.index.shape + (HIDDEN,))
        for expert in range(self.layer.experts):
            blocks = range(first_block[expert], first_block[expert + 1])
            assert all(experts[block] == expert for block in blocks)
            for choice in choices[first_choice[expert] : first_choice[expert + 1]]:
                token, place = divmod(choice, self.index.shape[1])
                assert self.index[token, place] == expert
                for block in blocks:
                    sums[token, place] += applied(self.layer.at[addresses[block]][None], self.states[token])
        return (sums * self.weights.unsqueeze(2)).sum(dim=1)

    def expected(self) -> torch.Tensor:
        """The layer's experts, of those that exist."""
        expected = torch.zeros(self.states.shape)
        for token, place in np.ndindex(*self.index.shape):
            expert = self.index[token, place]
            if not 0 <= expert < self.layer.experts:
                continue
            for blocks in (self.layer.resident[expert], self.layer.absent[expert]):
                if len(blocks):
                    expected[token] += self.weights[token, place] * applied(blocks, self.states[token])
        return expected

    def _table(self) -> list[list[int]]:
        most, table = self.given.max_blocks, self.given.table.tolist()
        num_blocks, rest = table[0], table[1:]
        sizes = most, most, self.layer.experts + 1, self.layer.experts + 1, self.index.numel()
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


@pytest.mark.parametrize("variant", supported_variants())
def test_odd_shapes(variant):
    torch.manual_seed(0)
    rng, kernel, mailbox = random.Random(0), CompiledExperts(3, variant=variant), Mailbox(torch.device("cpu"))
    shapes = ((1, 1, 1, False), (5, 1, 3, False), (5, 3, 4, True), (9, 9, 2, False), (5, 2, MOST_ROUTED_TOKENS, True))
    for job, (experts, top_k, tokens, alike) in enumerate(shapes, start=1):
        gpu = Gpu(tokens, Layer(rng, 0.6, experts), mailbox, top_k, alike)
        gpu.submit(kernel, job)
        gpu.send(job)
        kernel.wait()
        gpu.check()


def test_a_layer_knows_from_how_many_tokens_on_it_streams():
    blocks = [torch.empty(2, 6), torch.empty(0, 6)]
    layer = RoutedLayer(blocks, blocks, lambda tokens: 0.0 if tokens < 48 else 0.2)
    assert [layer.streams(tokens) for tokens in (1, 47, 48, MOST_ROUTED_TOKENS)] == [False, False, True, True]
    assert not RoutedLayer(blocks, [torch.empty(0, 6)] * 2, lambda _: 1.0).streams(MOST_ROUTED_TOKENS)
    assert [layer.most_blocks(choices) for choices in (1, 2, 9)] == [4, 4, 4]


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
    monkeypatch.setattr(routed, "PATIENCE_S", 0.05)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    kernel, mailbox = CompiledExperts(2), Mailbox(torch.device("cpu"))
    gpu = Gpu(1, Layer(random.Random(2), 0.5), mailbox)
    gpu.submit(kernel, 1)
    with pytest.raises(FiddlerError, match="the GPU does not answer"):
        kernel.wait()
    assert mailbox.finished.item() == gpu.given.described.item() == 1  # should it come back, it must not hang
    gpu.submit(kernel, 1 + 1)
    wait_for(mailbox.finished, 2)
    gpu.submit(kernel, 3)  # finishes what was before
    gpu.send(3)
    with pytest.raises(FiddlerError, match="the GPU does not answer"):
        kernel.wait()
    gpu.traffic[:] = 0
    gpu.submit(kernel, 4)
    gpu.send(4)
    kernel.wait()
    gpu.check()


def test_a_timeout_is_told_to_the_model_whose_job_it_was(monkeypatch):
    """Two models share the pool; the GPU sends nothing for one of them."""
    monkeypatch.setattr(routed, "PATIENCE_S", 0.05)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    kernel, mailboxes = CompiledExperts(2), [Mailbox(torch.device("cpu")) for _ in range(2)]
    silent, other = (Gpu(1, Layer(random.Random(2), 0.5), mailbox) for mailbox in mailboxes)
    silent.submit(kernel, 1)
    other.submit(kernel, 1)
    other.send(1)
    kernel.wait(0, mailboxes[1].finished)
    other.check()
    kernel.abandon(mailboxes[1].finished)
    with pytest.raises(FiddlerError, match="the GPU does not answer"):
        kernel.wait(0, mailboxes[0].finished)
    kernel.wait(0, mailboxes[0].finished)  # it is told once


def interrupt_soon() -> threading.Timer:
    """Ctrl-C, in a moment."""
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_an_interrupt_is_heard_while_a_gpu_sends_nothing():
    """Long before the job times out; the job ends, without a result, and the next one is right."""
    kernel, mailbox = CompiledExperts(2), Mailbox(torch.device("cpu"))
    gpu = Gpu(1, Layer(random.Random(2), 0.5), mailbox)
    for job in range(1, 4):
        gpu.submit(kernel, 2 * job - 1)
        started = time.monotonic()
        timer = interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            kernel.wait()
        timer.join()
        kernel.abandon(mailbox.finished)
        assert time.monotonic() - started < routed.PATIENCE_S / 3
        assert mailbox.finished.item() == gpu.given.described.item() == 2 * job - 1  # should the GPU come back, it must not hang
        gpu.traffic[:] = 0
        gpu.submit(kernel, 2 * job)
        gpu.send(2 * job)
        kernel.wait()
        gpu.check()


def again_and_again(kernel: CompiledExperts, *job) -> None:
    for _ in range(1000):
        kernel.wait()
        kernel.submit(*job)


def test_an_interrupt_is_heard_during_a_long_job():
    """One that no GPU is waited for: the caller of `wait` takes part in it."""
    blocks = torch.randn(4, 3 * NEURONS * HIDDEN).mul_(0.1).bfloat16()
    tokens = 60_000
    call = CpuCall(blocks, np.arange(tokens), np.ones(tokens, dtype=np.float32))
    states, output = torch.randn(tokens, HIDDEN).bfloat16(), torch.empty(tokens, HIDDEN)
    finished = torch.zeros(1, dtype=torch.int64)
    for threads in (1, 2):
        kernel = CompiledExperts(threads, variant="portable")
        kernel.submit([call], states, output, finished, threads)
        timer = interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            again_and_again(kernel, [call], states, output, finished, threads)
        timer.join()
        kernel.abandon(finished)
        expected = kernel.apply(blocks, states[:3])
        assert torch.equal(kernel.apply(blocks, states[:3]), expected)


def test_a_job_of_another_model_is_not_abandoned():
    """Two models share the pool; one of them is interrupted."""
    kernel, mailboxes = CompiledExperts(2), [Mailbox(torch.device("cpu")) for _ in range(2)]
    layer = Layer(random.Random(4), 0.5)
    gpus = [Gpu(2, layer, mailbox) for mailbox in mailboxes]
    for gpu in gpus:
        gpu.submit(kernel, 1)
    helper = threading.Timer(0.1, gpus[1].send, (1,))
    helper.start()
    kernel.abandon(mailboxes[0].finished)
    helper.join()
    kernel.wait()
    gpus[1].check()


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_choices_of_experts_that_do_not_exist(tokens):
    """As transformers marks those that another process computes: they add nothing, and write nowhere."""
    torch.manual_seed(tokens)
    kernel, mailbox = CompiledExperts(2), Mailbox(torch.device("cpu"))
    executors = Executors(torch.bfloat16, HIDDEN, NEURONS, 2, 4, torch.device("cpu"))
    layer = Layer(random.Random(tokens), 0.4, executors=executors)
    for job, outside in enumerate((layer.experts, layer.experts + 1, -1, 2**40), start=1):
        gpu = Gpu(tokens, layer, mailbox)
        lost = torch.rand(gpu.index.shape) < 0.4
        lost[0, 0] = True
        gpu.index[lost] = outside
        gpu.submit(kernel, job)
        gpu.send(job)
        kernel.wait()
        by_both = gpu.sums() + gpu.output
        by_python = layer.dispatch(gpu.states, gpu.index, gpu.weights)
        expected = gpu.expected()
        for found in (by_both, by_python.float()):
            assert (found - expected).norm() <= 2 * TOLERANCE * expected.norm()


def test_indices_of_another_integer_type():
    executors = Executors(torch.bfloat16, HIDDEN, NEURONS, 2, 4, torch.device("cpu"))
    layer = Layer(random.Random(7), 0.4, executors=executors)
    states, index, weights = torch.randn(5, HIDDEN).bfloat16(), torch.randint(0, 6, (5, 2)), torch.rand(5, 2)
    expected = layer.dispatch(states, index, weights)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(layer.dispatch(states, index.to(dtype), weights), expected)


def test_jobs_of_both_kinds_and_of_several_threads():
    torch.manual_seed(3)
    kernel, layer = CompiledExperts(3), Layer(random.Random(3), 0.5)
    call = CpuCall(layer.absent[0][:1].repeat(2, 1), np.arange(2), np.ones(2, dtype=np.float32))
    states = torch.randn(2, HIDDEN).bfloat16()
    expected = kernel.apply(call.blocks, states)

    def routed() -> None:
        mailbox = Mailbox(torch.device("cpu"))
        for job in range(1, 300):
            gpu = Gpu(1 + job % 3, layer, mailbox)
            gpu.send(job)
            gpu.submit(kernel, job)
            kernel.wait()
            wait_for(mailbox.finished, job)
            if job % 50 == 0:
                gpu.check()

    def plain() -> None:
        for _ in range(300):
            assert torch.equal(kernel.apply(call.blocks, states), expected)

    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(what) for what in (routed, plain, routed)]:
            done.result(timeout=120)


class Stream:
    """GPU kernels as `Executors` sees them: what is queued runs in order, in a thread of its own."""

    def __init__(self, at: dict[int, torch.Tensor], late_s: float = 1e-3):
        """`at`: blocks by address. `late_s`: what lies between two layers' experts: attention, say."""
        self.at, self.late_s = at, late_s
        self.thread = ThreadPoolExecutor(1)
        self.most_waiting = 0
        self.queued: list[Future] = []

    def queue(self, work) -> None:
        self.most_waiting = max(self.most_waiting, sum(not each.done() for each in self.queued))
        self.queued.append(self.thread.submit(torch.inference_mode(torch.is_inference_mode_enabled())(work)))

    def finish(self) -> None:
        for each in self.queued:
            each.result(timeout=60)

    def send(self, tensors, host, arrived, job):
        def work():
            time.sleep(self.late_s)
            for to, tensor in zip(host, tensors, strict=True):
                to.copy_(tensor)
            arrived[: len(tensors[0])] = job

        self.queue(work)

    def fetch(self, table, described, gave_up, job, device):
        fetched = torch.empty_like(table)
        self.queue(lambda: (wait_for(described, job), fetched.copy_(table)))
        return fetched

    def apply(self, table, max_blocks, num_experts, states, weights, block_neurons):
        results = torch.zeros((*weights.shape, states.shape[1]))

        def work():
            rows = table.tolist()
            choices = rows[1 + 2 * max_blocks + 2 * (num_experts + 1) :]
            firsts = rows[1 + 2 * max_blocks + num_experts + 1 :]
            for address, expert in zip(rows[1 : 1 + rows[0]], rows[1 + max_blocks :], strict=False):
                for choice in choices[firsts[expert] : firsts[expert + 1]]:
                    token, place = divmod(choice, weights.shape[1])
                    results[token, place] += weights[token, place] * applied(self.at[address][None], states[token])

        self.queue(work)
        return results

    def add_up(self, results, index, num_experts, cpu_output, finished, gave_up, job, like):
        output = torch.empty_like(like)
        self.queue(lambda: (wait_for(finished, job), output.copy_(results.sum(dim=1) + cpu_output)))
        return output


def test_python_is_ahead_of_cpu_and_gpu():
    """Layer after layer of one token is queued before the first is computed; the results are those of the other way."""
    torch.manual_seed(4)
    executors = Executors(torch.bfloat16, HIDDEN, NEURONS, 2, 4, torch.device("cpu"))
    rng = random.Random(4)
    layers = [Layer(rng, 0.4, executors=executors) for _ in range(12)]
    index = [torch.stack([torch.randperm(6)[:2] for _ in range(3)]) for _ in layers]
    weights = torch.rand(3, 2)
    states = [torch.randn(3, HIDDEN).bfloat16() for _ in layers]

    def run() -> tuple[list[torch.Tensor], Traffic, list[Span]]:
        executors.forget_traffic()
        with executors.timeline.recording() as spans:
            outputs = [layer.dispatch(x, chosen, weights) for layer, x, chosen in zip(layers, states, index, strict=True)]
            if executors.kernels:
                executors.kernels.finish()
            executors.finish_cpu()
        return outputs, executors.traffic, spans

    expected, traffic, _ = run()
    executors.kernels = Stream({address: block for layer in layers for address, block in layer.at.items()})
    for _ in range(3):
        found, same_traffic, spans = run()
        assert same_traffic == traffic
        for got, want in zip(found, expected, strict=True):
            assert (got.float() - want.float()).norm() <= 1e-2 * want.float().norm()
        for name in ("wait for the router", "blocks"):
            assert [span.layer for span in spans if span.name == name] == [0] * 12
        assert all(span.stop_s >= span.start_s for span in spans)
    assert executors.kernels.most_waiting >= 5  # of a layer that has only begun


def test_an_interrupt_leaves_nothing_under_way(monkeypatch):
    torch.manual_seed(5)
    executors = Executors(torch.bfloat16, HIDDEN, NEURONS, 2, 4, torch.device("cpu"))
    layer = Layer(random.Random(5), 0.4, executors=executors)
    executors.kernels = stream = Stream(layer.at)
    states, index, weights = torch.randn(1, HIDDEN).bfloat16(), torch.tensor([[0, 3]]), torch.rand(1, 2)
    for broken in ("send", "fetch", "apply", "add_up"):
        with monkeypatch.context() as patch:

            def interrupt(*_):
                raise KeyboardInterrupt

            patch.setattr(stream, broken, interrupt)
            with pytest.raises(KeyboardInterrupt):
                layer.dispatch(states, index, weights)
            assert not executors._under_way
        found = [layer.dispatch(states, index, weights) for _ in range(2)]
        stream.finish()
        executors.finish_cpu()
        assert torch.equal(*found)


def test_an_interrupted_wait_leaves_the_job_to_be_abandoned(monkeypatch):
    executors = Executors(torch.bfloat16, HIDDEN, NEURONS, 2, 4, torch.device("cpu"))
    layer = Layer(random.Random(5), 0.4, executors=executors)
    abandoned = []

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(executors.cpu, "abandon", abandoned.append)
    with monkeypatch.context() as patch:
        patch.setattr(executors.cpu, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            layer.dispatch(torch.randn(1, HIDDEN).bfloat16(), torch.tensor([[0, 3]]), torch.rand(1, 2))
    executors.abandon()
    assert len(abandoned) == 1
    assert not executors._under_way


def test_a_profile_times_what_experts_take_and_nothing_else():
    """Each layer's tokens come five milliseconds late, fifty times as long as the CPU needs for its experts."""
    bench = ExpertBench(ModelSpec.load(str(DEMO)), 10**9, Stopwatch(torch.device("cpu"), 0.0), torch.device("cpu"))
    bench.use_threads(2, pinned=False)
    bench.on_gpu, executors = True, bench.executors
    blocks = {block.data_ptr(): block for expert in bench.absent for block in expert}
    executors.kernels = stream = Stream(blocks, late_s=5e-3)
    try:
        times = bench._experts(1, [0.0, 0.5])
        assert set(times) == {0.0, 0.5}
        assert 1.0 < times[0.0].us < 2000.0
        assert times[0.5].us > 0
        assert executors.traffic.cpu_blocks > executors.traffic.streamed_blocks > executors.traffic.resident_blocks == 0
        executors.forget_traffic()
        assert bench.resident_expert(1).us > 0
        assert executors.traffic.resident_blocks == executors.traffic.needed_blocks > 0
    finally:
        stream.finish()


def test_what_is_observed_of_a_token_is_what_was_computed():
    torch.manual_seed(6)
    executors, rng = Executors(torch.bfloat16, HIDDEN, NEURONS, 2, 4, torch.device("cpu")), random.Random(6)
    layers = [Layer(rng, share, executors=executors) for share in (0.0, 0.2, 0.5, 0.8, 1.0)]
    executors.kernels = stream = Stream({address: block for layer in layers for address, block in layer.at.items()})
    config = SimpleNamespace(num_experts_per_tok=2, num_local_experts=6, hidden_size=HIDDEN)
    modules = [SimpleNamespace(dispatch=layer.dispatch) for layer in layers]
    device = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    model = SimpleNamespace(executors=executors, config=config, experts_modules=lambda: modules, **device)
    for number in range(3):
        executors.forget_traffic()
        observed = observe(model, number)
        traffic = executors.traffic
        assert sum(each.streamed for each in observed) == traffic.streamed_blocks > 0
        assert sum(each.on_cpu for each in observed) == traffic.cpu_blocks > 0
        assert all((each.cpu_s > 0) == (each.on_cpu > 0) for each in observed)
        assert all((each.link_s > 0) == (each.streamed > 0) for each in observed)
        assert all(each.both_s >= max(each.cpu_s, each.link_s) for each in observed)
    stream.finish()


class InStep(Stream):
    """A GPU whose results are there when Python goes on, as tensors on a CPU must be."""

    def add_up(self, *arguments):
        output = super().add_up(*arguments)
        self.finish()
        self.queued.clear()
        return output


def test_a_whole_model_through_the_hand_over():
    """Every layer of every step, in bfloat16: choices to the CPU's threads, their table, both parts, their sum."""
    model, tokenizer = load_model(make_plan(demo_shape("bfloat16"), [[3] * 8] * 6, share={1: 0.4}, threads=2), DEMO)
    executors = model.executors
    ids = tokenizer("Once upon a time there was a brave owl named Ruby.", return_tensors="pt")["input_ids"]
    ids = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2)

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return torch.cat([model(ids).logits, *one_by_one()], dim=1).float()

    def one_by_one() -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        return [model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits for n in range(ids.shape[1])]

    executors.forget_traffic()
    expected, needed = logits(), executors.traffic.needed_blocks
    executors.forget_traffic()
    rows = [*model.store.resident, *model.store.absent]
    blocks = [block for row in rows for expert in row for block in expert]
    executors.kernels = stream = InStep({block.data_ptr(): block for block in blocks}, late_s=0.0)
    found = logits()
    stream.thread.shutdown()
    executors.kernels = None
    traffic = executors.traffic
    assert min(traffic.resident_blocks, traffic.streamed_blocks, traffic.cpu_blocks) > 0
    assert traffic.needed_blocks == pytest.approx(needed, rel=0.05)
    assert (found - expected).norm() <= 0.05 * expected.norm()
    same = (found.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean()
    assert same > 0.95
