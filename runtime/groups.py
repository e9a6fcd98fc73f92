"""What the engine core keeps of a request: its completions or the beams of a search, and the output that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

from .beam_search import BeamSearch, Hypothesis
from .detokenizer import Detokenizer
from .outputs import CompletionOutput, RequestOutput
from .request import Request
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Completion:
    """One completion: its tokens and its text. watched: something is to be done at each of its tokens, not only at the last."""

    group_id: str
    request: Request
    detokenizer: Detokenizer | None
    watched: bool


@dataclass(frozen=True, eq=False)
class Group:
    """The completions of one prompt, or the beams of the search for them.

    first:  the request that computed the prompt
    stream: report every step, not only the end
    """

    request_id: str
    prompt: str | None
    params: SamplingParams
    stream: bool
    first: Request
    sequences: list[Completion]
    search: BeamSearch | None

    @cached_property
    def prompt_token_ids(self) -> list[int]:
        """As integers of Python's, for outputs."""
        return self.first.token_ids[: self.first.num_prompt_tokens].tolist()

    @property
    def finished(self) -> bool:
        if self.search is not None:
            return self.search.done
        return all(sequence.request.finished for sequence in self.sequences)

    @property
    def reports(self) -> bool:
        """Whether somebody wants to know of a change."""
        return self.stream or self.finished


def request_output(group: Group, tokenizer: Tokenizer | None) -> RequestOutput:
    """What is known of a request so far."""
    first = group.first
    return RequestOutput(
        request_id=group.request_id,
        prompt=group.prompt,
        prompt_token_ids=group.prompt_token_ids.copy(),
        prompt_logprobs=None if first.params.prompt_logprobs is None else list(first.prompt_logprobs),
        outputs=_completions(group) if group.search is None else _found(group, group.search, tokenizer),
        finished=group.finished,
        num_cached_tokens=first.num_cached_tokens or 0,
    )


def _completions(group: Group) -> list[CompletionOutput]:
    """All of a group, or the best of them, as soon as all have ended."""
    completions = [_completion(index, sequence) for index, sequence in enumerate(group.sequences)]
    if len(completions) == group.params.n:
        return completions
    best = sorted(completions, key=_mean_logprob, reverse=True)[: group.params.n]
    logprobs = group.params.logprobs
    return [
        replace(completion, index=index, logprobs=completion.logprobs if logprobs is not None else None)
        for index, completion in enumerate(best)
    ]


def _found(group: Group, search: BeamSearch, tokenizer: Tokenizer | None) -> list[CompletionOutput]:
    """What a beam search has found, the best first."""
    return [
        CompletionOutput(
            index=index,
            text="" if tokenizer is None else _text(group, hypothesis, tokenizer),
            token_ids=list(hypothesis.token_ids),
            cumulative_logprob=hypothesis.logprob,
            logprobs=None,
            finish_reason=hypothesis.finish_reason,
            stop_reason=hypothesis.stop_reason,
        )
        for index, hypothesis in enumerate(search.results())
    ]


def _text(group: Group, hypothesis: Hypothesis, tokenizer: Tokenizer) -> str:
    detokenizer = Detokenizer(tokenizer, group.first.prompt_token_ids, group.params)
    shown = group.params.include_stop_str_in_output or hypothesis.finish_reason != "stop"
    for token_id in hypothesis.token_ids if shown else hypothesis.token_ids[:-1]:
        detokenizer.append(token_id)
    detokenizer.finish()
    return detokenizer.text


def _mean_logprob(completion: CompletionOutput) -> float:
    """Of its tokens; a completion that ended before it had one is the worst."""
    assert completion.cumulative_logprob is not None, "nothing tells how good the completions are"
    count = len(completion.token_ids)
    return completion.cumulative_logprob / count if count else -inf


def _completion(index: int, sequence: Completion) -> CompletionOutput:
    request, detokenizer = sequence.request, sequence.detokenizer
    logprobs = None if request.params.logprobs is None else list(request.logprobs)
    cumulative = None
    if logprobs is not None:
        chosen = zip(logprobs, request.output_token_ids, strict=True)
        cumulative = sum(entry[token_id].logprob for entry, token_id in chosen)
    return CompletionOutput(
        index=index,
        text="" if detokenizer is None else detokenizer.text,
        token_ids=list(request.output_token_ids),
        cumulative_logprob=cumulative,
        logprobs=logprobs,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
