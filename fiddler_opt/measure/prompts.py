"""Reads prompts from text files, JSON and Hugging Face datasets, and encodes each of them.

Every entry becomes a prompt or an error that names it. Only blank lines are skipped, and nothing is
truncated.
"""

from pathlib import Path
from typing import Any

from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import cannot_read, is_file, is_folder, read_text, reason
from fiddler_run.system.parsing import parse_json

Prompt = str | list[dict[str, str]]  # text, or messages with "role" and "content"

# The first key with a value holds the prompt.
KEYS = ("prompt", "text", "messages", "conversations")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
TOOL_CALLS = ("tool_calls", "function_call")
SAVED_DATASET = ("dataset_dict.json", "state.json")


def name_sets(paths: list[Path]) -> dict[str, Path]:
    """Paths by the name of their set: the file's name or, if two are equal, the path.

    Raises:
        FiddlerError: a path is given twice.
    """
    names = [path.name for path in paths]
    sets = {path.name if names.count(path.name) == 1 else str(path): path for path in paths}
    if len(sets) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise FiddlerError(f"--prompts: {twice} is given twice; leave one out")
    return sets


def read_prompts(path: Path) -> list[Prompt]:
    """Reads the prompts of a file or a folder.

    A `.jsonl` file holds a JSON string or object per line, a `.json` file an array of them, any
    other file a text per line. A folder holds a dataset written by `save_to_disk`, of which all
    splits are read, or parquet files. An object or row holds a "prompt" or "text", "messages"
    (OpenAI; also in a "body", as in batch files) or "conversations" (ShareGPT). A message that only
    calls tools has empty text.

    Raises:
        FiddlerError: the path cannot be read, an entry is malformed, or there is no entry.
    """
    if is_folder(path):
        prompts = [_prompt(row, where) for where, row in _rows(path)]
    elif path.suffix == ".json":
        entries = parse_json(read_text(path), str(path), "put one object per line in a .jsonl file")
        if not isinstance(entries, list):
            raise FiddlerError(
                f"{path}: not an array; put the prompts between [ and ], or one a line in a .jsonl"
                " file"
            )
        prompts = [
            _prompt(entry, f"{path}: entry {number}") for number, entry in enumerate(entries, 1)
        ]
    else:
        # Not splitlines(): JSON strings may contain U+2028 and other characters that it treats as
        # line ends.
        text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
        lines = [
            (f"{path}:{number}", line)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
        if path.suffix == ".jsonl":
            prompts = [
                _prompt(parse_json(line, where, "write one JSON value per line"), where)
                for where, line in lines
            ]
        else:
            prompts = [line for _, line in lines]
    if not prompts:
        raise FiddlerError(f"{path}: holds no prompt; give at least one")
    return prompts


def encode_prompts(
    tokenizer, prompts: list[Prompt], context: int, origin: str, vocab_size: int | None = None
) -> list[list[int]]:
    """Encodes each prompt. `origin` names the prompts in errors.

    Messages go through the tokenizer's chat template. Without a template, their contents are joined
    by newlines.

    Args:
        context: the most tokens of a prompt.
        vocab_size: rows of the embedding. None: not checked.

    Returns:
        The token ids of each prompt.

    Raises:
        FiddlerError: a prompt is longer than `context`, has no tokens, or has a token outside the
            embedding; or the tokenizer or its chat template fails.
    """
    from fiddler_run.generation.text import chat_text, token_ids

    encoded = []
    for number, prompt in enumerate(prompts, 1):
        where = f"{origin}: prompt {number}"
        templated = not isinstance(prompt, str) and tokenizer.chat_template is not None
        if isinstance(prompt, str):
            text = prompt
        elif templated:
            text = chat_text(
                tokenizer, prompt, where, answer_follows=prompt[-1]["role"] != "assistant"
            )
        else:
            text = "\n".join(message["content"] for message in prompt)
        # Chat templates write the special tokens themselves.
        special_tokens = not templated
        ids = token_ids(tokenizer, text, context, vocab_size, where, special_tokens=special_tokens)
        if len(ids) > context:
            raise FiddlerError(
                f"{where} has {len(ids)} tokens, more than the context of {context}; shorten it"
            )
        encoded.append(ids)
    return encoded


def _prompt(entry: Any, where: str) -> Prompt:
    """The prompt in a JSON value or a dataset row."""
    if isinstance(entry, dict):
        if isinstance(entry.get("body"), dict):
            return _prompt(entry["body"], where)
        entry = next((entry[key] for key in KEYS if entry.get(key)), None)
        if isinstance(entry, list):
            messages = [
                _message(message, f"{where}: message {number}")
                for number, message in enumerate(entry, 1)
            ]
            if any(message["content"].strip() for message in messages):
                return messages
    if not isinstance(entry, str) or not entry.strip():
        raise FiddlerError(f"{where}: no text; give a string, or an object with {_listed(KEYS)}")
    return _utf8(entry, where)


def _message(message: Any, where: str) -> dict[str, str]:
    """Converts an OpenAI or ShareGPT message ("from", "value") to "role" and "content".

    Parts of the content are joined by newlines.
    """
    fields = message if isinstance(message, dict) else {}
    role = fields.get("role") or fields.get("from")
    content = (
        fields["value"]
        if fields.get("content") is None and "value" in fields
        else fields.get("content")
    )
    if content is None and any(fields.get(key) for key in TOOL_CALLS):
        content = ""
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise FiddlerError(
                f"{where}: a part of its content is not text, which is all that the model reads;"
                " remove it"
            )
        content = "\n".join(parts)
    if not isinstance(role, str) or not isinstance(content, str):
        raise FiddlerError(
            f'{where}: needs a "role" and a "content", or a "from" and a "value", each of them text'
        )
    return {"role": SHAREGPT_ROLES.get(role, role), "content": _utf8(content, where)}


def _utf8(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a character, such as "\ud83d"
        half = ascii(text[error.start]).strip("'")
        raise FiddlerError(
            f"{where}: not UTF-8 text: {half} is half of a character; remove it"
        ) from None
    return text


def _rows(folder: Path) -> list[tuple[str, dict]]:
    """The rows of a folder's dataset, each with its place for errors.

    Rows hold only the columns that can contain a prompt.
    """
    saved = any(is_file(folder / name) for name in SAVED_DATASET)
    try:
        files = [] if saved else sorted(folder.rglob("*.parquet"))
    except OSError as error:
        raise cannot_read(folder, error) from None
    if not saved and not files:
        raise FiddlerError(
            f"{folder}: neither a dataset written by `save_to_disk` nor a folder with parquet"
            " files; name a file or such a folder"
        )
    try:
        from datasets import DatasetDict, load_from_disk
        from pyarrow import parquet
    except ImportError:
        raise FiddlerError(
            f"{folder}: reading a dataset needs the package `datasets`: pip install datasets"
        ) from None
    tables: dict[Path, list[dict]] = {}
    try:
        if saved:
            dataset = load_from_disk(str(folder))
            splits = dataset.items() if isinstance(dataset, DatasetDict) else [("", dataset)]
            for name, split in splits:
                tables[folder / name] = split.select_columns(
                    _prompt_columns(folder / name, split.column_names)
                ).to_list()
        for file in files:
            columns = _prompt_columns(file, parquet.read_schema(file).names)
            tables[file] = parquet.read_table(file, columns=columns, partitioning=None).to_pylist()
    except FiddlerError:
        raise
    # a damaged folder raises KeyError, ValueError, OSError, ArrowException and others
    except Exception as error:
        raise FiddlerError(
            f"{folder}: cannot read the dataset: {reason(error)}; write or download it again"
        ) from None
    return [
        (f"{place}: row {number}", row)
        for place, rows in tables.items()
        for number, row in enumerate(rows, 1)
    ]


def _prompt_columns(place: Path, names: list[str]) -> list[str]:
    columns = [name for name in names if name in (*KEYS, "body")]
    if not columns:
        raise FiddlerError(
            f"{place}: no column {_listed(KEYS)} among {', '.join(names)}; rename the one that"
            " holds the prompts"
        )
    return columns


def _listed(keys: tuple[str, ...]) -> str:
    return ", ".join(f'"{key}"' for key in keys[:-1]) + f' or "{keys[-1]}"'
