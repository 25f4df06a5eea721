"""The device's part of a prompt, computed together for many experts or for one after the other."""

import ctypes
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hand_over import BLOCKS, CPU, HIDDEN, TOLERANCE, applied, compiled, random_blocks

from fiddler_run.engine import device_part
from fiddler_run.engine.engine import ExpertEngine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.kernels.block_table import Launch, Parts, build_table
from fiddler_run.kernels.table import Kernels

GROUP_TOKENS = 4
SLOTS = 6


class GroupedKernels:
    """Stands in for the GPU kernels that take a table."""

    def __init__(self, max_blocks: int):
        self.max_blocks = max_blocks  # of a launch
        self.launches = 0

    def group_tokens(self, tokens):
        return GROUP_TOKENS

    def max_launch_blocks(self, group_tokens):
        return self.max_blocks

    def read_table(self, table, gave_up, device):
        return table.clone()

    def expert_gemm(
        self, table, num_blocks, num_groups, launch, group_tokens, states, weights, results
    ):
        self.launches += 1
        assert launch.num_blocks <= self.max_blocks or launch.num_groups == 1
        sizes = (1, num_blocks, num_blocks, 4 * num_groups)
        _, addresses, group_of_block, groups, choices = (
            part.tolist() for part in table.split((*sizes, len(table) - sum(sizes)))
        )
        used = set()
        for group in range(launch.first_group, launch.first_group + launch.num_groups):
            first_block, last_block, first, last = groups[4 * group : 4 * group + 4]
            assert 0 < last - first <= group_tokens
            used |= set(range(first_block, last_block))
            for block in range(first_block, last_block):
                assert group_of_block[block] == group
                memory = (ctypes.c_uint8 * BLOCKS.block_bytes).from_address(addresses[block])
                weight = torch.frombuffer(memory, dtype=torch.uint8)[None]
                for choice in choices[first:last]:
                    token, place = divmod(choice, weights.shape[1])
                    results[token, place] += weights[token, place] * applied(weight, states[token])
        assert used == set(range(launch.first_block, launch.first_block + launch.num_blocks))

    def combine(self, results, index, num_experts, cpu_output, dtype):
        total = results.sum(dim=1) + (0 if cpu_output is None else cpu_output)
        return total.to(dtype)

    def add_from_host(self, output, cpu_output):
        output += cpu_output

    def wait(self, flag, gave_up, job):
        assert flag.item() == job.before.item() + job.number


def random_layers(rng: random.Random, share: float, engines: list) -> list[ExpertsLayer]:
    """The same layer for each engine."""
    counts = [(rng.randint(0, 3), rng.randint(0, 4)) for _ in range(9)]
    resident = [random_blocks(count) for count, _ in counts]
    host = [random_blocks(count) for _, count in counts]
    return [ExpertsLayer(0, resident, host, lambda tokens: share, engine) for engine in engines]


@pytest.mark.parametrize(("share", "max_blocks"), [(0.0, 100), (0.6, 100), (1.0, 5), (0.4, 1)])
def test_grouped_experts_match_experts_one_by_one(share, max_blocks, monkeypatch):
    torch.manual_seed(0)
    kernels = GroupedKernels(max_blocks)
    cpu = compiled(2)
    engines = [ExpertEngine(BLOCKS, Kernels(cpu, None, cpu.apply), CPU, SLOTS) for _ in range(2)]
    layers = random_layers(random.Random(1), share, engines)
    for engine in engines:
        resources = engine.resources
        resources.kernels = replace(resources.kernels, decode=kernels)
        engine.decode.takes = lambda tokens: False
    tokens = 40
    states = torch.randn(tokens, HIDDEN).bfloat16()
    index = torch.stack([torch.randperm(9)[:3] for _ in range(tokens)])
    index[3, 1] = 9  # an expert of another process
    weights = torch.rand(tokens, 3)
    together = layers[0](states, index, weights)
    assert kernels.launches > 0
    # all resident blocks in one launch, and one for each piece, unless a launch takes fewer
    resources = engines[0].resources
    num_pieces = -(-resources.traffic.streamed_blocks // resources.ring.at_once)
    if max_blocks == 100:
        assert kernels.launches == 1 + num_pieces
    kernels.launches = 0
    monkeypatch.setattr(device_part, "MAX_GROUPED_WORK", 0)
    one_by_one = layers[1](states, index, weights)
    assert kernels.launches == 0
    assert engines[0].resources.traffic == engines[1].resources.traffic
    error = (together.float() - one_by_one.float()).norm()
    assert error <= 2 * TOLERANCE * one_by_one.float().norm()


def test_table_lists_the_groups_of_each_step():
    """Two calls, of three and five choices; the first has two blocks in step 0, one in step 1."""
    parts = Parts(
        step=np.array([0, 0, 1]),
        call=np.array([0, 1, 0]),
        address=np.array([1000, 2000, 3000]),
        count=np.array([2, 1, 1]),
    )
    choices = np.array([1, 2, 5, 0, 3, 4, 6, 7])
    built = build_table(parts, 3, np.array([0, 3, 8]), choices, 10, 4, 100)
    assert built.launches == [[Launch(0, 4, 0, 3)], [Launch(4, 1, 3, 1)], []]
    groups = [[0, 2, 0, 3], [2, 3, 3, 7], [3, 4, 7, 8], [4, 5, 0, 3]]
    expected = [5, 1000, 1010, 2000, 2000, 3000, 0, 0, 1, 2, 3, *sum(groups, []), *choices]
    assert built.table.tolist() == expected
    assert (built.num_blocks, built.num_groups) == (5, 4)


def test_launches_take_no_more_blocks_than_they_may():
    """But at least one group."""
    parts = Parts(np.zeros(5, np.int64), np.arange(5), np.arange(5), np.array([2, 1, 3, 7, 1]))
    built = build_table(parts, 1, np.arange(6), np.arange(5), 1, 16, 4)
    assert built.launches == [
        [Launch(0, 3, 0, 2), Launch(3, 3, 2, 1), Launch(6, 7, 3, 1), Launch(13, 1, 4, 1)]
    ]
