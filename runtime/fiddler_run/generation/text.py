"""Encodes prompts with a checkpoint's tokenizer, and decodes answers token by token."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import is_file, reason
from fiddler_run.system.parsing import read_json_object

JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # a byte of a character that has no token
SAMPLE = "Once upon a time,\n  3 + 4 = 7."


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the checkpoint's tokenizer, with padding on the left as generation needs.

    Checks it by encoding and decoding a text, and by decoding each of its tokens.

    Raises:
        FiddlerError: the folder has no tokenizer that transformers can load and use.
    """
    for name in JSON_FILES:
        if is_file(folder / name):
            read_json_object(folder / name)
    if not any(is_file(folder / name) for name in VOCABULARIES):
        raise FiddlerError(
            f"{folder}: no tokenizer, neither tokenizer.json nor tokenizer.model; download the"
            " checkpoint again"
        )
    if not is_file(folder / "tokenizer.json") and not find_spec("sentencepiece"):
        raise FiddlerError(
            f"{folder}: its tokenizer.model needs the package sentencepiece: pip install"
            " sentencepiece"
        )
    with library_errors(
        f"{folder}: transformers cannot use its tokenizer", "download the tokenizer's files again"
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, padding_side="left", trust_remote_code=False
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        ids = tokenizer(SAMPLE)["input_ids"]
        tokenizer.decode(ids)
        tokenizer.batch_decode(
            [[token] for token in range(len(tokenizer))], skip_special_tokens=True
        )
        stream = TextStream(tokenizer, ids)
        for token in ids:
            stream.put(token)
        stream.finish()
    return tokenizer


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, object]],
    where: str,
    answer_follows: bool = True,
    tools: list[dict[str, object]] | None = None,
) -> str:
    """Formats messages with the tokenizer's chat template. `where` names them in errors.

    `tools` are functions that the model may call, in OpenAI's form.

    Raises:
        FiddlerError: there is no template for a chat, or it fails.
    """
    template = tokenizer.chat_template
    if template is None:
        raise FiddlerError(
            f"{where}: this model's tokenizer has no chat template; give one with --template FILE"
        )
    if isinstance(template, dict) and "default" not in template:
        raise FiddlerError(
            f"{where}: the model's chat templates ({', '.join(map(str, template))}) have no"
            " default; name one `default` in tokenizer_config.json, or give texts instead of"
            " messages"
        )
    with library_errors(f"{where}: the model's chat template refuses it", "change or remove it"):
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer_follows, tools=tools
        )
    if not isinstance(text, str):
        raise FiddlerError(
            f"{where}: the model's chat template produces no text; fix chat_template in"
            " tokenizer_config.json"
        )
    return text


def token_ids(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    context: int,
    vocab_size: int | None = None,
    where: str = "the prompt",
    special_tokens: bool = True,
) -> list[int]:
    """The token ids of a prompt.

    Args:
        context: the most tokens.
        vocab_size: rows of the model's embedding. None: not checked.
        where: names the prompt in errors.
        special_tokens: add the tokenizer's initial tokens.

    Raises:
        FiddlerError: the prompt is not text, is far longer than the context, has no tokens, or has
            a token outside the embedding.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of another encoding, which Python decodes as lone surrogates
        raise FiddlerError(f"{where} is not UTF-8 text") from None
    # encoding it would take gigabytes
    if len(text) > context and len(text) > context * max(
        map(len, tokenizer.get_vocab()), default=1
    ):
        raise FiddlerError(
            f"{where} has {len(text)} characters, more than the context of {context} tokens can"
            " hold; shorten it"
        )
    with library_errors(f"{where}: the model's tokenizer fails", "change or remove it"):
        ids = tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
    if not ids:
        raise FiddlerError(f"{where} has no tokens; remove it or write another")
    unknown = next(
        (token for token in ids if vocab_size is not None and not 0 <= token < vocab_size), None
    )
    if unknown is not None:
        raise FiddlerError(
            f"{where} contains the token {tokenizer.convert_ids_to_tokens(unknown)!r}, number"
            f" {unknown}, but the model's embedding has {vocab_size} rows; remove it"
        )
    return ids


class TextStream:
    """Decodes the tokens of an answer as they are generated.

    The pieces join to the text of the answer decoded at once, after its prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int]):
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._answer: list[int] = []
        self._held: list[int] = []
        self._sent = ""
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        # The stream starts with the prompt, because a token's text can depend on whether something
        # precedes it. A prompt that ends in a replacement character would look like an incomplete
        # character.
        streams = self._backend is not None and not _decoded(tokenizer, prompt).endswith("\ufffd")
        self._stream = DecodeStream(ids=prompt, skip_special_tokens=True) if streams else None

    def put(self, token: int) -> str:
        """The text that is now certain. Empty while a character is incomplete."""
        self._answer.append(token)
        self._held.append(token)
        if self._stream is None or BYTE_TOKEN.fullmatch(
            self._tokenizer.convert_ids_to_tokens(token) or ""
        ):
            # a run of byte tokens is decoded as a whole: one invalid byte invalidates the run
            return ""
        try:
            piece = self._stream.step(self._backend, self._held) or ""
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # the decoder changed earlier text: the rest follows at the end
            self._stream = None
            return ""
        self._held = []
        self._sent += piece
        return piece

    def finish(self) -> str:
        """The remaining text."""
        whole = answer_text(self._tokenizer, self._prompt, self._answer)
        return whole[len(os.path.commonprefix([whole, self._sent])) :]


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int]) -> str:
    """The text by which an answer continues its prompt, without special tokens."""
    before, both = (_decoded(tokenizer, ids) for ids in (prompt, [*prompt, *answer]))
    return both.removeprefix(before) if both.startswith(before) else _decoded(tokenizer, answer)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextmanager
def library_errors(what: str, remedy: str) -> Iterator[None]:
    """Converts any exception of a library on a checkpoint's file to a FiddlerError.

    The tokenizers library also panics, with exceptions that are not `Exception`.
    """
    try:
        yield
    except (FiddlerError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise FiddlerError(f"{what}: {reason(error)}; {remedy}") from None
