"""A simulated GPU for the hand-over of the decode path: its layers, and its side of a CPU job."""

import random
import time

import numpy as np
import torch
from activations import exact_glu

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.plain import Bf16
from fiddler_run.engine.buffers import PinnedBuffers
from fiddler_run.engine.calls import sorted_choices
from fiddler_run.engine.engine import ExpertEngine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.kernels.cpu import CompiledExperts
from fiddler_run.kernels.decode_layer import DecodeLayer, Job
from fiddler_run.kernels.pool import Pool
from fiddler_run.kernels.table import Kernels
from fiddler_run.plan.activation import SILU, Activation

CPU = torch.device("cpu")
HIDDEN = 96
NEURONS = 64
BLOCKS = Bf16(HIDDEN, NEURONS)
TOLERANCE = 3e-3  # one rounding of the products to bfloat16


def random_blocks(count: int) -> torch.Tensor:
    """Uint8 [count, block_bytes]."""
    return torch.randn(count, 3 * NEURONS * HIDDEN).mul_(0.1).bfloat16().view(torch.uint8)


def compiled(
    threads: int, variant: str | None = None, spin_us: int = 20, activation: Activation = SILU
) -> CompiledExperts:
    """The compiled kernel on its own pool."""
    return CompiledExperts(BLOCKS, Pool(threads, spin_us, variant=variant), activation)


def make_engine(decode: object | None = None) -> ExpertEngine:
    """An engine on the CPU, with these kernels for the decode path."""
    cpu = compiled(2)
    return ExpertEngine(BLOCKS, Kernels(cpu, decode, cpu.apply), CPU, 4)


def applied(
    blocks: torch.Tensor,
    state: torch.Tensor,
    encoding: Encoding = BLOCKS,
    activation: Activation = SILU,
) -> torch.Tensor:
    """Blocks applied to one state in float32."""
    gate_up, down = encoding.decode(blocks)
    gate, up = (gate_up.float() @ state.float()).chunk(2, dim=1)
    products = exact_glu(activation, gate, up)
    return (down.float() @ products.unsqueeze(2)).squeeze(2).sum(dim=0)


class Layer:
    """A layer whose experts have up to four resident and up to four host blocks each."""

    def __init__(
        self, rng: random.Random, share: float, experts: int = 6, engine: ExpertEngine | None = None
    ):
        def share_at(tokens: int) -> float:
            return share / tokens**0.1

        self.experts = experts
        self.resident, self.host = (
            [random_blocks(rng.randint(0, 4)) for _ in range(experts)] for _ in range(2)
        )
        self.decode = DecodeLayer(self.resident, self.host, share_at)
        self.layer = ExpertsLayer(0, self.resident, self.host, share_at, engine)
        self.share_at = share_at
        places = [block for expert in (*self.resident, *self.host) for block in expert]
        self.by_address = {block.data_ptr(): block for block in places}

    def on(self, engine: ExpertEngine) -> ExpertsLayer:
        """The same layer, run by another engine."""
        return ExpertsLayer(0, self.resident, self.host, self.share_at, engine)


