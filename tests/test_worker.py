"""The thread of the model: how it ends and fails; and the bytes of tokens."""

import pytest
from server import wait_until
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.answer import Request
from fiddler_run.generation.sampling import Options
from fiddler_run.generation.vocabulary import vocabulary
from fiddler_run.serving.worker import EndingError, Job, QueueFullError, Worker


class Panic(BaseException):
    """As a library in another language raises."""


def job(told: list) -> Job:
    return Job(Request([1], Options(1)), told.append)


@pytest.mark.parametrize("error", [FiddlerError("layer 3 is truncated"), Panic("panicked")])
def test_failed_load_refuses_jobs(error):
    def load(_):
        raise error

    worker = Worker(load, None, 2)
    told = []
    worker.submit(job(told))
    worker.start()
    worker.join()
    assert (worker.state, worker.error) == ("failed", error)
    assert [type(each) for each in told] == [EndingError]
    with pytest.raises(EndingError, match="the server is ending"):
        worker.submit(job(told))


def test_panic_in_an_answer_ends_all_jobs():
    """The thread must not die while the server says that it is ready."""
    worker = Worker(lambda _: None, None, 2)
    told = []

    def tell(event: object) -> None:
        told.append(event)
        if len(told) == 1:  # the model is None, which fails
            raise Panic

    worker.submit(Job(Request([1], Options(1)), tell))
    waiting = []
    worker.submit(job(waiting))
    with pytest.raises(QueueFullError):
        worker.submit(job([]))
    worker.start()
    worker.join()
    assert worker.state == "failed"
    assert type(told[-1]) is type(waiting[-1]) is EndingError


def test_stop_ends_loading():
    def load(on_bytes):
        while True:
            on_bytes(1)

    worker = Worker(load, None, 2)
    worker.start()
    wait_until(lambda: worker.loaded_bytes > 10)
    worker.stop()
    worker.join()
    assert worker.state == "loading"


def test_tokens_have_their_bytes():
    """Decoded alone, a token would lose its space, and a byte of a character its value."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁upon"]
    ids = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    known = vocabulary(tokenizer, len(names) + 3, [2])
    assert known.decode_bytes([ids["▁upon"]]) == b" upon"
    assert known.decode_bytes([ids["<0xC3>"]]) == b"\xc3"
    assert vocabulary(tokenizer, len(names) + 3, [2]) is known
