"""Oracles: decoding all tokens at once, and a search for stop strings character by character."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from trtc.runtime.detokenizer import Detokenizer
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.tokenizer import Tokenizer

MULTI_BYTE = "né 漢字, 🙂 and 👩‍👩‍👧 end"


def stream(
    tokenizer: Tokenizer, token_ids: Sequence[int], prompt: Sequence[int] = (1,), **params: Any
) -> tuple[list[str], str, str | None]:
    """Feeds tokens until a stop string matches: text shown after each, final text, stop string."""
    detokenizer = Detokenizer(tokenizer, list(prompt), SamplingParams(**params))
    shown, stop = [], None
    for token_id in token_ids:
        stop = detokenizer.append(token_id)
        shown.append(detokenizer.text)
        if stop is not None:
            break
    detokenizer.finish()
    return shown, detokenizer.text, stop


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Reads `text` one character at a time, until one of the stop strings is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def bytes_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte, so that every character beyond ASCII is split."""
    symbols = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [tokenizer._tokenizer.token_to_id(symbol) for word, _ in symbols for symbol in word]


@pytest.mark.parametrize("how", ["bpe", "bytes"])
def test_streamed_text_grows_by_whole_characters_to_the_whole_text(byte_level: Tokenizer, how: str) -> None:
    ids = byte_level.encode(MULTI_BYTE)[1:] if how == "bpe" else bytes_of(byte_level, MULTI_BYTE)
    shown, final, stop = stream(byte_level, ids)
    assert final == MULTI_BYTE == shown[-1] and stop is None
    for text in shown:
        assert MULTI_BYTE.startswith(text) and "\ufffd" not in text
    if how == "bytes":
        assert len(ids) == len(MULTI_BYTE.encode())
        assert len(set(shown)) == len(MULTI_BYTE), "every character is shown as soon as it is whole"


def test_half_a_character_is_shown_only_when_the_request_ends(byte_level: Tokenizer) -> None:
    ids = bytes_of(byte_level, "a漢")[:-1]
    shown, final, _ = stream(byte_level, ids)
    assert shown == ["a", "a", "a"] and final == "a\ufffd"


