"""`show --why`, `whatif` and `doctor`."""

import json
import random

import pytest
from command_line import assert_refused, run
from conftest import DEMO, ROOT
from planning import few_layers, machine_profile, random_routing, small_model

from fiddler_opt.insight.explain import marginal_values
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.placement import Placement
from fiddler_run.plan.schema import Workload

MACHINE = ROOT / "profiles/rtx4090.machine.yaml"


def test_why_explains_a_plan(tmp_path):
    plan = "plans/rtx4090.yaml"
    result = run("fiddler-opt", "show", plan, "--why", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in (
        "KV cache",
        "where the time goes",
        "experts in host memory",
        "GPU memory is used up",
        "Fiddler",
        "next in",
        "first out",
    ):
        assert words in result.stdout
    assert "where the time goes" not in run("fiddler-opt", "show", plan, cwd=tmp_path).stdout
    text = (ROOT / plan).read_text()
    (tmp_path / "lost.yaml").write_text(
        text.replace("machine: profiles/rtx4090", "machine: profiles/lost")
    )
    lost = run("fiddler-opt", "show", "lost.yaml", "--why", cwd=tmp_path)
    assert lost.returncode == 0
    assert "where the time goes" in lost.stdout
    assert "next in" not in lost.stdout
    assert "lost.machine.yaml: no such file" in lost.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["plans/rtx4090.yaml", "--why", "--machine", "profiles/two-cores.machine.yaml"],
            "not the profile that the plan was made from",
        ),
        (["plans/rtx4090.yaml", "--routing", "x.yaml"], "--machine and --routing need --why"),
        (["profiles/rtx4090.machine.yaml", "--why"], "a machine profile, but --why explains plans"),
    ],
)
def test_why_refuses_other_files_and_lone_flags(flags, words):
    result = run("fiddler-opt", "show", *flags, cwd=ROOT)
    assert result.returncode == 1
    assert words in result.stderr


def test_marginal_values_are_differences_of_the_cost_model():
    model = small_model()
    workload = Workload(prompt_tokens=4, output_tokens=4, num_beams=1, batch_size=1, max_seq_len=64)
    routing = random_routing(model, random.Random(1))
    cost = CostModel.build(model, machine_profile(model), routing, workload, 64)
    found = {
        (each.layer, each.expert): each
        for each in marginal_values(cost, Placement.of([[4, 2, 0, 0], [0, 0, 1, 4]]))
    }
    assert found[0, 0].gain_us is None
    assert found[0, 2].cost_us is None
    step_us = [
        1e6 * cost.decode_step_s(Placement.of([[4, n, 0, 0], [0, 0, 1, 4]])) for n in (1, 2, 3)
    ]
    assert found[0, 1].cost_us == pytest.approx(step_us[0] - step_us[1])
    assert found[0, 1].gain_us == pytest.approx(step_us[1] - step_us[2])


def test_whatif_prints_and_plots_a_sweep(tmp_path):
    four_layers = few_layers(tmp_path / "four-layers", 4)
    flags = ("--machine", MACHINE, "--model", four_layers)
    swept = ("--gpu-mem", "4GB,8GB", "--plot", "curve.png")
    result = run("fiddler-opt", "whatif", *flags, *swept, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "8.00 GB" in result.stdout
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert_refused(run("fiddler-opt", "whatif", *flags, cwd=tmp_path), "--gpu-mem")


@pytest.mark.slow
def test_doctor_refuses_a_model_that_does_not_fit(tmp_path):
    """test_doctor has the case of a model that fits."""
    config = json.loads((DEMO / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 2**20}))
    stopped = run("fiddler-opt", "doctor", "--model", tmp_path, cwd=tmp_path)
    assert stopped.returncode == 1
    assert stopped.stdout.startswith("stops")
    assert "cannot run here" in stopped.stderr
