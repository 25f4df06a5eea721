"""Folders as users have them: what `check` passes loads and runs, what it refuses is refused by loading in the same words."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import DEMO, demo_shape, make_plan
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from fiddler_opt.model import ModelSpec
from fiddler_run import load_model
from fiddler_run.check import check_plan
from fiddler_run.errors import FiddlerError
from fiddler_run.generate import Options, generate
from fiddler_run.plan import ModelShape

SHARDS = sorted(path.name for path in DEMO.glob("*.safetensors"))
FIRST_EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


@pytest.fixture
def model(tmp_path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "model")


def plan_file(folder: Path, name: str = "./model", dtype: str = "bfloat16") -> Path:
    plan = make_plan(demo_shape(dtype), [[4] * 8] * 6)
    named = plan.model.model_copy(update={"name": name})
    path = folder / "plan.yaml"
    plan.model_copy(update={"model": named}).save(path)
    return path


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change) -> None:
    """Gives each shard the tensors that `change(name, tensor)` makes of its own: one name and tensor, or none."""
    index = folder / "model.safetensors.index.json"
    weight_map = {}
    for shard in SHARDS:
        changed = [change(name, tensor) for name, tensor in load_file(folder / shard).items()]
        tensors = {name: tensor.contiguous() for name, tensor in filter(None, changed)}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index.write_text(json.dumps({"weight_map": weight_map}))


def stack_experts(name: str, tensor: torch.Tensor):
    if ".experts." not in name:
        return name, tensor
    if not name.endswith("experts.0.w1.weight"):
        return None
    return name.replace("block_sparse_moe.experts.0.w1.weight", "mlp.experts.gate_up_proj"), tensor


def only(folder: Path, *names: str) -> None:
    """Removes all other weights, and puts these files in their place."""
    for path in folder.glob("model*"):
        path.unlink()
    for name in names:
        (folder / name).write_bytes(b"weights")


def texts(folder: Path, count: int = 24, dtype: str = "bfloat16", **options) -> str:
    loaded, tokenizer = load_model(plan_file(folder, dtype=dtype))
    pieces: list[str] = []
    generate(loaded, tokenizer, "Once upon a time", Options(count, **options), pieces.append)
    return "".join(pieces)


REFUSED = {
    "quantised by its config": (
        lambda model: change_json(model / "config.json", quantization_config={"quant_method": "awq"}),
        "quantization_config says that the weights are quantised ('awq'); name the original",
    ),
    "AWQ tensors": (
        lambda model: change_tensors(
            model, lambda name, t: (name.replace("w1.weight", "w1.qweight"), t) if ".experts." in name else (name, t)
        ),
        "these weights are quantised; name the original, unquantised checkpoint",
    ),
    "fp8 tensors": (
        lambda model: change_tensors(model, lambda name, t: (name, t.to(torch.float8_e4m3fn) if ".experts." in name else t)),
        "is F8_E4M3: quantised; name the original",
    ),
    "4-bit tensors": (
        lambda model: change_tensors(model, lambda name, t: (name, t.to(torch.uint8).view(-1, 1) if ".experts." in name else t)),
        "is U8: quantised; name the original",
    ),
    "stacked experts": (
        lambda model: change_tensors(model, stack_experts),
        "all experts of a layer lie in one tensor; name a checkpoint with a tensor for each expert",
    ),
    "weights wider than config.json says": (
        lambda model: change_tensors(model, lambda name, t: (name, t.float())),
        'is F32, which the plan\'s bfloat16 cannot hold without loss; set "dtype": "float32" in config.json and plan again',
    ),
    "half precision of the other kind": (
        lambda model: change_tensors(model, lambda name, t: (name, t.half())),
        'is F16, which the plan\'s bfloat16 cannot hold without loss; set "dtype": "float16" in config.json and plan again',
    ),
    "wider norms": (
        lambda model: change_tensors(model, lambda name, t: (name, t.float() if "norm" in name else t)),
        'is F32, which the plan\'s bfloat16 cannot hold without loss; set "dtype": "float32" in config.json and plan again',
    ),
    "PyTorch pickles": (lambda model: only(model, "pytorch_model.bin"), "but weights as PyTorch pickles; --model names"),
    "Mistral's own format": (
        lambda model: only(model, "consolidated.safetensors"),
        "but weights in Mistral's own format; --model names",
    ),
    "a GGUF file": (lambda model: only(model, "mixtral.Q4_K_M.gguf"), "but a GGUF file; --model names"),
    "no index": (
        lambda model: (model / "model.safetensors.index.json").unlink(),
        "but safetensors files without an index; --model names",
    ),
    "an index that leaves the folder": (
        lambda model: change_json(model / "model.safetensors.index.json", weight_map={FIRST_EXPERT: "../model/" + SHARDS[0]}),
        "is not the name of a file beside it; download the checkpoint again",
    ),
    "an index of numbers": (
        lambda model: change_json(model / "model.safetensors.index.json", weight_map={FIRST_EXPERT: 7}),
        "'7' is not the name of a file beside it",
    ),
    "an index without end": (
        lambda model: (model / "model.safetensors.index.json").write_text('{"weight_map":' * 100_000),
        "nested too deeply",
    ),
    "an adapter": (lambda model: (model / "adapter_config.json").write_text("{}"), "adapters are not applied; merge it"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer, neither"),
    "half a tokenizer": (
        lambda model: (model / "tokenizer.json").write_text((DEMO / "tokenizer.json").read_text()[:2000]),
        "tokenizer.json: cannot read: not JSON",
    ),
    "half a generation config": (lambda model: (model / "generation_config.json").write_text('{"eos_'), "cannot read: not JSON"),
    "a list as generation config": (lambda model: (model / "generation_config.json").write_text("[2]"), "expected a JSON object"),
    "end tokens that are none": (
        lambda model: change_json(model / "generation_config.json", eos_token_id="</s>"),
        "generation_config.json: eos_token_id: ",
    ),
    "a temperature that is none": (
        lambda model: change_json(model / "generation_config.json", do_sample=True, temperature=-1.0),
        "generation_config.json: temperature: ",
    ),
    "NaN where a number belongs": (
        lambda model: change_json(model / "config.json", rms_norm_eps=float("nan")),
        "config.json: cannot read: not JSON: NaN is no number",
    ),
    "a tokenizer of another model": (
        lambda model: (
            change_tensors(
                model, lambda name, t: (name, t[:300] if name in ("lm_head.weight", "model.embed_tokens.weight") else t)
            ),
            change_json(model / "config.json", vocab_size=300),
        ),
        "the tokenizer is not this model's: of a simple text, the prompt holds the token",
    ),
    "dynamic RoPE": (
        lambda model: change_json(
            model / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
        ),
        "rope_type 'dynamic' depends on the length of a whole prompt",
    ),
    "an odd head": (lambda model: change_json(model / "config.json", head_dim=7), "head_dim is 7, expected an even number"),
    "more experts a token than there are": (
        lambda model: change_json(model / "config.json", num_experts_per_tok=9),
        "num_experts_per_tok is more than num_local_experts",
    ),
    "layers beyond reason": (
        lambda model: change_json(model / "config.json", num_hidden_layers=10**9),
        "key 'num_hidden_layers' is 1000000000, more than any model's 1000",
    ),
    "a dtype that is none": (
        lambda model: change_json(model / "config.json", dtype=["bfloat16"]),
        "dtype ['bfloat16'] is not supported",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_check_and_loading_refuse_alike(tmp_path, model, kind):
    damage, words = REFUSED[kind]
    damage(model)
    problems, _ = check_plan(plan_file(tmp_path))
    assert problems
    assert words in problems[0]
    assert "\n" not in problems[0]
    with pytest.raises(FiddlerError) as refusal:
        load_model(plan_file(tmp_path))
    assert str(refusal.value) == problems[0]


@pytest.mark.parametrize(
    "kind", ["quantised by its config", "AWQ tensors", "fp8 tensors", "stacked experts", "dynamic RoPE", "layers beyond reason"]
)
def test_the_planner_refuses_them_too(model, kind):
    damage, words = REFUSED[kind]
    damage(model)
    with pytest.raises(FiddlerError) as refusal:
        ModelSpec.load(str(model))
    assert words in str(refusal.value)


HARMLESS = {
    "stop strings": {"stop_strings": ["rabbit"]},
    "several sequences": {"num_return_sequences": 2, "do_sample": True},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "dictionaries": {"return_dict_in_generate": True, "output_scores": True},
    "no cache": {"use_cache": False},
    "another cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "length_penalty": 2.0},
    "a time limit": {"max_time": 0.0},
    "guidance": {"guidance_scale": 3.0},
    "forced tokens": {"forced_bos_token_id": 5, "forced_eos_token_id": 7, "suppress_tokens": [1, 2]},
    "lengths": {"max_length": 3, "min_length": 200, "max_new_tokens": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "kinds of no key": {"assistant_early_exit": "x", "watermarking_config": 3, "compile_config": []},
}


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_flags_and_plan_decide_what_is_generated(tmp_path, model, kind, where):
    expected = texts(tmp_path)
    change_json(model / where, **HARMLESS[kind])
    assert check_plan(plan_file(tmp_path))[0] == []
    assert texts(tmp_path) == expected
    beams = texts(tmp_path, num_beams=2)
    assert len(beams) > 10


def test_what_does_not_count_is_told(tmp_path, model):
    change_json(model / "generation_config.json", no_repeat_ngram_size=3, suppress_tokens=[1], _from_model_config=True)
    _, notes = check_plan(plan_file(tmp_path))
    assert any(
        note.endswith("generation_config.json: not used: no_repeat_ngram_size, suppress_tokens; flags decide") for note in notes
    )


def test_values_of_old_files_that_mean_nothing(tmp_path, model):
    expected = texts(tmp_path)
    change_json(model / "generation_config.json", pad_token_id=-1, do_sample=False, temperature=0.0)
    assert check_plan(plan_file(tmp_path))[0] == []
    assert texts(tmp_path) == expected


def test_weights_that_are_no_numbers(tmp_path, model):
    """They are found by the first token, in greedy decoding, too."""
    change_tensors(model, lambda name, t: (name, t * float("nan") if name == "model.norm.weight" else t))
    assert check_plan(plan_file(tmp_path))[0] == []
    for options in ({}, {"temperature": 1.0}):
        with pytest.raises(FiddlerError, match="the model's logits are no numbers; check its weights"):
            texts(tmp_path, **options)


def test_one_wrong_value_is_one_problem(tmp_path, model):
    """Though the tokenizer's class reads config.json as well."""
    change_json(model / "config.json", initializer_range=True)
    problems, _ = check_plan(plan_file(tmp_path))
    assert len(problems) == 1
    assert "config.json: transformers cannot use it" in problems[0]


