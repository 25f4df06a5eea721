"""Paths that the planner cannot read or write are refused in one line that names them."""

import os

import pytest
from conftest import DEMO, ROOT

from fiddler_opt.cli import main

MACHINE = ROOT / "profiles/rtx4090.machine.yaml"
LONG = "n" * 300
READING = [
    ["plan", "--gpu-mem", "24GB", "--machine", "{}"],
    ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--routing", "{}"],
    ["plan", "--gpu-mem", "24GB", "--profiles", "{}"],
    ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--model", "{}"],
    ["show", "{}"],
    ["show", ROOT / "plans/demo.yaml", "--why", "--machine", "{}"],
    ["diff", ROOT / "plans/demo.yaml", "{}"],
    ["calibrate", ROOT / "plans/demo.yaml", "{}"],
    ["replay", "{}", "trace.npz"],
    ["replay", ROOT / "plans/demo.yaml", "{}"],
    ["export", "{}", "--to", "llama.cpp"],
    [
        "profile",
        "--model",
        DEMO,
        "--prompts",
        "{}",
        "--only",
        "routing",
        "--plan",
        ROOT / "plans/demo.yaml",
    ],
    ["profile", "--model", DEMO, "--only", "routing", "--plan", "{}"],
]
WRITING = [
    ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "-o", "{}"],
    ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--emit", "{}"],
    ["whatif", "--gpu-mem", "8GB,24GB", "--machine", MACHINE, "--plot", "{}"],
    ["show", ROOT / "plans/demo.yaml", "--plot", "{}"],
    ["replay", ROOT / "plans/demo.yaml", "--synthetic", "0,0.5", "--plot", "{}"],
    ["export", ROOT / "plans/rtx4090.yaml", "--to", "llama.cpp", "-o", "{}"],
]
FOLDERS = [
    ["doctor", "--model", DEMO, "--profiles", "{}"],
    ["profile", "--model", DEMO, "--profiles", "{}"],
]
CASES = [
    (command, name)
    for commands, names in (
        (READING, (LONG, f"{LONG}/x", "loop", "loop/x")),
        (WRITING, (LONG, f"{LONG}/x", "loop", "loop/x")),
        (FOLDERS, (LONG, f"{LONG}/x", "loop", "loop/x")),
    )
    for command in commands
    for name in names
]


@pytest.fixture
def looped_folder(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "name"), CASES, ids=lambda value: " ".join(map(str, value))[:60]
)
def test_unusable_paths_are_refused(looped_folder, monkeypatch, capsys, command, name):
    """The last line on stderr names the path, and nothing is written."""
    monkeypatch.chdir(looped_folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(looped_folder.iterdir())
    status = main([str(part).format(name) for part in command])
    captured = capsys.readouterr()
    assert status == 1
    assert captured.out == "" or "--why" in command
    last = captured.err.splitlines()[-1]
    assert last.startswith("fiddler-opt: ")
    assert name[:20] in last
    assert sorted(looped_folder.iterdir()) == before


def test_nul_in_a_path_is_refused(looped_folder, monkeypatch, capsys):
    monkeypatch.chdir(looped_folder)
    for command in (
        ["show", "a\0b"],
        ["plan", "--gpu-mem", "24GB", "--machine", "a\0b"],
        ["replay", ROOT / "plans/demo.yaml", "a\0b"],
    ):
        assert main([str(part) for part in command]) == 1
        captured = capsys.readouterr()
        assert "cannot read" in captured.err or "no such" in captured.err
        assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "--gpu-mem", "24GB", "--machine", "locked/x"],
        ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--routing", "locked/x"],
        ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--profiles", "locked"],
        ["plan", "--gpu-mem", "24GB", "--profiles", "locked"],
        ["plan", "--gpu-mem", "24GB", "--machine", MACHINE, "--model", "locked/m"],
        ["show", "locked/x.yaml"],
        ["show", "locked/x.yaml", "--why"],
        ["calibrate", "locked/x.yaml", "b.json"],
        ["doctor", "--model", DEMO, "--profiles", "locked"],
        [
            "profile",
            "--model",
            DEMO,
            "--prompts",
            "locked/x.txt",
            "--only",
            "routing",
            "--plan",
            ROOT / "plans/demo.yaml",
        ],
    ],
    ids=lambda command: " ".join(map(str, command))[:60],
)
def test_locked_folder_is_refused(tmp_path, monkeypatch, capsys, command):
    """Simulated, because root may enter every folder."""
    look = os.stat

    def stat(path, **flags):
        if "locked" in str(path).split("/"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **flags)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.chdir(tmp_path)
    assert main([str(part) for part in command]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("fiddler-opt: locked")
    assert captured.err.endswith(": cannot read: Permission denied\n")
    assert captured.out == ""
