"""Trains the tiny OPT of this folder: a byte-level BPE tokenizer and a language model that summarizes news.

    python examples/train_tiny_opt.py --output-dir examples/tiny-opt --news examples/news.jsonl

The corpus is synthetic (see `news_corpus.py`). The model reads `article TL;DR: highlights</s>`; most of the
loss is on the highlights. The output is an ordinary Hugging Face folder in float16, a few megabytes, made
in minutes on two CPU cores. The same seed gives the same corpus and tokenizer on every machine; the weights
differ in their last bits from one machine or thread count to another, and so may a few of the summaries.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from news_corpus import PROMPT_SUFFIX, Pair, held_out_news, news, to_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

# The special tokens of the published OPT checkpoints; the position in this list is the id.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
NAMED_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOKENIZER_SETTINGS = {
    **NAMED_TOKENS,
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}
PAD_ID, EOS_ID = 1, 2


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained, and how. `article_weight` is the loss weight of article tokens, highlights have 1."""

    steps: int = 3000
    seed: int = 0
    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    article_weight: float = 0.05
    vocab_size: int = 1920
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    max_positions: int = 1024


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with OPT's special tokens; like OPT's it puts `</s>` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", EOS_ID)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TOKENIZER_SETTINGS)


def build_model(config: TrainingConfig) -> OPTForCausalLM:
    """A pre-norm OPT with tied embeddings and random weights."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            word_embed_proj_dim=config.hidden_size,
            ffn_dim=4 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            dropout=0.0,
            attention_dropout=0.0,
            init_std=config.hidden_size
            ** -0.5,  # OPT's 0.02 suits a wide model; here it delays copying by minutes
            pad_token_id=PAD_ID,
            bos_token_id=EOS_ID,
            eos_token_id=EOS_ID,
        )
    )


@dataclass(frozen=True)
class Example:
    """Token ids of `</s>article TL;DR: highlights</s>`; the highlights begin at index `prompt_length`."""

    token_ids: list[int]
    prompt_length: int


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> list[Example]:
    """The examples of these pairs, in their order."""
    prompts = tokenizer([pair.article + PROMPT_SUFFIX for pair in pairs])["input_ids"]
    summaries = tokenizer([" " + pair.highlights for pair in pairs], add_special_tokens=False)["input_ids"]
    return [
        Example([*prompt, *summary, EOS_ID], len(prompt))
        for prompt, summary in zip(prompts, summaries, strict=True)
    ]


def collate(examples: Sequence[Example], article_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and targets [batch, length] int64, right-padded, and each target's loss weight, float32."""
    length = max(len(example.token_ids) for example in examples)
    token_ids = torch.full((len(examples), length), PAD_ID)
    weights = torch.zeros(len(examples), length)
    for row, example in enumerate(examples):
        end = len(example.token_ids)
        token_ids[row, :end] = torch.tensor(example.token_ids)
        weights[row, : example.prompt_length] = article_weight
        weights[row, example.prompt_length : end] = 1.0
    return token_ids[:, :-1], token_ids[:, 1:], weights[:, 1:]


