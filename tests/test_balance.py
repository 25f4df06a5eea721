"""Each layer's division between link and CPU, found after loading: with layers whose speeds the test sets."""

from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from fiddler_run.balance import TOKENS, Observed, balance, observe, shares
from fiddler_run.kernels.routed import RoutedLayer, favoured
from fiddler_run.plan import FEW_TOKENS, MOST_ROUTED_TOKENS
from fiddler_run.timeline import Span

EXPERTS, BLOCKS, TOP_K = 8, 16, 2


class Executors:
    """Their clock stands still but for what layers take."""

    def __init__(self):
        self.timeline, self.spans, self.calls = self, [], 0

    def routes(self, tokens: int) -> bool:
        return tokens <= MOST_ROUTED_TOKENS

    def finish_cpu(self) -> None:
        pass

    @contextmanager
    def recording(self):
        self.spans, self.calls = [], 0
        yield self.spans


class Layer:
    """All of its experts' blocks are in host memory; `cpu_s` and `link_s` for each, and once `late_s` more for the CPU."""

    layer = 0

    def __init__(self, executors: Executors, share: float, cpu_s: float, link_s: float, late_s: float = 0.0):
        nothing, blocks = [torch.empty(0, 6)] * EXPERTS, [torch.empty(BLOCKS, 6)] * EXPERTS
        self.routed = RoutedLayer(nothing, blocks, lambda _: share)
        self.experts = [SimpleNamespace(num_absent=BLOCKS)] * EXPERTS
        self.executors, self.cpu_s, self.link_s, self.late_s = executors, cpu_s, link_s, late_s
        self.share, self.prompts_favour_link, self.prompts, self.late_prompt_s = share, 1.0, [], 0.0

    def __call__(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        if len(states) > 1:
            self.compute_prompt(states, index, weights)
            return
        assert index.shape == weights.shape == (1, TOP_K)
        assert index.max() < EXPERTS
        streamed = int(self.routed.shares[1] * TOP_K * BLOCKS + 0.5)
        on_cpu, executors = TOP_K * BLOCKS - streamed, self.executors
        late_s, self.late_s = self.late_s, 0.0
        call = executors.calls
        executors.spans += [
            Span("CPU", "wait for the router", 0, call, 0.0, 9.0),
            Span("CPU", "blocks", 0, call, 9.0, 9.0 + on_cpu * self.cpu_s + late_s),
            Span("link", "in place", 0, call, 9.0, 9.0 + streamed * self.link_s),
        ]
        executors.calls += 1

    def compute_prompt(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        assert index.shape == weights.shape == (len(states), TOP_K)
        assert index.flatten().bincount(minlength=EXPERTS).min() > 0
        self.prompts.append(len(states))
        share, call, executors = favoured(self.share, self.prompts_favour_link), self.executors.calls, self.executors
        late_s, self.late_prompt_s = self.late_prompt_s, 0.0
        executors.spans += [
            Span("CPU", "blocks", 0, call, 1.0, 1.0 + (1 - share) * self.cpu_s + late_s),
            Span("link", "copy", 0, call, 0.0, share * self.link_s / 2),
            Span("link", "copy", 0, call, 9.0, 9.0 + share * self.link_s / 2),
            Span("GPU", "streamed", 0, call, 0.0, 99.0),
        ]
        executors.calls += 1


def model_of(executors: Executors, layers: list[Layer]) -> SimpleNamespace:
    config = SimpleNamespace(num_experts_per_tok=TOP_K, num_local_experts=EXPERTS, hidden_size=4)
    modules, device = [SimpleNamespace(dispatch=layer) for layer in layers], torch.device("cpu")
    plan = SimpleNamespace(
        prefill_chunk_tokens=2048,
        workload=SimpleNamespace(max_seq_len=4096, batch_size=1),
        stream_share_at=lambda tokens: layers[0].share,
        num_absent_blocks=sum(expert.num_absent for layer in layers for expert in getattr(layer, "experts", ())),
    )
    return SimpleNamespace(
        executors=executors, config=config, plan=plan, dtype=None, device=device, experts_modules=lambda: modules
    )


def balanced(executors: Executors, layers: list[Layer]) -> list[list[float]]:
    """Shares by tokens."""
    balance(model_of(executors, layers))
    return [list(layer.routed.shares) for layer in layers]


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
def test_cpu_and_link_finish_together(share):
    executors = Executors()
    speeds = [(1.0, 2.0), (1.0, 3.0), (2.0, 2.0), (3.0, 2.0)]
    for (cpu_s, link_s), found in zip(
        speeds, balanced(executors, [Layer(executors, share, *each) for each in speeds]), strict=True
    ):
        assert found[1] == pytest.approx(cpu_s / (cpu_s + link_s), abs=0.01)
        assert found[FEW_TOKENS:] == pytest.approx([share] * (len(found) - FEW_TOKENS))
        assert sorted(found[1:FEW_TOKENS], reverse=found[1] > share) == found[1:FEW_TOKENS]  # from its own to the plan's


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_prompts_have_one_division_for_all_layers(share):
    executors = Executors()
    layers = [Layer(executors, share, *each) for each in ((1.0, 2.0), (2.0, 3.0), (3.0, 5.0))]
    layers[1].routed = None  # some of its blocks are on disk
    balance(model_of(executors, layers))
    assert len({layer.prompts_favour_link for layer in layers}) == 1
    assert favoured(share, layers[0].prompts_favour_link) == pytest.approx(3 / (3 + 5))  # the layer in the middle
    assert [layer.prompts for layer in layers] == [[128 * EXPERTS // TOP_K] * 2] * 3


def test_one_late_layer_does_not_change_what_prompts_do():
    executors = Executors()
    layers = [Layer(executors, 2 / 3, 2.0, 1.0) for _ in range(8)]
    layers[5].late_prompt_s = 1.0
    balanced(executors, layers)
    assert layers[0].prompts_favour_link == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        ({"prefill_chunk_tokens": 300}, 300),
        ({"max_seq_len": 300}, 300),
        ({"max_seq_len": 200, "batch_size": 2}, 400),
        ({"max_seq_len": 200, "batch_size": 8}, 512),
        ({"prefill_chunk_tokens": MOST_ROUTED_TOKENS}, None),
        ({"max_seq_len": MOST_ROUTED_TOKENS}, None),
        ({"share": 0.0}, None),
        ({"share": 1.0}, None),
        ({"absent": 0}, None),
    ],
)
def test_which_prompts_are_divided_anew(change, tokens):
    executors = Executors()
    layer = Layer(executors, change.get("share", 0.3), 1.0, 2.0)
    layer.experts = [SimpleNamespace(num_absent=change.get("absent", BLOCKS))] * EXPERTS
    model = model_of(executors, [layer])
    model.plan.prefill_chunk_tokens = change.get("prefill_chunk_tokens", 2048)
    model.plan.workload = SimpleNamespace(max_seq_len=change.get("max_seq_len", 4096), batch_size=change.get("batch_size", 1))
    balance(model)
    assert layer.prompts == ([tokens] * 2 if tokens else [])
    assert (layer.prompts_favour_link == 1.0) == (tokens is None)


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


def test_what_is_seen_of_a_token():
    executors = Executors()
    layers = [Layer(executors, share, 1.0, 2.0) for share in (0.25, 0.0, 1.0)]
    layers.insert(1, SimpleNamespace(routed=None))  # some of its blocks are on disk
    together, cpu, link = observe(model_of(executors, layers))
    assert together == Observed(8, 24, 16.0, 24.0, 24.0)
    assert cpu == Observed(0, 32, 0.0, 32.0, 32.0)
    assert link == Observed(32, 0, 64.0, 0.0, 64.0)
    assert shares(model_of(executors, layers)) == {0: 0.25}
    layers[0].experts = [SimpleNamespace(num_absent=0)] * EXPERTS
    assert observe(model_of(executors, layers))[0] == Observed(0, 0, 0.0, 0.0, 0.0)
    assert shares(model_of(executors, layers)) == {}


@pytest.mark.parametrize(("top_k", "experts"), [(1, 8), (2, 8), (8, 64), (3, 4), (2, 2)])
def test_the_experts_that_are_called_lie_all_over_a_layer(top_k, experts, monkeypatch):
    executors, called = Executors(), set()
    layer = Layer(executors, 0.25, 1.0, 2.0)
    layer.experts = layer.experts[:1] * experts
    model = model_of(executors, [layer])
    model.config = SimpleNamespace(num_experts_per_tok=top_k, num_local_experts=experts, hidden_size=4)

    def call(self, states, index, weights):
        assert index.unique().numel() == index.numel() == top_k
        called.update(index.flatten().tolist())

    monkeypatch.setattr(Layer, "__call__", call)
    for number in range(TOKENS):
        observe(model, number)
    gaps = [b - a for a, b in pairwise([*sorted(called), experts + min(called)])]
    assert max(gaps) <= max(1, -(-experts // (top_k * TOKENS)))


def test_where_python_hands_out_the_work_there_is_nothing_to_divide():
    executors = Executors()
    executors.routes = lambda tokens: False
    layers = [Layer(executors, 0.25, 1.0, 2.0)]
    assert observe(model_of(executors, layers)) == []
    assert shares(model_of(executors, layers)) == {}
    assert balanced(executors, layers)[0][1] == 0.25
