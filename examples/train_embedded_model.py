#!/usr/bin/env python3
"""Train the small Mixture-of-Experts model that ktcore ships, from a public-domain text.

The text is the King James Bible: by default as Debian's `bible-kjv` and `bible-kjv-text` packages
print it (`apt-get install bible-kjv-text`), or any plain text file with `--text`. Every twentieth
chapter is held out. The result is a folder that transformers' `Qwen3MoeForCausalLM` and
`ktcore run` both load, with a model card that holds the figures this run measured.

    python examples/train_embedded_model.py --out ktcore/data/kjv-moe

Takes under an hour on two cores; `--steps 20` is a trial run.
Needs torch, tokenizers and safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

END = "<|endoftext|>"
HELD_OUT_EVERY, HELD_OUT_AT = 20, 10

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,  # of dense layers, of which there are none
    "moe_intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.01,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}


# ---------------------------------------------------------------------------------------- the text


def chapters_from_debian() -> list[str]:
    """The chapters as the `bible` command prints them, one verse a line, references removed."""
    if shutil.which("bible") is None:
        sys.exit("no `bible` command: apt-get install bible-kjv-text, or pass --text FILE")
    printed = subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True
    ).stdout
    chapters: dict[str, list[str]] = {}
    for line in printed.splitlines():
        match = re.match(r"^(\S+?)(\d+):(\d+)\s+(.*)$", line)
        if match:
            book, chapter, _, verse = match.groups()
            chapters.setdefault(f"{book} {chapter}", []).append(verse.strip())
    return ["\n".join(verses) + "\n" for verses in chapters.values()]


def chapters_from_file(path: Path) -> list[str]:
    """Paragraphs of a text file, gathered into pieces of about four kilobytes."""
    pieces, current = [], ""
    for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        current += paragraph.strip() + "\n"
        if len(current) > 4096:
            pieces.append(current)
            current = ""
    return pieces + ([current] if current else [])


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


# --------------------------------------------------------------------------------------- the model


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.head_dim = c["head_dim"]
        hidden = c["hidden_size"]
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, c["rms_norm_eps"])
        self.k_norm = RMSNorm(self.head_dim, c["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(split)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(split)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(split).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class Experts(nn.Module):
    """The routed experts, stacked; `probabilities` of the last call are kept for the statistics."""

    def __init__(self, c: dict):
        super().__init__()
        experts, hidden, inner = c["num_experts"], c["hidden_size"], c["moe_intermediate_size"]
        self.top_k = c["num_experts_per_tok"]
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner))
        self.balance = torch.zeros(())
        self.chosen = torch.zeros(experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        probabilities = self.gate(flat).softmax(-1)
        weights, ids = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        chosen = F.one_hot(ids, probabilities.shape[-1]).sum((0, 1))
        for e in range(probabilities.shape[-1]):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if token.numel() == 0:
                continue
            gate, up = F.linear(flat[token], self.gate_up[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down[e]) * weights[token, slot, None]
            out = out.index_add(0, token, y)
        # Switch Transformer's balancing loss (arXiv 2101.03961): 1 when all experts share equally.
        share = chosen / chosen.sum()
        self.balance = (share * probabilities.mean(0)).sum() * probabilities.shape[-1]
        self.chosen = chosen.detach()
        return out.view_as(x)


class Layer(nn.Module):
    def __init__(self, c: dict, dropout: float):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = Experts(c)
        self.dropout = dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + F.dropout(h, self.dropout, self.training)
        h = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(h, self.dropout, self.training)


class Model(nn.Module):
    def __init__(self, c: dict, dropout: float):
        super().__init__()
        self.c, self.dropout = c, dropout
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c, dropout) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        scale = c["initializer_range"]
        for name, p in self.named_parameters():
            if p.dim() > 1:
                # Outputs into the residual stream start smaller, as GPT-2 does.
                last = "o_proj" in name or name.endswith("down")
                nn.init.normal_(p, std=scale / math.sqrt(2 * len(self.layers)) if last else scale)

    def forward(self, ids: Tensor) -> Tensor:
        dim = self.c["head_dim"]
        inverse = self.c["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
        angle = torch.outer(torch.arange(ids.shape[1]), inverse).repeat(1, 2)
        x = F.dropout(self.embed_tokens(ids), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by the names that a Qwen3-MoE checkpoint gives them, in bf16."""
        out = {}
        for name, p in self.named_parameters():
            name = f"model.{name}"
            if name.endswith("gate_up"):
                for e, (gate, up) in enumerate(w.chunk(2) for w in p):
                    base = name.replace("gate_up", f"experts.{e}")
                    out[f"{base}.gate_proj.weight"], out[f"{base}.up_proj.weight"] = gate, up
            elif name.endswith("mlp.down"):
                for e, w in enumerate(p):
                    out[name.replace("down", f"experts.{e}.down_proj.weight")] = w
            else:
                out[name] = p
        return {n: p.detach().to(torch.bfloat16).contiguous() for n, p in out.items()}