def test_a_folder_for_experts_on_disk_that_does_not_exist(tmp_path):
    plan = make_plan(demo_shape("bfloat16"), [[0] * 8] * 6, on_disk=[[1] * 8] * 6)
    with pytest.raises(FiddlerError, match="none: no such folder for the experts that are to lie on disk"):
        load_model(plan, DEMO, disk_folder=tmp_path / "none")


def test_the_tokenizers_own_end_token_ends_an_answer(tmp_path, model):
    assert "." in texts(tmp_path)
    change_json(model / "tokenizer_config.json", eos_token=".")
    text = texts(tmp_path)
    assert len(text) > 3
    assert "." not in text
    loaded, _ = load_model(plan_file(tmp_path))
    full_stop = loaded.generation_config.eos_token_id
    assert full_stop[0] == 2
    assert len(full_stop) == 2


def test_end_tokens_of_config_json_count_without_a_generation_config(tmp_path, model):
    (model / "generation_config.json").unlink()
    change_json(model / "config.json", eos_token_id=[5, 9])
    loaded, _ = load_model(plan_file(tmp_path))
    assert loaded.generation_config.eos_token_id == [2, 5, 9]


def test_refinements_of_sampling_count_where_there_is_sampling(tmp_path, model, caplog):
    exact = {"dtype": "float32"}  # in bfloat16, two tokens may be the likeliest
    greedy = texts(tmp_path, **exact)
    assert texts(tmp_path, temperature=1.5, seed=1, **exact) != greedy
    for do_sample in (True, False):
        change_json(model / "generation_config.json", top_k=1, do_sample=do_sample, temperature=0.3)
        assert texts(tmp_path, **exact) == greedy
        assert texts(tmp_path, temperature=1.5, seed=1, **exact) == greedy  # of one token there is no choice
    assert "generation flags" not in caplog.text