def test_bytes_that_never_make_a_character_do_not_swallow_what_follows(byte_level: Tokenizer) -> None:
    broken = [bytes_of(byte_level, "漢")[1]] * 6
    ids = [*broken, *bytes_of(byte_level, "é!")]
    shown, final, _ = stream(byte_level, ids)
    assert final == shown[-1] == byte_level.decode(ids) == "\ufffd" * 6 + "é!"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_end_as_decoding_them_at_once(byte_level: Tokenizer, data: st.DataObject) -> None:
    """Random tokens, half of them parts of characters; what was shown is never taken back."""
    pieces = [bytes_of(byte_level, c) for c in "é漢🙂a"] + [[i] for i in range(300)]
    ids = [i for piece in data.draw(st.lists(st.sampled_from(pieces), max_size=30)) for i in piece]
    skip = data.draw(st.booleans())
    shown, final, _ = stream(byte_level, ids, skip_special_tokens=skip)
    assert final == byte_level.decode(ids, skip_special_tokens=skip)
    for before, after in zip(shown, [*shown[1:], final], strict=True) if shown else ():
        assert after.startswith(before)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_byte_fallback_keeps_spaces_and_whole_characters(
    byte_fallback: Tokenizer, data: st.DataObject
) -> None:
    """Oracle: the text of prompt and output together, less the text of the prompt."""
    pieces = [[257], [258], [259], [260]] + [[byte + 1 for byte in c.encode()] for c in "é漢🙂"]
    ids = [i for piece in data.draw(st.lists(st.sampled_from(pieces), max_size=20)) for i in piece]
    prompt = [257, 258]
    shown, final, _ = stream(byte_fallback, ids, prompt)
    assert final == byte_fallback.decode([*prompt, *ids])[len("the cat") :]
    assert all("\ufffd" not in text and final.startswith(text) for text in shown)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_long_outputs_of_broken_characters_end_as_decoding_them_at_once(
    byte_level: Tokenizer, data: st.DataObject
) -> None:
    """Tokens that end within a character, with and without text before it, between whole ones, in rows far longer than one
    character; what was shown is never taken back."""
    broken = [i for i in range(300) if byte_level.decode([i]).endswith("\ufffd")]
    broken += bytes_of(byte_level, "漢") * 20  # else few of them make a character
    rows = st.lists(st.sampled_from(broken), max_size=60) | st.lists(st.integers(0, 299), max_size=5)
    ids = [i for row in data.draw(st.lists(rows, max_size=6)) for i in row]
    shown, final, _ = stream(byte_level, ids)
    assert final == byte_level.decode(ids)
    for before, after in zip(shown, [*shown[1:], final], strict=True) if shown else ():
        assert after.startswith(before)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        *product(
            ["byte_level", "byte_fallback"], ["broken", "half a character", "no text behind half a character"]
        ),
        ("byte_level", "text and half a character"),
    ],
)
def test_each_token_is_decoded_a_few_times_however_long_no_character_ends(
    kind: str, row: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the ids that the tokenizer decodes: a bound for each token, not one that grows with their number."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    character = bytes_of(tokenizer, "漢") if kind == "byte_level" else [byte + 1 for byte in "漢".encode()]
    first, second = character[:2]
    ids = {
        "broken": [second] * 400,
        "half a character": [first, second] * 200,
        "text and half a character": [i for i in range(300) if tokenizer.decode([i]) == "\ufffdc\ufffd"]
        * 400,
        "no text behind half a character": [first, *[10_000] * 400],
    }[row]
    decode, num_decoded = tokenizer.decode, []

    def counted(token_ids: Sequence[int], **options: Any) -> str:
        num_decoded.append(len(token_ids))
        return decode(token_ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    _, final, _ = stream(tokenizer, ids)
    assert final == decode(ids)
    assert max(num_decoded) < 40 and sum(num_decoded) < 40 * len(ids)


def test_broken_bytes_are_shown_before_the_request_ends(byte_level: Tokenizer) -> None:
    shown, final, stop = stream(byte_level, [bytes_of(byte_level, "漢")[1]] * 100, stop=["\ufffd" * 40])
    assert final == "" and stop is not None and 40 <= len(shown) < 60


@settings(max_examples=100, deadline=None)
@given(prompt=st.text("aé漢🙂", min_size=1, max_size=8), text=st.text("aé漢🙂 ", max_size=8))
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_prompt_may_end_in_characters_of_many_tokens(
    kind: str, prompt: str, text: str, request: pytest.FixtureRequest
) -> None:
    """Oracle: the text. What is decoded of the prompt begins with a whole character: byte fallback makes none of a row of bytes
    that does not."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    before, after = (
        bytes_of(tokenizer, t) if kind == "byte_level" else [byte + 1 for byte in t.encode()]
        for t in (prompt, text)
    )
    shown, final, _ = stream(tokenizer, after, before)
    assert final == text and all(text.startswith(part) for part in shown)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("cut", range(1, 17))
def test_a_prompt_may_end_within_a_character(kind: str, cut: int, request: pytest.FixtureRequest) -> None:
    """Oracle: the characters whose first byte is in the output, as that of a request that goes on where another was cut off."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    text = "字漢é🙂漢a🙂"
    ids = bytes_of(tokenizer, text) if kind == "byte_level" else [byte + 1 for byte in text.encode()]
    expected = text[len(text.encode()[:cut].decode(errors="replace")) :]
    shown, final, _ = stream(tokenizer, ids[cut:], ids[:cut])
    assert final == expected and all(expected.startswith(part) for part in shown)


def test_a_literal_replacement_character_in_the_prompt_stays_there(byte_level: Tokenizer) -> None:
    prompt = byte_level.encode("so\ufffd")
    _, final, _ = stream(byte_level, byte_level.encode("é cat")[1:], prompt)
    assert final == "é cat"


def test_special_tokens_show_only_when_asked_for(byte_level: Tokenizer) -> None:
    ids = [*byte_level.encode("the cat"), 0, *byte_level.encode(" sat")[1:]]
    assert stream(byte_level, ids)[1] == "the cat sat"
    assert stream(byte_level, ids, skip_special_tokens=False)[1] == "<s>the cat</s> sat"


def test_a_stop_string_is_cut_and_never_shown(byte_level: Tokenizer) -> None:
    shown, final, stop = stream(byte_level, bytes_of(byte_level, "go on STOP here"), stop=["STOP"])
    assert (final, stop) == ("go on ", "STOP")
    assert shown[-5:] == ["go on ", "go on ", "go on ", "go on ", "go on "]  # S, ST, STO were held back


def test_what_only_begins_like_a_stop_string_is_shown_later(byte_level: Tokenizer) -> None:
    shown, final, stop = stream(byte_level, bytes_of(byte_level, "aSTO"), stop=["STOP"])
    assert shown == ["a"] * 4 and final == "aSTO" and stop is None
    assert stream(byte_level, bytes_of(byte_level, "aSTOb"), stop=["STOP"])[0][-1] == "aSTOb"


def test_a_stop_string_of_split_characters(byte_level: Tokenizer) -> None:
    ids = bytes_of(byte_level, "a🙂漢🙂字b")
    shown, final, stop = stream(byte_level, ids, stop=["漢🙂字", "nothing"])
    assert (final, stop) == ("a🙂", "漢🙂字")
    assert len(shown) == len(ids) - 1 and shown[-2] == "a🙂"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_stop_strings_do_not_depend_on_how_text_is_cut_into_tokens(
    byte_level: Tokenizer, data: st.DataObject
) -> None:
    words = st.lists(st.sampled_from(["the", " cat", " sat", "stop", " and", "é"]), max_size=6).map("".join)
    text = data.draw(words)
    part = st.tuples(st.integers(0, 20), st.integers(1, 4)).map(lambda cut: text[cut[0] : cut[0] + cut[1]])
    stops = data.draw(st.lists(part.filter(bool) | st.just("op"), min_size=1, max_size=3))
    ids = data.draw(st.sampled_from([bytes_of(byte_level, text), byte_level.encode(text)[1:]]))
    expected, stop = first_stop(text, stops)
    shown, final, found = stream(byte_level, ids, stop=stops)
    assert (final, found) == (expected, stop)
    assert all(expected.startswith(part) for part in shown)


TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\N{REPLACEMENT CHARACTER}"), max_size=12
)
"""Without U+FFFD, which half a character decodes to: a text that ends with it looks as if more were to come."""


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, how=st.sampled_from(["bpe", "bytes"]), data=st.data())
def test_random_unicode_is_shown_by_whole_characters(
    byte_level: Tokenizer, text: str, how: str, data: st.DataObject
) -> None:
    """Any character of Unicode, in tokens that split it or do not, with and without stop strings cut out of it."""
    ids = bytes_of(byte_level, text) if how == "bytes" else byte_level.encode(text)[1:]
    whole = byte_level.decode(ids)
    assert whole == text
    start = data.draw(st.integers(0, len(text)))
    stop = text[start : start + data.draw(st.integers(0, 3))]
    expected, _ = first_stop(text, [stop]) if stop else (text, None)
    shown, final, _ = stream(byte_level, ids, stop=[stop] if stop else None)
    assert final == expected
    assert all(expected.startswith(part) for part in shown), "half a character, or a part of the stop string"