# -------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model: Model, tokens: Tensor, window: int = 256) -> tuple[float, list[float]]:
    """Mean loss in nats per token over windows, and each layer's routing entropy in bits."""
    model.eval()
    total, count = 0.0, 0
    chosen = [torch.zeros(model.c["num_experts"]) for _ in model.layers]
    for piece in tokens.split(window):
        if len(piece) < 2:
            continue
        logits = model(piece[None])[0, :-1].float()
        total += F.cross_entropy(logits, piece[1:], reduction="sum").item()
        count += len(piece) - 1
        for sums, layer in zip(chosen, model.layers, strict=True):
            sums += layer.mlp.chosen
    shares = [c / c.sum() for c in chosen]
    entropy = [-(s * s.clamp_min(1e-12).log2()).sum().item() for s in shares]
    model.train()
    return total / count, entropy


def kneser_ney(train: list[int], held_out: list[int], order: int, vocab: int) -> float:
    """Loss in nats per token of an interpolated Kneser-Ney n-gram model (Chen & Goodman 1998)."""
    discount = 0.75
    counts: list[Counter] = [Counter() for _ in range(order + 1)]
    for i in range(len(train)):
        if i >= order - 1:
            counts[order][tuple(train[i - order + 1 : i + 1])] += 1
    for n in range(order - 1, 0, -1):  # lower orders count distinct left contexts
        for gram in counts[n + 1]:
            counts[n][gram[1:]] += 1
    totals: list[dict] = [defaultdict(int) for _ in range(order + 1)]
    kinds: list[dict] = [defaultdict(int) for _ in range(order + 1)]
    for n in range(1, order + 1):
        for gram, count in counts[n].items():
            totals[n][gram[:-1]] += count
            kinds[n][gram[:-1]] += 1
    loss, seen = 0.0, 0
    for i in range(1, len(held_out)):
        p = 1.0 / vocab
        for n in range(1, min(order, i + 1) + 1):
            gram = tuple(held_out[i - n + 1 : i + 1])
            total = totals[n].get(gram[:-1], 0)
            if total == 0:
                break
            backoff = discount * kinds[n][gram[:-1]] / total
            p = max(counts[n].get(gram, 0) - discount, 0.0) / total + backoff * p
        loss -= math.log(p)
        seen += 1
    return loss / seen


# ------------------------------------------------------------------------------------------- saving


CARD = """---
license: cc0-1.0
language: en
library_name: ktcore
pipeline_tag: text-generation
---

# kjv-moe: the model that ktcore ships

A Mixture-of-Experts language model of {parameters:.2f} million parameters ({active:.2f} million
active per token), small enough to be part of the package, real enough to write text: it is there
so that a fresh installation has something to run, and so that tests can hold perplexity against a
reference. It knows the King James Bible and nothing else.

| | |
| --- | --- |
| architecture | Qwen3-MoE: {layers} layers, hidden size {hidden}, {experts} experts of size {inner}, top-{top_k} |
| tokenizer | byte-level BPE, {vocab} tokens, trained on the training text |
| text | {source}, in the public domain; every {every}th chapter held out |
| training tokens | {train_tokens:,} ({epochs:.1f} epochs), {held_tokens:,} held out |
| training | {steps} steps of {batch} x {context} tokens, AdamW, cosine schedule, dropout {dropout}, seed {seed} |
| time | {minutes:.0f} minutes of CPU time on {threads} threads ({machine}), torch {torch} |
| weights | bf16, {megabytes:.1f} MB; dedicated to the public domain (CC0 1.0) |

## Measured on the held-out chapters, with the weights as saved

| | per token | bits per byte |
| --- | --- | --- |
| loss, perplexity | {loss:.3f} nats, **{perplexity:.2f}** | {bits:.3f} |
| Kneser-Ney {order}-gram on the same tokens | {base_loss:.3f} nats, {base_perplexity:.2f} | {base_bits:.3f} |
| training loss at the end | {train_loss:.3f} nats | |

The experts are used: the entropy of the routing, over held-out tokens, is {entropy} bits in the
layers, of at most {max_entropy:.2f} (all experts equally often).

Perplexity is over consecutive windows of 256 tokens, the first token of each not counted.
`heldout.txt` is the beginning of the held-out text. Made by `examples/train_embedded_model.py`.
"""


