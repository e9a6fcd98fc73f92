"""An engine as a model of EleutherAI's lm-evaluation-harness, under the name `trtc`.

Importing this module registers it: `lm_eval.simple_evaluate(model="trtc", model_args="engine_dir=...")`. Requests are taken
apart as the harness's own model `hf` does it, so that both give the same numbers on the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ...core.errors import ConfigError, RequestError, TrtcError
from ..llm import LLM
from ..sampling_params import SamplingParams
from ..tokenizer import required_tokenizer
from .forward import Scored, sequence_logits

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@register_model("trtc")
class EngineLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Scores and generates with one engine directory.

    max_length:    tokens the model sees at once; None: the engine's max_seq_len
    max_gen_toks:  tokens to generate where a task does not say
    add_bos_token: whether texts get the tokenizer's special tokens; None: they do, as the tokenizer is made
    num_pages:     of the KV cache; see `load_executor`
    batch_size, max_batch_size, device: what the harness gives to every model; the engine decides them itself
    Raises EngineError or TargetError as `LLM` does, RequestError when the engine has no tokenizer files.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        num_pages: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self._llm = LLM(engine_dir, num_pages=num_pages)
        try:
            self._configure(engine_dir, max_length)
        except TrtcError:
            self.close()
            raise
        self.max_gen_toks = max_gen_toks
        self._add_bos_token = add_bos_token

    def _configure(self, engine_dir: str | Path, max_length: int | None) -> None:
        tokenizer = required_tokenizer(self._llm.tokenizer, engine_dir)
        longest = self._llm.core.executor.max_seq_len
        self.max_length = longest if max_length is None else max_length
        if not 2 <= self.max_length <= longest:
            raise ConfigError(
                f"max_length is {max_length}; accepted: 2 to the engine's max_seq_len of {longest}"
            )
        self._tokenizer = tokenizer

    def close(self) -> None:
        """Releases the engine."""
        self._llm.close()

    @property
    def eot_token_id(self) -> int:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise RequestError(
                "the engine's tokenizer names no end-of-sequence token, which the harness needs"
            )
        return eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Of the harness's cache of requests."""
        return f"trtc-{self._llm.core.executor.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; one that starts with the prefix token gets no second one."""
        if add_special_tokens is None:
            prefix = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = self._add_bos_token is not False and not string.startswith(prefix)
        return self._tokenizer.encode(string, special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context: its log-likelihood, and whether greedy decoding gives it.

        What is longer than the model loses its beginning.
        """
        pairs = [(context, continuation) for _, context, continuation in requests]
        by_length = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        answers: dict[int, tuple[float, bool]] = {}
        for index, answer in zip(by_length, self._scores([pairs[i] for i in by_length]), strict=True):
            answers[index] = answer
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return [answers[index] for index in range(len(pairs))]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        sequences = []
        for context, continuation in pairs:
            inputs = [*context, *continuation][-(self.max_length + 1) : -1]
            if len(continuation) > len(inputs):
                raise RequestError(
                    f"a continuation of {len(continuation)} tokens does not fit the model's {self.max_length}"
                )
            sequences.append(Scored(inputs, len(inputs) - len(continuation)))
        rows = sequence_logits(self._llm.core.executor, sequences)
        for (_, continuation), logits in zip(pairs, rows, strict=True):
            targets = torch.tensor(continuation, device=logits.device)
            chosen = logits.log_softmax(-1).gather(1, targets[:, None])
            yield float(chosen.sum()), bool((logits.argmax(-1) == targets).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap but for one token."""
        windows = [
            (index, (None, *make_disjoint_window(window)))
            for index, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([window for _, window in windows])
        for (index, _), (value, _) in zip(windows, scores, strict=True):
            totals[index] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, cut before the first of its stop texts."""
        prompts, params = [], []
        for request in requests:
            context, options = request.args
            wanted = sampling_params(options, self.max_gen_toks)
            assert wanted.max_tokens is not None
            room = self.max_length - wanted.max_tokens
            if room < 1:
                raise RequestError(
                    f"{wanted.max_tokens} tokens to generate leave no room for a context within {self.max_length}"
                )
            room = min(room, self._llm.core.executor.max_input_len)
            prompts.append(self.tok_encode(context)[-room:])
            params.append(wanted)
        # an LLM that knows no prefixes: scoring has written over the pages of those of earlier calls
        llm = LLM.from_executor(self._llm.core.executor, self._tokenizer)
        texts = [output.outputs[0].text for output in llm.generate(prompts, params)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def sampling_params(options: dict[str, Any], max_gen_toks: int) -> SamplingParams:
    """The generation settings of a task. Raises ConfigError naming one that the engine does not have."""
    options = dict(options)
    until = options.pop("until", None) or []
    lengths = [options.pop(name) for name in _LENGTH_NAMES if name in options]
    do_sample = options.pop("do_sample", None)
    chosen = {name: options.pop(name) for name in _SAMPLING_NAMES if name in options}
    if options:
        raise ConfigError(
            f"generation setting {min(options)} is not known; accepted: until, do_sample, "
            f"{', '.join((*_LENGTH_NAMES, *_SAMPLING_NAMES))}"
        )
    if not do_sample and (do_sample is False or not chosen.get("temperature")):
        chosen = {name: chosen[name] for name in ("repetition_penalty",) if name in chosen} | {
            "temperature": 0.0
        }
    stops = [until] if isinstance(until, str) else [text for text in until if text]
    return SamplingParams(max_tokens=int(lengths[0]) if lengths else max_gen_toks, stop=stops, **chosen)
