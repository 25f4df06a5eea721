"""The models that tests compare: stock transformers, and ours with a plan's placement."""

from pathlib import Path

import torch
from transformers import MixtralForCausalLM

from fiddler_run.generation.model import PlannedModel
from fiddler_run.models.config import ModelConfig
from fiddler_run.models.dispatched import skeleton
from fiddler_run.models.tensor_map import TensorMap
from fiddler_run.plan.schema import Plan
from fiddler_run.weights.checkpoint import Checkpoint
from fiddler_run.weights.store import ExpertStore
from fiddler_run.weights.tensor_files import TensorFiles


class Stock:
    """A checkpoint's model in stock transformers, in float32, with its answers cached.

    It uses eager experts: the default implementation refuses sizes that are no multiple of 16
    bytes.
    """

    def __init__(self, folder: Path, device: torch.device):
        model = MixtralForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        self.model = model.to(device).eval()
        self._answers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        key = f"{ids.tolist()} {mask.tolist()}"
        if key not in self._answers:
            self._answers[key] = self.model(ids, attention_mask=mask).logits
        return self._answers[key]

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        seed: int = 0,
        **arguments: object,
    ) -> torch.Tensor:
        """The tokens for these arguments of `generate()`, drawn with `seed` if they are sampled."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        key = f"{input_ids.tolist()} {attention_mask.tolist()} {seed} {sorted(arguments.items())}"
        if key not in self._answers:
            torch.manual_seed(seed)
            self._answers[key] = self.model.generate(**inputs, **arguments)
        return self._answers[key]


def answer(model, tokenizer, text: str, new_tokens: int = 6, **arguments: object) -> str:
    """The text of `new_tokens` greedy tokens after a prompt."""
    encoded = tokenizer(text, return_tensors="pt").to(model.device)
    greedy = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    output = model.generate(**encoded, **greedy, pad_token_id=2, **arguments)
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :])


def move_experts(model: PlannedModel, plan: Plan, folder: Path) -> None:
    """Applies another plan to a loaded model; its experts are read from `folder`."""
    store = ExpertStore(plan, model.device, folder)
    store.load(open_checkpoint(folder))
    model.attach_experts(plan, store)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder."""
    files = TensorFiles(folder)
    model = skeleton(ModelConfig.read(folder / "config.json"), torch.float32)
    return Checkpoint(files, TensorMap(model, files))
