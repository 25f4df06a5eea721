"""lossless12: every weight comes back bit for bit, and the CPU kernel multiplies it."""

import random

import numpy as np
import pytest
import torch
from activations import exact_glu, with_each_activation
from conftest import DEMO, demo_shape, make_plan, random_plan
from hand_over import TOLERANCE
from models import open_checkpoint
from seeds import seeds

from fiddler_run import load_model
from fiddler_run.encodings.lossless12 import GROUP, Lossless12, _library
from fiddler_run.kernels.cpu import CompiledExperts
from fiddler_run.kernels.cpu_calls import CpuCall, CpuCalls
from fiddler_run.kernels.library import library, supported_variants
from fiddler_run.kernels.pool import Pool
from fiddler_run.weights.checkpoint import DummyWeights
from fiddler_run.weights.store import ExpertStore

if library() is None or not Lossless12.available():
    pytest.skip("needs a C++ compiler", allow_module_level=True)

PATTERNS = 2**16
Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def of_bits(bits: torch.Tensor) -> torch.Tensor:
    """bfloat16 weights with these bits, given as integers from 0 to 65535."""
    return bits.to(torch.int32).to(torch.int16).view(torch.bfloat16)


def encoded(
    matrices: Matrices, neurons: int, first: int = 0
) -> tuple[Lossless12, torch.Tensor, list]:
    """The encoding, the blocks from neuron `first` on, and the memory that they refer to."""
    intermediate, hidden = matrices[0].shape
    encoding = Lossless12(hidden, neurons)
    count = encoding.blocks_per_expert(intermediate) - first // neurons
    blocks = torch.full((count, encoding.block_bytes), 255, dtype=torch.uint8)
    return encoding, blocks, encoding.encode(blocks, *matrices, first)


def assert_lossless(matrices: Matrices, neurons: int, first: int = 0) -> list:
    """Returns the memory that the blocks refer to, one tensor for each with too many escapes."""
    encoding, blocks, referred = encoded(matrices, neurons, first)
    gate_up, down = encoding.decode(blocks)
    for found, other in zip((gate_up, down), encoding.decode_with_pytorch(blocks), strict=True):
        assert torch.equal(found.view(torch.int16), other.view(torch.int16))
    found = (
        gate_up[:, :neurons].flatten(0, 1),
        gate_up[:, neurons:].flatten(0, 1),
        down.transpose(0, 1).flatten(1).T,
    )
    gate, up, columns = matrices
    for got, want in zip(found, (gate, up, columns.T), strict=True):
        count = len(want) - first
        assert torch.equal(got[:count].view(torch.int16), want[first:].view(torch.int16))
        assert not got[count:].view(torch.int16).any()  # padding
    return referred


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_pattern_in_every_place(shuffled):
    """Neighbours alike, which mostly have codes, and shuffled, which mostly are escapes."""
    order = torch.arange(PATTERNS)
    if shuffled:
        order = torch.randperm(PATTERNS, generator=torch.Generator().manual_seed(0))
    bits = order[(torch.arange(PATTERNS).unsqueeze(1) + torch.arange(GROUP)) % PATTERNS]
    gate = of_bits(bits)
    down = of_bits(bits.flip(0)).T.contiguous()
    referred = assert_lossless((gate, gate.flip(0), down), 1024)
    assert bool(referred) == shuffled


def drawn(rng: random.Random, rows: int, width: int) -> torch.Tensor:
    """Weights of a random kind."""
    weights = torch.randn(rows, width)
    kind = rng.randrange(7)
    if kind == 0:
        weights *= 10.0 ** rng.uniform(-44, 38)
    elif kind == 1:  # another scale for each row
        weights *= 10.0 ** torch.empty(rows, 1).uniform_(-30, 30)
    elif kind == 2:
        weights = torch.where(torch.rand(rows, width) < 0.9, 0.0, weights)
    elif kind == 3:  # outliers
        weights *= torch.where(torch.rand(rows, width) < 0.01, 1e6, 1.0)
    elif kind == 4:
        weights = torch.full((rows, width), rng.choice([0.0, -0.0, 1.0, 1e-40, torch.inf]))
    elif kind == 5:
        weights[:, 0] = rng.choice([torch.nan, -torch.inf, 3e38])
    else:
        return of_bits(torch.randint(0, PATTERNS, (rows, width)))
    return weights.bfloat16()


