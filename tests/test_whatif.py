"""What-if: profiles scaled to other links and RAM, curves of whole plans over one quantity, and the flags that ask for them."""

import argparse
import random
import sys

import pytest
from conftest import ROOT
from planning import machine_profile, random_routing, small_model
from rich.console import Console

from fiddler_opt.compiler import compile_plan
from fiddler_opt.machine import MachineProfile
from fiddler_opt.memory import fixed_memory
from fiddler_opt.model import ModelSpec
from fiddler_opt.problem import Budget
from fiddler_opt.scaling import memory_rate, ram_rate, with_gpu_memory, with_link, with_ram, with_rates
from fiddler_opt.sweep_flags import WhatIf, add_whatif_flags, parse_whatif
from fiddler_opt.whatif import Row, points, run_whatif, short, sweep
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Workload

MADE = {
    "command": "test",
    "machine": "test",
    "machine_sha256": "",
    "machine_source": "measured",
    "routing": "random",
    "created": "2026-01-01",
}
WORKLOAD = Workload(prompt_tokens=100, output_tokens=50, num_beams=1, batch_size=1, max_seq_len=256)
MODEL = small_model()
ROUTING = random_routing(MODEL, random.Random(1))
NEEDED = fixed_memory(MODEL, machine_profile(MODEL), WORKLOAD, 10**9, 256).used  # all that is not experts


@pytest.fixture(scope="module")
def rtx4090() -> MachineProfile:
    return MachineProfile.load(ROOT / "profiles" / "rtx4090.machine.yaml")


def random_machine(rng: random.Random) -> MachineProfile:
    """A roofline with overheads and noise, in milliseconds; its memory may or may not limit CPU and link together."""
    alone, copy, on_device = rng.uniform(2e3, 8e3), rng.uniform(1e3, 2e4), rng.uniform(20, 200)
    memory, arithmetic = rng.choice([0.0, rng.uniform(0.5, 1.0)]) * alone, alone / rng.uniform(5, 100)
    absent, device = {}, {}
    for tokens in (1, 2, 8, 32, 128, 512):
        cpu, gpu = max(alone, arithmetic * tokens), on_device * max(1, tokens / 64)
        link = max(copy, gpu, memory)
        best = max(memory, cpu * link / (cpu + link)) * rng.uniform(1, 1.2)
        share = round(cpu / (cpu + link), 2)
        absent[tokens] = {1.0: link, share: best, 0.0: cpu, round(share / 2, 3): best * 1.1}
        absent[tokens] = {share: us * rng.uniform(0.97, 1.03) for share, us in absent[tokens].items()}
        if tokens == 512:
            del absent[tokens][rng.choice([0.0, 1.0])]
        device[tokens] = gpu
    machine = machine_profile(MODEL, dense=150.0)
    link = machine.link.model_copy(update={"h2d_bytes_per_s": MODEL.expert_bytes / copy * 1e6})
    return machine.model_copy(update={"absent_expert_us": absent, "device_expert_us": device, "link": link})


MACHINES = [random_machine(random.Random(seed)) for seed in range(60)]


def faster(*rates: float) -> list[float]:
    return [rate * factor for rate in rates for factor in (0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0, 50.0)]


def test_the_profiled_rates_give_the_profile_back(rtx4090):
    for machine in (rtx4090, *MACHINES):
        for same in (
            with_link(machine, machine.link.h2d_bytes_per_s),
            with_ram(machine, ram_rate(machine)),
            with_rates(machine, machine.link.h2d_bytes_per_s, ram_rate(machine)),
        ):
            assert same.best_absent_us == pytest.approx(machine.best_absent_us, rel=1e-6)
            assert same.cpu_expert_us == pytest.approx(machine.cpu_expert_us, rel=1e-6)
            assert same.stream_share == pytest.approx(machine.stream_share, abs=1e-3)
            assert same.h2d_bytes_per_s == pytest.approx(machine.h2d_bytes_per_s)


