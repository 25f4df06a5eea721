"""Encodings in machine profiles and plans: the fastest that was timed is chosen."""

import re

import pytest
from command_line import assert_refused, run
from conftest import ROOT
from planning import few_layers

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.machine_parts import EncodedExperts
from fiddler_opt.inputs.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.insight.calibrate import Correction, refitted
from fiddler_opt.insight.doctor import smallest
from fiddler_opt.insight.host_checks import bytes_in_ram, check_ram
from fiddler_opt.insight.scaling import ram_rate, with_rates
from fiddler_opt.units import format_bytes
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan

SHIPPED = ROOT / "profiles/rtx4090.machine.yaml"
PLAIN = MachineProfile.load(SHIPPED).model_copy(update={"encodings": {}})
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


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory) -> str:
    return few_layers(tmp_path_factory.mktemp("model") / "four-layers", 4)


@pytest.fixture
def planned(tmp_path, four_layers):
    """Plans for a machine whose packed experts take `factor` times as long, with further flags."""

    def plan(factor: float, *flags: str, available_bytes: int = 128 * 10**9) -> tuple[Plan, str]:
        memory = PLAIN.memory.model_copy(update={"available_bytes": available_bytes})
        machine = with_packed(PLAIN, factor).model_copy(update={"memory": memory})
        machine.save(tmp_path / "m.yaml")
        file = f"{flags[-1] if flags else 'auto'}.yaml".replace("/", "-")
        sized = () if {"--gpu-mem", "--target"} & {*flags} else ("--gpu-mem", "6GB")
        arguments = ("--machine", "m.yaml", "--model", four_layers, *sized, *flags, "-o", file)
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
    assert packed.rank.num_resident_blocks > 1.25 * plain.rank.num_resident_blocks
    rates = [plan.predicted.decode_tokens_per_s for plan in (packed, plain)]
    assert rates[0] > 1.3 * rates[1]
    host = [plan.rank.host_memory_bytes.experts for plan in (packed, plain)]
    assert host[0] < 0.72 * host[1]
    slow, _ = planned(1.5)
    assert slow.encoding == "bf16"


def test_an_encoding_that_alone_fits_into_ram_is_chosen(planned):
    plain, printed = planned(1.5)
    host = plain.rank.host_memory_bytes
    needed = plain.loading_ram_bytes
    assert needed == host.experts + host.embedding + 8 * MODEL.expert_bytes
    assert (plain.encoding, "of RAM" in printed) == ("bf16", False)
    packed, printed = planned(1.5, available_bytes=needed - 1)
    assert (packed.encoding, "of RAM" in printed) == ("lossless12", False)
    _, printed = planned(1.5, "--encoding", "bf16", available_bytes=needed - 1)
    assert f"loading this plan takes {format_bytes(needed)} of RAM, but according to" in printed
    neither, printed = planned(1.5, available_bytes=packed.loading_ram_bytes - 1)
    assert (neither.encoding, "of RAM" in printed) == ("bf16", True)


def test_plans_of_two_encodings_are_explained_and_compared(planned, tmp_path):
    planned(RATIO)
    planned(RATIO, "--encoding", "bf16")
    why = run("fiddler-opt", "show", "auto.yaml", "--why", cwd=tmp_path)
    assert why.returncode == 0, why.stderr
    assert "next in" in why.stdout
    assert why.stderr == ""
    differences = run("fiddler-opt", "diff", "bf16.yaml", "auto.yaml", cwd=tmp_path).stdout
    assert "encoding" in differences
    assert "lossless12" in differences


def test_an_encoding_without_times_is_refused(tmp_path):
    PLAIN.save(tmp_path / "m.yaml")
    flags = ("--machine", "m.yaml", "--gpu-mem", "24GB", "--encoding")
    assert_refused(
        run("fiddler-opt", "plan", *flags, "lossless12", cwd=tmp_path),
        "--encoding lossless12: the machine profile has no times for it",
    )
    assert_refused(
        run("fiddler-opt", "plan", *flags, "fp16", cwd=tmp_path),
        "--encoding: fp16 cannot store the bfloat16 weights of mistralai/Mixtral-8x7B-v0.1",
    )


def test_whatif_sweeps_the_faster_encoding(planned, tmp_path, four_layers):
    planned(RATIO)
    flags = ("--machine", "m.yaml", "--model", four_layers, "--gpu-mem", "6GB")
    flags += ("--ram", "60GB/s,90GB/s")
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


