"""Plans of Mixtral-8x7B, checked against numbers computed by hand."""

import sys
from dataclasses import replace
from functools import cache

import pytest
from conftest import ROOT
from planning import small_model

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.insight.explain import binding_words
from fiddler_opt.insight.scaling import ram_rate, with_rates
from fiddler_opt.solve.comparison import compared
from fiddler_opt.solve.compiler import by_rule, compile_plan
from fiddler_opt.solve.memory import activation_bytes, host_embedding_bytes, staged_blocks
from fiddler_opt.solve.problem import Problem
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Budget, Plan, Workload

WORKLOAD = Workload(
    prompt_tokens=512, output_tokens=128, num_beams=1, batch_size=1, max_seq_len=4096
)
PROVENANCE = {
    "command": "test",
    "machine": "rtx4090",
    "machine_sha256": "",
    "machine_source": "data sheet",
    "routing": "uniform (assumed)",
    "created": "2026-01-01",
}
EXPERT_BYTES = 352_321_536
BLOCK_BYTES = 22_020_096


@cache
def mixtral() -> ModelSpec:
    return ModelSpec.load(DEFAULT_MODEL)


@cache
def rtx4090() -> MachineProfile:
    return MachineProfile.load(ROOT / "profiles" / "rtx4090.machine.yaml")


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return mixtral()


@pytest.fixture(scope="module")
def machine() -> MachineProfile:
    return rtx4090()


@cache
def plan_for(gpu_bytes: int) -> Plan:
    """The plan on the machine of the data sheets, solved once for all tests."""
    return plan_on(rtx4090(), gpu_bytes)


def plan_on(machine: MachineProfile, gpu_bytes: int, placer=None, encoding: str = "bf16") -> Plan:
    model = mixtral().in_encoding(encoding)
    routing = Routing.uniform(model)
    budget = Budget(gpu_bytes=gpu_bytes)
    return compile_plan(model, machine, routing, WORKLOAD, budget, PROVENANCE, placer=placer)


def test_a_budget_a_byte_short_of_a_block_has_one_block_less():
    """The solver tolerates so small a part of a block."""
    plan = plan_for(24 * 10**9)
    unused = plan.rank.gpu_memory_bytes.total - plan.rank.gpu_memory_bytes.used
    short = plan_on(rtx4090(), 24 * 10**9 - unused - 1)
    assert short.rank.num_resident_blocks == plan.rank.num_resident_blocks - 1
    assert short.rank.gpu_memory_bytes.used <= short.rank.gpu_memory_bytes.total


def test_without_gpu_memory_the_next_gb_is_not_valued():
    plan = plan_for(0)
    assert plan.predicted.next_gb_tokens_per_s == 0
    assert binding_words(plan).endswith("; the plan uses no GPU memory")


def test_small_experts_have_a_larger_staging_ring():
    assert staged_blocks(mixtral()) == 12
    assert staged_blocks(mixtral().for_ranks(2)) == 24  # of half the size
    sizes = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "hidden_size": 2048,
        "intermediate_size": 768,
    }
    small = small_model(**sizes)  # 3 blocks of 256 neurons an expert
    assert small.block_bytes == 3_145_728
    assert staged_blocks(small) == 128 * 3 // 16
    many = small_model(**sizes | {"num_experts": 256})
    assert staged_blocks(many) == 96_000_000 // 3_145_728


def test_bytes_by_purpose_by_hand():
    plan = plan_for(24_000_000_000)
    gpu = plan.rank.gpu_memory_bytes
    assert gpu.total == 24_000_000_000
    # the embedding table is in host memory
    assert gpu.non_expert_weights == 3_211_272_192 - 262_144_000
    assert plan.rank.host_memory_bytes.embedding == 262_144_000
    assert gpu.kv_cache == 4096 * 131_072
    assert gpu.staging == 12 * BLOCK_BYTES
    # the driver, and its map of up to 90.2 GB of page-locked memory
    assert gpu.reserve == 600_000_000 + 176_160_768
    assert gpu.experts == plan.rank.num_resident_blocks * BLOCK_BYTES
    parts = (
        gpu.non_expert_weights
        + gpu.kv_cache
        + gpu.staging
        + gpu.activations
        + gpu.reserve
        + gpu.experts
    )
    assert parts <= 24_000_000_000
    assert 24_000_000_000 - parts < BLOCK_BYTES  # no room left for another block
    assert gpu.experts + plan.rank.host_memory_bytes.experts == 256 * EXPERT_BYTES


