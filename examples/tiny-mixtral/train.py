"""Trains the demo checkpoint in this folder on a CPU: tokenizer, model, prompts and README tables.

`python train.py` overwrites the checkpoint next to it; about 15 minutes on two cores. Seeded, so
two runs on the same machine and library versions give the same weights.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from corpus import DOMAINS, documents

HERE = Path(__file__).parent
TRAIN_SEED = 1
HELD_OUT_SEED = 2
BALANCE = 0.02
VOCAB_SIZE = 768
SEQUENCE_TOKENS = 192


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer. Digits stay single, so that sums can be learned digit by
    digit.
    """
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Split(Regex(r"\d"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
    )


def config() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        router_aux_loss_coef=0.0,  # see balance_loss
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        use_cache=True,
    )


def sequences(tokenizer, domain: str, seed: int, count: int) -> torch.Tensor:
    """`count` documents of one domain, joined and cut: token ids [n, SEQUENCE_TOKENS]."""
    encoded = tokenizer([text + tokenizer.eos_token for text in documents(domain, seed, count)])[
        "input_ids"
    ]
    flat = torch.tensor([token for ids in encoded for token in ids])
    n = len(flat) // SEQUENCE_TOKENS
    return flat[: n * SEQUENCE_TOKENS].view(n, SEQUENCE_TOKENS)


def balance_loss(model, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The usual load-balancing loss, computed per layer.

    transformers' own loss combines all layers, which lets each layer rely on a few experts if other
    layers use the rest.
    """
    config = model.config
    losses = [
        load_balancing_loss_func((logits,), config.num_local_experts, config.num_experts_per_tok)
        for logits in router_logits
    ]
    return torch.stack(losses).mean()


def train(model, data: dict[str, torch.Tensor], steps: int, batch: int, peak_lr: float) -> None:
    """Trains with AdamW, linear warm-up and cosine decay.

    Every batch contains all domains, so that the balance loss leaves experts free to specialise.
    """
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=peak_lr,
        betas=(0.9, 0.98),
    )
    warmup = max(1, steps // 20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, steps - warmup, eta_min=peak_lr / 50
    )
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, 1.0, warmup)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [linear, cosine], [warmup])
    model.train()
    started = time.time()
    for step in range(1, steps + 1):
        parts = [rows[torch.randint(len(rows), (batch // len(data),))] for rows in data.values()]
        ids = torch.cat(parts)
        output = model(input_ids=ids, labels=ids, output_router_logits=True)
        loss = output.loss + BALANCE * balance_loss(model, output.router_logits)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(
                f"step {step}/{steps}  loss {output.loss.item():.3f} "
                f" {time.time() - started:.0f} s",
                flush=True,
            )


@torch.inference_mode()
def evaluate(model, tokenizer) -> None:
    """Prints README.md's tables: the loss per domain, and the busiest experts per layer and
    domain.
    """
    model.eval()
    losses = {}
    counts = {}
    for domain in DOMAINS:
        ids = sequences(tokenizer, domain, HELD_OUT_SEED, 400)[:64]
        output = model(input_ids=ids, labels=ids, output_router_logits=True)
        logits = output.logits[:, :-1].float().reshape(-1, VOCAB_SIZE)
        losses[domain] = torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1)).item()
        counts[domain] = [
            torch.bincount(
                router.topk(model.config.num_experts_per_tok).indices.flatten(),
                minlength=router.shape[-1],
            )
            for router in output.router_logits
        ]
    print("\n| domain | held-out loss (nats per token) |\n|---|---|")
    for domain, loss in losses.items():
        print(f"| {domain} | {loss:.3f} |")
    print("\n| layer | " + " | ".join(DOMAINS) + " |\n|---|" + "---|" * len(DOMAINS))
    for layer in range(model.config.num_hidden_layers):
        cells = []
        for domain in DOMAINS:
            share = counts[domain][layer] / counts[domain][layer].sum()
            top = share.topk(2)
            cells.append(
                ", ".join(
                    f"{e} ({100 * s:.0f} %)"
                    for e, s in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                )
            )
        print(f"| {layer} | " + " | ".join(cells) + " |")


def write_prompts() -> None:
    """Writes the first halves of held-out documents of each domain to prompts/.

    `fiddler-opt profile` records routing on them by default.
    """
    (HERE / "prompts").mkdir(exist_ok=True)
    for domain in DOMAINS:
        lines = [
            json.dumps({"prompt": text[: len(text) // 2]})
            for text in documents(domain, HELD_OUT_SEED, 16)
        ]
        (HERE / "prompts" / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--documents", type=int, default=12000, help="documents of each domain")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = train_tokenizer(
        [text for domain in DOMAINS for text in documents(domain, TRAIN_SEED, 3000)]
    )
    data = {
        domain: sequences(tokenizer, domain, TRAIN_SEED, arguments.documents) for domain in DOMAINS
    }
    print({domain: tuple(rows.shape) for domain, rows in data.items()})
    model = MixtralForCausalLM(config())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, data, arguments.steps, arguments.batch, arguments.lr)

    model = model.to(torch.bfloat16)
    model.config.output_router_logits = False
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(HERE, max_shard_size="4MB")
    tokenizer.save_pretrained(HERE)
    write_prompts()
    evaluate(model, tokenizer)


if __name__ == "__main__":
    main()
