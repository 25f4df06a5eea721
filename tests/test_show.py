"""Any file that fiddler-opt writes can be shown and drawn."""

import pytest
from conftest import ROOT
from test_commands import assert_refused, files_in, run

FILES = {
    "plans/rtx4090.yaml": ["843 of 4096 blocks", "│ 31    │", "made on", "fiddler-opt plan --machine"],
    "profiles/rtx4090.machine.yaml": ["AMD Ryzen 9 7950X", "│ 1024", "data sheet"],
    "profiles/two-cores.machine.yaml": ["no CUDA device", "GB/s", "measured"],
    "profiles/tiny-mixtral.routing.yaml": ["programs.jsonl", "│ 5     │"],
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name, tmp_path):
    result = run("fiddler-opt", "show", ROOT / name, "--plot", "out.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in FILES[name]:
        assert words in result.stdout
    picture = (tmp_path / "out.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_refused(tmp_path):
    (tmp_path / "other.yaml").write_text("version: 1\nname: x\n")
    (tmp_path / "broken.yaml").write_text((ROOT / "plans/demo.yaml").read_text().replace("cpu_threads: ", "cpu_threads: -"))
    before = files_in(tmp_path)
    plan = ROOT / "plans/demo.yaml"
    for arguments, words in (
        (["other.yaml"], "other.yaml: neither a plan nor a profile"),
        (["none.yaml"], "none.yaml: cannot read"),
        (["broken.yaml"], "broken.yaml: cpu_threads"),
        ([plan, "--plot", "other.yaml/x.png"], "other.yaml/x.png: cannot write"),
    ):
        assert_refused(run("fiddler-opt", "show", *arguments, cwd=tmp_path), words)
    unknown = run("fiddler-opt", "show", plan, "--plot", "x.nothing", cwd=tmp_path)
    assert unknown.returncode == 1
    assert "x.nothing: cannot write: Format 'nothing' is not supported" in unknown.stderr
    assert files_in(tmp_path) == before