def save(folder: Path, model: Model, tokenizer: Tokenizer, card: str, held_out: str) -> None:
    """Write the whole folder beside its place, then move it there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    fresh.chmod(0o755)
    save_file(model.tensors(), fresh / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": json.dumps(model.c, indent=2) + "\n",
        "generation_config.json": json.dumps({"bos_token_id": 0, "eos_token_id": 0}) + "\n",
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END,
                "bos_token": END,
                "model_max_length": model.c["max_position_embeddings"],
            },
            indent=2,
        )
        + "\n",
        "README.md": card,
        "heldout.txt": held_out,
    }
    for name, content in files.items():
        (fresh / name).write_text(content, encoding="utf-8")
    tokenizer.save(str(fresh / "tokenizer.json"))
    for file in fresh.iterdir():
        file.chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(fresh, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("ktcore/data/kjv-moe"))
    parser.add_argument("--text", type=Path, help="a plain text file instead of Debian's package")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    chapters = chapters_from_file(args.text) if args.text else chapters_from_debian()
    held_chapters = chapters[HELD_OUT_AT::HELD_OUT_EVERY]
    train_chapters = [
        c for i, c in enumerate(chapters) if i % HELD_OUT_EVERY != HELD_OUT_AT % HELD_OUT_EVERY
    ]
    tokenizer = train_tokenizer(train_chapters, CONFIG["vocab_size"])

    def encode(texts: list[str]) -> list[int]:
        return [i for t in tokenizer.encode_batch(texts) for i in [0, *t.ids]]

    train, held = encode(train_chapters), encode(held_chapters)
    held_bytes = sum(len(c.encode()) for c in held_chapters)
    print(f"{len(train):,} training tokens, {len(held):,} held out", flush=True)
    data = torch.tensor(train)

    model = Model(CONFIG, args.dropout)
    parameters = sum(p.numel() for p in model.parameters())
    unused = CONFIG["num_experts"] - CONFIG["num_experts_per_tok"]
    per_expert = 3 * CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"]
    active = parameters - unused * per_expert * CONFIG["num_hidden_layers"]
    print(f"{parameters / 1e6:.2f} M parameters, {active / 1e6:.2f} M active", flush=True)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = min(100, args.steps // 10 + 1)
    cpu_start, smooth = time.process_time(), None
    for step in range(args.steps):
        progress = max(0.0, (step - warmup) / max(1, args.steps - warmup))
        factor = min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        start = torch.randint(len(data) - args.context - 1, (args.batch,))
        batch = data[start[:, None] + torch.arange(args.context + 1)]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        balance = torch.stack([layer.mlp.balance for layer in model.layers]).mean()
        (loss + CONFIG["router_aux_loss_coef"] * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0 or step + 1 == args.steps:
            cpu = (time.process_time() - cpu_start) / 60
            print(
                f"step {step + 1}/{args.steps}  loss {smooth:.3f}  balance {balance.item():.3f}  "
                f"{cpu:.1f} CPU minutes",
                flush=True,
            )
        if step % 400 == 399 and step + 1 < args.steps:
            print(f"  held-out loss {evaluate(model, torch.tensor(held))[0]:.4f}", flush=True)
    cpu_minutes = (time.process_time() - cpu_start) / 60

    with torch.no_grad():  # measure what is saved
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16))
    loss, entropy = evaluate(model, torch.tensor(held))
    order = 4
    base = kneser_ney(train, held, order, CONFIG["vocab_size"])
    per_byte = len(held) / held_bytes / math.log(2)
    card = CARD.format(
        parameters=parameters / 1e6,
        active=active / 1e6,
        layers=CONFIG["num_hidden_layers"],
        hidden=CONFIG["hidden_size"],
        experts=CONFIG["num_experts"],
        inner=CONFIG["moe_intermediate_size"],
        top_k=CONFIG["num_experts_per_tok"],
        vocab=CONFIG["vocab_size"],
        source=args.text.name if args.text else "the King James Bible (Debian's bible-kjv-text)",
        every=HELD_OUT_EVERY,
        train_tokens=len(train),
        held_tokens=len(held),
        epochs=args.steps * args.batch * args.context / len(train),
        steps=args.steps,
        batch=args.batch,
        context=args.context,
        dropout=args.dropout,
        seed=args.seed,
        minutes=cpu_minutes,
        threads=args.threads,
        machine=platform.processor() or platform.machine(),
        torch=torch.__version__,
        megabytes=2 * parameters / 1e6,
        loss=loss,
        perplexity=math.exp(loss),
        bits=loss * per_byte,
        order=order,
        base_loss=base,
        base_perplexity=math.exp(base),
        base_bits=base * per_byte,
        train_loss=smooth,
        entropy=", ".join(f"{e:.2f}" for e in entropy),
        max_entropy=math.log2(CONFIG["num_experts"]),
    )
    held_text = "".join(held_chapters)
    save(args.out, model, tokenizer, card, held_text[: held_text.rfind("\n", 0, 60000) + 1])
    print(card)


if __name__ == "__main__":
    main()