def test_a_faster_link_or_ram_makes_nothing_slower(rtx4090):
    for machine in (rtx4090, *MACHINES):
        for scale, rate in ((with_link, machine.link.h2d_bytes_per_s), (with_ram, ram_rate(machine))):
            scaled = [scale(machine, r) for r in faster(rate)]
            for slower, quicker in zip(scaled, scaled[1:], strict=False):
                for tokens, us in quicker.best_absent_us.items():
                    assert us <= slower.best_absent_us[tokens] * (1 + 1e-6)
                for tokens, us in quicker.cpu_expert_us.items():
                    assert us <= slower.cpu_expert_us[tokens] * (1 + 1e-6)


def test_a_scaled_profile_is_a_profile(rtx4090):
    for machine in (rtx4090, *MACHINES[:10]):
        for rates in ((1e3, None), (None, 1e3), (1e15, 1e15)):
            scaled = with_rates(machine, *rates)
            assert MachineProfile.parse(scaled.dump(), "scaled") == scaled
            assert scaled.cpu_expert_us.keys() == machine.cpu_expert_us.keys()


def test_the_link_brings_nothing_where_the_memory_is_the_limit(rtx4090):
    limited = [machine for machine in (rtx4090, *MACHINES) if memory_rate(machine)]
    assert 15 < len(limited) < len(MACHINES) - 5
    for machine in limited:
        best = machine.best_absent_us
        tokens = min(best, key=best.get)
        for factor in (1.5, 4, 100):
            faster_link = with_link(machine, factor * machine.h2d_bytes_per_s)
            assert faster_link.best_absent_us[tokens] == pytest.approx(best[tokens], rel=1e-6)
            assert min(faster_link.best_absent_us.values()) >= best[tokens] * (1 - 1e-6)  # nor anywhere more than the memory gives
        both = with_rates(machine, 100 * machine.h2d_bytes_per_s, 1.3 * ram_rate(machine))
        assert min(both.best_absent_us.values()) == pytest.approx(best[tokens] / 1.3, rel=1e-6)
    for machine in MACHINES:
        if machine not in limited and 1.0 in machine.absent_expert_us[1]:
            assert with_link(machine, 2 * machine.h2d_bytes_per_s).best_absent_us[1] < machine.best_absent_us[1]


def test_by_hand():
    """CPU 4000 us, link 6000: 2400 together if nothing limited them, but 3000 were measured. At 64 tokens the CPU is bound by
    arithmetic: 16000 us, with the link 4364."""
    machine = machine_profile(MODEL, device=100.0)
    link = machine.link.model_copy(update={"h2d_bytes_per_s": MODEL.expert_bytes / 6e-3})
    absent = {1: {0.0: 4000.0, 0.35: 3000.0, 1.0: 6000.0}, 64: {0.0: 16000.0, 0.727: 48000 / 11, 1.0: 6000.0}}
    machine = machine.model_copy(update={"absent_expert_us": absent, "link": link, "device_expert_us": {1: 100.0, 64: 100.0}})

    faster_link = with_link(machine, 1.5 * machine.h2d_bytes_per_s)
    assert faster_link.absent_expert_us[1] == {0.0: 4000.0, 0.35: 3000.0, 1.0: 4000.0}
    assert faster_link.absent_expert_us[64] == {0.0: 16000.0, 0.8: 3200.0, 1.0: 4000.0}
    twice_link = with_link(machine, 2 * machine.h2d_bytes_per_s)
    assert twice_link.best_absent_us == {1: 3000.0, 64: 3000.0}  # 16000 * 3000 / 19000 would be more than the memory gives
    twice_ram = with_ram(machine, 2 * ram_rate(machine))
    assert twice_ram.cpu_expert_us == {1: 2000.0, 64: 16000.0}
    assert twice_ram.absent_expert_us[1] == {0.0: 2000.0, 0.25: 1500.0, 1.0: 6000.0}  # 2000 * 6000 / 8000, and 3000 / 2
    assert twice_ram.best_absent_us[64] == 4363.636
    half_link = with_link(machine, machine.h2d_bytes_per_s / 2)
    assert half_link.best_absent_us[1] == 3000.0  # 4000 * 12000 / 16000: the balance, just as the memory
    assert half_link.stream_share[1] == 0.25


