"""Profiles scaled to other links and RAM."""

import random
import sys

import pytest
from conftest import ROOT
from planning import machine_profile, random_machine, small_model

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.insight.scaling import memory_rate, ram_rate, with_rates
from fiddler_run.errors import FiddlerError

MODEL = small_model()


@pytest.fixture(scope="module")
def rtx4090() -> MachineProfile:
    return MachineProfile.load(ROOT / "profiles" / "rtx4090.machine.yaml")


def with_link(machine: MachineProfile, bytes_per_s: float) -> MachineProfile:
    return with_rates(machine, link_bytes_per_s=bytes_per_s)


def with_ram(machine: MachineProfile, bytes_per_s: float) -> MachineProfile:
    return with_rates(machine, ram_bytes_per_s=bytes_per_s)


MACHINES = [random_machine(random.Random(seed)) for seed in range(60)]


def ascending(*rates: float) -> list[float]:
    return [rate * factor for rate in rates for factor in (0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0, 50.0)]


def test_profiled_rates_reproduce_the_profile(rtx4090):
    for machine in (rtx4090, *MACHINES):
        for same in (
            with_link(machine, machine.link.h2d_bytes_per_s),
            with_ram(machine, ram_rate(machine)),
            with_rates(machine, machine.link.h2d_bytes_per_s, ram_rate(machine)),
        ):
            assert same.best_host_us == pytest.approx(machine.best_host_us, rel=1e-6)
            assert same.cpu_expert_us == pytest.approx(machine.cpu_expert_us, rel=1e-6)
            assert same.stream_share == pytest.approx(machine.stream_share, abs=1e-3)
            assert same.h2d_bytes_per_s == pytest.approx(machine.h2d_bytes_per_s)


def test_faster_link_or_ram_makes_nothing_slower(rtx4090):
    for machine in (rtx4090, *MACHINES):
        for scale, rate in (
            (with_link, machine.link.h2d_bytes_per_s),
            (with_ram, ram_rate(machine)),
        ):
            scaled = [scale(machine, r) for r in ascending(rate)]
            for slower, quicker in zip(scaled, scaled[1:], strict=False):
                for tokens, us in quicker.best_host_us.items():
                    assert us <= slower.best_host_us[tokens] * (1 + 1e-6)
                for tokens, us in quicker.cpu_expert_us.items():
                    assert us <= slower.cpu_expert_us[tokens] * (1 + 1e-6)


def test_scaled_profile_is_valid(rtx4090):
    for machine in (rtx4090, *MACHINES[:10]):
        for rates in ((1e3, None), (None, 1e3), (1e15, 1e15)):
            scaled = with_rates(machine, *rates)
            assert MachineProfile.parse(scaled.dump(), "scaled") == scaled
            assert scaled.cpu_expert_us.keys() == machine.cpu_expert_us.keys()


def test_faster_link_does_not_help_where_memory_is_the_limit(rtx4090):
    limited = [machine for machine in (rtx4090, *MACHINES) if memory_rate(machine)]
    assert 15 < len(limited) < len(MACHINES) - 5
    for machine in limited:
        best = machine.best_host_us
        tokens = min(best, key=best.get)
        for factor in (1.5, 4, 100):
            faster_link = with_link(machine, factor * machine.h2d_bytes_per_s)
            assert faster_link.best_host_us[tokens] == pytest.approx(best[tokens], rel=1e-6)
            # nor does any number of tokens exceed the memory's rate
            assert min(faster_link.best_host_us.values()) >= best[tokens] * (1 - 1e-6)
        both = with_rates(machine, 100 * machine.h2d_bytes_per_s, 1.3 * ram_rate(machine))
        assert min(both.best_host_us.values()) == pytest.approx(best[tokens] / 1.3, rel=1e-6)
    for machine in MACHINES:
        if machine not in limited and 1.0 in machine.host_expert_us[1]:
            assert (
                with_link(machine, 2 * machine.h2d_bytes_per_s).best_host_us[1]
                < machine.best_host_us[1]
            )


