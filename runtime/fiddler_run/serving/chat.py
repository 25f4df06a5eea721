"""A chat in the terminal: reads messages and commands, and prints each answer as it streams."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import is_searching
from prompt_toolkit.key_binding import KeyBindings
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.answer import Answer, Piece, Request, answer
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.report import figures
from fiddler_run.generation.sampling import Options
from fiddler_run.generation.text import chat_text, token_ids
from fiddler_run.system.files import exists, write_whole

HELP = """\
/new          forget the conversation; the system message stays
/system TEXT  set the system message and start a new conversation; without TEXT, show it
/stats        figures of the last answer, beside the plan's predictions
/save FILE    write the conversation to a new JSON file
/exit         end the chat, as Ctrl-D does; Ctrl-C only ends an answer
Enter sends a message, Alt-Enter begins a new line, and // sends one that begins with a slash."""


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises FiddlerError if the tokenizer has no chat template, or one that fails."""
    if tokenizer.chat_template is None:
        raise FiddlerError(
            "this model's tokenizer has no chat template; give one with --template FILE"
        )
    chat_text(tokenizer, [{"role": "user", "content": "Hello"}], "chat")


def chat(
    model: PlannedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    max_new_tokens: int | None = None,
) -> None:
    """Chats on the terminal until the user leaves. Needs the main thread, for Ctrl-C.

    The length and the beams in `options` are ignored. `max_new_tokens` None: an answer may fill the
    plan's context. The second Ctrl-C during an answer raises KeyboardInterrupt.
    """
    require_template(tokenizer)
    talk = Chat(model, tokenizer, replace(options, num_beams=1), max_new_tokens)
    prompt = PromptSession("> ", multiline=True, key_bindings=_keys())
    talk.say("/help lists the commands, Ctrl-D ends the chat")
    explained = False
    while True:
        try:
            text = prompt.prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not explained:
                talk.say("Ctrl-D or /exit ends the chat")
            explained = True
            continue
        if text.strip() == "/exit":
            return
        try:
            talk.take(text)
        except FiddlerError as error:
            talk.say(str(error), style="")


@dataclass
class Chat:
    """A conversation with a model, and its commands."""

    model: PlannedModel
    tokenizer: PreTrainedTokenizerBase
    options: Options
    max_new_tokens: int | None
    system: list[dict[str, str]] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    last: Answer | None = None

    def say(self, what: str | Table, style: str = "dim") -> None:
        stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        stderr.print(what, style=style)

    def take(self, text: str) -> None:
        """Runs a command or answers a message. Errors leave the conversation as it was."""
        if text.startswith("/") and not text.startswith("//"):
            self._run(text)
        elif text.strip():
            self._answer(text.removeprefix("/"))

    def _run(self, line: str) -> None:
        name, text = [*line.split(maxsplit=1), ""][:2]
        commands = {
            "/new": self._forget,
            "/system": lambda: self._set_system(text.strip()),
            "/stats": lambda: self.say(self._stats(), style=""),
            "/save": lambda: self._save(text.strip()),
            "/help": lambda: self.say(HELP, style=""),
        }
        if name not in commands or (text and name not in ("/system", "/save")):
            raise FiddlerError(
                f"{line.splitlines()[0]}: unknown command; /help lists them, and // sends a"
                " message that begins with a slash"
            )
        commands[name]()

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        with _cancelling() as cancelled:
            ids = self._ids([*self.system, *messages], "the conversation")
            room = self.model.plan.workload.max_seq_len - len(ids)
            options = replace(self.options, max_new_tokens=min(room, self.max_new_tokens or room))
            request = Request(ids, options)
            try:
                self.last = answer(self.model, self.tokenizer, request, _show, cancelled)
            finally:
                print(flush=True)
            self.messages = [*messages, {"role": "assistant", "content": self.last.text}]
            self.say(_summary(self.last))

    def _ids(self, messages: list[dict[str, str]], where: str) -> list[int]:
        text = chat_text(self.tokenizer, messages, where)
        context = self.model.plan.workload.max_seq_len
        rows = self.model.config.get_text_config().vocab_size
        ids = token_ids(self.tokenizer, text, context, rows, where, special_tokens=False)
        if len(ids) >= context:
            raise FiddlerError(
                f"{where} has {len(ids)} tokens and leaves no room for an answer in the plan's"
                f" context of {context}; start another with /new, or shorten it"
            )
        return ids

    def _forget(self) -> None:
        self.messages = []
        self.say("new conversation")

    def _set_system(self, content: str) -> None:
        if content:
            system = [{"role": "system", "content": content}]
            self._ids([*system, {"role": "user", "content": "Hello"}], "the system message")
            self.system = system
            self._forget()
        else:
            self.say(self.system[0]["content"] if self.system else "no system message")

    def _save(self, name: str) -> None:
        path = os.path.expanduser(name)
        if not name or exists(path):
            problem = f"{name} exists" if name else "no file"
            raise FiddlerError(f"/save: {problem}; give the name of a new file")
        content = {"messages": [*self.system, *self.messages]}
        write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        self.say(f"saved to {path}")

    def _stats(self) -> Table:
        if self.last is None:
            raise FiddlerError("/stats: no answer yet; send a message first")
        plan = self.model.plan
        measured = self.last.measured
        traffic = measured.traffic if measured.output_tokens > 1 else measured.prefill_traffic
        table = figures(plan, measured)
        table.add_row("decode, at most", "", f"{plan.predicted.bound_tokens_per_s:.2f} tokens/s")
        table.add_row("prompt tokens reused", f"{measured.reused_tokens}")
        carried = traffic.bytes_by_resource(plan.block_bytes)
        table.add_row("expert bytes, GPU", decimal(carried["gpu_memory"]))
        table.add_row("expert bytes, link", decimal(carried["link"]))
        table.add_row("expert bytes, CPU", decimal(carried["cpu"]))
        return table


def _show(piece: Piece) -> None:
    print(piece.text, end="", flush=True)


def _keys() -> KeyBindings:
    """Enter sends a message, of one line or several; Alt-Enter begins a new line."""
    keys = KeyBindings()
    typing = ~is_searching  # in a search of the history, Enter keeps its role
    keys.add("enter", filter=typing)(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter", filter=typing)(lambda event: event.current_buffer.newline(False))
    return keys


@contextmanager
def _cancelling() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets. The second one raises KeyboardInterrupt."""
    cancelled = threading.Event()

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cancelled.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield cancelled
    finally:
        signal.signal(signal.SIGINT, before)


def _summary(last: Answer) -> str:
    """The figures of an answer in one line."""
    measured = last.measured
    count = measured.output_tokens
    parts = [
        f"{count} tokens, {measured.decode_tokens_per_s:.1f} tokens/s" if count > 1 else "1 token",
        f"first token after {measured.ttft_s:.1f} s",
        f"{measured.reused_tokens} of {measured.prompt_tokens} prompt tokens reused",
        {"cancelled": "interrupted", "length": "cut at the limit"}.get(last.finish, ""),
    ]
    return ", ".join(part for part in parts if part)
