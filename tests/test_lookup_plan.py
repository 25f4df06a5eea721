"""What plans say about prompt lookup."""

import shutil
from pathlib import Path

import pytest
from command_line import run
from conftest import DEMO, ROOT
from damage import change_json
from planning import few_layers

from fiddler_opt.insight.explain import marginal_values
from fiddler_opt.insight.lookup import BreakEven, break_even
from fiddler_opt.insight.sources import sources
from fiddler_opt.solve.placement import placement_of
from fiddler_run.plan.schema import Plan

PLAN = ROOT / "plans/rtx4090.yaml"


def test_break_even_is_the_number_of_distinct_experts():
    """Host memory sets the pace: a pass takes as long as the experts that it calls, of 8."""
    plan = Plan.load(PLAN)
    problem, routing = sources(plan, PLAN, None, None)
    found = break_even(problem, routing, placement_of(plan))
    assert found.tokens == 17
    called = 8 * (1 - (1 - 2 / 8) ** 17)
    assert found.steps == pytest.approx(called / 2, rel=0.1)


def test_why_states_the_break_even_of_one_sequence(tmp_path):
    shown = run("fiddler-opt", "show", PLAN, "--why", cwd=ROOT)
    assert "prompt lookup: a pass of 17 tokens takes 3." in shown.stdout
    assert "--lookup pays if it yields more than 3." in shown.stdout
    model = few_layers(tmp_path / "model", 2)
    flags = ("--machine", ROOT / "profiles/rtx4090.machine.yaml", "--gpu-mem", "6GB")
    several = ("--batch-size", "2", "--max-seq-len", "1024", "-o", "p.yaml")
    planned = run("fiddler-opt", "plan", "--model", model, *flags, *several, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    shown = run("fiddler-opt", "show", "p.yaml", "--why", cwd=tmp_path)
    assert "next in" in shown.stdout
    assert "lookup" not in shown.stdout


def test_a_model_that_has_changed_since_is_named(tmp_path):
    model = few_layers(tmp_path / "model", 2)
    flags = ("--machine", ROOT / "profiles/rtx4090.machine.yaml", "--gpu-mem", "6GB")
    planned = run("fiddler-opt", "plan", "--model", model, *flags, "-o", "p.yaml", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    change_json(tmp_path / "model/config.json", num_hidden_layers=3)
    shown = run("fiddler-opt", "show", "p.yaml", "--why", cwd=tmp_path)
    assert "p.yaml: model.num_layers is 2, but" in shown.stderr
    assert "next in" not in shown.stdout


def test_a_baseline_is_explained_by_its_own_rule(tmp_path):
    """With `stream`, a block in GPU memory saves its time on the link, not on the CPU."""
    machine = ROOT / "profiles/rtx4090.machine.yaml"
    flags = ("--model", few_layers(tmp_path / "model", 2), "--machine", machine, "--gpu-mem", "6GB")
    words = (*flags, "--encoding", "bf16", "--baseline", "stream", "-o", "p.yaml")
    planned = run("fiddler-opt", "plan", *words, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    plan = Plan.load(tmp_path / "p.yaml")
    problem, routing = sources(plan, tmp_path / "p.yaml", None, None)
    placement = placement_of(plan)
    by_link = marginal_values(problem.cost(routing, "link"), placement)
    assert by_link != marginal_values(problem.cost(routing), placement)
    shown = run("fiddler-opt", "show", "p.yaml", "--why", cwd=tmp_path).stdout
    largest = max(each.gain_us for each in by_link if each.gain_us is not None)
    assert f"{largest:.2f} us" in shown
    assert break_even(problem, routing, placement, "link").words in shown


def test_a_routing_profile_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "profiles/tiny-mixtral.routing.yaml", tmp_path / "uniform.routing.yaml")
    flags = ("--machine", ROOT / "profiles/rtx4090.machine.yaml", "--gpu-mem", "2GB")
    named = ("--model", DEMO, "--routing", "uniform.routing.yaml", "-o", "p.yaml")
    planned = run("fiddler-opt", "plan", *named, *flags, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "uniform routing assumed" not in planned.stderr
    routing = sources(Plan.load("p.yaml"), Path("p.yaml"), None, None)[1]
    assert len({value for row in routing.decode.expert for value in row}) > 8


def test_passes_that_take_as_long_as_their_tokens_cannot_pay():
    assert BreakEven(3, 3.2).words == (
        "prompt lookup: a pass of 3 tokens takes 3.2 decode steps; --lookup cannot pay"
    )
