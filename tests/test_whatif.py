"""`fiddler-opt whatif`: plans over a range of one quantity, and its flags."""

import argparse
import random

import pytest
from planning import machine_profile, random_machine, random_routing, small_model
from rich.console import Console
from seeds import spread

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.insight.scaling import ram_rate, with_gpu_memory
from fiddler_opt.insight.sweep import Row, points, sweep
from fiddler_opt.insight.sweep_flags import WhatIf, add_whatif_flags, parse_whatif
from fiddler_opt.insight.whatif import run_whatif, short
from fiddler_opt.solve.compiler import compile_plan
from fiddler_opt.solve.memory import fixed_memory
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Budget, Workload

PROVENANCE = {
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
NEEDED = fixed_memory(
    MODEL, machine_profile(MODEL), WORKLOAD, 10**9, 256
).used  # everything but experts


MACHINES = [random_machine(random.Random(seed)) for seed in range(6)]


def ascending(*rates: float) -> list[float]:
    return [rate * factor for rate in rates for factor in (0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0, 50.0)]


def solve(machine: MachineProfile, workload: Workload, gpu_bytes: int):
    return compile_plan(MODEL, machine, ROUTING, workload, Budget(gpu_bytes=gpu_bytes), PROVENANCE)


def rows_of(machine: MachineProfile, asked: WhatIf, model: ModelSpec = MODEL) -> list[Row]:
    return sweep(points(asked, machine, WORKLOAD), model, solve)


@pytest.mark.parametrize("swept", spread(["gpu_mem", "link", "ram"], 2))
def test_more_of_any_resource_never_predicts_slower(swept):
    for machine in MACHINES[:6]:
        given = {"gpu_mem": NEEDED + 4 * MODEL.expert_bytes}
        values = {
            "gpu_mem": range(NEEDED, NEEDED + 8 * MODEL.expert_bytes, MODEL.expert_bytes),
            "link": map(round, ascending(machine.h2d_bytes_per_s)),
            "ram": map(round, ascending(ram_rate(machine))),
        }[swept]
        rows = rows_of(machine, WhatIf(swept, list(values), given))
        predictions = [row.plan.predicted for row in rows]
        seconds = [
            each.ttft_s + (WORKLOAD.output_tokens - 1) / each.decode_tokens_per_s
            for each in predictions
        ]
        assert all(
            later <= earlier * 1.001 for earlier, later in zip(seconds, seconds[1:], strict=False)
        ), seconds
        assert seconds[-1] < 0.95 * seconds[0]


def test_gpu_memory_may_exceed_the_profiled_gpu():
    machine = with_gpu_memory(MACHINES[0], 1)
    machine = machine.model_copy(
        update={"device": machine.device.model_copy(update={"memory_bytes": NEEDED})}
    )
    asked = WhatIf("gpu_mem", [NEEDED, 4 * NEEDED], {})
    assert [row.plan.rank.num_resident_blocks for row in rows_of(machine, asked)][-1] == 32
    assert with_gpu_memory(machine, 10).device == machine.device


def test_sweep_of_gpu_memory_needs_a_gpu():
    machine = machine_profile(MODEL, kind="cpu")
    with pytest.raises(FiddlerError, match="--gpu-mem: the machine profile has no GPU"):
        points(WhatIf("gpu_mem", [1, 2], {}), machine, WORKLOAD)
    assert [
        point.gpu_total_bytes
        for point in points(WhatIf("ram", [10**9, 10**10], {}), machine, WORKLOAD)
    ] == [0, 0]


def test_points_that_do_not_fit_are_rows():
    machine = MACHINES[0]
    small, large = rows_of(machine, WhatIf("gpu_mem", [10**6, 6 * 10**8], {}))
    assert small.plan is None
    assert short(small.problem).endswith("MB is needed before any expert")
    assert large.plan is not None
    assert [
        short(row.problem) for row in rows_of(machine, WhatIf("max_seq_len", [128, 150, 512], {}))
    ] == [
        "prompt and output take 150 tokens, the context has 128",
        "",
        "the model's context ends at 256 tokens",
    ]


def printed(machine: MachineProfile, asked: WhatIf, plot_file: str | None = None) -> str:
    tables = Console(width=120, highlight=False, markup=False)
    with tables.capture() as capture:
        run_whatif(asked, MODEL, machine, WORKLOAD, solve, plot_file, tables)
    return capture.get()


def test_sweep_is_printed_and_plotted(tmp_path):
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
            line = next(
                line
                for line in text.splitlines()
                if line.startswith("│") and line.split()[1] in row.point.label.split()
            )
            assert row.point.label in line
            words = (
                short(row.problem)
                if row.plan is None
                else f"{row.plan.predicted.decode_tokens_per_s:.2f}"
            )
            assert words in line
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000
    with pytest.raises(
        FiddlerError,
        match="no value of --gpu-mem has a plan: .* is needed before any expert",
    ):
        printed(machine, WhatIf("gpu_mem", [10**6, 10**7], {}))


def parse(line: str) -> WhatIf:
    parser = argparse.ArgumentParser()
    add_whatif_flags(parser)
    return parse_whatif(parser.parse_args(line.split()))


def test_a_network_is_for_ranks():
    assert parse("--ranks 1,2 --network 1ms,1GB/s").network == "1ms,1GB/s"
    with pytest.raises(FiddlerError, match="--network is between ranks; add --ranks"):
        parse("--gpu-mem 8GB,24GB --network 1ms,1GB/s")


def test_flags_are_parsed():
    assert parse("--gpu-mem 8GB,24GB,16GB --beams 2") == WhatIf(
        "gpu_mem", [8 * 10**9, 16 * 10**9, 24 * 10**9], {"num_beams": 2}
    )
    asked = parse("--context 2048..32768 --link 25GB/s --prompt-tokens 1000")
    assert asked == WhatIf(
        "max_seq_len",
        [2048, 4096, 8192, 12288, 16384, 20480, 24576, 28672, 32768],
        {"link": 25 * 10**9, "prompt_tokens": 1000},
    )
    workload = asked.workload_values()
    assert workload == {
        "prompt_tokens": 1000,
        "output_tokens": None,
        "num_beams": None,
        "batch_size": None,
        "max_seq_len": 32768,
    }
    assert parse("--prompt-tokens 10,20").workload_values()["prompt_tokens"] == 10


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "nothing to vary; give one of --gpu-mem, --link, .* several values"),
        ("--gpu-mem 8GB --beams 2", "nothing to vary"),
        (
            "--gpu-mem 8GB,9GB --beams 1..4",
            "--gpu-mem and --beams have several values each; vary one at a time",
        ),
        ("--gpu-mem 8..48GB", "--gpu-mem 8: a size needs a unit"),
        ("--gpu-mem 48GB..8GB", "a range goes from a smaller to a larger value"),
        ("--link 12GB,25GB", "--link 12GB: not a rate; write for example 25GB/s"),
        ("--ram 0GB/s,1GB/s", "--ram 0GB/s: must be more than zero"),
        ("--beams 0,1", "--beams 0: must be more than zero"),
        ("--context 1.5,2", "--context 1.5: not a whole number"),
        ("--batch-size 1..2,3", "give either a list, A,B,C, or a range, A..B"),
    ],
)
def test_bad_flags_are_refused(line, words):
    with pytest.raises(FiddlerError, match=words):
        parse(line)
