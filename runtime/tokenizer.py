"""Text to token ids and back, from the `tokenizer.json` that travels in the engine directory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import EngineError, RequestError
from ..core.strict_json import read_object

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
_NAME_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""What tokenizers with byte fallback call the token of one byte."""


def in_utf8(text: str) -> bool:
    """Whether UTF-8 has `text`: not half a surrogate pair, as Python makes of bytes that are no text. No model writes such a
    text, and no answer can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Tokenizer:
    """A `tokenizers` tokenizer with the names of its special tokens."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, bos_token: str | None, eos_token: str | None
    ) -> None:
        # A file may carry the truncation and padding of its training run; a prompt is neither cut nor filled.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.bos_token_id = None if bos_token is None else tokenizer.token_to_id(bos_token)
        self.eos_token_id = None if eos_token is None else tokenizer.token_to_id(eos_token)

    @classmethod
    def from_dir(cls, path: str | PathLike[str]) -> Tokenizer | None:
        """Reads the tokenizer files of a directory; None when it has no tokenizer.json.

        Raises EngineError naming the file that cannot be read.
        """
        file = Path(path) / TOKENIZER_FILE
        if not file.is_file():
            return None
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(file.read_bytes())
            tokenizer.encode("")
        except OSError as error:
            raise EngineError(f"{file}: cannot be read: {error.strerror}") from None
        except (KeyboardInterrupt, SystemExit):
            raise
        # The library raises plain Exception for every fault that it knows, and of others what is not even one.
        except BaseException as error:
            raise EngineError(f"{file} is not a tokenizer file: {error}") from error
        names = special_token_names(Path(path))
        return cls(tokenizer, bos_token=names.get("bos_token"), eos_token=names.get("eos_token"))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with or without the special tokens that the tokenizer's post-processor adds."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text cannot be encoded as UTF-8: {error.reason} at {error.start}"
            ) from error
        return self._tokenizer.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, which need not be whole characters."""
        text = self.decode([token_id], skip_special_tokens=False)
        name = self._tokenizer.id_to_token(token_id) or ""
        if "\N{REPLACEMENT CHARACTER}" in text:
            if found := _BYTE_TOKEN.fullmatch(name):
                return bytes([int(found[1], 16)])
            if all(character in _byte_of() for character in name):
                return bytes(_byte_of()[character] for character in name)
        return text.encode()


@cache
def _byte_of() -> Mapping[str, int]:
    """Byte-level tokenizers write bytes as characters: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def required_tokenizer(tokenizer: Tokenizer | None, engine_dir: str | PathLike[str]) -> Tokenizer:
    """The tokenizer of an engine that is of no use without. Raises RequestError when it has none."""
    if tokenizer is None:
        raise RequestError(
            f"{engine_dir}: the engine has no tokenizer files; build it from a folder with them"
        )
    return tokenizer


def special_token_names(path: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token, ... in the tokenizer files of a folder; the first file that knows a name wins.

    Raises EngineError naming the file that cannot be read.
    """
    names: dict[str, str] = {}
    for file in (path / name for name in _NAME_FILES):
        if not file.is_file():
            continue
        entries = read_object(file, EngineError)
        for name, value in entries.items():
            content = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(content, str):
                names.setdefault(name, content)
    return names
