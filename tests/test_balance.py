"""Each layer's division between link and CPU, found after loading: with layers whose speeds the test sets."""

from types import SimpleNamespace

import pytest
import torch

from fiddler_run.balance import FEW_TOKENS, balance
from fiddler_run.dispatch import Traffic
from fiddler_run.kernels.routed import RoutedLayer
from fiddler_run.timeline import Span

EXPERTS, BLOCKS, TOP_K = 8, 16, 2


class Executors:
    """Their clock stands still but for what layers take."""

    def __init__(self):
        self.traffic, self.timeline, self.spans, self.calls = Traffic(), self, [], 0

    def routes(self, tokens: int) -> bool:
        return True

    def finish_cpu(self) -> None:
        pass

    def start(self) -> None:
        self.spans, self.calls = [], 0

    def stop(self) -> list[Span]:
        return self.spans


class Layer:
    """All of its experts' blocks are in host memory; `cpu_s` and `link_s` for each, and `late_s` for each call's CPU part."""

    def __init__(self, executors: Executors, share: float, cpu_s: float, link_s: float, late_s: float = 0.0):
        nothing, blocks = [torch.empty(0, 6)] * EXPERTS, [torch.empty(BLOCKS, 6)] * EXPERTS
        self.routed = RoutedLayer(nothing, blocks, lambda _: share)
        self.executors, self.cpu_s, self.link_s, self.late_s = executors, cpu_s, link_s, late_s

    def __call__(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        assert index.shape == weights.shape == (1, TOP_K)
        assert index.max() < EXPERTS
        streamed = round(self.routed.shares[1] * TOP_K * BLOCKS)
        on_cpu, executors = TOP_K * BLOCKS - streamed, self.executors
        before, call = executors.traffic, executors.calls
        executors.traffic = Traffic(0, before.streamed_blocks + streamed, before.cpu_blocks + on_cpu)
        late_s = self.late_s if call == 1 else 0.0  # once interrupted
        executors.spans += [
            Span("CPU", "wait for the router", 0, call, 0.0, 9.0),
            Span("CPU", "blocks", 0, call, 9.0, 9.0 + on_cpu * self.cpu_s + late_s),
            Span("link", "in place", 0, call, 9.0, 9.0 + streamed * self.link_s),
        ]
        executors.calls += 1


def balanced(executors: Executors, layers: list[Layer]) -> list[list[float]]:
    """Shares by tokens."""
    config = SimpleNamespace(num_experts_per_tok=TOP_K, num_local_experts=EXPERTS, hidden_size=4)
    modules = [SimpleNamespace(dispatch=layer) for layer in layers]
    balance(SimpleNamespace(executors=executors, config=config, dtype=None, device=None, experts_modules=lambda: modules))
    return [list(layer.routed.shares) for layer in layers]


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
def test_cpu_and_link_finish_together(share):
    executors = Executors()
    speeds = [(1.0, 2.0), (1.0, 3.0), (2.0, 2.0), (3.0, 2.0)]
    for (cpu_s, link_s), found in zip(
        speeds, balanced(executors, [Layer(executors, share, *each) for each in speeds]), strict=True
    ):
        assert found[1] == pytest.approx(cpu_s / (cpu_s + link_s), abs=0.01)
        assert found[1 : FEW_TOKENS + 1] == [found[1]] * FEW_TOKENS
        assert found[FEW_TOKENS + 1 :] == pytest.approx([share] * (len(found) - FEW_TOKENS - 1))


def test_one_late_call_changes_nothing():
    executors = Executors()
    (found,) = balanced(executors, [Layer(executors, 0.3, 1.0, 2.0, late_s=100.0)])
    assert found[1] == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_does_all_goes_on_doing_it(share):
    executors = Executors()
    (found,) = balanced(executors, [Layer(executors, share, 1.0, 2.0)])
    assert set(found[1:]) == {share}


def test_a_share_too_small_for_one_block_stays():
    executors = Executors()
    (found,) = balanced(executors, [Layer(executors, 0.01, 1.0, 2.0)])
    assert found[1] == pytest.approx(0.01)


def test_few_blocks_are_never_given_to_one_side_alone():
    executors = Executors()
    (found,) = balanced(executors, [Layer(executors, 0.5, 1.0, 1000.0)])
    assert 0.0 < found[1] <= 0.1