def test_a_second_file_of_all_weights_is_not_read(tmp_path, model):
    expected = texts(tmp_path)
    names = {name: tensor for shard in SHARDS for name, tensor in load_file(model / shard).items()}
    noise = {name: torch.randn_like(tensor) * 0.02 for name, tensor in names.items()}
    save_file(noise, model / "model.safetensors", metadata={"format": "pt"})
    problems, notes = check_plan(plan_file(tmp_path))
    assert problems == []
    assert any("model.safetensors: not read, since model.safetensors.index.json names other files" in note for note in notes)
    assert texts(tmp_path) == expected


def test_all_weights_are_those_of_the_files(random_checkpoint):
    """Tied or not, in another dtype or not: what transformers loads."""
    for overrides in ({}, {"tie_word_embeddings": True}, {"head_dim": 16}):
        folder, shape = random_checkpoint(**overrides)
        loaded, _ = load_model(make_plan(shape, [[0] * 8] * 2), folder)
        stock = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        ours = loaded.state_dict()
        assert set(ours) == {name for name in stock if ".experts." not in name}
        assert all(torch.equal(tensor.cpu(), stock[name]) for name, tensor in ours.items())
        assert torch.equal(loaded.model.rotary_emb.inv_freq.cpu(), MixtralForCausalLM(loaded.config).model.rotary_emb.inv_freq)