def batches(tokenizer: PreTrainedTokenizerFast, config: TrainingConfig) -> Iterator[list[Example]]:
    """Batches of never repeated training articles, each of articles of about one length to save padding."""
    source = news(seed=config.seed, held_out=False)
    order = torch.Generator().manual_seed(config.seed)
    while True:
        chunk = encode(tokenizer, list(islice(source, 16 * config.batch_size)))
        chunk.sort(key=lambda example: len(example.token_ids))
        for index in torch.randperm(16, generator=order).tolist():
            yield chunk[index * config.batch_size : (index + 1) * config.batch_size]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig, log_every: int
) -> None:
    """Trains `model` in place and prints the loss per token of article and of highlights as it goes."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    model.train()
    start = time.perf_counter()
    for step, examples in enumerate(islice(batches(tokenizer, config), config.steps)):
        inputs, targets, weights = collate(examples, config.article_weight)
        logits = model(input_ids=inputs, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % log_every == 0 or step == config.steps - 1:
            in_highlights = weights.flatten() == 1.0
            in_article = weights.flatten() == config.article_weight
            print(
                f"step {step:5d}  article loss {losses[in_article].mean().item():.3f}"
                f"  highlights loss {losses[in_highlights].mean().item():.3f}"
                f"  {time.perf_counter() - start:.0f} s",
                flush=True,
            )


@torch.inference_mode()
def token_accuracy(model: OPTForCausalLM, examples: Sequence[Example], batch_size: int = 50) -> float:
    """Share of highlights tokens (with the closing `</s>`) that are the likeliest given all before them."""
    correct = total = 0
    for begin in range(0, len(examples), batch_size):
        inputs, targets, weights = collate(examples[begin : begin + batch_size], article_weight=0.0)
        hits = (model(input_ids=inputs).logits.argmax(-1) == targets) & (weights > 0)
        correct += int(hits.sum())
        total += int((weights > 0).sum())
    return correct / total


@torch.inference_mode()
def summarize(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, articles: Sequence[str], batch_size: int = 50
) -> list[str]:
    """Greedy summaries of these articles."""
    summaries: list[str] = []
    for begin in range(0, len(articles), batch_size):
        prompts = [article + PROMPT_SUFFIX for article in articles[begin : begin + batch_size]]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        summaries += [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
    return summaries


def rouge1(references: Sequence[str], summaries: Sequence[str]) -> float | None:
    """Mean ROUGE-1 F in percent, or None where the package `rouge-score` is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None
    scorer = RougeScorer(["rouge1"])
    scores = [scorer.score(*pair)["rouge1"].fmeasure for pair in zip(references, summaries, strict=True)]
    return float(100 * sum(scores) / len(scores))


def evaluate(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> None:
    """Prints how well the model summarizes `pairs`, and its first three summaries."""
    model.eval()
    summaries = summarize(model, tokenizer, [pair.article for pair in pairs])
    references = [pair.highlights for pair in pairs]
    score = rouge1(references, summaries)
    exact = sum(reference == summary for reference, summary in zip(references, summaries, strict=True))
    print(f"held-out articles           {len(pairs)}")
    print(f"token accuracy, highlights  {100 * token_accuracy(model, encode(tokenizer, pairs)):.1f} %")
    rouge_text = "not measured: pip install rouge-score" if score is None else f"{score:.1f}"
    print(f"ROUGE-1                     {rouge_text}")
    print(f"equal to the reference      {exact}")
    for pair, summary in list(zip(pairs, summaries, strict=True))[:3]:
        print(f"\narticle:   {pair.article}\nreference: {pair.highlights}\nsummary:   {summary}")


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: Path) -> None:
    """Writes a Hugging Face folder: float16 weights, configurations, tokenizer."""
    model.generation_config = GenerationConfig(bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.half().save_pretrained(output_dir)
    tokenizer.backend_tokenizer.save(str(output_dir / "tokenizer.json"))
    tokenizer.backend_tokenizer.model.save(str(output_dir))
    # Not tokenizer.save_pretrained: transformers 4 does not know the class name that transformers 5 writes.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        **TOKENIZER_SETTINGS,
    }
    write_json(output_dir / "tokenizer_config.json", settings)
    write_json(output_dir / "special_tokens_map.json", NAMED_TOKENS)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    default = TrainingConfig()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--news", type=Path, required=True, help="jsonl file to write the held-out pairs to")
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="seed of corpus and weights (%(default)s)"
    )
    parser.add_argument("--held-out", type=int, default=200, help="number of held-out pairs (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument(
        "--log-every", type=int, default=100, help="steps between two lines of losses (%(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    config = TrainingConfig(steps=arguments.steps, seed=arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(config.seed)
    sample = islice(news(seed=config.seed, held_out=False), 10_000)
    tokenizer = train_tokenizer(
        (f"{pair.article}{PROMPT_SUFFIX} {pair.highlights}" for pair in sample), config.vocab_size
    )
    model = build_model(config)
    print(f"{model.num_parameters():,} parameters, vocabulary of {len(tokenizer)} tokens")
    train(model, tokenizer, config, arguments.log_every)
    save(model, tokenizer, arguments.output_dir)
    pairs = held_out_news(config.seed, arguments.held_out)
    arguments.news.write_text(to_jsonl(pairs))
    evaluate(OPTForCausalLM.from_pretrained(arguments.output_dir, dtype=torch.float32), tokenizer, pairs)


if __name__ == "__main__":
    main()
