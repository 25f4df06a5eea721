"""Times all of a model but its experts: attention, router and norms of a layer, and what a step costs outside the layers."""

from collections.abc import Callable

import torch
from transformers import MixtralConfig

from fiddler_opt.bench_timing import medians_us, positive_us
from fiddler_opt.model import ModelSpec
from fiddler_run.arena import TORCH_DTYPES
from fiddler_run.model import DispatchedMixtral

PREFILL_TOKENS = (16, 128, 512)


@torch.inference_mode()
def time_dense(model: ModelSpec, device: torch.device) -> tuple[dict[int, float], dict[int, float]]:
    """Microseconds by tokens of one layer without its experts, and of a step outside the layers, through `generate()`.

    Two models, of one layer and of more, whose experts return their input: the difference is the layers'. 1 token is a
    decode step, more are a prompt.
    """
    more, steps, prompt = 5, 16, PREFILL_TOKENS[0]
    models = [_model_without_experts(model, layers, device) for layers in (1, more)]
    layer_us, head_us = {}, {}
    for tokens in (1, *PREFILL_TOKENS):
        if tokens == 1:
            calls = [_generation(each, prompt, new) for each in models for new in (1, 1 + steps)]
            times = medians_us(calls, device)
            small, large = (times[1] - times[0]) / steps, (times[3] - times[2]) / steps
        else:
            small, large = medians_us([_generation(each, tokens, 1) for each in models], device)
        layer_us[tokens] = positive_us((large - small) / (more - 1))
        head_us[tokens] = positive_us(small - layer_us[tokens])
    return layer_us, head_us


def _model_without_experts(spec: ModelSpec, num_layers: int, device: torch.device) -> DispatchedMixtral:
    config = MixtralConfig(**{**spec.config, "num_hidden_layers": num_layers})
    with torch.device("meta"):
        model = DispatchedMixtral(config)
    model = model.to(TORCH_DTYPES[spec.shape.dtype]).to_empty(device=device).eval().requires_grad_(False)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.uniform_(-0.02, 0.02)
    for experts in model.experts_modules():
        experts.dispatch = lambda hidden_states, top_k_index, top_k_weights: hidden_states
    return model


def _generation(model: DispatchedMixtral, prompt_tokens: int, new_tokens: int) -> Callable[[], object]:
    ids = torch.zeros((1, prompt_tokens), dtype=torch.long, device=model.device)
    arguments = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
