"""`fiddler-opt show` prints and plots every file that fiddler-opt writes."""

import io
import random
import re

import pytest
from command_line import assert_refused, files_in, run
from conftest import ROOT, demo_shape, make_plan
from rich.console import Console

from fiddler_opt.insight.plots import plot
from fiddler_opt.insight.report import print_file
from fiddler_run.errors import FiddlerError
from fiddler_run.system import files

FILES = {
    "plans/rtx4090.yaml": [
        "expert blocks (27.0%) on the GPU, the equivalent of 69.1 of 256 experts",
        "│ 31    │",
        "made on",
        "fiddler-opt plan --machine",
    ],
    "profiles/rtx4090.machine.yaml": ["AMD Ryzen 9 7950X", "│ 1024", "data sheet"],
    "profiles/two-cores.machine.yaml": ["no CUDA device", "GB/s", "measured"],
    "profiles/tiny-mixtral.routing.yaml": ["programs.jsonl", "│ 5     │"],
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_shown_and_plotted(name, tmp_path):
    result = run("fiddler-opt", "show", ROOT / name, "--plot", "out.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in FILES[name]:
        assert words in result.stdout
    picture = (tmp_path / "out.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_show_refuses_bad_files_and_bad_plot_names(tmp_path):
    (tmp_path / "other.yaml").write_text("version: 1\nname: x\n")
    (tmp_path / "broken.yaml").write_text(
        (ROOT / "plans/demo.yaml").read_text().replace("cpu_threads: ", "cpu_threads: -")
    )
    before = files_in(tmp_path)
    plan = ROOT / "plans/demo.yaml"
    for arguments, words in (
        (["other.yaml"], "other.yaml: neither a plan nor a profile"),
        (["none.yaml"], "none.yaml: cannot read"),
        (["broken.yaml"], "broken.yaml: ranks[0].cpu_threads"),
        ([plan, "--plot", "other.yaml/x.png"], "other.yaml/x.png: cannot write"),
    ):
        assert_refused(run("fiddler-opt", "show", *arguments, cwd=tmp_path), words)
    unknown = run("fiddler-opt", "show", plan, "--plot", "x.nothing", cwd=tmp_path)
    assert unknown.returncode == 1
    assert "x.nothing: cannot write: Format 'nothing' is not supported" in unknown.stderr
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("experts", [8, 16, 18, 20, 32, 64, 128])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_wide_tables_show_all_numbers(tmp_path, experts, width):
    shape = demo_shape().model_copy(update={"num_experts": experts, "intermediate_size": 512})
    rng = random.Random(experts)
    resident = [[rng.randint(1, 16) for _ in range(experts)] for _ in range(6)]
    make_plan(shape, resident).save(tmp_path / "p.yaml")
    out = io.StringIO()
    print_file(
        Console(file=out, width=width, highlight=False, markup=False), str(tmp_path / "p.yaml")
    )
    text = out.getvalue().partition("blocks in GPU memory by expert")[2]
    shown = {layer: [] for layer in range(6)}
    heads = []
    for line in text.splitlines():
        cells = re.split("[│┃]", line)[1:-1]
        if cells and cells[0].strip() == "layer":
            heads += [int(cell) for cell in cells[1:]]
        elif cells:
            shown[int(cells[0])] += [int(cell) for cell in cells[1:]]
    assert heads == list(range(experts))
    assert [shown[layer] for layer in range(6)] == resident
    assert all(len(line) <= width for line in text.splitlines() if "│" in line)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2", "x.yaml: not valid YAML"),
        ("a: &b [1]\nc: *b\n", "x.yaml: not valid YAML: line 1: anchors"),
        ("[" * 1000, "x.yaml: not valid YAML"),
        ("hello", "x.yaml: neither a plan nor a profile"),
        ("[1, 2]", "x.yaml: neither a plan nor a profile"),
        ('{"decode": {"ms": 1}}', "x.yaml: neither a plan nor a profile"),
        ("recorded: 1\nranks: 2\n", "x.yaml: neither a plan nor a profile"),
        ("\nranks: []\nversion: 9\n", "x.yaml: version: this release reads"),
        ("\nresident_blocks: {}\nversion: 2\n", "x.yaml: version: this release reads version 3"),
        ("{version: 2, recorded: {}}", "x.yaml: model: missing"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, text, words):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(FiddlerError, match=words) as caught:
        print_file(Console(file=io.StringIO()), str(tmp_path / "x.yaml"))
    assert "\n" not in str(caught.value)


def test_full_disk_keeps_the_old_plot(tmp_path, monkeypatch):
    file = tmp_path / "out.png"
    file.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    plan = make_plan(demo_shape(), [[3] * 8] * 6)
    with pytest.raises(FiddlerError, match="out.png: cannot write: No space left on device"):
        plot(plan, file)
    assert files_in(tmp_path) == {"out.png": b"old"}
