"""Runs commands as a user does, in this process or in their own."""

import io
import os
import subprocess
import sys
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import yaml
from conftest import DEMO, ROOT, set_key

import fiddler_opt.cli
import fiddler_run.cli

SHIPPED_PLAN = ROOT / "plans" / "demo.yaml"
MACHINE = ROOT / "profiles" / "two-cores.machine.yaml"
ROUTING = ROOT / "profiles" / "tiny-mixtral.routing.yaml"
MAIN = {"fiddler-opt": fiddler_opt.cli.main, "fiddler-run": fiddler_run.cli.main}
ENTRY = {
    "fiddler-opt": "import sys; from fiddler_opt.entry import main; sys.exit(main())",
    "fiddler-run": "import sys; from fiddler_run.command import fiddler_run as main;"
    " sys.exit(main())",
}


def run(
    command: str, *arguments: object, cwd: Path, stdin: str = ""
) -> subprocess.CompletedProcess:
    """Runs a command in this process, in the folder `cwd`."""
    words = [str(argument) for argument in arguments]
    stdout = io.StringIO()
    stderr = io.StringIO()
    stdin_file = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    with ExitStack() as stack:
        stack.enter_context(chdir(cwd))
        stack.enter_context(redirect_stdout(stdout))
        stack.enter_context(redirect_stderr(stderr))
        stack.enter_context(patch.object(sys, "stdin", stdin_file))
        stack.enter_context(patch.object(sys, "argv", [command, *words]))
        stack.enter_context(patch.dict(os.environ, COLUMNS="200"))
        try:
            status = MAIN[command](words)
        except SystemExit as ended:  # argparse
            status = ended.code
    return subprocess.CompletedProcess(
        [command, *words], status, stdout.getvalue(), stderr.getvalue()
    )


def started(
    command: str, *arguments: object, cwd: Path, first: str = "", **options: object
) -> subprocess.Popen:
    """Starts a command in its own process; `options` may replace its pipes.

    `first`: a Python statement to run before it.
    """
    folders = [str(ROOT), str(ROOT / "runtime"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "COLUMNS": "200"}
    program = f"import sys; sys.argv[0] = {command!r}; {first or 'pass'}; {ENTRY[command]}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        text=True,
        **{**pipes, **options},
    )


def run_process(
    command: str, *arguments: object, cwd: Path, stdin: str = ""
) -> subprocess.CompletedProcess:
    """Runs a command in its own process, as a user does."""
    with started(command, *arguments, cwd=cwd) as process:
        stdout, stderr = process.communicate(stdin, timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Asserts exit status 1, empty stdout, and one line on stderr that contains `words`."""
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


def edited_plan(folder: Path, **changes: object) -> Path:
    """Writes the shipped plan with other values; `a__b=1` sets key b in a."""
    data = yaml.safe_load(SHIPPED_PLAN.read_text())
    data["model"]["name"] = str(DEMO)
    for path, value in changes.items():
        set_key(data, path.split("__"), value)
    file = folder / "edited.yaml"
    file.write_text(yaml.safe_dump(data))
    return file
