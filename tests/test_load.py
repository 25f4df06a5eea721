"""Loading, converting and deleting a model."""

import gc
import random
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan, random_plan
from models import open_checkpoint

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError
from fiddler_run.loading.load import _warm_up
from fiddler_run.weights.store import ExpertStore


def test_deleted_model_frees_its_memory():
    model, tokenizer = load_model(random_plan(demo_shape("bfloat16"), random.Random(2)), DEMO)
    with torch.no_grad():
        model(**tokenizer("Once", return_tensors="pt").to(model.device))
    arena = weakref.ref(model.store._host_arena)
    del model
    gc.collect()
    assert arena() is None


def test_loading_can_be_interrupted():
    plan = make_plan(demo_shape("bfloat16"), [[0] * 8] * 6)
    checkpoint = open_checkpoint(DEMO)
    read = []

    class Counting:
        def blocks(self, layer, expert, encoding):
            return None

        def expert(self, layer, expert):
            read.append((layer, expert))
            time.sleep(0.01)
            return checkpoint.expert(layer, expert)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ExpertStore(plan, torch.device("cpu"), Path()).load(Counting(), interrupt)
    assert len(read) < 48


def test_conversion_to_another_dtype_or_device_is_refused(device):
    model, tokenizer = load_model(random_plan(demo_shape("bfloat16"), random.Random(3)), DEMO)
    for convert in (model.float, model.half, model.double, lambda: model.to(torch.float32)):
        with pytest.raises(
            FiddlerError, match=r"the experts are bfloat16 and cannot be converted; for torch.float"
        ):
            convert()
    with pytest.raises(FiddlerError, match="a loaded model cannot be moved"):
        model.to("meta")
    model.bfloat16()
    model.to(device)
    assert model(**tokenizer("Once", return_tensors="pt").to(device)).logits.isfinite().all()


def test_model_of_the_shortest_context_is_warmed_up():
    """The context holds one prompt token and one output token."""
    plan = make_plan(demo_shape("bfloat16"), [[4] * 8] * 6)
    workload = plan.workload.model_copy(
        update={"prompt_tokens": 1, "output_tokens": 1, "max_seq_len": 2, "num_beams": 1}
    )
    model, _ = load_model(plan.model_copy(update={"workload": workload}), DEMO)
    _warm_up(model)
    assert model.engine.resources.traffic.needed_blocks > 0
