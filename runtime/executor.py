"""The border between the runtime and a target: an `Executor` runs one engine step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..core.errors import EngineError

if TYPE_CHECKING:
    import torch

    from .step_input import Int32Array, StepInput


class Executor(Protocol):
    """One loaded engine with its paged KV cache.

    The limits are those the engine was built for; the scheduler keeps every step within them.
    """

    @property
    def num_pages(self) -> int:
        """Pages in the KV cache; page ids are 0 .. num_pages - 1."""

    @property
    def page_size(self) -> int:
        """Tokens per page."""

    @property
    def max_batch_size(self) -> int:
        """Sequences in one step."""

    @property
    def max_num_tokens(self) -> int:
        """Tokens in one step, over all its sequences."""

    @property
    def max_seq_len(self) -> int:
        """Tokens in one sequence, prompt and output together."""

    @property
    def max_input_len(self) -> int:
        """Tokens in one prompt."""

    @property
    def max_beam_width(self) -> int:
        """Beams of one prompt; 1: no beam search."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits; token ids are 0 .. vocab_size - 1."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids of the model; empty when it has none."""

    def execute(self, step: StepInput) -> torch.Tensor:
        """Runs one step and appends its keys and values to the cache.

        Returns logits [R, vocab_size] float32, one row per entry of `step.logits_index`, on any device. R is
        0 when the step holds only parts of prompts. The tensor may be reused by the next call.
        """

    def close(self) -> None:
        """Releases the device memory. Calling it twice is harmless."""


@runtime_checkable
class PageCopier(Protocol):
    """What an executor offers beyond `Executor` when its cache pages can be copied, as beam search wants it."""

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies page source[i] to page target[i], all before the next step. No target is a source."""


@runtime_checkable
class GreedyChooser(Protocol):
    """What an executor offers beyond `Executor` when it can choose tokens where the logits are."""

    @property
    def max_draft_tokens(self) -> int | None:
        """Tokens of a step up to which guessed tokens are cheap to verify; None: no such limit."""

    def choose(self, step: StepInput) -> Int32Array:
        """As `execute`, but returns of each row the token with the largest logit, the first of equals. [R], on the host.
        -1 where that logit is found not to be finite; a `DecodeLoop` may not look."""


def token_list(chosen: Int32Array) -> list[int]:
    """What a `GreedyChooser` chose. Raises EngineError where a logit was not finite."""
    tokens: list[int] = chosen.tolist()
    if min(tokens, default=0) < 0:
        raise EngineError("the engine's logits are not finite: its weights or dtype overflow")
    return tokens


@runtime_checkable
class StepStarter(Protocol):
    """What an executor offers beyond `Executor` when a step may begin before the host knows the tokens of the one before.

    Steps run, and tickets are collected, in the order in which they were started; none of another kind comes in between.
    """

    def start_step(self, step: StepInput, source: Int32Array | None) -> Any:
        """Starts a step, as `GreedyChooser.choose`, and returns its ticket at once.

        source: [T]; where it is not negative, the token is the one chosen in that row of the step started before, and that in
                step.token_ids means nothing. Sequences with such a token have no other new one, and come before any that has
                several. None: all tokens are known
        """

    def finish_step(self, ticket: Any) -> Int32Array:
        """Waits for a step; returns what `GreedyChooser.choose` does. [R], on the host."""


@runtime_checkable
class Preparer(Protocol):
    """What an executor offers beyond `Executor` when steps wait, the first time, for what could have been made before."""

    def prepare(self) -> bool:
        """Makes a piece of it, which takes about a tenth of a second; runs no step. False: nothing was left."""


@runtime_checkable
class DecodeLoop(Protocol):
    """What an executor offers beyond `Executor` when its device can repeat greedy decode steps without the host.

    Tickets stand for steps under way; they are collected in the order in which they were given.
    """

    def loop_load(self, token_ids: Int32Array, kv_length: Int32Array, page_table: Int32Array) -> None:
        """Sets the sequences of the next steps: the last token of each, its length with that token, and its pages,
        which must hold the tokens of every step until the next load. Arguments: [B], [B], [B, P]."""

    def loop_enqueue(self, count: int) -> Any:
        """Starts `count` steps after those under way and returns their ticket at once."""

    def loop_rest(self, rows: Sequence[int]) -> None:
        """Computes nothing more for these of the rows that were loaded, in steps that are enqueued from now on; what
        `loop_collect` returns for them has no meaning."""

    def loop_collect(self, ticket: Any) -> Int32Array:
        """Waits for the steps of a ticket; returns the tokens they chose, [count, B]."""


@runtime_checkable
class LoopBehindSteps(Protocol):
    """What a `StepStarter` with a `DecodeLoop` offers beyond both when the loop can go on from a step that is under way."""

    def loop_load_behind(
        self, token_ids: Int32Array, source: Int32Array, kv_length: Int32Array, page_table: Int32Array
    ) -> None:
        """As `DecodeLoop.loop_load`, behind the step that was started last: where `source`, [B], is not negative, the token is
        the one chosen in that row of that step, and the one in token_ids means nothing.

        That step's ticket is collected before those of the loop.
        """