def test_against_data_sheets_of_other_hardware(rtx4090, monkeypatch):
    """A data sheet's profile is a roofline; scaling must give what its script gives for the other link or RAM."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "profiles"), *sys.path])
    import data_sheet

    for name, scale, rates in (
        ("LINK_BYTES_PER_S", with_link, (4e9, 16e9, 28e9, 50e9, 63e9)),
        ("HOST_BYTES_PER_S", with_ram, (40e9, 60e9, 100e9, 160e9, 400e9)),
    ):
        for rate in rates:
            with monkeypatch.context() as other:
                other.setattr(data_sheet, name, rate)
                told = data_sheet.data_sheet_profile()
            scaled = scale(rtx4090, rate)
            assert scaled.best_absent_us == pytest.approx(told.best_absent_us, rel=1e-3)
            assert scaled.cpu_expert_us == pytest.approx(told.cpu_expert_us, rel=1e-3)
            for tokens, share in scaled.stream_share.items():
                cpu, link, best = (
                    told.absent_expert_us[tokens][0.0],
                    told.absent_expert_us[tokens][1.0],
                    scaled.best_absent_us[tokens],
                )
                assert max((1 - share) * cpu, share * link) <= best * 1.01


def test_without_a_gpu():
    machine = machine_profile(MODEL, kind="host")
    assert with_ram(machine, ram_rate(machine) / 2).best_absent_us == {1: 160.0, 8: 160.0}
    assert with_ram(machine, ram_rate(machine) / 2).device_expert_us == pytest.approx({1: 20.0, 8: 20.0})
    with pytest.raises(FiddlerError, match="--link: the machine profile has no GPU"):
        with_link(machine, 1e9)
    with pytest.raises(FiddlerError, match="--gpu-mem: the machine profile has no GPU"):
        points(WhatIf("gpu_mem", [1, 2], {}), machine, WORKLOAD)
    assert [point.gpu_total_bytes for point in points(WhatIf("ram", [10**9, 10**10], {}), machine, WORKLOAD)] == [0, 0]


def solve(machine: MachineProfile, workload: Workload, gpu_bytes: int):
    return compile_plan(MODEL, machine, ROUTING, workload, Budget(gpu_bytes), MADE)


def rows_of(machine: MachineProfile, asked: WhatIf, model: ModelSpec = MODEL) -> list[Row]:
    return sweep(points(asked, machine, WORKLOAD), model, solve)


@pytest.mark.parametrize("swept", ["gpu_mem", "link", "ram"])
def test_more_of_anything_predicts_no_slower_plan(swept):
    for machine in MACHINES[:6]:
        given = {"gpu_mem": NEEDED + 4 * MODEL.expert_bytes}
        values = {
            "gpu_mem": range(NEEDED, NEEDED + 8 * MODEL.expert_bytes, MODEL.expert_bytes),
            "link": map(round, faster(machine.h2d_bytes_per_s)),
            "ram": map(round, faster(ram_rate(machine))),
        }[swept]
        rows = rows_of(machine, WhatIf(swept, list(values), given))
        told = [row.plan.predicted for row in rows]
        seconds = [each.ttft_s + (WORKLOAD.output_tokens - 1) / each.decode_tokens_per_s for each in told]
        assert all(later <= earlier * 1.001 for earlier, later in zip(seconds, seconds[1:], strict=False)), seconds
        assert seconds[-1] < 0.95 * seconds[0]


def test_a_larger_gpu_than_the_profiled_one():
    machine = with_gpu_memory(MACHINES[0], 1)
    machine = machine.model_copy(update={"device": machine.device.model_copy(update={"memory_bytes": NEEDED})})
    asked = WhatIf("gpu_mem", [NEEDED, 4 * NEEDED], {})
    assert [row.plan.num_resident_blocks for row in rows_of(machine, asked)][-1] == 32
    assert with_gpu_memory(machine, 10).device == machine.device


def test_what_does_not_fit_is_a_row():
    machine = MACHINES[0]
    small, large = rows_of(machine, WhatIf("gpu_mem", [10**6, 6 * 10**8], {}))
    assert small.plan is None
    assert short(small.problem).endswith("MB are needed before any expert")
    assert large.plan is not None
    assert [short(row.problem) for row in rows_of(machine, WhatIf("max_seq_len", [128, 150, 512], {}))] == [
        "prompt and output take 150 tokens, the context has 128",
        "",
        "the model's context ends at 256 tokens",
    ]


def printed(machine: MachineProfile, asked: WhatIf, plot_file: str | None = None) -> str:
    tables = Console(width=120, highlight=False, markup=False)
    with tables.capture() as capture:
        run_whatif(asked, MODEL, machine, WORKLOAD, solve, plot_file, tables)
    return capture.get()


def test_table_and_picture(tmp_path):
    machine = MACHINES[0]
    for number, asked in enumerate(
        (
            WhatIf("gpu_mem", [10**6, NEEDED, 10**8], {}),
            WhatIf("link", [5 * 10**6, 10**7], {"gpu_mem": NEEDED, "ram": 10**7}),
            WhatIf("num_beams", [1, 2], {}),
        )
    ):
        picture = tmp_path / "new" / f"{number}.png"
        text = printed(machine, asked, str(picture))
        assert "assumed: " in text
        for row in rows_of(machine, asked):
            line = next(line for line in text.splitlines() if line.startswith("│") and line.split()[1] in row.point.label.split())
            assert row.point.label in line
            words = short(row.problem) if row.plan is None else f"{row.plan.predicted.decode_tokens_per_s:.2f}"
            assert words in line
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000
    with pytest.raises(FiddlerError, match="there is a plan for no value of --gpu-mem: .* are needed before any expert"):
        printed(machine, WhatIf("gpu_mem", [10**6, 10**7], {}))


def parse(line: str) -> WhatIf:
    parser = argparse.ArgumentParser()
    add_whatif_flags(parser)
    return parse_whatif(parser.parse_args(line.split()))


def test_flags():
    assert parse("--gpu-mem 8GB,24GB,16GB --beams 2") == WhatIf("gpu_mem", [8 * 10**9, 16 * 10**9, 24 * 10**9], {"num_beams": 2})
    asked = parse("--context 2048..32768 --link 25GB/s --prompt-tokens 1000")
    assert asked == WhatIf(
        "max_seq_len",
        [2048, 4096, 8192, 12288, 16384, 20480, 24576, 28672, 32768],
        {"link": 25 * 10**9, "prompt_tokens": 1000},
    )
    workload = vars(asked.workload_flags())
    assert workload == {"prompt_tokens": 1000, "output_tokens": None, "num_beams": None, "batch_size": None, "max_seq_len": 32768}
    assert parse("--prompt-tokens 10,20").workload_flags().prompt_tokens == 10


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "nothing to vary; give one of --gpu-mem, --link, .* several values"),
        ("--gpu-mem 8GB --beams 2", "nothing to vary"),
        ("--gpu-mem 8GB,9GB --beams 1..4", "--gpu-mem and --beams have several values each; vary one at a time"),
        ("--gpu-mem 8..48GB", "--gpu-mem 8: a size needs a unit"),
        ("--gpu-mem 48GB..8GB", "a range goes from a smaller to a larger value"),
        ("--link 12GB,25GB", "--link 12GB: not a rate; write for example 25GB/s"),
        ("--ram 0GB/s,1GB/s", "--ram 0GB/s: must be more than zero"),
        ("--beams 0,1", "--beams 0: must be more than zero"),
        ("--context 1.5,2", "--context 1.5: not a whole number"),
        ("--batch-size 1..2,3", "give either a list, A,B,C, or a range, A..B"),
    ],
)
def test_refuses(line, words):
    with pytest.raises(FiddlerError, match=words):
        parse(line)