def test_without_page_locking_the_cpu_computes_all_host_blocks(model, machine):
    """The profile of such a machine has times of the CPU alone."""
    alone = {
        tokens: {0.0: times[0.0]}
        for tokens, times in machine.host_expert_us.items()
        if 0.0 in times
    }
    unlocked = machine.model_copy(update={"host_expert_us": alone})
    assert machine.streams
    assert not unlocked.streams
    plan = plan_on(unlocked, 24 * 10**9)
    usual = plan_for(24 * 10**9)
    assert usual.rank.streams
    assert not plan.rank.streams
    assert plan.rank.gpu_memory_bytes.staging == 0
    assert plan.rank.gpu_memory_bytes.reserve == 600_000_000
    assert set(plan.rank.stream_share.values()) == {0.0}
    # They take the staging ring's place.
    assert plan.rank.num_resident_blocks > usual.rank.num_resident_blocks
    assert plan.predicted.ttft_s > usual.predicted.ttft_s
    compare = compared(plan, Problem.of(plan, model, unlocked), Routing.uniform(model))
    assert set(compare.predicted.alternatives) == {"greedy", "uniform", "layers", "cpu"}
    with pytest.raises(FiddlerError, match="host memory that can be page-locked"):
        plan_on(unlocked, 24 * 10**9, by_rule("stream"))
    with pytest.raises(FiddlerError, match="--link: in the machine profile, no experts are copied"):
        with_rates(unlocked, link_bytes_per_s=10**10)
    faster = with_rates(unlocked, ram_bytes_per_s=2 * ram_rate(unlocked))
    assert not faster.streams
    odd = unlocked.model_copy(
        update={"host_expert_us": {1: {0.0: 3360.0}, 8: {0.0: 5775.8}, 1024: {0.0: 68848.8}}}
    )
    assert not with_rates(odd, ram_bytes_per_s=335.54432e9).streams  # not even by rounding
    assert faster.host_expert_us[1][0.0] == pytest.approx(
        unlocked.host_expert_us[1][0.0] / 2, rel=1e-3
    )


def test_zero_bytes_give_a_plan_for_the_cpu_alone():
    plan = plan_for(0)
    assert plan.rank.gpu_memory_bytes.used == 0
    assert plan.rank.num_resident_blocks == 0
    assert plan.rank.stream_share == {1: 0.0}
    assert plan.rank.host_memory_bytes.experts == 256 * EXPERT_BYTES


def test_more_memory_never_predicts_slower():
    rates = [plan_for(gb * 10**9).predicted.decode_tokens_per_s for gb in (8, 12, 16, 20, 24)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_more_sequences_take_more_memory(model, machine):
    """Beams take less than a batch, because their prompt passes once."""
    one = activation_bytes(model, machine.kernels, WORKLOAD, 2048)
    beams, batch = (
        activation_bytes(model, machine.kernels, WORKLOAD.model_copy(update={key: 4}), 2048)
        for key in ("num_beams", "batch_size")
    )
    assert one < beams < 2 * one
    assert batch > 3 * one


def test_scores_take_memory_without_a_fused_kernel(model, machine):
    """In bfloat16, two copies of 2 bytes and one of 4 for each head; and 10% of slack."""
    eager = replace(model, sizes=model.sizes.model_copy(update={"score_heads": 32}))
    fused, kept = (
        activation_bytes(each, machine.kernels, WORKLOAD, 512) for each in (model, eager)
    )
    assert kept - fused == pytest.approx(1.1 * 8 * 32 * 512 * WORKLOAD.max_seq_len, abs=2)


def test_embedding_lies_in_host_memory_with_a_gpu(model, machine):
    """Except where the output head shares its table."""
    tied = ModelSpec.from_config({**model.config.raw, "tie_word_embeddings": True}, "tied", "here")
    cpu = MachineProfile.load(ROOT / "profiles" / "two-cores.machine.yaml")
    assert host_embedding_bytes(model, machine, 1) == 262_144_000
    assert host_embedding_bytes(tied, machine, 1) == 0
    assert host_embedding_bytes(model, machine, 0) == 0
    assert host_embedding_bytes(model, cpu, 1) == 0


def test_unpacked_weights_are_counted(machine):
    """Eight blocks at once, with 10% of slack."""
    plain, packed = (
        activation_bytes(mixtral().in_encoding(name), machine.kernels, WORKLOAD, 2048)
        for name in ("bf16", "lossless12")
    )
    assert packed - plain == pytest.approx(1.1 * 8 * BLOCK_BYTES, abs=2)


def test_error_of_a_small_budget_states_the_need():
    with pytest.raises(
        FiddlerError,
        match=r"--gpu-mem 4.00 GB is too small: 5.04 GB is needed before any expert \(non-expert",
    ):
        plan_for(4 * 10**9)


def test_shipped_plan_is_reproduced():
    plan = Plan.load(ROOT / "plans" / "rtx4090.yaml")
    assert plan.provenance.machine_source == "data sheet"
    assert plan.model.name == "mistralai/Mixtral-8x7B-v0.1"
    assert plan.encoding == "lossless12"
    again = plan_on(rtx4090(), 24_000_000_000, encoding="lossless12")
    assert again.rank.gpu_memory_bytes == plan.rank.gpu_memory_bytes
    assert again.rank.stream_share == plan.rank.stream_share
    # Under uniform routing many placements are equally good, and the solver may return any of
    # them.
    assert again.predicted.decode_tokens_per_s == pytest.approx(
        plan.predicted.decode_tokens_per_s, rel=1e-3
    )
    assert again.predicted.ttft_s == pytest.approx(plan.predicted.ttft_s, rel=1e-3)


def test_data_sheet_profile_matches_its_script(machine, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "profiles"), *sys.path])
    from data_sheet import data_sheet_profile

    assert data_sheet_profile() == machine
