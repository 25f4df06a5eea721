"""Randomly damaged checkpoints and plans: check and loading run them or refuse them alike."""

import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
from conftest import make_plan

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.answer import generate
from fiddler_run.generation.sampling import Options
from fiddler_run.generation.text import SAMPLE
from fiddler_run.loading.check import check_plan

VALUES = [
    *(None, True, 0, -1, 1, 2, 7, 1.5, 1e300, -0.0, 10**30, math.nan, math.inf),
    *("", "x", "\u0000", [], {}, [1], {"a": 1}, [[[]]]),
]
SHARD = "model-00001-of-00001.safetensors"
JSON_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
]


@pytest.fixture(scope="module")
def whole(random_checkpoint) -> Path:
    """A folder with a small sharded checkpoint and a plan that runs it."""
    folder, shape = random_checkpoint()
    (folder / "model.safetensors").rename(folder / SHARD)
    names = json.loads(_header(folder / SHARD)).keys() - {"__metadata__"}
    index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(names), SHARD)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = make_plan(shape, [[1] * 8] * 2)
    named = plan.model.model_copy(update={"name": "."})
    plan.model_copy(update={"model": named}).save(folder / "plan.yaml")
    assert check_plan(folder / "plan.yaml")[0] == []
    return folder


def _header(shard: Path) -> bytes:
    content = shard.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    length = rng.randint(1, 40)
    return rng.choice(
        [
            content[:at],
            content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
            content[:at] + content[at + length :],
            content[:at] + content[at : at + length] * 2 + content[at + length :],
            content[:at] + bytes(rng.randrange(256) for _ in range(length)) + content[at:],
            b"\xef\xbb\xbf" + content,
            b"",
            content[:at] + b"[" * 20_000 + content[at:],
        ]
    )


def mutate_json(rng: random.Random, data):
    """The same value with one part changed, removed, renamed, or swapped with another part."""
    places = []

    def walk(value, depth: int = 0) -> None:
        if isinstance(value, (dict, list)) and value:
            places.append(value)
            # A sample of a large table, which would otherwise hold nearly all places.
            children = list(value.values() if isinstance(value, dict) else value)
            for child in children if len(children) < 60 else rng.sample(children, 5):
                walk(child, depth + 1)

    walk(data)
    holder = rng.choice(places)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = rng.choice(keys)
    other = rng.choice(keys)
    kind = rng.choice(["value", "value", "value", "remove", "rename", "exchange", "number"])
    if kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice(["x", str(key) + "s", str(key).upper()])] = holder.pop(key)
    elif kind == "exchange":
        mine = holder[key]
        holder[key] = holder[other]
        holder[other] = mine
    elif kind == "number" and type(holder[key]) in (int, float):
        holder[key] = rng.choice(
            [holder[key] + 1, holder[key] * 2, -holder[key], holder[key] * 10**9]
        )
    else:
        holder[key] = rng.choice(VALUES)
    return data


def mutate_folder(rng: random.Random, folder: Path, kind: str) -> None:
    shard = folder / SHARD
    if kind == "json":
        path = folder / rng.choice(JSON_FILES)
        if rng.random() < 0.7:
            path.write_text(json.dumps(mutate_json(rng, json.loads(path.read_text()))))
        else:
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    elif kind == "shard":
        header = _header(shard)
        rest = shard.read_bytes()[8 + len(header) :]
        other = json.dumps(mutate_json(rng, json.loads(header))).encode()
        header = rng.choice(
            [header, other, other, mutate_bytes(rng, header), mutate_bytes(rng, header)]
        )
        length = (
            len(header) if rng.random() < 0.8 else rng.choice([0, 2**63, 10**9, len(header) + 1])
        )
        at = rng.randrange(len(rest))
        data = rng.choice([rest, rest, rest[:at], rest[:at] + b"\xff" + rest[at + 1 :]])
        shard.write_bytes(length.to_bytes(8, "little") + header + data)
    elif kind == "file":
        path = folder / rng.choice([*JSON_FILES, shard.name])
        path.unlink()
        replacement = rng.choice(["gone", "a folder", "a loop", "another file"])
        if replacement == "a folder":
            path.mkdir()
        elif replacement == "a loop":
            path.symlink_to(path.name)
        elif replacement == "another file":
            shutil.copy(folder / "plan.yaml", path)
    else:
        plan = folder / "plan.yaml"
        plan.write_bytes(
            mutate_bytes(rng, plan.read_bytes())
            if rng.random() < 0.5
            else mutate_line(rng, plan.read_text()).encode()
        )


def mutate_line(rng: random.Random, text: str) -> str:
    """A plan with a number replaced, a line removed or doubled, or a YAML trick inserted."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    trick = rng.choice(
        [
            "!!int ''",
            "&a [*a]",
            "!!set {x}",
            "2026-13-45",
            "1:2:3:4.5",
            "0x" + "f" * 5000,
            ".inf",
            "~",
            "[" * 50,
            "? x",
        ]
    )
    number = rng.choice(
        ["-1", "0", "1", "7", "999999999999", "1e308", "5e-324", "9" * 500, "1.5", "true", "''"]
    )
    digits = [i for i, line in enumerate(lines) if any(c.isdigit() for c in line.partition(":")[2])]
    target = rng.choice(digits)
    key, _, value = lines[target].partition(":")
    words = value.split(" ")
    numeric = [i for i, word in enumerate(words) if word.strip("{}[],").replace(".", "").isdigit()]
    kind = rng.choice(["number", "number", "number", "trick", "remove", "double"])
    if kind == "number" and numeric:
        place = rng.choice(numeric)
        words[place] = words[place].replace(words[place].strip("{}[],"), number)
        lines[target] = f"{key}:{' '.join(words)}"
    elif kind == "trick":
        lines[target] = f"{key}: {trick}"
    elif kind == "remove":
        del lines[at]
    else:
        lines.insert(at, lines[at])
    return "\n".join(lines)


def one_line(text: str) -> bool:
    return bool(text) and "\n" not in text


CASES = {"json": 12, "shard": 12, "file": 8, "plan": 8}  # times FUZZ_TIMES


@pytest.mark.parametrize("kind", CASES)
def test_damaged_folder_runs_or_is_refused_in_one_line(whole, tmp_path, kind):
    ran = 0
    for seed in range(CASES[kind] * int(os.environ.get("FUZZ_TIMES", "1"))):
        rng = random.Random(f"{kind} {seed}")
        folder = tmp_path / "copy"
        shutil.copytree(whole, folder, copy_function=os.link if kind == "plan" else shutil.copy)
        if kind == "plan":  # hard-linked, so it must be replaced
            (folder / "plan.yaml").unlink()
            shutil.copy(whole / "plan.yaml", folder)
        mutate_folder(rng, folder, kind)
        problems, notes = check_plan(folder / "plan.yaml")
        assert all(map(one_line, [*problems, *notes])), (kind, seed, problems)
        if problems:
            with pytest.raises(FiddlerError) as refusal:
                load_model(folder / "plan.yaml")
            assert str(refusal.value) == problems[0], (kind, seed)
        elif not any("not here" in note for note in notes):
            model, tokenizer = load_model(folder / "plan.yaml")
            options = Options(max_new_tokens=3)
            measured = generate(model, tokenizer, SAMPLE, options, lambda text: None)
            assert measured.output_tokens >= 1, (kind, seed)
            ran += 1
        shutil.rmtree(folder)
    assert ran  # some damage does no harm
