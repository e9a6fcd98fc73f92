"""From logits to tokens.

The order is vLLM's: logit bias, bad words, minimum length, then repetition, frequency and presence penalties,
temperature, min_p, top_k, top_p. Each filter works on what the one before it has left, as transformers' logits processors do.

Randomness is counter-based: the token at output position i of a request is chosen by one uniform number,
Philox(key=(seed, sample index), counter=i) (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011), through the inverse of the cumulative distribution over the tokens in descending order. The same seed
so gives the same text whatever else is in the batch, and after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..core.errors import EngineError
from .outputs import Logprob
from .request import Request

CANDIDATES = 512
"""The most likely tokens that are put in order first: nearly always the one to be drawn is among them."""

_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SampledToken:
    """The next token of one request; logprobs as in `CompletionOutput`, None unless asked for."""

    token_id: int
    logprobs: dict[int, Logprob] | None = None


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[SampledToken]:
    """Chooses the next token of each request.

    logits: [S, V] float32, row i belongs to requests[i]; left unchanged
    Raises EngineError when a row holds NaN or infinity.
    """
    assert logits.shape[0] == len(requests), f"{logits.shape[0]} logits rows for {len(requests)} requests"
    if not requests:
        return []
    scores = adjusted(logits, requests)
    best, chosen = scores.max(dim=-1)
    if not bool(best.isfinite().all()):
        bad = requests[int((~best.isfinite()).nonzero()[0])].request_id
        raise EngineError(
            f"the engine's logits for request {bad} are not finite: its weights or dtype overflow"
        )
    random_rows = [row for row, request in enumerate(requests) if not request.params.greedy]
    if random_rows:
        chosen[random_rows] = _draw(scores[random_rows], [requests[row] for row in random_rows])
    token_ids: list[int] = chosen.tolist()
    return _with_logprobs(logits, requests, token_ids)


def adjusted(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Bias, bad words, minimum length and penalties on logits [S, V]; returns `logits` itself when none is set."""
    banned = {
        row: ids for row, request in enumerate(requests) if (ids := _banned_ids(request, logits.shape[1]))
    }
    biased = {row: bias for row, request in enumerate(requests) if (bias := request.params.logit_bias)}
    rows = [row for row, request in enumerate(requests) if request.params.has_penalties]
    if not (banned or biased or rows):
        return logits
    scores = logits.clone()
    for row, bias in biased.items():
        scores[row, list(bias)] += scores.new_tensor(list(bias.values()))
    for row, token_ids in banned.items():
        scores[row, token_ids] = -torch.inf
    if rows:
        scores[rows] = _penalize(scores[rows], [requests[row] for row in rows])
    return scores


@dataclass(frozen=True)
class Filters:
    """What each of S rows leaves to chance: columns [S, 1]. top_k: int64, the vocabulary's size or more keeps all."""

    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor

    def of_rows(self, rows: torch.Tensor) -> Filters:
        return Filters(self.min_p[rows], self.top_k[rows], self.top_p[rows])


def filtered_weights(
    ordered: torch.Tensor, filters: Filters, total: torch.Tensor | None = None
) -> torch.Tensor:
    """Unnormalized probabilities [S, C] float64 of candidates, 0 where a filter removes one.

    ordered: [S, C] scores after temperature, descending, 0 for the best
    total:   [S, 1] float64 weight of all tokens that min_p and top_k leave, where that is more than the candidates'
    """
    weights = ordered.double().exp()
    weights = weights.where(weights >= filters.min_p, 0.0)
    kth = ordered.gather(1, filters.top_k.clamp(max=ordered.shape[1]) - 1)
    weights = weights.where(ordered >= kth, 0.0)
    cumulative = weights.cumsum(dim=-1)
    mass_before = (cumulative - weights) / (cumulative[:, -1:] if total is None else total)
    return weights.where((mass_before < filters.top_p) | (filters.top_p >= 1.0), 0.0)


def uniform(seed: int, sample_index: int, position: int) -> float:
    """The random number in [0, 1) of one output position."""
    generator = np.random.Philox(key=seed | sample_index << 64, counter=position)
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def top_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> list[dict[int, Logprob]]:
    """Per row of logits [N, V]: the given token's log probability, then those of the `counts[row]` best."""
    logprobs = logits.log_softmax(dim=-1)
    given = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = (logprobs > given).sum(dim=-1) + 1
    best, best_ids = logprobs.topk(min(max(counts), logits.shape[1]), dim=-1)
    rows = zip(
        token_ids, given[:, 0].tolist(), ranks.tolist(), best_ids.tolist(), best.tolist(), counts, strict=True
    )
    table = []
    for token_id, logprob, rank, ids, values, count in rows:
        entries = {token_id: Logprob(logprob, rank)}
        for index in range(count):
            entries.setdefault(ids[index], Logprob(values[index], index + 1))
        table.append(entries)
    return table


def _banned_ids(request: Request, vocab_size: int) -> list[int]:
    params = request.params
    ids = request.bad_words.forbidden_after(request.token_ids)
    if len(request.output_token_ids) < params.min_tokens:
        ids.update(params.stop_token_ids or (), () if params.ignore_eos else request.eos_token_ids)
    return [token_id for token_id in ids if token_id < vocab_size]


