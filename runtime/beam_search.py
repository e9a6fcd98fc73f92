"""Beam search, as `transformers` does it: same tokens, same order of the results.

The beams of a prompt are requests like any other, which the scheduler runs, preempts and computes again one by one. A beam
whose logits are known waits for its siblings; when all are there, the best continuations of all of them together become the
next beams. A beam with several continuations is forked: full pages are shared, the page begun is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import EngineError
from .outputs import FinishReason
from .request import Request, RequestStatus
from .scheduler import Scheduler

if TYPE_CHECKING:
    import torch

Candidate = tuple[float, int]
"""Log probability of a whole output that ends with a token, and that token."""


@dataclass(frozen=True)
class Hypothesis:
    """An output that has ended. score: what hypotheses are compared by; logprob: of all its tokens."""

    token_ids: tuple[int, ...]
    score: float
    logprob: float
    finish_reason: FinishReason
    stop_reason: int | None


class BeamSearch:
    """The search for the best outputs of one prompt.

    root:             a request for the prompt, the first beam
    max_total_tokens: prompt and output tokens at most
    """

    def __init__(self, root: Request, max_total_tokens: int) -> None:
        params = root.params
        self.root = root
        self.done = False
        self.stop_ids = frozenset(params.stop_token_ids or ()) | (
            frozenset() if params.ignore_eos else root.eos_token_ids
        )
        # so many that `beam_width` are left when all tokens that end a beam are among the best
        self.num_candidates = max(2, 1 + len(self.stop_ids)) * params.beam_width
        self._params = params
        self._max_output_tokens = max_total_tokens - root.num_prompt_tokens
        self._scores = {root: 0.0}
        self._candidates: dict[Request, list[Candidate]] = {}
        self._hypotheses: list[Hypothesis] = []
        self._may_improve = True
        self._numbers = count(1)

    @property
    def beams(self) -> list[Request]:
        """The requests that are searched on, the best first."""
        return list(self._scores)

    def logprob(self, beam: Request) -> float:
        return self._scores[beam]

    def offer(self, beam: Request, candidates: list[Candidate]) -> None:
        """Takes the best `num_candidates` continuations of one beam, the best first."""
        self._candidates[beam] = candidates

    @property
    def ready(self) -> bool:
        """Whether all continuations are known. Those of a beam that was preempted since are offered once more."""
        return not self.done and all(
            beam.status is RequestStatus.RUNNING and beam.num_computed_tokens == beam.num_tokens
            for beam in self._scores
        )

    def advance(self, scheduler: Scheduler) -> list[tuple[int, int]]:
        """Chooses the next beams. Returns pages and their copies, which the caller has to fill before the next step."""
        width = self._params.beam_width
        full = len(self._hypotheses) == width
        closed = not self._may_improve or (full and self._params.early_stopping is True)
        length = len(self.root_output()) + 1
        survivors: list[tuple[Request, Candidate]] = []
        ended: list[Hypothesis] = []
        for rank, (beam, candidate) in enumerate(self._best()):
            if length < self._max_output_tokens and candidate[1] not in self.stop_ids:
                survivors.append((beam, candidate))
            elif rank < width and not closed:
                ended.append(self._hypothesis(beam, candidate))
        self._keep(ended)
        del survivors[width:]
        self.done = not survivors or not self._goes_on(survivors[0][1][0], length)
        if self.done:
            self._drop(self.beams, scheduler)
            return []
        return self._fork(survivors, scheduler)

    def end(self, scheduler: Scheduler, reason: FinishReason) -> None:
        """Ends the search early; the beams become hypotheses as they are."""
        self.done = True
        self._keep(
            [
                Hypothesis(
                    tuple(beam.output_token_ids),
                    self._normalized(logprob, max(1, len(beam.output_token_ids))),
                    logprob,
                    reason,
                    None,
                )
                for beam, logprob in self._scores.items()
            ]
        )
        self._drop(self.beams, scheduler)

    def results(self) -> list[Hypothesis]:
        """The best first, as many as `n` says."""
        return self._hypotheses[: self._params.n]

    def root_output(self) -> list[int]:
        """The output of any beam: all are of one length."""
        return self.beams[0].output_token_ids

    def _best(self) -> list[tuple[Request, Candidate]]:
        pairs = [(beam, candidate) for beam in self._scores for candidate in self._candidates[beam]]
        pairs.sort(key=lambda pair: -pair[1][0])
        return pairs[: self.num_candidates]

    def _hypothesis(self, beam: Request, candidate: Candidate) -> Hypothesis:
        logprob, token_id = candidate
        token_ids = (*beam.output_token_ids, token_id)
        stopped = token_id in self.stop_ids
        named = stopped and (token_id not in beam.eos_token_ids or self._params.ignore_eos)
        return Hypothesis(
            token_ids,
            self._normalized(logprob, len(token_ids)),
            logprob,
            "stop" if stopped else "length",
            token_id if named else None,
        )

    def _keep(self, ended: list[Hypothesis]) -> None:
        """The best of the hypotheses, old and new."""
        ranked = sorted([*self._hypotheses, *ended], key=lambda hypothesis: -hypothesis.score)
        self._hypotheses = ranked[: self._params.beam_width]

    def _goes_on(self, best: float, length: int) -> bool:
        """Whether searching on can change the results, as far as `early_stopping` wants to know.

        best: log probability of the best beam, `length` tokens long
        """
        if len(self._hypotheses) < self._params.beam_width:
            return True
        if self._params.early_stopping is True:
            return False
        hopeful = self._params.early_stopping == "never" and self._params.length_penalty > 0
        bound = self._normalized(best, self._max_output_tokens if hopeful else length)
        self._may_improve = self._may_improve and bound > self._hypotheses[-1].score
        return self._may_improve

    def _normalized(self, logprob: float, length: int) -> float:
        """The score of an output, in float32 as `transformers` has it."""
        return float(np.float32(logprob) / np.float32(length**self._params.length_penalty))

    def _fork(
        self, survivors: list[tuple[Request, Candidate]], scheduler: Scheduler
    ) -> list[tuple[int, int]]:
        parents = {beam for beam, _ in survivors}
        self._drop([beam for beam in self._scores if beam not in parents], scheduler)  # room for the others
        copies: list[tuple[int, int]] = []
        beams: list[Request] = []
        for parent, _ in survivors:
            beam = parent
            if parent in beams:
                beam = self._child()
                copies += scheduler.fork(parent, beam)
            beams.append(beam)
        self._scores = {}
        for beam, (_, (logprob, token_id)) in zip(beams, survivors, strict=True):
            beam.append_output(token_id)
            self._scores[beam] = logprob
        self._candidates.clear()
        return copies

    def _child(self) -> Request:
        root, number = self.root, next(self._numbers)
        return Request(
            f"{root.request_id}/{number}",
            root.prompt_token_ids,
            root.params,
            root.eos_token_ids,
            sample_index=number,
            priority=root.priority,
        )

    @staticmethod
    def _drop(beams: Sequence[Request], scheduler: Scheduler) -> None:
        for beam in beams:
            scheduler.cancel(beam)


def candidates(logits: torch.Tensor, beams: Sequence[tuple[Request, BeamSearch]]) -> list[list[Candidate]]:
    """The best continuations of each beam, as many as its search wants.

    logits: [S, V] float32, row i belongs to beams[i]
    Raises EngineError when a row holds NaN or infinity.
    """
    logprobs = logits.log_softmax(dim=-1)
    if not bool(logprobs.amax(dim=-1).isfinite().all()):
        names = ", ".join(beam.request_id for beam, _ in beams)
        raise EngineError(f"the engine's logits for {names} are not finite: its weights or dtype overflow")
    for row, (beam, search) in enumerate(beams):
        if len(beam.output_token_ids) < beam.params.min_tokens:
            banned = [token_id for token_id in search.stop_ids if token_id < logprobs.shape[1]]
            logprobs[row, banned] = -float("inf")
    scores = logprobs.new_tensor([search.logprob(beam) for beam, search in beams])
    most = max(search.num_candidates for _, search in beams)
    values, token_ids = (logprobs + scores[:, None]).topk(min(most, logprobs.shape[1]), dim=-1)
    rows = zip(values.tolist(), token_ids.tolist(), strict=True)
    return [
        list(zip(logprob, ids, strict=True))[: search.num_candidates]
        for (logprob, ids), (_, search) in zip(rows, beams, strict=True)
    ]
