"""`LLM`: prompts in, completions out, on one engine directory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, count
from numbers import Integral
from os import PathLike
from types import TracebackType
from typing import Any, Self, Unpack

from ..core.errors import EngineError, RequestError
from .engine_core import EngineCore
from .executor import Executor
from .load_core import CoreOptions, EngineOptions, check_keywords, load_core
from .outputs import RequestOutput
from .prompt import ACCEPTED, Prompt, Prompts, tokenized
from .request import check_line
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer


class LLM:
    """Offline generation: `LLM(engine_dir).generate(prompts, SamplingParams(...))`."""

    def __init__(self, engine_dir: str | PathLike[str], **options: Unpack[EngineOptions]) -> None:
        """Loads an engine directory.

        num_pages:             of the KV cache; None: as many as kv_cache_memory_bytes holds
        kv_cache_memory_bytes: None: enough for the engine's max_batch_size sequences of max_seq_len tokens
        verify:                True: compare the sha256 of every file first
        seed:                  0; of the stream from which requests without a seed draw theirs
        enable_prefix_cache:   True: a prompt starts behind what an earlier one with the same beginning left in the cache
        prompt_lookup:         None, or a PromptLookup for greedy requests that ask for nothing else
        Raises EngineError when the directory is not an engine this version can run, TargetError when this
        machine cannot run it, ConfigError for an option of another kind, TypeError for one that there is not.
        """
        check_keywords("LLM", options)
        self._start(load_core(engine_dir, **options))

    @classmethod
    def from_executor(
        cls, executor: Executor, tokenizer: Tokenizer | None = None, **options: Unpack[CoreOptions]
    ) -> Self:
        """Runs on an executor that is loaded already, or that is not made from an engine directory."""
        llm = cls.__new__(cls)
        llm._start(EngineCore(executor, tokenizer, **options))
        return llm

    def _start(self, core: EngineCore) -> None:
        self.core, self.tokenizer = core, core.tokenizer
        self._request_ids = map(str, count())
        self._busy = threading.Lock()
        self._closed = False

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_output: Callable[[RequestOutput], None] | None = None,
        priority: int | Sequence[int] = 0,
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Completes all prompts, batched as the engine allows. Returns one output per prompt, in their order.

        prompts:         one prompt or a list of them; a list of integers is one prompt of token ids
        sampling_params: one for all, or one per prompt; None: SamplingParams()
        on_output:       called after each step for every request with a new token: all of its output so far
        priority:        one for all, or one per prompt; lower goes first (`PRIORITY_STEP`)
        timeout_s:       after so many seconds what has not ended ends with what it has, for the reason "timeout"
        Raises RequestError, before anything runs, naming the prompt's index and what the engine accepts; EngineError
        after `close`.
        """
        texts_and_ids = [self._tokenize(index, prompt) for index, prompt in enumerate(_prompt_list(prompts))]
        params = _params_list(sampling_params, len(texts_and_ids))
        priorities = _priorities(priority, len(texts_and_ids))
        for number in priorities:
            check_line(number, timeout_s)
        if not self._busy.acquire(blocking=False):
            raise RequestError("generate() is already running on this LLM; pass all prompts in one call")
        request_ids = [next(self._request_ids) for _ in texts_and_ids]
        deadline = None if timeout_s is None else time.perf_counter() + timeout_s
        rows = list(zip(request_ids, texts_and_ids, params, priorities, strict=True))

        def add(index: int) -> None:
            request_id, (text, token_ids), param, number = rows[index]
            with _naming_prompt(index):
                self.core.add_request(
                    request_id,
                    token_ids,
                    param,
                    prompt=text,
                    stream=on_output is not None,
                    priority=number,
                    deadline=deadline,
                )

        enough = len(rows)
        if len(set(priorities)) == 1:  # else somebody at the end may have to go first
            enough = self._enough_for_a_step([len(token_ids) for _, token_ids in texts_and_ids])
        try:
            self._refuse_if_closed()
            for index in range(enough):
                add(index)
            for index in range(enough, len(rows)):
                with _naming_prompt(index):
                    self.core.check_request(texts_and_ids[index][1], params[index])
            self.core.begin()
            for index in range(enough, len(rows)):  # while the device computes, if it has begun
                add(index)
            finished = self._run(on_output)
        finally:  # an error in a step or in on_output leaves no request and no page behind
            for request_id in request_ids:
                self.core.cancel(request_id)
            self._busy.release()
            if self._closed:
                self._release()
        return [finished[request_id] for request_id in request_ids]

    def close(self) -> None:
        """Releases the engine. The LLM cannot generate afterwards; what does in another thread ends with an EngineError."""
        self._closed = True
        self._release()

    def _release(self) -> None:
        """Releases the engine of a closed LLM, unless it runs: whoever ends its last step then does."""
        if self._busy.acquire(blocking=False):
            try:
                self.core.executor.close()
            finally:
                self._busy.release()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineError("this LLM is closed; load the engine again to generate")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, on_output: Callable[[RequestOutput], None] | None) -> dict[str, RequestOutput]:
        finished = {}
        while self.core.has_unfinished:
            self._refuse_if_closed()
            for output in self.core.step():
                if output.finished:
                    finished[output.request_id] = output
                if on_output is not None:
                    on_output(output)
        return finished

    def _enough_for_a_step(self, num_tokens: Sequence[int]) -> int:
        """How many of the prompts, of so many tokens each, fill the first step; all, if they do not."""
        executor = self.core.executor
        wholes = accumulate(num_tokens)
        full = (count for count, whole in enumerate(wholes, 1) if whole >= executor.max_num_tokens)
        return min(next(full, len(num_tokens)), executor.max_batch_size, len(num_tokens))

    def _tokenize(self, index: int, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        """The text of a prompt, if it has one, and its token ids."""
        with _naming_prompt(index):
            return tokenized(prompt, self.tokenizer)


@contextmanager
def _naming_prompt(index: int) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise RequestError(f"prompt {index}: {error}") from error


def _prompt_list(prompts: object) -> list[Any]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise RequestError(f"prompts is a {type(prompts).__name__}; accepted: {ACCEPTED}, or a list of these")
    if prompts and all(isinstance(item, Integral) for item in prompts):
        return [prompts]
    return list(prompts)


def _params_list(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if sampling_params is None:
        return [SamplingParams()] * num_prompts
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    accepted = "accepted: SamplingParams, or a list with one per prompt"
    if not isinstance(sampling_params, list | tuple):
        raise RequestError(f"sampling_params is a {type(sampling_params).__name__}; {accepted}")
    for index, param in enumerate(sampling_params):
        if not isinstance(param, SamplingParams):
            raise RequestError(f"sampling_params[{index}] is a {type(param).__name__}; {accepted}")
    if len(sampling_params) != num_prompts:
        raise RequestError(f"{len(sampling_params)} sampling_params for {num_prompts} prompts; {accepted}")
    return list(sampling_params)


def _priorities(priority: int | Sequence[int], num_prompts: int) -> list[int]:
    if isinstance(priority, list | tuple):
        if len(priority) != num_prompts:
            raise RequestError(
                f"{len(priority)} priorities for {num_prompts} prompts; accepted: an integer, or a list with one per prompt"
            )
        return list(priority)
    return [priority] * num_prompts  # type: ignore[list-item]  # `check_line` refuses what is no integer
