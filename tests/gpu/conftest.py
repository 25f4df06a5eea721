"""Models, plans and inputs for the tests that need a CUDA device.

The other tests use a CUDA device too if there is one: it then holds the GPU part of their plans.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import random_plan, with_rank

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.measure.machine import MachineBench, measure_machine, release_gpu_memory
from fiddler_opt.measure.settings import ProfileSettings
from fiddler_opt.measure.unfinished import Unfinished
from fiddler_opt.solve.compiler import compile_plan
from fiddler_run import load_model
from fiddler_run.engine.engine import ExpertEngine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.generation.model import PlannedModel
from fiddler_run.plan.schema import Budget, Plan, Workload
from fiddler_run.weights.arena import Arena

CUDA = torch.device("cuda", 0)
Wide = tuple[Path, ModelSpec, MachineProfile]
# The precision of the figures does not matter here.
HASTY = ProfileSettings(
    tokens=(1, 64, 1024),
    dense_tokens=(1, 512),
    rounds=1,
    seconds=0.02,
    memory_fraction=0.1,
)
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 768,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
}
PROVENANCE = dict.fromkeys(
    ("command", "machine", "machine_sha256", "machine_source", "routing", "created"), "test"
)


@pytest.fixture(scope="session")
def wide(random_checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Wide:
    """A wider model (0.85 GB of experts in float32), and this machine's profile for it."""
    folder, _ = random_checkpoint(**WIDE)
    spec = ModelSpec.load(str(folder))
    bench = MachineBench(spec, HASTY, folder)
    machine = profile_of(bench, tmp_path_factory.mktemp("profiles"))
    del bench
    release_gpu_memory()
    return folder, spec, machine


@pytest.fixture(scope="module")
def wide_bfloat16(random_checkpoint) -> Iterator[PlannedModel]:
    """A model of random weights in bfloat16, the GPU kernels' dtype, with a random placement."""
    folder, shape = random_checkpoint(**WIDE)
    shape = shape.model_copy(update={"dtype": "bfloat16"})
    plan = random_plan(shape, random.Random(3), block_neurons=224)
    memory = plan.rank.gpu_memory_bytes
    # tests generate on streams of their own, for each of which cuBLAS takes 32 MiB
    more = memory.model_copy(update={"total": memory.total + 8 * 2**25})
    model, _ = load_model(with_rank(plan, gpu_memory_bytes=more), folder, load_format="dummy")
    yield model
    del model
    # cuBLAS keeps 32 MiB for each stream that it was ever used on, which counts against the cap.
    torch._C._cuda_clearCublasWorkspaces()
    release_gpu_memory()


def profile_of(bench: MachineBench, folder: Path) -> MachineProfile:
    """The profile that a bench measures; its checkpoint is in `folder`."""
    unfinished = Unfinished(folder / "wide.machine.yaml", bench.identity)
    return measure_machine(bench, unfinished, "test", True, lambda name, finished: None)


def solved(spec: ModelSpec, machine: MachineProfile, workload: Workload, gpu_bytes: int) -> Plan:
    """The best plan under uniform routing."""
    budget = Budget(gpu_bytes=gpu_bytes)
    return compile_plan(spec, machine, Routing.uniform(spec), workload, budget, PROVENANCE)


def random_ids(sequences: int, tokens: int, seed: int) -> torch.Tensor:
    """Token ids [sequences, tokens] on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 700, (sequences, tokens), generator=generator).to(CUDA)


def exactly(ids: torch.Tensor, new_tokens: int) -> dict:
    """Arguments of `generate()` for exactly this many greedy tokens after `ids`."""
    return {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
    }


def assert_layer_matches(
    engine: ExpertEngine,
    experts: Sequence[torch.Tensor],
    inputs: list[torch.Tensor],
    expected: torch.Tensor,
    splits: Sequence[tuple[int, float]],
) -> None:
    """Checks a layer's output for several splits; a second call must give the same bits.

    Args:
        experts: the blocks of each expert in page-locked memory.
        inputs: states, index and weights on the engine's device.
        expected: float64 [tokens, hidden].
        splits: blocks of each expert in GPU memory, and the share of the others that is streamed.
    """
    for resident, share in splits:
        layer = ExpertsLayer(
            0,
            [blocks[:resident].to(inputs[0].device) for blocks in experts],
            [blocks[resident:] for blocks in experts],
            lambda _, share=share: share,
            engine,
        )
        outputs = [layer(*inputs).cpu() for _ in range(2)]
        assert torch.equal(*outputs)
        # rounding products and output to bfloat16 alone gives up to 3.3e-3
        assert (outputs[0].double() - expected).norm() <= 4e-3 * expected.norm()
    engine.resources.settle()


def page_locked(blocks: torch.Tensor) -> torch.Tensor:
    """A copy of blocks, uint8 [count, block_bytes], in page-locked memory."""
    arena = Arena(*blocks.shape, torch.device("cpu"))
    arena.blocks.copy_(blocks)
    arena.pin()
    return arena.blocks
