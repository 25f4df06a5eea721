"""Settings of the whole process are restored, and forked processes are refused."""

import os
import random
import threading
import time

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan, random_plan
from models import answer
from transformers import StoppingCriteria

from fiddler_run import load_model
from fiddler_run.kernels.library import library
from fiddler_run.kernels.pool import shared_pool
from fiddler_run.system import process_settings

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
# Python warns of a fork while there are other threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def result_in_a_fork(function) -> str:
    """Returns the result of `function()` in a forked process, which must exit with status 0."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = function()
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writing, result.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        result = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return result


@needs_fork
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forked_process_is_refused(dtype, place):
    """A fork lacks the threads that compute and the thread that may hold a lock."""
    plan = random_plan(demo_shape(dtype), random.Random(3))
    model, tokenizer = place(plan)
    result = result_in_a_fork(lambda: answer(model, tokenizer, "Once"))
    assert result.startswith("FiddlerError: this model was loaded by process ")
    assert result.endswith('by the method "spawn", and load the model there')


@needs_fork
@pytest.mark.skipif(library() is None, reason="needs the compiled CPU kernel")
def test_forked_process_makes_its_own_pool():
    def settings_and_pool() -> str:
        with process_settings.while_running(1):
            return str(shared_pool(2, 20, False) is pool)

    pool = shared_pool(2, 20, False)
    assert shared_pool(2, 20, False) is pool
    with process_settings._lock:  # as another thread may hold it
        assert result_in_a_fork(settings_and_pool) == "False"


def test_settings_of_the_process_are_restored(monkeypatch):
    before = torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()
    plan = make_plan(demo_shape("bfloat16"), [[4] * 8] * 6, threads=2)
    model, tokenizer = load_model(plan, DEMO)
    assert (torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()) == before
    seen = []

    class Look(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append((torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    monkeypatch.setattr(model.session, "_cpu_threads", 2)  # a model this small would use 1
    answer(model, tokenizer, "Once", stopping_criteria=[Look()])
    assert set(seen) == {(2, False)}
    assert (torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()) == before


def test_little_work_is_not_divided_among_threads():
    assert process_settings.dense_threads(16, 83_902_464) == 16  # a layer of Mixtral-8x7B
    assert process_settings.dense_threads(16, 101_000) == 1  # of the demo model


def test_pytorch_leaves_the_cpu_to_the_experts_beside_a_gpu():
    threads = process_settings.dense_threads
    assert threads(16, 83_902_464, on_gpu=True, own_threads=True) == 1
    assert threads(16, 83_902_464, on_gpu=True) == 16  # PyTorch computes the experts
    assert threads(16, 83_902_464, own_threads=True) == 16  # and here, the dense layers


def test_turns_restore_the_settings_of_each_thread():
    """PyTorch's number of threads is a setting of each thread."""
    before = torch.get_num_threads()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    entered = threading.Event()
    left = threading.Event()
    found = []

    def first() -> None:
        with process_settings.while_running(before + 3):
            entered.set()
            time.sleep(0.05)
        found.append(torch.get_num_threads())
        left.set()

    def second() -> None:
        entered.wait()
        with process_settings.while_running(before + 2):
            left.wait()
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [before, before + 2, before]
    assert (torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()) == (before, cudnn)


def test_last_of_several_turns_restores_the_settings():
    before = torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()
    first, second = (
        process_settings.while_running(threads) for threads in (before[0] + 1, before[0] + 2)
    )
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    second.__exit__(None, None, None)
    assert (torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()) == before
