"""Oracles: the tiny OPT's own text, which says these words when nothing forbids them; a search through all sequences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trtc.core.errors import RequestError
from trtc.runtime.bad_words import BadWords, bad_words
from trtc.runtime.llm import LLM
from trtc.runtime.outputs import CompletionOutput
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.tokenizer import Tokenizer
from trtc.tests.tiny_opt import build_tiny_opt

IDS = st.integers(0, 3)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(build_tiny_opt(tmp_path_factory.mktemp("bad_words") / "engine")) as llm:
        yield llm


def completions(llm: LLM, **options: Any) -> list[CompletionOutput]:
    (output,) = llm.generate("The city council", SamplingParams(n=8, max_tokens=30, seed=1, **options))
    return output.outputs


def test_words_do_not_come(llm: LLM) -> None:
    """The six words said most often, and one of several tokens."""
    assert llm.tokenizer is not None
    text = " ".join(completion.text for completion in completions(llm))
    counts = Counter(re.findall(r"(?<= )[A-Za-z]+", text))
    ids = {word: llm.tokenizer.encode(f" {word}", special_tokens=False) for word in counts}
    forbidden = [word for word, _ in counts.most_common(6)]
    forbidden.append(next(word for word in counts if len(ids[word]) > 1))
    for completion in completions(llm, bad_words=forbidden):
        tokens = completion.token_ids
        for word in forbidden:
            ends = range(len(ids[word]), len(tokens) + 1)
            assert all(tokens[end - len(ids[word]) : end] != ids[word] for end in ends), completion.text


def test_a_word_begun_in_the_prompt_is_not_finished(llm: LLM) -> None:
    (plain,) = llm.generate("The city council", SamplingParams(temperature=0, max_tokens=1))
    first = plain.outputs[0].token_ids[0]
    sequence = [*plain.prompt_token_ids[-2:], first]
    params = SamplingParams(temperature=0, max_tokens=1, bad_words_ids=[sequence])
    (output,) = llm.generate("The city council", params)
    assert output.outputs[0].token_ids != [first]


@settings(deadline=None)
@given(words=st.lists(st.lists(IDS, min_size=1, max_size=4), max_size=6), text=st.lists(IDS, max_size=6))
def test_forbidden_is_what_would_complete_a_sequence(words: list[list[int]], text: list[int]) -> None:
    expected = {token for token in range(4) if any([*text, token][-len(word) :] == word for word in words)}
    found = BadWords(words)
    assert found.forbidden_after(text) == expected
    assert found.ever_forbidden == {word[-1] for word in words}
    assert bool(found) == bool(words)


def test_words_are_forbidden_at_the_beginning_and_after_a_space(byte_level: Tokenizer) -> None:
    words = bad_words(SamplingParams(bad_words=[" cat", "the"]), byte_level)
    for text in ("cat", " cat", "the", " the"):
        *before, last = byte_level.encode(text, special_tokens=False)
        assert last in words.forbidden_after([1, *before])


def test_a_word_without_tokens_is_refused(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_level, "encode", lambda text, special_tokens: [])
    with pytest.raises(RequestError, match="of which the tokenizer makes no tokens") as error:
        bad_words(SamplingParams(bad_words=["x"]), byte_level)
    assert error.value.field == "bad_words"
