"""A plan of Mixtral-8x7B for 24 GB, its bytes against numbers written by hand."""

import sys

import pytest
from conftest import ROOT

from fiddler_opt.compiler import compile_plan
from fiddler_opt.machine import MachineProfile
from fiddler_opt.memory import activation_bytes
from fiddler_opt.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.problem import Budget
from fiddler_opt.routing import Routing
from fiddler_opt.scaling import ram_rate, with_link, with_ram
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Plan, Workload

WORKLOAD = Workload(prompt_tokens=512, output_tokens=128, num_beams=1, batch_size=1, max_seq_len=4096)
MADE = {
    "command": "test",
    "machine": "rtx4090",
    "machine_sha256": "",
    "machine_source": "data sheet",
    "routing": "uniform (assumed)",
    "created": "2026-01-01",
}
EXPERT_BYTES, BLOCK_BYTES = 352_321_536, 22_020_096


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return ModelSpec.load(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def machine() -> MachineProfile:
    return MachineProfile.load(ROOT / "profiles" / "rtx4090.machine.yaml")


def plan_for(model, machine, total, workload=WORKLOAD) -> Plan:
    return compile_plan(model, machine, Routing.uniform(model), workload, Budget(total), MADE)


def test_bytes_by_purpose(model, machine):
    plan = plan_for(model, machine, 24_000_000_000)
    gpu = plan.gpu_memory_bytes
    assert gpu.total == 24_000_000_000
    assert gpu.non_expert_weights == 3_211_272_192 - 262_144_000  # the embedding table lies in host memory
    assert plan.host_memory_bytes.embedding == 262_144_000
    assert gpu.kv_cache == 4096 * 131_072
    assert gpu.staging == 8 * BLOCK_BYTES
    assert gpu.reserve == 600_000_000 + 176_160_768  # the driver, and its map of up to 90.2 GB of page-locked memory
    assert gpu.experts == plan.num_resident_blocks * BLOCK_BYTES
    parts = gpu.non_expert_weights + gpu.kv_cache + gpu.staging + gpu.activations + gpu.reserve + gpu.experts
    assert parts <= 24_000_000_000
    assert 24_000_000_000 - parts < BLOCK_BYTES  # no room left for another block
    assert gpu.experts + plan.host_memory_bytes.experts == 256 * EXPERT_BYTES


def test_what_cannot_be_page_locked_is_left_to_the_cpu(model, machine):
    """As a profile says it that found no link for experts: by the CPU alone."""
    alone = {tokens: {0.0: times[0.0]} for tokens, times in machine.absent_expert_us.items() if 0.0 in times}
    unlocked = machine.model_copy(update={"absent_expert_us": alone})
    assert machine.streams
    assert not unlocked.streams
    plan, usual = plan_for(model, unlocked, 24 * 10**9), plan_for(model, machine, 24 * 10**9)
    assert usual.streams
    assert not plan.streams
    assert plan.gpu_memory_bytes.staging == 0
    assert plan.gpu_memory_bytes.reserve == 600_000_000
    assert set(plan.stream_share.values()) == {0.0}
    assert plan.num_resident_blocks > usual.num_resident_blocks  # in the staging's place
    assert plan.predicted.ttft_s > usual.predicted.ttft_s
    assert set(plan.predicted.alternatives) == {"greedy", "uniform", "layers", "cpu"}
    with pytest.raises(FiddlerError, match="host memory that can be page-locked"):
        compile_plan(model, unlocked, Routing.uniform(model), WORKLOAD, Budget(24 * 10**9), MADE, baseline="stream")
    with pytest.raises(FiddlerError, match="--link: by the machine profile no experts are copied over it"):
        with_link(unlocked, 10**10)
    faster = with_ram(unlocked, 2 * ram_rate(unlocked))
    assert not faster.streams
    odd = unlocked.model_copy(update={"absent_expert_us": {1: {0.0: 3360.0}, 8: {0.0: 5775.8}, 1024: {0.0: 68848.8}}})
    assert not with_ram(odd, 335.54432e9).streams  # not by rounding either
    assert faster.absent_expert_us[1][0.0] == pytest.approx(unlocked.absent_expert_us[1][0.0] / 2, rel=1e-3)


def test_zero_bytes_is_a_plan_for_the_cpu_alone(model, machine):
    plan = plan_for(model, machine, 0)
    assert plan.gpu_memory_bytes.used == 0
    assert plan.num_resident_blocks == 0
    assert plan.stream_share == {1: 0.0}
    assert plan.host_memory_bytes.experts == 256 * EXPERT_BYTES


def test_more_memory_is_predicted_no_slower(model, machine):
    rates = [plan_for(model, machine, gb * 10**9).predicted.decode_tokens_per_s for gb in (8, 12, 16, 20, 24)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_more_sequences_take_more_memory(model):
    """Beams less than prompts: their prompt passes once."""
    one = activation_bytes(model, WORKLOAD, 2048)
    beams, batch = (activation_bytes(model, WORKLOAD.model_copy(update={key: 4}), 2048) for key in ("num_beams", "batch_size"))
    assert one < beams < 2 * one
    assert batch > 3 * one


def test_too_small_a_budget_says_what_is_needed(model, machine):
    with pytest.raises(FiddlerError, match=r"--gpu-mem 4.00 GB is too small: 5.22 GB are needed before any expert \(non expert"):
        plan_for(model, machine, 4 * 10**9)


def test_shipped_plan(model, machine):
    plan = Plan.load(ROOT / "plans" / "rtx4090.yaml")
    assert plan.provenance.machine_source == "data sheet"
    assert plan.model.name == "mistralai/Mixtral-8x7B-v0.1"
    again = plan_for(model, machine, 24_000_000_000)
    assert again.gpu_memory_bytes == plan.gpu_memory_bytes
    assert again.stream_share == plan.stream_share
    # Uniform routing leaves many placements equally good; which of them the solver returns is its own affair.
    assert again.predicted.decode_tokens_per_s == pytest.approx(plan.predicted.decode_tokens_per_s, rel=1e-3)
    assert again.predicted.ttft_s == pytest.approx(plan.predicted.ttft_s, rel=1e-3)


def test_data_sheet_profile_is_what_its_script_gives(machine, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "profiles"), *sys.path])
    from data_sheet import data_sheet_profile

    assert data_sheet_profile() == machine