def _penalize(scores: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    repetition = _column([request.params.repetition_penalty for request in requests], scores)
    frequency = _column([request.params.frequency_penalty for request in requests], scores)
    presence = _column([request.params.presence_penalty for request in requests], scores)
    seen = _token_counts([request.token_ids for request in requests], scores) > 0
    scores = torch.where(seen, torch.where(scores > 0, scores / repetition, scores * repetition), scores)
    output = _token_counts([request.output_token_ids for request in requests], scores)
    return scores - frequency * output - presence * (output > 0)


def _token_counts(sequences: Sequence[Sequence[int]], like: torch.Tensor) -> torch.Tensor:
    """How often each token occurs in each sequence, [S, V]."""
    vocab_size, longest = like.shape[1], max(map(len, sequences))
    padded = np.full((len(sequences), longest), vocab_size, np.int64)
    for row, token_ids in zip(padded, sequences, strict=True):
        row[: len(token_ids)] = token_ids
    index = torch.from_numpy(padded).to(like.device)
    counts = like.new_zeros(len(sequences), vocab_size + 1)
    return counts.scatter_add_(1, index, like.new_ones(index.shape))[:, :vocab_size]


def _draw(scores: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Random tokens [S] int64 from scores [S, V], one of each request's own stream."""
    params = [request.params for request in requests]
    vocab_size = scores.shape[1]
    # the best score becomes 0 first, so that no temperature makes it overflow
    scores = scores - scores.amax(dim=-1, keepdim=True)
    scores = scores / _column([p.temperature for p in params], scores)
    top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    filters = Filters(
        min_p=_column([p.min_p for p in params], scores),
        top_k=torch.tensor(top_k, device=scores.device)[:, None],
        # above 0 in float32 too: the most probable token always stays
        top_p=_column([max(p.top_p, _SMALLEST) for p in params], scores),
    )
    uniforms = [uniform(r.seed, r.sample_index, len(r.output_token_ids)) for r in requests]
    chances = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None]
    widest = max(top_k)
    if widest <= CANDIDATES:
        return _pick(scores, filters, chances, widest)[0]
    chosen, sure = _pick(scores, filters, chances, CANDIDATES)
    unsure = (~sure).nonzero()[:, 0]
    if len(unsure):  # the number is among the less likely tokens: all have to be in order
        chosen[unsure] = _pick(scores[unsure], filters.of_rows(unsure), chances[unsure], widest)[0]
    return chosen


def _pick(
    scores: torch.Tensor, filters: Filters, chances: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [S] int64, whether each is certain [S]) by the inverse of the cumulative distribution, from the `count` best.

    chances: [S, 1] float64, uniform in [0, 1). A token that is certain is the one that any larger `count` gives: what it
    depends on is summed up over the whole row, or over the candidates that a filter has left.
    """
    vocab_size = scores.shape[1]
    ordered, token_ids = _descending(scores, count)
    complete = ordered.shape[1] == vocab_size
    # A row with fewer ties than another has candidates past its own `count`, of whose ties only some may be here.
    own = (ordered >= ordered[:, count - 1 : count]) | complete
    keeps_all = filters.top_k >= vocab_size
    total = None
    if bool(keeps_all.any()):
        every = scores.double().exp()
        # one after the other, so that the sum of a row is the same bits in every batch
        every = every.where(every >= filters.min_p, 0.0).cumsum(dim=-1)[:, -1:]
        left = filtered_weights(
            ordered, Filters(filters.min_p, filters.top_k, torch.ones_like(filters.top_p))
        )
        total = every.where(keeps_all, left.cumsum(dim=-1)[:, -1:])
    weights = filtered_weights(ordered, filters, total).where(own, 0.0)
    cumulative = weights.cumsum(dim=-1)
    # a filter has removed the last candidate, and so all that are not here
    ended = weights.gather(1, own.sum(dim=-1, keepdim=True) - 1) == 0.0
    whole = cumulative[:, -1:]
    if total is not None:
        whole = total.where((filters.top_p >= 1.0) & keeps_all, whole)
    target = chances * whole
    # target may round up to the total; the last candidate with weight is the last that may be picked
    last = (weights > 0).sum(dim=-1, keepdim=True) - 1
    pick = torch.searchsorted(cumulative, target, right=True).minimum(last)
    inside = (filters.top_p >= 1.0) & (target < cumulative[:, -1:])
    sure = torch.full_like(ended, complete) | (filters.top_k <= count) | (keeps_all & (ended | inside))
    return token_ids.gather(1, pick).squeeze(1), sure.squeeze(1)


def _descending(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `count` scores of each row and all that tie with the last; equal scores in order of id."""
    if count < scores.shape[1]:
        kth = scores.topk(count, dim=-1).values[:, -1:]
        count = int((scores >= kth).sum(dim=-1).max())
        ids = scores.topk(count, dim=-1).indices.sort(dim=-1).values
        ordered, order = scores.gather(1, ids).sort(dim=-1, descending=True, stable=True)
        return ordered, ids.gather(1, order)
    return scores.sort(dim=-1, descending=True, stable=True)


def _with_logprobs(
    logits: torch.Tensor, requests: Sequence[Request], token_ids: Sequence[int]
) -> list[SampledToken]:
    counts = {row: k for row, request in enumerate(requests) if (k := request.params.logprobs) is not None}
    if not counts:
        return [SampledToken(token_id) for token_id in token_ids]
    rows = list(counts)
    table = top_logprobs(logits[rows], [token_ids[row] for row in rows], list(counts.values()))
    logprobs = dict(zip(rows, table, strict=True))
    return [SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