def test_a_config_without_a_dtype(tmp_path, model):
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.load(str(model))
    assert (spec.shape.dtype, spec.note) == ("bfloat16", None)  # that of the weights beside it
    only(model)
    spec = ModelSpec.load(str(model))
    assert spec.shape.dtype == "bfloat16"
    assert spec.note.endswith("config.json names no dtype: bfloat16 is assumed")


def test_defaults_are_those_of_transformers(model):
    from transformers import MixtralConfig

    from fiddler_run.model_config import DEFAULTS

    stock = MixtralConfig()
    assert {key: getattr(stock, key) for key in DEFAULTS} == DEFAULTS
    config = json.loads((model / "config.json").read_text())
    config.update(num_attention_heads=16)
    with pytest.raises(FiddlerError, match="key 'num_key_value_heads' is None"):  # transformers refuses it as well
        ModelSpec.from_config({**config, "num_key_value_heads": None}, "m", "here")
    del config["num_key_value_heads"], config["max_position_embeddings"]
    spec = ModelSpec.from_config(config, "m", "here")
    assert spec.sizes.num_key_value_heads == stock.num_key_value_heads
    assert spec.max_position_embeddings == stock.max_position_embeddings


def hub_cache(root: Path, monkeypatch, leave_out: tuple[str, ...] = (), unfetched: tuple[str, ...] = ()) -> Path:
    """A cache that holds the demo under the id someone/tiny, with links as the hub's client makes them; the snapshot's folder.

    `unfetched`: names of files that the model has on the hub, of which the client knows, but which it has not fetched.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    cache = root / "models--someone--tiny"
    snapshot = cache / "snapshots" / commit
    for folder in (cache / "refs", cache / "blobs", cache / "trees", snapshot):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    sizes = {}
    for path in DEMO.iterdir():
        if path.is_file() and path.name not in leave_out and path.suffix != ".py":
            blob = cache / "blobs" / f"blob-{path.name}"
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(blob)
            sizes[path.name] = path.stat().st_size
    files = {name: {"size": size, "blob_id": f"blob-{name}"} for name, size in {**sizes, **dict.fromkeys(unfetched, 9)}.items()}
    (cache / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    return snapshot


UNFETCHED = (".gitattributes", "NOTES.md", "consolidated.safetensors", "params.json")


def test_a_model_of_the_hub_is_checked_and_loaded_without_what_it_does_not_need(tmp_path, monkeypatch):
    folder = hub_cache(tmp_path, monkeypatch, unfetched=UNFETCHED)
    plan = plan_file(tmp_path, "someone/tiny")
    problems, notes = check_plan(plan)
    assert problems == []
    assert not any("not here" in note for note in notes)
    assert load_model(plan)[1] is not None
    (folder / SHARDS[1]).resolve().write_bytes(b"x")
    problems, _ = check_plan(plan)
    assert len(problems) == 1
    assert "damaged or cut off" in problems[0]
    with pytest.raises(FiddlerError) as refusal:
        load_model(plan)
    assert str(refusal.value) == problems[0]


def test_a_model_of_the_hub_that_is_not_all_here(tmp_path, monkeypatch):
    hub_cache(tmp_path, monkeypatch, leave_out=(SHARDS[2],), unfetched=(SHARDS[2],))
    plan = plan_file(tmp_path, "someone/tiny")
    problems, notes = check_plan(plan)
    assert problems == []
    assert notes[0].startswith("the weights of someone/tiny are not here, or not all of them")
    with pytest.raises(FiddlerError, match="someone/tiny: not a folder, and not to be had from the Hugging Face hub"):
        load_model(plan)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixtral.Q4_K_M.gguf", "a GGUF file; --model takes a checkpoint folder"),
        ("weights.bin", "a file; --model takes a checkpoint folder"),
        ("x" * 300, "cannot read: File name too long"),
        ("a\0b", "cannot read: "),
    ],
)
def test_names_that_are_no_folder(tmp_path, name, words):
    if len(name) < 100 and "\0" not in name:
        (tmp_path / name).write_bytes(b"GGUF")
    problems, _ = check_plan(plan_file(tmp_path), str(tmp_path / name))
    assert len(problems) == 1
    assert words in problems[0]


def test_a_folder_whose_name_is_no_text(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "caf\udce9")
    problems, _ = check_plan(plan_file(tmp_path), str(folder))
    assert len(problems) == 1
    assert problems[0].endswith("the folder's name is not UTF-8, so that transformers cannot read it; rename it")


@pytest.mark.parametrize(
    "change",
    [
        {"workload": {"max_seq_len": 10**9}},
        {"workload": {"num_beams": 10**9}},
        {"workload": {"batch_size": 10**6, "max_seq_len": 10**6}},
        {"gpu_memory_bytes": {"staging": 10**15, "total": 2 * 10**15}},
    ],
    ids=str,
)
def test_memory_that_a_plan_does_not_count(tmp_path, model, change):
    """Edited by hand: a context, beams or a staging ring that no memory holds is found before loading."""
    plan = make_plan(demo_shape("bfloat16"), [[4] * 8] * 6)
    updates = {key: getattr(plan, key).model_copy(update=values) for key, values in change.items()}
    updates["model"] = plan.model.model_copy(update={"name": "./model"})
    path = tmp_path / "plan.yaml"
    plan.model_copy(update=updates).save(path)
    problems, _ = check_plan(path)
    assert len(problems) == 1
    with pytest.raises(FiddlerError) as refusal:
        load_model(path)
    assert str(refusal.value) == problems[0]


def test_no_shape_takes_all_memory():
    """A list of a billion rows would."""
    with pytest.raises(ValueError, match="num_layers"):
        ModelShape(**{**demo_shape().model_dump(), "num_layers": 10**9})
