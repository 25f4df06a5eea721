"""Files of models' sizes: right, found by name and content, and enough to plan without torch."""

import json
import shutil
import subprocess
import sys

import pytest
from command_line import assert_refused, run
from conftest import DEMO, ROOT
from seeds import spread

from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.model_file import ModelFile, config_sha256
from fiddler_run.models.config import BUNDLED_CONFIGS, ModelConfig
from fiddler_run.models.measured import described

SHIPPED = {path.name: path for path in (ROOT / "profiles").glob("*.model.yaml")}
QUICK = ("LiquidAI/LFM2-8B-A1B", "mistralai/Mixtral-8x7B-v0.1")
# Published: the total of the checkpoint's index or, for models with more than a language model in
# it, twice the published number of the language model's parameters.
PUBLISHED_BYTES = {
    "mistralai/Mixtral-8x7B-v0.1": 93_405_585_408,
    "mistralai/Mixtral-8x22B-v0.1": 281_241_268_224,
    "Qwen/Qwen3-30B-A3B": 61_064_245_248,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 2 * 79_674_391_296,
    "Qwen/Qwen3.5-35B-A3B": 2 * 34_660_610_688,
    "deepseek-ai/DeepSeek-V2-Lite-Chat": 31_412_968_448,
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": 2 * 49_122_681_728,
    "LiquidAI/LFM2-8B-A1B": 16_679_862_528,
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in [*BUNDLED_CONFIGS, str(DEMO)]
    ],
)
def test_shipped_sizes_are_those_of_the_config(name):
    config = ModelConfig.read(BUNDLED_CONFIGS.get(name, DEMO / "config.json"))
    found = ModelFile.find(name, config, "bfloat16")
    _, shape, sizes = described(config, found.model.name, "bfloat16")
    assert (found.model, found.sizes) == (shape, sizes)


@pytest.mark.parametrize("name", PUBLISHED_BYTES)
def test_shipped_sizes_add_up_to_the_published_checkpoint(name):
    model = ModelSpec.load(name)
    shape = model.shape
    experts = shape.num_layers * shape.num_experts * shape.expert_elements
    assert 2 * experts + model.sizes.dense_bytes == PUBLISHED_BYTES[name]


@pytest.mark.parametrize("name", spread(["Qwen/Qwen3-30B-A3B", "examples/tiny-mixtral"], 1))
def test_planning_with_a_model_file_loads_no_torch(name, tmp_path):
    code = (
        "import sys; from fiddler_opt.cli import main; status = main();"
        " sys.exit(status or bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    flags = ("--model", name, "--gpu-mem", "24GB", "-o", str(tmp_path / "plan.yaml"))
    machine = ("--machine", "profiles/rtx4090.machine.yaml")
    result = subprocess.run(
        [sys.executable, "-c", code, "plan", *machine, *flags],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_written_file_is_found_until_the_config_changes(tmp_path):
    shutil.copytree(DEMO, tmp_path / "small")
    result = run("fiddler-opt", "profile", "--only", "model", "--model", "small", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "profiles/small.model.yaml\n")
    path = tmp_path / "profiles/small.model.yaml"
    config_file = tmp_path / "small/config.json"
    raw = json.loads(config_file.read_text())
    written = ModelFile.load(path)
    assert written.provenance.config_sha256 == config_sha256(ModelConfig.read(config_file))
    assert written.model.num_experts == 8
    config_file.write_text(json.dumps({**raw, "num_local_experts": 4}))
    flags = ("--model", "small", "--gpu-mem", "0GB", "-o", "plan.yaml")
    machine = ("--machine", ROOT / "profiles/two-cores.machine.yaml")
    assert run("fiddler-opt", "plan", *machine, *flags, cwd=tmp_path).returncode == 0
    assert "num_experts: 4" in (tmp_path / "plan.yaml").read_text()


def test_damaged_file_is_refused(tmp_path):
    (tmp_path / "profiles").mkdir()
    text = SHIPPED["Qwen3-30B-A3B.model.yaml"].read_text()
    changed = text.replace("dense_bytes: ", "dense_bytes: -")
    (tmp_path / "profiles/Qwen3-30B-A3B.model.yaml").write_text(changed)
    flags = ("--model", "Qwen/Qwen3-30B-A3B", "--gpu-mem", "24GB")
    machine = ("--machine", ROOT / "profiles/rtx4090.machine.yaml")
    result = run("fiddler-opt", "plan", *machine, *flags, cwd=tmp_path)
    assert_refused(result, "profiles/Qwen3-30B-A3B.model.yaml: sizes.dense_bytes")
