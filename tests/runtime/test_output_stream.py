"""The way from the engine's thread to a reader. Oracle: `request_output`, which makes the same output at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from trtc.core.errors import EngineError
from trtc.runtime.engine_core import EngineCore
from trtc.runtime.groups import request_output
from trtc.runtime.output_stream import Cutter, OutputStream
from trtc.runtime.outputs import RequestOutput
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.tokenizer import Tokenizer

from .test_async_llm import WideToy

PROMPT = [71, 72, 73, 74]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "several": {"n": 3, "temperature": 1.0, "seed": 5},
    "logprobs": {"logprobs": 2, "prompt_logprobs": 1},
    "stop string": {"stop": ["ab", "zz", "\N{REPLACEMENT CHARACTER}"], "temperature": 1.0, "seed": 3},
    "best of": {"n": 2, "best_of": 4, "temperature": 1.0, "seed": 1},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("every", [1, 3])
def test_pieces_are_the_output_in_parts(case: str, every: int, byte_level: Tokenizer) -> None:
    """every: the reader is slow, and comes back after so many steps."""
    params = SamplingParams(max_tokens=20, ignore_eos=True, **({"temperature": 0.0} | CASES[case]))
    core = EngineCore(WideToy(vocab_size=300), byte_level)
    group = core.add_request("r", PROMPT, params, prompt="text")

    async def main() -> list[tuple[RequestOutput, RequestOutput]]:
        stream, cutter, seen = OutputStream("r", "text", PROMPT, params.n), Cutter(params.n), []
        for number in range(1, 100):
            if not core.has_unfinished:
                break
            changed = [each for each in core.advance() if each.reports]
            for each in changed:
                stream.put(cutter.update(each, byte_level))
            if changed and (number % every == 0 or group.finished):
                seen.append((await stream.get(), request_output(group, byte_level)))
        return seen

    seen = asyncio.run(main())
    assert seen and seen[-1][0].finished
    assert len(seen) == 1 or case != "best of"
    for found, expected in seen:
        for one, other in zip(found.outputs, expected.outputs, strict=True):
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob)
        assert _without_sums(found) == _without_sums(expected)


def _without_sums(output: RequestOutput) -> Any:
    rows = [
        (o.index, o.text, o.token_ids, o.logprobs, o.finish_reason, o.stop_reason) for o in output.outputs
    ]
    return rows, output.prompt, output.prompt_token_ids, output.prompt_logprobs, output.finished


def test_an_output_that_was_read_stays_as_it_is() -> None:
    core = EngineCore(WideToy(vocab_size=300))
    group = core.add_request(
        "r", PROMPT, SamplingParams(max_tokens=4, temperature=0, logprobs=1, ignore_eos=True)
    )

    async def main() -> list[RequestOutput]:
        stream, cutter, seen = OutputStream("r", None, PROMPT, 1), Cutter(1), []
        while not group.finished:
            core.advance()
            stream.put(cutter.update(group, None))
            seen.append(await stream.get())
        return seen

    seen = asyncio.run(main())
    assert [len(output.outputs[0].token_ids) for output in seen] == [1, 2, 3, 4]
    assert [len(output.outputs[0].logprobs or ()) for output in seen] == [1, 2, 3, 4]


def test_a_reader_waits_for_what_is_new_and_hears_of_errors() -> None:
    async def main() -> None:
        stream = OutputStream("r", None, PROMPT, 1)
        reader = asyncio.ensure_future(stream.get())
        await asyncio.sleep(0)
        assert not reader.done()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        stream.fail("the engine was shut down")  # nobody waits any more
        with pytest.raises(EngineError, match="shut down"):
            await stream.get()

    asyncio.run(main())