def test_scaled_times_by_hand():
    """At one token memory is the limit, at 64 tokens the CPU's arithmetic.

    At one token the CPU takes 4000 us and the link 6000. Together they would take 2400 us without
    the limit; 3000 were measured. At 64 tokens the CPU takes 16000 us, both together 4364.
    """
    machine = machine_profile(MODEL, device=100.0)
    link = machine.link.model_copy(update={"h2d_bytes_per_s": MODEL.expert_bytes / 6e-3})
    host = {
        1: {0.0: 4000.0, 0.35: 3000.0, 1.0: 6000.0},
        64: {0.0: 16000.0, 0.727: 48000 / 11, 1.0: 6000.0},
    }
    machine = machine.model_copy(
        update={"host_expert_us": host, "link": link, "resident_expert_us": {1: 100.0, 64: 100.0}}
    )

    faster_link = with_link(machine, 1.5 * machine.h2d_bytes_per_s)
    assert faster_link.host_expert_us[1] == {0.0: 4000.0, 0.35: 3000.0, 1.0: 4000.0}
    assert faster_link.host_expert_us[64] == {0.0: 16000.0, 0.8: 3200.0, 1.0: 4000.0}
    twice_link = with_link(machine, 2 * machine.h2d_bytes_per_s)
    # 16000 * 3000 / 19000 would exceed the memory's rate
    assert twice_link.best_host_us == {
        1: 3000.0,
        64: 3000.0,
    }
    twice_ram = with_ram(machine, 2 * ram_rate(machine))
    assert twice_ram.cpu_expert_us == {1: 2000.0, 64: 16000.0}
    # 2000 * 6000 / 8000, and 3000 / 2
    assert twice_ram.host_expert_us[1] == {
        0.0: 2000.0,
        0.25: 1500.0,
        1.0: 6000.0,
    }
    assert twice_ram.best_host_us[64] == 4363.636
    half_link = with_link(machine, machine.h2d_bytes_per_s / 2)
    # 4000 * 12000 / 16000: the balance equals the memory's limit
    assert half_link.best_host_us[1] == 3000.0
    assert half_link.stream_share[1] == 0.25


def test_scaling_matches_data_sheets_of_other_hardware(rtx4090, monkeypatch):
    """A data sheet's profile is a roofline, which its script also gives for another link or RAM."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "profiles"), *sys.path])
    import data_sheet

    for name, scale, rates in (
        ("LINK_BYTES_PER_S", with_link, (4e9, 16e9, 28e9, 50e9, 63e9)),
        ("HOST_BYTES_PER_S", with_ram, (40e9, 60e9, 100e9, 160e9, 400e9)),
    ):
        for rate in rates:
            with monkeypatch.context() as other:
                other.setattr(data_sheet, name, rate)
                expected = data_sheet.data_sheet_profile()
            scaled = scale(rtx4090, rate)
            assert scaled.best_host_us == pytest.approx(expected.best_host_us, rel=1e-3)
            assert scaled.cpu_expert_us == pytest.approx(expected.cpu_expert_us, rel=1e-3)
            for tokens, share in scaled.stream_share.items():
                cpu = expected.host_expert_us[tokens][0.0]
                link = expected.host_expert_us[tokens][1.0]
                best = scaled.best_host_us[tokens]
                assert max((1 - share) * cpu, share * link) <= best * 1.01


def test_without_a_gpu_only_ram_can_be_scaled():
    machine = machine_profile(MODEL, kind="cpu")
    assert with_ram(machine, ram_rate(machine) / 2).best_host_us == {1: 160.0, 8: 160.0}
    assert with_ram(machine, ram_rate(machine) / 2).resident_expert_us == pytest.approx(
        {1: 20.0, 8: 20.0}
    )
    with pytest.raises(FiddlerError, match="--link: the machine profile has no GPU"):
        with_link(machine, 1e9)
