"""The CNN/DailyMail protocol: article + ` TL;DR:`, greedy, ROUGE against the reference summary.

It is the one of TensorRT-LLM's examples/summarize.py: texts are stripped, ` n't` is joined, a prompt that is too long loses
its beginning, scores are the mean F measure of `rouge-score` without stemming, in percent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from ...core.config import BuildConfig
from ...core.errors import ConfigError, RequestError, TargetError
from ..llm import LLM
from ..prompt_lookup import LookupStats, PromptLookup
from ..sampling_params import SamplingParams
from ..tokenizer import Tokenizer
from .dataset import Pair
from .hf import HFModel

TLDR = " TL;DR:"
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

TokenIds: TypeAlias = list[int]
Generate: TypeAlias = Callable[[list[TokenIds]], list[TokenIds]]
"""Prompts of one batch -> the new tokens of each."""


@dataclass(frozen=True)
class Summaries:
    """What one side made of the prompts. The end-of-sequence token counts as an output token.

    batch_seconds: wall-clock time of each batch
    """

    token_ids: list[TokenIds]
    batch_seconds: list[float]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / sum(self.batch_seconds)

    @property
    def latency_s(self) -> float:
        """Mean time of a batch."""
        return sum(self.batch_seconds) / len(self.batch_seconds)


def input_limit(build: BuildConfig, output_len: int) -> int:
    """Tokens a prompt may have so that `output_len` more fit. Raises RequestError when none may."""
    limit = min(build.max_input_len, build.max_seq_len - output_len)
    if limit < 1:
        raise RequestError(
            f"output_len {output_len} leaves no room for an article: the engine's max_seq_len is {build.max_seq_len}"
        )
    return limit


def encode_prompts(pairs: Sequence[Pair], tokenizer: Tokenizer, limit: int) -> list[TokenIds]:
    """Token ids of each article and ` TL;DR:`, at most `limit`: special tokens in front stay, the article loses its beginning.

    Raises RequestError when ` TL;DR:` itself does not fit.
    """
    prefix = tokenizer.encode("")
    smallest = len(tokenizer.encode(TLDR))
    if limit < smallest:
        raise RequestError(f"prompts may have {limit} tokens; {TLDR!r} alone has {smallest}")
    prompts = []
    for pair in pairs:
        token_ids = tokenizer.encode((pair.article + TLDR).strip().replace(" n't", "n't"))
        if len(token_ids) > limit:
            token_ids = prefix + token_ids[len(token_ids) - (limit - len(prefix)) :]
        prompts.append(token_ids)
    return prompts


def run(
    generate: Generate, prompts: Sequence[TokenIds], batch_size: int, *, warm_up: bool = True
) -> Summaries:
    """Times `generate` on the prompts, batch after batch; `warm_up`: after it has run the first batch once."""
    if batch_size < 1:
        raise ConfigError(f"batch size is {batch_size}; accepted: a whole number >= 1")
    batches = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    if warm_up:
        generate(batches[0])
    outputs: list[TokenIds] = []
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        outputs += generate(batch)
        seconds.append(time.perf_counter() - start)
    return Summaries(outputs, seconds)


def engine_generate(llm: LLM, output_len: int, num_beams: int = 1) -> Generate:
    """Generation by an engine, greedy or the best of a beam search."""
    params = SamplingParams(max_tokens=output_len, temperature=0.0, beam_width=num_beams)

    def generate(prompts: list[TokenIds]) -> list[TokenIds]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    return generate


def hf_generate(
    model: HFModel, output_len: int, eos_token_ids: Sequence[int], num_beams: int = 1
) -> Generate:
    """The same by `transformers`."""
    return lambda prompts: model.generate(prompts, output_len, eos_token_ids, num_beams)


def engine_perplexity(llm: LLM, prompts: Sequence[TokenIds], output_len: int) -> float:
    """Mean over the prompts of the perplexity of prompt and greedy output, each its own, by the engine's probabilities.

    The outputs are generated once more, so that the clock of `run` never sees log-probabilities being made.
    """
    params = SamplingParams(max_tokens=output_len, temperature=0.0, logprobs=0, prompt_logprobs=0)
    values = []
    for output in llm.generate(list(prompts), params):
        completion = output.outputs[0]
        assert output.prompt_logprobs is not None and completion.cumulative_logprob is not None
        scored = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        prompt = sum(entry[token_id].logprob for token_id, entry in scored if entry is not None)
        count = len(output.prompt_token_ids) - 1 + len(completion.token_ids)
        values.append(math.exp(-(prompt + completion.cumulative_logprob) / count))
    return sum(values) / len(values)


def run_lookup(
    llm: LLM, prompts: Sequence[TokenIds], batch_size: int, output_len: int, lookup: PromptLookup
) -> tuple[Summaries, LookupStats]:
    """As `run` of an engine with prompt lookup, and what the lookup brought while the clock ran."""
    params = SamplingParams(max_tokens=output_len, temperature=0.0, prompt_lookup=lookup)

    def generate(batch: list[TokenIds]) -> list[TokenIds]:
        return [output.outputs[0].token_ids for output in llm.generate(batch, params)]

    generate(list(prompts[:batch_size]))
    before = replace(llm.core.lookup_stats)
    side = run(generate, prompts, batch_size, warm_up=False)
    return side, llm.core.lookup_stats.since(before)


def hf_perplexity(model: HFModel, prompts: Sequence[TokenIds], outputs: Sequence[TokenIds]) -> float:
    """Mean over the prompts of the perplexity of prompt and output by the probabilities of `transformers`."""
    values = []
    for prompt, output in zip(prompts, outputs, strict=True):
        token_ids = [*prompt, *output]
        logits = model.logits(token_ids)[:-1]
        targets = torch.tensor(token_ids[1:], device=logits.device)
        values.append(math.exp(float(torch.nn.functional.cross_entropy(logits, targets))))
    return sum(values) / len(values)


def rouge_scorer() -> Any:
    """The scorer of the package `rouge-score`. Raises TargetError when that is missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise TargetError("ROUGE needs the package rouge-score: pip install rouge-score") from None
    return RougeScorer(list(ROUGE_TYPES))


def rouge(references: Sequence[str], summaries: Sequence[str]) -> dict[str, float]:
    """Mean F measures in percent, by ROUGE_TYPES. Raises TargetError as `rouge_scorer` does."""
    scorer = rouge_scorer()
    scores = [scorer.score(*pair) for pair in zip(references, summaries, strict=True)]
    return {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE_TYPES}
