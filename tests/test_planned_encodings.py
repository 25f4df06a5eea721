"""Encodings in machine profiles and plans: the fastest that was timed is chosen."""

import pytest
from command_line import assert_refused, run
from conftest import ROOT

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.machine_parts import EncodedExperts
from fiddler_opt.inputs.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.insight.doctor import smallest
from fiddler_opt.insight.host_checks import bytes_in_ram, check_ram
from fiddler_opt.insight.scaling import with_rates
from fiddler_run.plan.schema import Plan

SHIPPED = ROOT / "profiles/rtx4090.machine.yaml"
MODEL = ModelSpec.load(DEFAULT_MODEL)
PACKED = MODEL.in_encoding("lossless12")
RATIO = PACKED.expert_bytes / MODEL.expert_bytes


def with_packed(machine: MachineProfile, factor: float) -> MachineProfile:
    """The profile with lossless12, whose experts take `factor` times as long."""
    experts = EncodedExperts(
        block_neurons=PACKED.block_neurons,
        expert_bytes=PACKED.expert_bytes,
        host_expert_us={
            tokens: {share: us * factor for share, us in row.items()}
            for tokens, row in machine.host_expert_us.items()
        },
        resident_expert_us={t: us * factor for t, us in machine.resident_expert_us.items()},
    )
    return machine.model_copy(update={"encodings": {"lossless12": experts}})


@pytest.fixture
def planned(tmp_path):
    """Plans for a machine whose packed experts take `factor` times as long, with further flags."""

    def plan(factor: float, *flags: str) -> tuple[Plan, str]:
        with_packed(MachineProfile.load(SHIPPED), factor).save(tmp_path / "m.yaml")
        file = f"{'-'.join(flags).strip('-') or 'auto'}.yaml"
        arguments = ("--machine", "m.yaml", "--gpu-mem", "24GB", *flags, "-o", file)
        result = run("fiddler-opt", "plan", *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return Plan.load(tmp_path / file), result.stderr

    return plan


def test_the_faster_encoding_is_chosen(planned):
    packed, printed = planned(RATIO)
    assert packed.encoding == "lossless12"
    assert "experts are stored as lossless12: 12.1 bits per weight, exact" in printed
    plain, printed = planned(RATIO, "--encoding", "bf16")
    assert plain.encoding == "bf16"
    assert "stored as" not in printed
    assert plain.rank == Plan.load(ROOT / "plans/rtx4090.yaml").rank
    assert packed.rank.num_resident_blocks > 1.3 * plain.rank.num_resident_blocks
    rates = [plan.predicted.decode_tokens_per_s for plan in (packed, plain)]
    assert rates[0] > 1.3 * rates[1]
    host = [plan.rank.host_memory_bytes.experts for plan in (packed, plain)]
    assert host[0] < 0.72 * host[1]
    slow, _ = planned(1.5)
    assert slow.encoding == "bf16"


def test_plans_of_two_encodings_are_explained_and_compared(planned, tmp_path):
    planned(RATIO)
    planned(RATIO, "--encoding", "bf16")
    why = run("fiddler-opt", "show", "auto.yaml", "--why", cwd=tmp_path)
    assert why.returncode == 0, why.stderr
    assert "next in" in why.stdout
    assert why.stderr == ""
    differences = run("fiddler-opt", "diff", "encoding-bf16.yaml", "auto.yaml", cwd=tmp_path).stdout
    assert "encoding" in differences
    assert "lossless12" in differences


def test_an_encoding_without_times_is_refused(tmp_path):
    flags = ("--machine", SHIPPED, "--gpu-mem", "24GB", "--encoding")
    assert_refused(
        run("fiddler-opt", "plan", *flags, "lossless12", cwd=tmp_path),
        "--encoding lossless12: the machine profile has no times for it",
    )
    assert_refused(
        run("fiddler-opt", "plan", *flags, "fp16", cwd=tmp_path),
        "--encoding fp16: cannot store mistralai/Mixtral-8x7B-v0.1, whose weights are bfloat16",
    )


def test_whatif_sweeps_the_faster_encoding(planned, tmp_path):
    planned(RATIO)
    flags = ("--machine", "m.yaml", "--gpu-mem", "24GB", "--ram", "60GB/s,90GB/s")
    rows = [
        [line.split()[4] for line in found.stdout.splitlines() if "GB/s │" in line]
        for found in (
            run("fiddler-opt", "whatif", *flags, *more, cwd=tmp_path)
            for more in ((), ("--encoding", "bf16"))
        )
    ]
    assert [len(each) for each in rows] == [2, 2]
    for packed, plain in zip(*rows, strict=True):
        assert float(packed) > 1.3 * float(plain)


def test_times_of_an_encoding_can_be_put_back():
    machine = with_packed(MachineProfile.load(SHIPPED), RATIO)
    packed = machine.in_encoding("lossless12")
    assert packed.shape.expert_bytes == PACKED.expert_bytes
    assert packed.best_host_us[1] == pytest.approx(RATIO * machine.best_host_us[1])
    assert machine.with_encoding(packed) == machine
    assert machine.in_encoding("bf16") == machine
    slower = packed.model_copy(update={"resident_expert_us": {1: 7.0}, "head_us": {1: 9.0}})
    changed = machine.with_encoding(slower)
    assert changed.resident_expert_us == machine.resident_expert_us
    assert changed.encodings["lossless12"].resident_expert_us == {1: 7.0}
    assert changed.head_us == {1: 9.0}


def test_doctor_counts_the_smallest_encoding():
    machine = MachineProfile.load(SHIPPED)
    assert smallest(MODEL, None) == smallest(MODEL, machine) == MODEL
    stored = smallest(MODEL, with_packed(machine, RATIO))
    in_ram = bytes_in_ram(stored, 24 * 10**9)
    assert in_ram < 0.71 * bytes_in_ram(MODEL, 24 * 10**9)
    found = check_ram(stored, in_ram, 64 * 10**9)
    assert found.kind == "ok"
    assert found.what.startswith("Mixtral-8x7B-v0.1, stored as lossless12, needs 49.83 GB")


def test_rates_scale_every_encoding():
    machine = with_packed(MachineProfile.load(SHIPPED), RATIO)
    scaled = with_rates(machine, ram_bytes_per_s=41.6e9)  # half of the profiled rate
    for name in ("bf16", "lossless12"):
        before, after = (each.in_encoding(name).cpu_expert_us[1] for each in (machine, scaled))
        assert after == pytest.approx(2 * before, rel=0.02)
