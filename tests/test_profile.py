"""`fiddler-opt profile`: resuming, sets of prompts, and busy machines."""

import json
import subprocess
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from command_line import files_in, run, started
from conftest import DEMO, ROOT

from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import RoutingProfile
from fiddler_opt.measure import machine, quiet, settings
from fiddler_opt.measure.machine import MachineBench
from fiddler_opt.measure.quiet import undisturbed
from fiddler_opt.measure.routing import RoutingTrace
from fiddler_opt.measure.settings import QUICK, THOROUGH
from fiddler_opt.measure.unfinished import Unfinished
from fiddler_run.errors import FiddlerError
from fiddler_run.system.host import num_cores

HASTY = replace(QUICK, tokens=(1, 64), dense_tokens=(1, 64), seconds=0.02, memory_fraction=0.005)
UNFINISHED = Path("profiles/.local.machine.yaml.unfinished")

pytestmark = pytest.mark.xdist_group("profile")  # tests that time this machine


@pytest.fixture(scope="module")
def demo() -> ModelSpec:
    return ModelSpec.load(str(DEMO))


def test_bench_frees_its_memory(demo):
    """The model that is loaded next may need these gigabytes."""
    bench = MachineBench(demo, QUICK, None)
    assert list(bench.parts)[:3] == ["host", "device", "threads"]
    experts = bench._experts
    alive = weakref.ref(bench)
    arenas = [weakref.ref(each.arena) for each in experts.values()]
    assert list(experts) == list(bench.models)
    del bench, experts
    assert alive() is None
    assert [arena() for arena in arenas] == [None] * len(arenas)


def test_all_ranks_agree_on_the_shares(demo):
    """On the ends, and then on what is missing: without a GPU, nothing."""
    bench = MachineBench(demo, HASTY, None)
    bench.found["threads"] = {"threads": 1, "pinned": False, "page_locked": False}
    asked = []
    bench.agree = lambda shares: asked.append(shares) or shares
    found = bench.parts["experts, 1 tokens, round 1"]()
    assert asked == [[0.0], []]
    assert list(found["host_expert_us"]) == [0.0]


def test_resuming_is_refused_if_page_locking_has_changed(demo):
    """Parts timed with page-locked memory do not go with parts timed without."""
    bench = MachineBench(demo, QUICK, None)
    bench.found["threads"] = {"threads": 1, "pinned": False, "page_locked": True}
    with pytest.raises(
        FiddlerError,
        match="could be page-locked before, but cannot be now: delete the",
    ):
        bench.parts["experts, 1 tokens, round 1"]()


