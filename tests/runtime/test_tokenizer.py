"""Oracle: transformers' fast tokenizer on the same directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from trtc.core.errors import EngineError, RequestError
from trtc.runtime.tokenizer import Tokenizer

TEXTS = ["the cat", " sat\n\n", "漢字🙂 and more than three tokens", "a</s>b", "", "\x00\x7f"]


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_those_of_transformers(
    byte_level: Tokenizer, tokenizer_dir: Path, text: str
) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"))
    ids = byte_level.encode(text)
    assert ids == reference.encode(text)
    assert ids[0] == byte_level.bos_token_id == 1
    for skip in (True, False):
        expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert byte_level.decode(ids, skip_special_tokens=skip) == expected


def test_special_tokens_come_from_the_configuration(byte_level: Tokenizer) -> None:
    assert (byte_level.bos_token_id, byte_level.eos_token_id) == (1, 0)


def test_a_directory_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.from_dir(tmp_path) is None


def test_special_token_names_may_be_missing(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer is not None and tokenizer.eos_token_id is None
    (tmp_path / "special_tokens_map.json").write_text(
        '{"eos_token": "</s>", "additional_special_tokens": []}'
    )
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer is not None and tokenizer.eos_token_id == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", b"{"), ("tokenizer.json", b'{"model": 3}'), ("tokenizer_config.json", b"{,}"),
     ("tokenizer_config.json", b"\xff\xfe"), ("tokenizer_config.json", b"[]"),
     ("tokenizer_config.json", b'{"eos_token": "\\ud800"}'), ("tokenizer_config.json", b'{"eos_token": "\xed\xa0\x80"}')],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, tokenizer_dir: Path, name: str, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EngineError, match=name):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_signal_while_a_file_is_read_is_no_fault_of_the_file(
    end: type[BaseException], tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ctrl-C raises, and what handlers of SIGTERM do."""

    def interrupted(file: Path) -> bytes:
        raise end

    monkeypatch.setattr(Path, "read_bytes", interrupted)
    with pytest.raises(end):
        Tokenizer.from_dir(tokenizer_dir)


def test_a_file_that_the_library_panics_about_is_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    """When it is read, and not at the first prompt: a template with a special token that there is not."""
    data = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    pieces = [{"SpecialToken": {"id": "<none>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(EngineError, match=r"tokenizer\.json is not a tokenizer file: "):
        Tokenizer.from_dir(tmp_path)


def test_a_folder_may_have_a_name_that_is_no_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    """As file systems and containers without a locale have them."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shutil.copytree(tokenizer_dir, folder)
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer is not None and tokenizer.decode(tokenizer.encode("a storm")) == "a storm"


def test_half_a_surrogate_pair_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError, match="cannot be encoded as UTF-8"):
        byte_level.encode("a\ud83d")


def test_no_transformers_at_run_time() -> None:
    """Oracle: a fresh interpreter in which importing transformers or tokenizers would fail."""
    code = (
        "import sys; sys.modules['transformers'] = None; sys.modules['tokenizers'] = None; "
        "import trtc.runtime.llm, trtc.runtime.tokenizer"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_bytes_of_tokens_make_the_text(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    """Also where a character is split over tokens. Oracle: UTF-8."""
    text = "né 漢字, 🙂 and \u00ad \x00 end"
    ids = byte_level.encode(text, special_tokens=False)
    assert any("\ufffd" in byte_level.decode([token_id]) for token_id in ids), "nothing is split"
    assert b"".join(map(byte_level.token_bytes, ids)) == text.encode()
    assert byte_level.token_bytes(0) == b"</s>"
    assert b"".join(byte_fallback.token_bytes(1 + byte) for byte in "漢".encode()) == "漢".encode()