@pytest.mark.parametrize("seed", seeds(2, 5))
def test_random_weights_and_shapes(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    referring = 0
    for _ in range(200):
        neurons, hidden = (GROUP * rng.randint(1, 3) for _ in range(2))
        intermediate = rng.randint(1, 3 * neurons)
        gate, up = (drawn(rng, intermediate, hidden) for _ in range(2))
        down = drawn(rng, hidden, intermediate)
        first = neurons * rng.randrange(-(-intermediate // neurons))
        referring += bool(assert_lossless((gate, up, down), neurons, first))
    assert 60 < referring < 180  # blocks of both kinds


def test_trained_weights_need_few_escapes():
    checkpoint = open_checkpoint(DEMO)
    escapes = weights = 0
    for layer in range(6):
        for expert in range(8):
            matrices = checkpoint.expert(layer, expert)
            assert assert_lossless(matrices, 64) == []
            encoding, blocks, _ = encoded(matrices, 64)
            _, firsts, *_ = encoding.offsets()
            ends = blocks[:, firsts : firsts + 4 * (encoding.rows + 1)].view(torch.int32)[:, -1]
            escapes += ends.sum().item()
            weights += sum(matrix.numel() for matrix in matrices)
    assert 0 < escapes < weights / 1000


def test_both_languages_agree_on_the_layout():
    for hidden, neurons in ((64, 64), (128, 192), (4096, 896), (2048, 64)):
        block_bytes = Lossless12(hidden, neurons).block_bytes
        assert _library().lossless12_bytes(hidden, neurons, True) == block_bytes
        block_bytes = Lossless12(hidden, neurons, gated=False).block_bytes
        assert _library().lossless12_bytes(hidden, neurons, False) == block_bytes


def test_columns_of_long_rows_are_exact():
    hidden = 2**16
    gate = torch.zeros(64, hidden).bfloat16()
    gate[:, -1] = 1.0
    gate[:, 1] = 1e-20
    gate[:, 2:600] = 1.0
    gate[:, 40_000] = 1e20
    assert_lossless((gate, gate.flip(1), gate.T.contiguous()), 64)


def test_a_block_takes_three_quarters_of_bf16():
    encoding = Lossless12(4096, 896)
    assert encoding.block_bytes / (3 * 4096 * 896 * 2) == pytest.approx(0.7552, abs=1e-4)


@with_each_activation
@pytest.mark.parametrize("variant", supported_variants())
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 17, 40])
def test_kernel_matches_float64(variant, tokens, activation):
    torch.manual_seed(tokens)
    hidden = 128
    neurons = 192
    for outliers in (False, True):  # escapes in the blocks, and elsewhere
        matrices = [
            torch.randn(size) * 0.1 for size in ((500, hidden), (500, hidden), (hidden, 500))
        ]
        for matrix in matrices:
            matrix[torch.rand(matrix.shape) < (0.1 if outliers else 1e-3)] *= 1e-5
        matrices = tuple(matrix.bfloat16() for matrix in matrices)
        encoding, blocks, referred = encoded(matrices, neurons)
        assert bool(referred) == outliers
        states = torch.randn(tokens, hidden).bfloat16()
        rows = np.arange(0, tokens, 2)
        weights = np.random.rand(len(rows)).astype(np.float32)
        gate, up, down = (matrix.double() for matrix in matrices)
        x = states[rows].double()
        product = exact_glu(activation, x @ gate.T, x @ up.T) @ down.T
        expected = torch.zeros(tokens, hidden, dtype=torch.float64)
        expected[rows] = product * torch.from_numpy(weights).double().unsqueeze(1)
        outputs = []
        for threads in (1, 3):
            output = torch.full((tokens, hidden), torch.nan)
            kernel = CompiledExperts(encoding, Pool(threads, variant=variant), activation)
            kernel.submit(CpuCalls.of([CpuCall(blocks, rows, weights)]), states, output)
            kernel.wait()
            outputs.append(output)
            assert (output - expected).norm() <= TOLERANCE * expected.norm()
        assert torch.equal(*outputs)


@pytest.mark.parametrize("seed", seeds(6, 25))
def test_random_placements_give_the_logits_of_bf16(seed, device):
    """The weights are the same, but sums may be rounded differently."""

    def logits(encoding: str) -> torch.Tensor:
        plan = random_plan(demo_shape("bfloat16"), random.Random(seed), 64, encoding=encoding)
        model, tokenizer = load_model(plan, DEMO)
        inputs = tokenizer("One bright morning", return_tensors="pt").to(device)
        with torch.no_grad():
            return model(**inputs).logits

    expected = logits("bf16")
    worst = (logits("lossless12") - expected).abs().max() / expected.abs().max()
    assert worst <= 0.02


def test_blocks_with_many_escapes_are_counted():
    plan = make_plan(demo_shape("bfloat16"), [[0] * 8] * 6, 256, encoding="lossless12")
    store = ExpertStore(plan, torch.device("cpu"), DEMO)
    weights = DummyWeights(plan.model, torch.bfloat16)
    store.load(weights)
    assert store.notes == []
    weights._pool = of_bits(torch.randint(0, PATTERNS, weights._pool.shape))
    store.load(weights)
    (note,) = store.notes
    assert note.startswith("48 blocks have more unusual weights than lossless12")
