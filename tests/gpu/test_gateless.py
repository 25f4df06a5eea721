"""Experts without a gate on a GPU, link and CPU."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from activations import RELU2

from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.encodings.plain import Bf16
from fiddler_run.engine.engine import make_engine
from gpu.conftest import CUDA, assert_layer_matches, page_locked

HIDDEN = 256
NEURONS = 192
EXPERTS = 3


@pytest.mark.parametrize("kind", [Bf16, Lossless12])
@pytest.mark.parametrize("tokens", [1, 7, 33, 300])
def test_layer_matches_float64(kind, tokens):
    torch.manual_seed(tokens)
    encoding = kind(HIDDEN, NEURONS, gated=False)
    stored = torch.empty(4 * EXPERTS, encoding.block_bytes, dtype=torch.uint8)
    stored = page_locked(stored).split(4)
    experts = []
    for blocks in stored:
        up = (torch.randn(4 * NEURONS, HIDDEN) * 0.05).bfloat16()
        down = (torch.randn(HIDDEN, 4 * NEURONS) * 0.05).bfloat16()
        assert encoding.encode(blocks, None, up, down, 0) == []
        experts.append((up.double(), down.double()))
    states = torch.randn(tokens, HIDDEN).bfloat16()
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2).softmax(dim=1)
    expected = torch.zeros(states.shape, dtype=torch.float64)
    for token, chosen in enumerate(index.tolist()):
        for expert, weight in zip(chosen, weights[token].double(), strict=True):
            up, down = experts[expert]
            expected[token] += weight * (down @ (up @ states[token].double()).relu().square())
    engine = make_engine(encoding, CUDA, threads=2, slots=3, activation=RELU2)
    assert engine.resources.kernels.decode is not None
    inputs = [tensor.to(CUDA) for tensor in (states, index, weights)]
    splits = ((0, 0.0), (0, 1.0), (4, 0.0), (1, 0.4))
    assert_layer_matches(engine, stored, inputs, expected, splits)
