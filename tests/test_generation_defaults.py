"""The values used from generation_config.json and config.json; flags and plan set the rest."""

import shutil
from pathlib import Path

import pytest
from conftest import make_plan
from damage import change_json, write_plan
from seeds import spread

from fiddler_run import load_model
from fiddler_run.generation.answer import generate
from fiddler_run.generation.sampling import Options
from fiddler_run.loading.check import check_plan

GENERATION = "generation_config.json"
IGNORED = {
    "stop strings": {"stop_strings": ["e"]},
    "several sequences": {"num_return_sequences": 2, "do_sample": True},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "dictionary output": {"return_dict_in_generate": True, "output_scores": True},
    "no cache": {"use_cache": False},
    "another cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "length_penalty": 2.0},
    "a time limit": {"max_time": 0.0},
    "guidance": {"guidance_scale": 3.0},
    "forced tokens": {"forced_bos_token_id": 5, "forced_eos_token_id": 7, "suppress_tokens": [1]},
    "lengths": {"max_length": 3, "min_length": 200, "max_new_tokens": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "values of wrong types": {
        "assistant_early_exit": "x",
        "watermarking_config": 3,
        "compile_config": [],
    },
}


def generated(folder: Path, count: int = 12, dtype: str = "bfloat16", **options: object) -> str:
    """Writes a plan into `folder`; returns the answer of the model next to it."""
    loaded, tokenizer = load_model(write_plan(folder, dtype=dtype))
    pieces: list[str] = []
    generate(loaded, tokenizer, "Once upon a time", Options(count, **options), pieces.append)
    return "".join(pieces)


@pytest.fixture(scope="module")
def small(random_checkpoint, tmp_path_factory) -> Path:
    """A folder with a small model and its plan."""
    folder, shape = random_checkpoint()
    plan = make_plan(shape, [[1] * 8] * 2, block_neurons=96)
    named = plan.model.model_copy(update={"name": "./model"})
    root = tmp_path_factory.mktemp("small")
    shutil.copytree(folder, root / "model")
    plan.model_copy(update={"model": named}).save(root / "plan.yaml")
    return root


def answers(folder: Path) -> list[str]:
    """The answers with one beam and with two."""
    loaded, tokenizer = load_model(folder / "plan.yaml")
    found = []
    for beams in (1, 2):
        pieces: list[str] = []
        options = Options(max_new_tokens=8, num_beams=beams)
        generate(loaded, tokenizer, "Once upon a time", options, pieces.append)
        found.append("".join(pieces))
    return found


@pytest.fixture(scope="module")
def expected(small) -> list[str]:
    found = answers(small)
    assert all(len(text) > 5 for text in found)
    assert "e" in found[0]
    return found


@pytest.mark.parametrize("kind", spread(IGNORED, 4))
@pytest.mark.parametrize("where", [GENERATION, "config.json"])
def test_flags_and_plan_decide_what_is_generated(small, expected, tmp_path, kind, where):
    folder = shutil.copytree(small, tmp_path / "copy")
    change_json(folder / "model" / where, **IGNORED[kind])
    assert check_plan(folder / "plan.yaml")[0] == []
    assert answers(folder) == expected


def test_ignored_values_are_noted(tmp_path, model):
    change_json(
        model / "generation_config.json",
        no_repeat_ngram_size=3,
        suppress_tokens=[1],
        _from_model_config=True,
    )
    _, notes = check_plan(write_plan(tmp_path))
    assert any(
        note.endswith(
            "generation_config.json: not used: no_repeat_ngram_size, suppress_tokens; flags decide"
        )
        for note in notes
    )


def test_meaningless_values_of_old_files_are_ignored(tmp_path, model):
    expected = generated(tmp_path)
    change_json(model / "generation_config.json", pad_token_id=-1, do_sample=False, temperature=0.0)
    assert check_plan(write_plan(tmp_path))[0] == []
    assert generated(tmp_path) == expected


def test_end_token_of_the_tokenizer_ends_an_answer(tmp_path, model):
    assert "." in generated(tmp_path)
    change_json(model / "tokenizer_config.json", eos_token=".")
    text = generated(tmp_path)
    assert len(text) > 3
    assert "." not in text
    loaded, _ = load_model(write_plan(tmp_path))
    full_stop = loaded.generation_config.eos_token_id
    assert full_stop[0] == 2
    assert len(full_stop) == 2


def test_end_tokens_default_to_those_of_config_json(tmp_path, model):
    (model / "generation_config.json").unlink()
    change_json(model / "config.json", eos_token_id=[5, 9])
    loaded, _ = load_model(write_plan(tmp_path))
    assert loaded.generation_config.eos_token_id == [2, 5, 9]


def test_sampling_options_apply_only_when_sampling(tmp_path, model, caplog):
    exact = {"count": 8, "dtype": "float32"}  # bfloat16 logits may tie
    greedy = generated(tmp_path, **exact)
    assert generated(tmp_path, temperature=1.5, seed=1, **exact) != greedy
    for do_sample in (True, False):
        change_json(model / "generation_config.json", top_k=1, do_sample=do_sample, temperature=0.3)
        assert generated(tmp_path, **exact) == greedy
        # top_k=1 leaves one choice
        assert generated(tmp_path, temperature=1.5, seed=1, **exact) == greedy
    assert "generation flags" not in caplog.text
