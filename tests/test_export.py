"""`export`: what it writes is read back by each program's rules, adds up, and fits the budget."""

import json
import random
import re
import shutil
import subprocess
import warnings
from itertools import product

import pytest
import torch
from command_line import SHIPPED_PLAN, assert_refused, run
from conftest import ROOT
from planning import machine_profile, random_routing, small_model
from transformers import MixtralConfig, MixtralForCausalLM

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.insight.export import TARGETS, Export, Source, by_frequency, frequencies
from fiddler_opt.measure.expert_counts import save_expert_counts
from fiddler_opt.solve.compiler import compile_plan
from fiddler_opt.solve.problem import Problem
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Budget, Workload

PLAN = "plans/rtx4090.yaml"
MODEL = small_model(num_layers=6)
LAYERS = 6
EXPERTS = 4
WORKLOAD = Workload(prompt_tokens=8, output_tokens=9, num_beams=1, batch_size=1, max_seq_len=64)
MADE = dict.fromkeys(
    ("command", "machine", "machine_sha256", "machine_source", "routing", "created"), ""
)


def source(experts: float, counts_file: str | None = None) -> Source:
    """A plan for the small model with GPU memory for so many experts besides the staging ring."""
    machine = machine_profile(MODEL, memory_bytes=10**10)
    routing = random_routing(MODEL, random.Random(1))
    fixed = Problem(MODEL, machine, WORKLOAD, Budget(gpu_bytes=10**9), 64).memory()
    gpu_bytes = fixed.used + MODEL.embedding_bytes + int(experts * MODEL.expert_bytes)
    plan = compile_plan(MODEL, machine, routing, WORKLOAD, Budget(gpu_bytes=gpu_bytes), MADE)
    return Source.of(plan, Problem.of(plan, MODEL, machine), routing, counts_file)


def stock_model() -> MixtralForCausalLM:
    with torch.device("meta"):
        return MixtralForCausalLM(MixtralConfig(**MODEL.config.raw)).bfloat16()


def kept_on_gpu(export: Export) -> set[tuple[int, int]]:
    return {
        (layer, expert)
        for layer, expert in product(range(LAYERS), range(EXPERTS))
        if export.resident[layer][expert]
    }


@pytest.mark.parametrize("experts", [2.0, 4.2, 9.0, 13.5, 40.0])
@pytest.mark.parametrize("name", TARGETS)
def test_exports_fit_the_plans_budget(name, experts):
    made = source(experts)
    export = TARGETS[name](made)
    memory = made.problem.memory()
    used = memory.used - memory.staging + export.gpu_expert_bytes
    used += 0 if name == "llama.cpp" else made.problem.host_embedding_bytes
    if name == "accelerate" and len(kept_on_gpu(export)) < LAYERS * EXPERTS:
        used += made.layer_bytes  # copied to the GPU when called
    assert used <= memory.total
    assert export.gpu_expert_bytes == len(kept_on_gpu(export)) * MODEL.expert_bytes
    assert all(count in (0, MODEL.blocks_per_expert) for row in export.resident for count in row)
    if experts == 40:
        assert len(kept_on_gpu(export)) == LAYERS * EXPERTS
    grain = EXPERTS if name != "ktransformers" else 1
    room = used + grain * MODEL.expert_bytes
    assert room > memory.total or len(kept_on_gpu(export)) == LAYERS * EXPERTS  # not one more


@pytest.mark.parametrize("experts", [0.0, 9.0, 40.0])
def test_llama_cpp_keeps_the_last_layers(experts):
    export = TARGETS["llama.cpp"](source(experts))
    match = re.fullmatch(r"-ngl 99 -c 64 --n-cpu-moe (\d+)", export.text)
    on_cpu = int(match[1])
    kept = {(layer, expert) for layer in range(on_cpu, LAYERS) for expert in range(EXPERTS)}
    assert kept == kept_on_gpu(export)


@pytest.mark.skipif(shutil.which("llama-fit-params") is None, reason="llama.cpp is not in PATH")
def test_llama_cpp_accepts_the_flags():
    """Its parser reads them from left to right, and ends at --version."""
    flags = TARGETS["llama.cpp"](source(9.0)).text.split()
    for arguments, status in ((flags, 0), (["--n-cpu-mo", "1"], 1)):
        found = subprocess.run(
            ["llama-fit-params", *arguments, "--version"], capture_output=True, check=False
        )
        assert found.returncode == status, found.stderr


def test_llama_cpp_counts_layers_without_experts():
    """DeepSeek-V2-Lite has 27 layers, and the first has no experts."""
    model = ModelSpec.load("deepseek-ai/DeepSeek-V2-Lite-Chat")
    machine = MachineProfile.load(ROOT / "profiles/rtx4090.machine.yaml").in_encoding("bf16")
    routing = Routing.uniform(model)
    budget = Budget(gpu_bytes=10 * 10**9)
    plan = compile_plan(model, machine, routing, WORKLOAD, budget, MADE)
    export = TARGETS["llama.cpp"](Source.of(plan, Problem.of(plan, model, machine), routing))
    kept = sum(any(row) for row in export.resident)
    assert 0 < kept < 26
    assert export.text.endswith(f"--n-cpu-moe {27 - kept}")


def read_device(devices: dict[str, int | str], name: str) -> int | str:
    """The device of a parameter: that of the only key that is it or a parent of it."""
    (key,) = (k for k in devices if k in ("", name) or name.startswith(f"{k}."))
    return devices[key]