class Gpu:
    """The GPU's side of one CPU job: sends the inputs and checks the table and the output."""

    def __init__(
        self,
        tokens: int,
        layer: Layer,
        buffers: PinnedBuffers,
        top_k: int = 2,
        alike: bool = False,
        activation: Activation = SILU,
    ):
        """`alike`: all tokens choose the same experts. `activation`: of the experts."""
        self.activation = activation
        self.states = torch.randn(tokens, HIDDEN).bfloat16()
        self.index = torch.stack([torch.randperm(layer.experts)[:top_k] for _ in range(tokens)])
        if alike:
            self.index[:] = self.index[0].clone()
        self.weights = torch.rand(tokens, top_k)
        self.layer = layer
        self.buffers = buffers
        choices = tokens * top_k
        bounds = layer.decode.max_blocks(choices), layer.decode.max_groups(choices)
        self.inputs = buffers.decode_inputs(self.states, self.index, self.weights, *bounds)
        self.output = torch.full((tokens, HIDDEN), torch.nan)
        self.traffic = np.zeros(3, dtype=np.int64)

    def submit(self, kernel: CompiledExperts, job: int) -> None:
        kernel.submit_routed(
            self.layer.decode,
            self.inputs,
            self.traffic,
            self.output,
            self.buffers.output_ready,
            job,
        )

    def send(self, job: int) -> None:
        for to, tensor in zip(
            (self.inputs.states, self.inputs.index, self.inputs.weights), self._tensors, strict=True
        ):
            to.copy_(tensor)
        self.inputs.inputs_ready[: len(self.states)] = job

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.states, self.index, self.weights

    def check(self) -> None:
        """Asserts that both parts add up to the layer's output, and that the split is Python's."""
        addresses, _, _, choices = self._table()
        found = self.output + self.sums()
        expected = self.expected()
        assert (found - expected).norm() <= TOLERANCE * expected.norm()
        calls = self.layer.layer.split(
            sorted_choices(self.index.numpy(), self.weights.numpy(), self.layer.experts)
        )
        assert self.traffic.tolist() == calls.traffic.tolist()
        runs = calls.runs()
        parts = zip(runs.blocks, runs.counts, strict=True)
        streamed = {block.data_ptr() for blocks, count in parts for block in blocks[:count]}
        called = calls.choices.experts.tolist()
        resident = {block.data_ptr() for e in called for block in self.layer.resident[e]}
        assert set(addresses) == streamed | resident
        assert sorted(choices) == list(range(self.index.numel()))

    def sums(self) -> torch.Tensor:
        """The weighted sums of the blocks that the table assigns to the GPU."""
        addresses, group_of_block, groups, choices = self._table()
        sums = torch.zeros(self.index.shape + (HIDDEN,))
        called = set()
        for group, (first_block, last_block, first_choice, last_choice) in enumerate(groups):
            blocks = range(first_block, last_block)
            assert all(group_of_block[block] == group for block in blocks)
            for choice in choices[first_choice:last_choice]:
                token, place = divmod(choice, self.index.shape[1])
                called.add((self.index[token, place].item(), group))
                for block in blocks:
                    sums[token, place] += applied(
                        self.layer.by_address[addresses[block]][None],
                        self.states[token],
                        activation=self.activation,
                    )
        # each called expert has one group, and these come first
        assert len({expert for expert, _ in called}) == len(called)
        assert sorted(group for _, group in called) == list(range(len(called)))
        return (sums * self.weights.unsqueeze(2)).sum(dim=1)

    def expected(self) -> torch.Tensor:
        """The layer's output; choices of unknown experts add nothing."""
        expected = torch.zeros(self.states.shape)
        for token, place in np.ndindex(*self.index.shape):
            expert = self.index[token, place]
            if not 0 <= expert < self.layer.experts:
                continue
            for blocks in (self.layer.resident[expert], self.layer.host[expert]):
                if len(blocks):
                    expected[token] += self.weights[token, place] * applied(
                        blocks, self.states[token], activation=self.activation
                    )
        return expected

    def _table(self) -> tuple[list[int], list[int], list[list[int]], list[int]]:
        """Addresses of blocks, their groups, the groups, and the choices."""
        inputs = self.inputs
        num_blocks = inputs.table[0].item()
        sizes = (inputs.max_blocks, inputs.max_blocks, 4 * inputs.max_groups, self.index.numel())
        addresses, group_of_block, groups, choices = inputs.table[1:].split(sizes)
        return (
            addresses[:num_blocks].tolist(),
            group_of_block[:num_blocks].tolist(),
            groups.view(-1, 4).tolist(),
            choices.tolist(),
        )


def number_of(job: Job) -> int:
    return int(job.before) + job.number


def wait_for(flag: torch.Tensor, job: int) -> None:
    deadline = time.monotonic() + 60
    while flag.item() < job:
        assert time.monotonic() < deadline
        time.sleep(1e-4)