def test_encodings_of_a_profile_can_be_exchanged():
    machine = with_packed(PLAIN, RATIO)
    packed = machine.in_encoding("lossless12")
    assert packed.shape.expert_bytes == PACKED.expert_bytes
    assert packed.best_host_us[1] == pytest.approx(RATIO * machine.best_host_us[1])
    assert list(packed.encodings) == ["bf16"]
    assert packed.in_encoding("bf16") == machine
    assert machine.in_encoding("bf16") == machine
    assert machine.in_encoding("fp32") == machine


def test_an_encoding_that_alone_reaches_the_speed_is_planned(planned):
    plain, _ = planned(RATIO, "--encoding", "bf16")
    faster = 1.1 * plain.predicted.decode_tokens_per_s
    target, _ = planned(RATIO, "--target", f"{faster:.1f}tok/s")
    assert target.encoding == "lossless12"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bf16", {}, "encodings.bf16: the profile's own tables are in bf16"),
        ("fp32", {}, "encodings.fp32: fp32 is not one of bf16, lossless12"),
        ("lossless12", {"block_neurons": 7}, "block_neurons: 7 is not a multiple of 64"),
        ("lossless12", {"expert_bytes": 1}, "encodings.lossless12.expert_bytes: 1, by the other"),
        ("lossless12", {"resident_expert_us": {2: 1.0}}, "needs entries for 1 token"),
        ("lossless12", {"host_expert_us": {1: {0.5: 1.0}}}, "the share 0.0, the CPU alone"),
    ],
)
def test_impossible_entries_are_refused(name, changes, message):
    machine = with_packed(PLAIN, RATIO)
    experts = machine.encodings["lossless12"].model_copy(update=changes)
    text = machine.model_copy(update={"encodings": {name: experts}}).dump()
    with pytest.raises(FiddlerError, match=re.escape(message)):
        MachineProfile.parse(text, "m.yaml")


def test_doctor_counts_the_smallest_encoding():
    assert smallest(MODEL, None) == smallest(MODEL, PLAIN) == MODEL
    stored = smallest(MODEL, with_packed(PLAIN, RATIO))
    in_ram = bytes_in_ram(stored, 24 * 10**9)
    assert in_ram < 0.71 * bytes_in_ram(MODEL, 24 * 10**9)
    found = check_ram(stored, in_ram, 64 * 10**9)
    assert found.kind == "ok"
    assert found.what.startswith("Mixtral-8x7B-v0.1, stored as lossless12, needs 49.83 GB")


@pytest.mark.parametrize("factor", [RATIO, 1.0])
def test_rates_scale_every_encoding(factor):
    """By the same factor, also one whose kernels do not reach the memory's rate."""
    machine = with_packed(PLAIN, factor)
    same = with_rates(machine, ram_bytes_per_s=ram_rate(machine)).encodings["lossless12"]
    for tokens, row in machine.encodings["lossless12"].host_expert_us.items():
        found = same.host_expert_us[tokens]  # of the ends and the best share alone
        assert found[0.0] == pytest.approx(row[0.0])
        assert min(found.values()) == pytest.approx(min(row.values()), rel=1e-3)
    scaled = with_rates(machine, ram_bytes_per_s=ram_rate(machine) / 2)
    for name in ("bf16", "lossless12"):
        before, after = (each.in_encoding(name).cpu_expert_us[1] for each in (machine, scaled))
        assert after == pytest.approx(2 * before, rel=0.02)


def test_calibration_corrects_every_encoding():
    machine = with_packed(PLAIN, RATIO)
    corrections = [Correction("host", 1, 100.0, 150.0), Correction("resident", 1, 10.0, 20.0)]
    corrected = refitted(machine.in_encoding("lossless12"), corrections, "by hand")
    assert corrected.shape.encoding == "lossless12"
    back = corrected.in_encoding("bf16")
    for name in ("bf16", "lossless12"):
        before, after = (each.in_encoding(name) for each in (machine, back))
        assert after.best_host_us[1] == pytest.approx(1.5 * before.best_host_us[1], rel=1e-3)
        assert after.resident_expert_us[1] == pytest.approx(
            2 * before.resident_expert_us[1], rel=1e-2
        )