@pytest.mark.parametrize("experts", [4.2, 13.5, 40.0])
def test_device_map_covers_every_parameter_once(experts):
    export = TARGETS["accelerate"](source(experts))
    devices = json.loads(export.text)
    found = {}
    for name, parameter in stock_model().named_parameters():
        device = read_device(devices, name)
        assert device in (0, "cpu")
        assert device == 0 or ".experts." in name
        found.setdefault((".experts." in name, device), []).append(parameter.nbytes)
    assert sum(found.get((True, 0), [])) == export.gpu_expert_bytes


def test_accelerate_accepts_the_device_map():
    modeling = pytest.importorskip("accelerate.utils.modeling")
    made = source(13.5)
    export = TARGETS["accelerate"](made)
    model = stock_model()
    devices = json.loads(export.text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # for keys that are no modules
        modeling.check_device_map(model, devices)
    sizes = modeling.compute_module_sizes(model)
    on_gpu = sum(sizes[name] for name, device in devices.items() if device == 0)
    assert on_gpu == sizes[""] - sum(sizes[n] for n, device in devices.items() if device == "cpu")
    buffers = sum(each.nbytes for each in model.buffers())  # of rotary positions
    assert on_gpu - export.gpu_expert_bytes == MODEL.non_expert_bytes + buffers
    # its own rule, with the same memory, keeps no more experts
    own = modeling.infer_auto_device_map(
        model,
        {0: on_gpu + made.layer_bytes, "cpu": 10**12},
        no_split_module_classes=["MixtralExperts"],
    )
    modeling.check_device_map(model, own)
    kept = sum(sizes[name] for name, device in own.items() if device == 0)
    assert kept <= on_gpu + made.layer_bytes


def count_of(text: str) -> int:
    """The experts that sglang-kt puts on the GPU."""
    ratio = float(re.search(r"--kt-gpu-experts-ratio ([\d.]+)", text)[1])
    return int(LAYERS * EXPERTS * ratio)


@pytest.mark.parametrize("experts", [0.0, 9.0, 13.5, 40.0])
def test_ktransformers_keeps_as_many_experts(experts):
    export = TARGETS["ktransformers"](source(experts))
    each, more = divmod(count_of(export.text), LAYERS)
    kept = {(n, e) for n in range(LAYERS) for e in range(EXPERTS) if e < each + (n < more)}
    assert kept == kept_on_gpu(export)
    assert "--kt-expert-placement-strategy uniform" in export.text


def test_ktransformers_keeps_the_most_often_called(tmp_path):
    file = tmp_path / "counts.pt"
    made = source(9.0, str(file))
    export = TARGETS["ktransformers"](made)
    assert export.text.endswith(f"{file} --max-running-requests 1 --max-total-tokens 64")
    layers = [1, 2, 3, 4, 5, 6]  # as if the first of seven had none
    save_expert_counts(frequencies(made.routing), layers, 7, file)
    counts = torch.load(file, weights_only=True)["logical_count"]
    assert counts.shape == (1, 7, EXPERTS)
    assert not counts[0, 0].any()
    most = counts[0, 1:].flatten().topk(count_of(export.text)).indices.tolist()
    assert {divmod(index, EXPERTS) for index in most} == kept_on_gpu(export)
    assert by_frequency(made.routing)[0] in kept_on_gpu(export)


def test_accelerate_refuses_a_budget_without_room_for_a_layer():
    with pytest.raises(FiddlerError, match="all experts of a layer .* with more --gpu-mem"):
        TARGETS["accelerate"](source(0.0))


def test_ktransformers_refuses_other_dtypes_and_unknown_counts():
    made = source(9.0, "counts.pt")
    uniform = Source(made.plan, made.problem, Routing.uniform(MODEL), "counts.pt")
    with pytest.raises(FiddlerError, match="uniform routing"):
        TARGETS["ktransformers"](uniform)
    shape = made.plan.model.model_copy(update={"dtype": "float32"})
    plan = made.plan.model_copy(update={"model": shape})
    with pytest.raises(FiddlerError, match="float32; choose another --to"):
        TARGETS["ktransformers"](Source(plan, made.problem, made.routing))


@pytest.mark.parametrize("name", TARGETS)
def test_command_prints_what_it_rounds(tmp_path, name):
    result = run("fiddler-opt", "export", PLAN, "--to", name, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in ("the plan, lossless12", "the best plan, bf16", f"{name}, bf16", "rounded: 1106"):
        assert words in result.stderr
    assert f"written for {name}" in result.stderr
    if name == "llama.cpp":
        assert result.stdout == "-ngl 99 -c 4096 --n-cpu-moe 26\n"
        written = run("fiddler-opt", "export", PLAN, "--to", name, "-o", "flags", cwd=tmp_path)
        assert written.stdout == "flags\n"
        assert (tmp_path / "flags").read_text() == result.stdout
    if name == "accelerate":
        devices = json.loads(result.stdout)
        on_cpu = [key for key, device in devices.items() if device == "cpu"]
        assert on_cpu == [f"model.layers.{layer}.mlp.experts" for layer in range(5, 32)]


def test_refusals(tmp_path):
    def exported(plan: object, *flags: object):
        return run("fiddler-opt", "export", plan, *flags, cwd=tmp_path)

    assert_refused(exported(SHIPPED_PLAN, "--to", "llama.cpp"), "demo.yaml", "without a GPU")
    assert_refused(exported(PLAN, "--to", "llama.cpp", "--counts", "c.pt"), "ktransformers")
    assert_refused(exported(PLAN, "--to", "ktransformers", "--counts", "c.txt"), "c.txt", ".pt")
    assert exported(PLAN, "--to", "ollama").returncode == 2
    assert exported(PLAN).returncode == 2
