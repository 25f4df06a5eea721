"""The bytes of each token, by the library llguidance."""

import threading
import weakref

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

from fiddler_run.generation.text import library_errors

_found: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, LLTokenizer] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_tokens: list[int]
) -> LLTokenizer:
    """llguidance's form of a tokenizer. Made once, which takes about a second.

    Args:
        vocab_size: of the logits.
        end_tokens: end a text.

    Raises:
        FiddlerError: the tokenizer has no fast implementation.
    """
    with _lock:
        if tokenizer not in _found:
            with library_errors("this model's tokenizer", "use neither logprobs nor JSON formats"):
                _found[tokenizer] = from_tokenizer(tokenizer, vocab_size, end_tokens)
        return _found[tokenizer]
