"""The chat in the terminal: typed input in this process, and a real terminal in its own."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator

import pytest
from conftest import ROOT
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from fiddler_run import FiddlerError, load_model
from fiddler_run.command import exit_status
from fiddler_run.generation.sampling import Options
from fiddler_run.serving.chat import chat

PLAN = ROOT / "plans" / "demo.yaml"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
UP = "\x1b[A"
ALT_ENTER = "\x1b\r"
CTRL_C = "\x03"
CTRL_D = "\x04"
PASTE = "\x1b[200~%s\x1b[201~"
READY = r"\x1b\[\?2004h.*?\x1b\[\?25h"  # the terminal reports pastes, and the cursor shows
ANSWER = r"\x1b\[\?2004l.*?\w"
# Chats again and again. Its answers end where the context does, or nearly so.
DRIVER = f"""
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from fiddler_run import load_model
from fiddler_run.command import exit_status
from fiddler_run.generation.sampling import Options
from fiddler_run.serving.chat import chat
model, tokenizer = load_model({str(PLAN)!r})
tokenizer.chat_template = {TEMPLATE!r}
hot = Options(max_new_tokens=1, temperature=3.0, top_p=1.0, seed=0)
while True:
    print("ended with", exit_status(lambda: chat(model, tokenizer, hot), "fiddler-run"))