def test_sets_of_prompts_and_their_trace_are_recorded(tmp_path):
    """`--plan` needs no machine profile; trace and routing profile have the same counts."""
    (tmp_path / "stories.txt").write_text(
        "Once upon a time\nThe sun was warm. Pip went for a walk\n"
    )
    (tmp_path / "code.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "def count(n):"}]}) + "\n"
    )
    flags = (
        "--only",
        "routing",
        "--plan",
        ROOT / "plans/demo.yaml",
        "--trace",
        "trace.npz",
        "--output-tokens",
        "5",
    )
    result = run(
        "fiddler-opt",
        "profile",
        "--model",
        DEMO,
        "--prompts",
        "stories.txt",
        "code.jsonl",
        *flags,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["profiles/tiny-mixtral.routing.yaml"]
    profile = RoutingProfile.load(tmp_path / "profiles/tiny-mixtral.routing.yaml")
    assert {name: part.prompts for name, part in profile.sets.items()} == {
        "stories.txt": 2,
        "code.jsonl": 1,
    }
    assert {name: part.decode.tokens for name, part in profile.sets.items()} == {
        "stories.txt": 8,
        "code.jsonl": 4,
    }
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    assert trace.set_names == ["stories.txt", "code.jsonl"]
    counted = np.bincount(trace.experts[trace.decode & (trace.prompt == 2), 0].ravel(), minlength=8)
    assert counted.tolist() == profile.sets["code.jsonl"].decode.activations[0]


@pytest.fixture
def torch_threads():
    """Restores PyTorch's number of threads, which a profile in this process changes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_killed_profile_resumes(tmp_path, demo, torch_threads, monkeypatch):
    """Parts of another machine are not reused. test_unfinished has a kill at every write."""
    file = tmp_path / UNFINISHED
    file.parent.mkdir()
    parts = {"host": {}, "threads": {}, "device": {}}
    file.write_text(yaml.safe_dump({"made_with": {"cpu": "another"}, "parts": parts}))

    def finished_parts() -> list[str]:
        found = yaml.safe_load(file.read_text())
        return [] if found["made_with"] == {"cpu": "another"} else list(found["parts"])

    prompts = DEMO / "prompts" / "stories.jsonl"
    arguments = ("profile", "--quick", "--force", "--model", DEMO, "--prompts", prompts)
    arguments += ("--output-tokens", "2")
    monkeypatch.setattr(settings, "QUICK", HASTY)
    hasty = f"import fiddler_opt.measure.settings as s; s.QUICK = s.{HASTY!r}"
    options = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "first": hasty}
    killed = started("fiddler-opt", *arguments, **options)
    while len(finished_parts()) < 3:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.02)
    killed.kill()
    assert "resuming" not in killed.communicate()[1]
    assert [path.name for path in file.parent.glob("[!.]*")] == []
    kept = finished_parts()
    parts = list(MachineBench(demo, HASTY, None).parts)
    assert kept == parts[: len(kept)]

    killed = started("fiddler-opt", *arguments, **options)
    timed = tmp_path / "profiles/local.machine.yaml"
    while not timed.exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.005)
    killed.kill()  # while routing is recorded
    assert f"resuming an unfinished profile: {len(kept)} of " in killed.communicate()[1]
    machine_text = timed.read_text()

    result = run("fiddler-opt", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    words = f"resuming an unfinished profile: {len(parts)} of {len(parts)} parts are timed"
    assert words in result.stderr
    assert timed.read_text() == machine_text
    routing = RoutingProfile.load(tmp_path / "profiles/tiny-mixtral.routing.yaml")
    assert routing.sets["stories.jsonl"].prompts == 16
    assert set(files_in(tmp_path)) == {
        "profiles/local.machine.yaml",
        "profiles/tiny-mixtral.routing.yaml",
    }


def test_parts_of_another_machine_model_or_settings_are_dropped(tmp_path, demo, monkeypatch):
    def identity(model: ModelSpec = demo) -> dict:
        return MachineBench(model, QUICK, None).identity

    before = identity()
    path = tmp_path / "m.yaml"
    Unfinished(path, before).part("host", dict)
    assert Unfinished(path, identity()).parts == {"host": {}}
    shape = demo.shape.model_copy(update={"hidden_size": 256})
    assert Unfinished(path, identity(replace(demo, shape=shape))).parts == {}
    assert Unfinished(path, MachineBench(demo, THOROUGH, None).identity).parts == {}
    monkeypatch.setattr(machine, "cpu_name", lambda: "another")
    assert Unfinished(path, identity()).parts == {}


@pytest.mark.parametrize(
    ("taken", "is_busy"), [(None, False), (0.3, False), (0.5 + 0.05 * num_cores() + 0.1, True)]
)
def test_timing_beside_other_programs_is_refused(monkeypatch, taken, is_busy):
    monkeypatch.setattr(quiet, "OtherProcesses", lambda: SimpleNamespace(cores=lambda: taken))
    assert undisturbed("link", lambda: {"us": 1}) == {"us": 1}  # too short to tell
    monkeypatch.setattr(quiet, "MIN_SECONDS", 0.0)
    if is_busy:
        with pytest.raises(FiddlerError, match=r"the machine is busy: .* \(link\); close them"):
            undisturbed("link", lambda: {"us": 1})
    else:
        assert undisturbed("link", lambda: {"us": 1}) == {"us": 1}


def test_busy_machine_is_not_profiled(tmp_path, monkeypatch):
    others = SimpleNamespace(cores=lambda: float(num_cores()))
    monkeypatch.setattr(quiet, "OtherProcesses", lambda: others)
    monkeypatch.setattr(quiet, "MIN_SECONDS", 0.0)
    result = run(
        "fiddler-opt", "profile", "--quick", "--model", DEMO, "--only", "machine", cwd=tmp_path
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "the machine is busy: other programs used" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "profiles/local.machine.yaml").exists()
