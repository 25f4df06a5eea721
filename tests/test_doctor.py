"""`fiddler-opt doctor` on this machine, and the processes it starts."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import DEMO, ROOT

import fiddler_run.kernels
from fiddler_opt.insight.probe import kernels
from fiddler_opt.measure import device as bench_device
from fiddler_run.encodings.table import ENCODINGS


@pytest.fixture
def gpu_kernels():
    """Without Triton, replaces it by a stand-in, so that the kernels' module can be imported.

    All of the module but the kernels themselves is plain Python.
    """
    if find_spec("triton"):
        yield
        return
    language = SimpleNamespace(constexpr=object)
    triton = SimpleNamespace(
        jit=lambda function=None, **_: function or (lambda decorated: decorated), language=language
    )
    # The patch also forgets the modules that the test imports.
    with patch.dict(sys.modules, {"triton": triton, "triton.language": language}):
        yield
    del fiddler_run.kernels.gpu


def test_probe_reports_which_blocks_the_kernels_support(gpu_kernels):
    for encoding, neurons in (("fp32", 896), ("fp16", 896), ("bf16", 900)):
        blocks = ENCODINGS[encoding](4096, neurons)
        assert kernels(blocks) == {"kernels_suit": False, "kernel_error": None}
    for encoding in ("bf16", "lossless12"):
        found = kernels(ENCODINGS[encoding](4096, 896))
        assert found["kernels_suit"]
        assert (found["kernel_error"] is None) == torch.cuda.is_available()


@pytest.mark.slow
def test_doctor_finds_that_the_demo_model_runs(tmp_path):
    """A torch.py in the current folder must not be imported."""
    (tmp_path / "torch.py").write_text("open('it-ran', 'w')\n")
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    command = [sys.executable, "-P", "-m", "fiddler_opt.cli", "doctor", "--model", str(DEMO)]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "tiny-mixtral needs" in result.stdout
    assert "PyTorch does not start" not in result.stdout
    assert "CPU kernel" in result.stdout
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.slow
def test_context_measurement_ignores_a_torch_module_in_the_folder(tmp_path, monkeypatch):
    """Only the imports of the process that measures the CUDA context are checked here."""
    (tmp_path / "torch.py").write_text("found = 'the wrong one'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_device.torch.cuda, "mem_get_info", lambda _: (0, 0))
    real = subprocess.Popen
    seen = []

    def popen(command, **pipes):
        program = command.index("-c") + 1
        look = "import torch; print(len(getattr(torch, 'found', '')), flush=True)"
        seen.append(real([*command[:program], look, *command[program + 1 :]], **pipes))
        return seen[0]

    monkeypatch.setattr(bench_device.subprocess, "Popen", popen)
    assert bench_device.context_bytes(bench_device.torch.device("cuda", 0)) == 0
    assert seen[0].args[1] == "-P"