"""


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load_model(PLAN)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.fixture
def talk(loaded, capsys, tmp_path) -> Callable:
    """Types keys into a chat; returns stdout, stderr and the conversation at its end."""

    def talk(keys: str, most: int | None = 6) -> tuple[str, str, list[dict[str, str]]]:
        file = tmp_path / "conversation.json"
        file.unlink(missing_ok=True)
        with create_pipe_input() as typed, create_app_session(typed, DummyOutput()):
            typed.send_text(f"{keys}/save {file}\r/exit\rnever sent\r")
            chat(*loaded, Options(max_new_tokens=1, num_beams=4), most)
        captured = capsys.readouterr()
        return captured.out, captured.err, json.loads(file.read_text())["messages"]

    return talk


def contents(messages: list[dict[str, str]], role: str = "user") -> list[str]:
    return [message["content"] for message in messages if message["role"] == role]


def test_answers_are_printed_with_their_figures(talk):
    out, err, messages = talk("Once upon a time\rdef count\r")
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert out == "".join(f"{text}\n" for text in contents(messages, "assistant"))
    figures = r"6 tokens, .+ tokens/s, first token after .+ s, (\d+) of (\d+) prompt tokens reused"
    first, second = re.findall(figures, err)
    assert 0 < int(first[1]) <= int(second[0]) < int(second[1])


def test_messages_of_several_lines_stay_whole(talk):
    _, _, messages = talk(PASTE % "one\r\n  two\r/exit" + f"\ra{ALT_ENTER}b\r   \r")
    assert contents(messages) == ["one\n  two\n/exit", "a\nb"]


def test_slashes_begin_commands_unless_doubled(talk):
    _, err, messages = talk("/new is what?\r/neu\r//new\r/ \r/help\r")
    assert contents(messages) == ["/new"]
    for words in ("/new is what?: unknown command", "/neu: unknown command", "/save FILE    write"):
        assert words in err


def test_new_forgets_all_but_the_system_message(talk):
    _, err, messages = talk(f"/system\ra\r/system One{ALT_ENTER}two\rb\r/new\r/system\rc\r")
    assert err.index("no system message") < err.index("One\ntwo")
    assert [message["content"] for message in messages[:-1]] == ["One\ntwo", "c"]
    _, _, messages = talk("a\r/system Be brief.\rb\r")
    assert contents(messages) == ["b"]


def test_stats_compare_the_last_answer_with_the_plan(talk, loaded):
    _, err, _ = talk("/stats\rdef count\r/stats\r")
    assert "/stats: no answer yet" in err
    predicted = loaded[0].plan.predicted
    rows = re.findall(r"│ (.+?) +│ +(.*?) │ +(.*?) │", err)
    assert {name: planned for name, _, planned in rows if planned} == {
        "time to first token": f"{predicted.ttft_s:.3f} s",
        "decode": f"{predicted.decode_tokens_per_s:.2f} tokens/s",
        "decode, at most": f"{predicted.bound_tokens_per_s:.2f} tokens/s",
        "GPU hit rate": f"{predicted.gpu_hit_rate:.1%}",
    }
    bytes_by_place = [measured for name, measured, _ in rows if name.startswith("expert bytes")]
    assert re.fullmatch(r"[\d.]+ [kM]B, 0 bytes, [\d.]+ [kM]B", ", ".join(bytes_by_place))


def test_save_refuses_existing_files_and_lists_what_was_said(talk, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    fresh = tmp_path / "a new file"
    _, err, messages = talk(f"/save {taken}\r/save\ra\r/save {fresh}\r/save {tmp_path}\rb\r")
    assert err.count("give the name of a new file") == 3
    assert taken.read_text() == "mine"
    assert json.loads(fresh.read_text()) == {"messages": messages[:2]}


def test_a_conversation_that_does_not_fit_is_refused(talk):
    long = "word " * 600
    _, err, messages = talk(f"a\r{PASTE % long}\r/system {PASTE % long}\rb\r")
    assert contents(messages) == ["a", "b"]
    assert len(re.findall(r"no room for an answer in the plan's context of 512; .*/new", err)) == 2


def test_an_answer_may_fill_the_context(talk, loaded):
    count = next(n for n in range(512) if len(loaded[1]("word " * n)["input_ids"]) > 490)
    for most in (None, 10**6):
        _, err, messages = talk(f"{PASTE % ('word ' * count)}\r", most)
        assert len(messages) == 2
        assert "prompt tokens reused, cut at the limit" in err


def test_messages_that_the_template_refuses_are_forgotten(talk, loaded, monkeypatch):
    refused = "messages[0].role == 'system' or 'bad' in messages[-1].content"
    refuse = f"{{% if {refused} %}}{{{{ raise_exception('too bad') }}}}{{% endif %}}"
    monkeypatch.setattr(loaded[1], "chat_template", refuse + TEMPLATE)
    _, err, messages = talk("bad\r/system Be brief.\ra\r")
    assert contents(messages) == ["a"]
    for what in ("conversation", "system message"):
        assert f"the {what}: the model's chat template refuses it: too bad" in err


def test_tokenizers_without_a_usable_template_are_refused(loaded, monkeypatch):
    for template, words in (
        (None, "no chat template; give one with --template FILE"),
        ({"rag": TEMPLATE}, "have no default"),
        ("{{ raise_exception('never') }}", "refuses it: never"),
    ):
        monkeypatch.setattr(loaded[1], "chat_template", template)
        with pytest.raises(FiddlerError, match=words):
            chat(*loaded, Options(max_new_tokens=1))


def test_the_second_interrupt_ends_the_program(talk, loaded):
    """Both arrive while the first token is computed. The model still answers the next chat."""
    before = signal.getsignal(signal.SIGINT)
    interrupts = loaded[0].lm_head.register_forward_pre_hook(
        lambda *_: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    )
    assert exit_status(lambda: talk("Once upon a time\r"), "fiddler-run") == 130
    interrupts.remove()
    assert signal.getsignal(signal.SIGINT) == before
    assert "6 tokens, " in talk("Once upon a time\r")[1]


class Terminal:
    """A process that chats in a terminal of its own."""

    def __init__(self):
        self._keyboard, self._screen = os.openpty()
        termios.tcsetwinsize(self._screen, (24, 100))
        changes = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            cwd=ROOT / "runtime",
            env={**os.environ, **changes},
            start_new_session=True,
            **dict.fromkeys(("stdin", "stdout", "stderr"), self._screen),
        )
        self._unread = ""

    def press(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def read_until(self, pattern: str) -> str:
        """What the process has printed since the last call, up to a match of the pattern."""
        while (found := re.search(pattern, self._unread, re.DOTALL)) is None:
            assert select.select([self._keyboard], [], [], 60)[0], self._unread
            self._unread += os.read(self._keyboard, 65536).decode(errors="replace")
        self._unread = self._unread[found.end() :]
        return found.string[: found.end()]

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._screen)[3] & termios.ECHO)


@pytest.fixture(scope="module", autouse=True)
def terminal() -> Iterator[Terminal]:
    """Loads its model while the other tests run."""
    terminal = Terminal()
    yield terminal
    with terminal.process as process:
        process.kill()


def test_a_real_terminal(terminal, tmp_path):
    """Ctrl-C, history, paste and Ctrl-D, in answers of hundreds of tokens."""
    terminal.read_until(READY)
    for typed in (PASTE % "first\n/exit", "second", UP + UP):
        terminal.press(f"{typed}\r")
        terminal.read_until(ANSWER)
        terminal.press(CTRL_C)
        terminal.read_until("prompt tokens reused, interrupted")
        terminal.read_until(READY)
    file = tmp_path / "conversation.json"
    terminal.press(f"/save {file}\r")
    terminal.read_until(READY)
    messages = json.loads(file.read_text())["messages"]
    assert contents(messages) == ["first\n/exit", "second", "first\n/exit"]
    assert all(contents(messages, "assistant"))

    seen = ""
    for _ in range(2):
        terminal.press(f"never sent{CTRL_C}")
        seen += terminal.read_until(READY)
    assert seen.count("Ctrl-D or /exit ends the chat") == 1
    terminal.press(CTRL_D)
    assert "tokens/s" not in terminal.read_until("ended with 0")

    terminal.read_until(READY)
    assert not terminal.echoes
    terminal.process.terminate()
    assert terminal.process.wait(60) == -signal.SIGTERM
    assert terminal.echoes
