"""`fiddler-opt doctor` on this machine, and the processes that it starts."""

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
    """Where there is no Triton, the kernels' module with a stand-in for it: all but the kernels
    themselves is plain Python.
    """
    if find_spec("triton"):
        yield
        return
    language = SimpleNamespace(constexpr=object)
    triton = SimpleNamespace(
        jit=lambda function=None, **_: function or (lambda decorated: decorated), language=language
    )
    # and without what the test imports
    with patch.dict(sys.modules, {"triton": triton, "triton.language": language}):
        yield
    del fiddler_run.kernels.gpu


def test_the_kernels_are_asked_whether_they_suit(gpu_kernels):
    for encoding, neurons in (("fp32", 896), ("fp16", 896), ("bf16", 900)):
        blocks = ENCODINGS[encoding](4096, neurons)
        assert kernels(blocks) == {"kernels_suit": False, "kernel_error": None}
    found = kernels(ENCODINGS["bf16"](4096, 896))
    assert found["kernels_suit"]
    assert (found["kernel_error"] is None) == torch.cuda.is_available()


def test_the_demo_model_runs_on_this_machine(tmp_path):
    """In a folder with a torch.py, which is not run."""
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


def test_a_torch_is_not_run_where_a_gpu_is_described(tmp_path, monkeypatch):
    """The process that takes GPU memory for the profile; only its Python is looked at here."""
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
