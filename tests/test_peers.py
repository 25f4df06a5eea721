"""`benchmarks/peers.py`: the rows of programs that ran, and of those that are missing."""

import json
import subprocess
import sys

import pytest
from conftest import DEMO, ROOT

SCRIPTS = ROOT / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import peers

    return peers


def test_rows_of_other_runs_are_kept(peers):
    """They may have been timed on other prompts."""
    result = {"command": "x", "decode_tokens_per_s": 2.0, "ttft_s": {"512": 1.5}}
    found = {
        "one": {**result, "gpu_bytes": 0, "host_bytes": 10**9},
        "two": {"why_not": "not installed"},
    }
    lines = peers.table(found, [512, 4096]).splitlines()
    assert lines[0].startswith("|  | decode, tokens/s | first of 512, s | first of 4096, s |")
    assert lines[2] == "| one | 2.00 | 1.50 |  | 0.0 | 1.0 | `x` |"
    assert lines[3] == "| two |  |  |  |  |  | not installed |"
    assert len(peers.figure(found).axes) == 2
    assert len(peers.figure({}).axes) == 1


def test_programs_choose_their_own_threads(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    import process

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("OTHER", "kept")
    print_both = "import os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ['OTHER'])"
    found = process.run([sys.executable, "-c", print_both], tmp_path / "log")
    assert found.stdout == "None kept\n"


def test_a_program_without_a_result_is_a_row(peers, tmp_path):
    log = tmp_path / "log"
    with pytest.raises(peers.Failed, match="no result within 0.1 s"):
        peers.run([sys.executable, "-c", "import time; time.sleep(60)"], log, 0.1)
    with pytest.raises(peers.Failed, match="printed no JSON"):
        peers.read(peers.run([sys.executable, "-c", "print('[')"], log), log)
    with pytest.raises(peers.Failed, match="failed, see "):
        peers.run([sys.executable, "-c", "exit(1)"], log)


@pytest.mark.slow
def test_programs_run_or_say_why_not(tmp_path):
    command = [
        *(sys.executable, SCRIPTS / "peers.py", "--plan", ROOT / "plans/demo.yaml"),
        *("--only", "fiddler-run,fiddler,llama.cpp", "--model", DEMO / "config.json"),
        *("--prompts", 8, 16, "--output-tokens", 4, "-o", tmp_path),
    ]
    subprocess.run([*map(str, command)], check=True, capture_output=True, cwd=ROOT)
    found = json.loads((tmp_path / "peers.json").read_text())
    assert found["fiddler"] == {"why_not": "no --fiddler given"}
    assert "why_not" in found["llama.cpp"]
    ours = found["fiddler-run, demo"]
    assert set(ours["ttft_s"]) == {"8", "16"}
    assert ours["decode_tokens_per_s"] > 0
    assert (tmp_path / "peers.png").stat().st_size > 0


def test_gguf_of_both_families_is_read_back(tmp_path):
    gguf = pytest.importorskip("gguf")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "vocab_size": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    }
    families = {
        "mixtral": {"num_local_experts": 4},
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 32},
    }
    for family, more in families.items():
        config = tmp_path / f"{family}.json"
        config.write_text(json.dumps({"model_type": family, **sizes, **more}))
        file = tmp_path / f"{family}.gguf"
        command = [sys.executable, SCRIPTS / "random_gguf.py", config, file]
        subprocess.run([*map(str, command)], check=True)
        shapes = {each.name: each.shape.tolist() for each in gguf.GGUFReader(file).tensors}
        width = more.get("moe_intermediate_size", 64)
        assert shapes["blk.1.ffn_down_exps.weight"] == [width, 64, 4]
        assert ("blk.0.attn_q_norm.weight" in shapes) == (family == "qwen3_moe")