@settings(max_examples=150, deadline=None)
@given(text=st.text("abé🙂 ", max_size=12), stop=st.text("abé🙂 ", min_size=1, max_size=3))
def test_a_stop_string_stays_where_asked_for(byte_level: Tokenizer, text: str, stop: str) -> None:
    """Nothing has to be held back then; what follows the match in its token is cut."""
    for ids in (bytes_of(byte_level, text), byte_level.encode(text)[1:]):
        shown, final, found = stream(byte_level, ids, stop=[stop], include_stop_str_in_output=True)
        before, _ = first_stop(text, [stop])
        assert final == (before + stop if found else text)
        assert (found == stop) == (stop in text)
        assert all(final.startswith(part) for part in shown)


def test_min_tokens_lets_earlier_stop_strings_pass(byte_level: Tokenizer) -> None:
    ids = bytes_of(byte_level, "ab ab ab")
    assert stream(byte_level, ids, stop="ab", min_tokens=2)[1:] == ("ab ", "ab")
    assert stream(byte_level, ids, stop="ab", min_tokens=1)[1:] == ("", "ab")
    shown, final, stop = stream(byte_level, ids, stop=["ab", "much longer"], min_tokens=5)
    assert (final, stop) == ("ab ab ", "ab")
    # the first "a" might begin a stop string; "ab" is one, and passes
    assert shown[:2] == ["", "ab"] and shown[4] == "ab ab"
