"""Steps of executors on packed tokens, and checks of engines whose oracle is the engine itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from trtc.runtime.executor import Executor, PageCopier
from trtc.runtime.llm import LLM
from trtc.runtime.load import load_executor
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.step_input import StepInput

from .packed_steps import Inputs, PagedSequences

TOKENS = [5, 17, 1, 90, 0, 23, 64, 2, 11, *range(20, 80)]
"""A sequence that engines of `opt_models.BUILD` take as one prompt."""


def step_input(inputs: Inputs) -> StepInput:
    return StepInput(**{name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()})


def execute(executor: Executor, inputs: Inputs) -> torch.Tensor:
    """The logits of a step in float32 on the CPU, which the next step leaves alone."""
    return executor.execute(step_input(inputs)).to("cpu", torch.float32, copy=True)


def logits_in_chunks(executor: Executor, tokens: Sequence[int], chunks: Sequence[int]) -> torch.Tensor:
    """[tokens, vocab] of one sequence that is fed in `chunks` of so many tokens."""
    assert sum(chunks) == len(tokens)
    sequence = PagedSequences(executor.page_size, executor.num_pages)
    rows, start = [], 0
    for size in chunks:
        rows.append(execute(executor, sequence.step({"a": tokens[start : start + size]})))
        start += size
    return torch.cat(rows)


def engine_logits(engine: Path, tokens: Sequence[int], chunks: Sequence[int]) -> torch.Tensor:
    """`logits_in_chunks` of an engine that is loaded for it."""
    executor = load_executor(engine)
    logits = logits_in_chunks(executor, tokens, chunks)
    executor.close()
    return logits


def batch_work(sequences: int, step: int) -> dict[str, list[int]]:
    """New tokens of many sequences, below 90: three of each in step 0, then one."""
    count = 3 if step == 0 else 1
    return {str(i): [(7 * i + step) % 90, (5 * i) % 90, i % 90][:count] for i in range(sequences)}


def check_copied_pages(engine: Path) -> None:
    """A sequence goes on from copies of another's pages as that does. Oracle: the logits of the other."""
    executor = load_executor(engine)
    assert isinstance(executor, PageCopier)
    sequence = PagedSequences(executor.page_size, executor.num_pages)
    execute(executor, sequence.step({"a": TOKENS[:30]}))
    step = sequence.step({"a": [7]})
    pages = step["page_table"][0].tolist()
    copies = [page for page in range(executor.num_pages) if page not in pages][: len(pages)]
    executor.copy_pages(pages, copies)
    expected = execute(executor, step)
    step["page_table"][0] = torch.tensor(copies, dtype=torch.int32)
    assert torch.equal(execute(executor, step), expected)
    executor.close()


def check_reproducible(engine: Path) -> None:
    """Greedy tokens, run ahead of the host, are the same when the engine is loaded again."""
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    runs = []
    for _ in range(2):
        with LLM(engine) as llm:
            runs.append(list(llm.generate([TOKENS[:20]], params)[0].outputs[0].token_ids))
    assert runs[0] == runs[1]
