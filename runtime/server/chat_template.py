"""Conversations to prompts, with the chat template that travels in the engine directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...core.errors import EngineError, RequestError
from ...core.strict_json import read_object
from ..tokenizer import Tokenizer, special_token_names


class ChatTemplate:
    """A Jinja template as Hugging Face tokenizers have it, and the tokenizer for the text it makes."""

    def __init__(self, source: str, tokenizer: Tokenizer, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: bos_token, eos_token, ... by name. Raises EngineError for a template that cannot be read."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise EngineError(f"the chat template of the engine cannot be read: {error}") from error
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_dir(cls, path: str | Path) -> ChatTemplate | None:
        """The template of a directory, from the places transformers looks in; None when it has none."""
        folder = Path(path)
        source = _find_source(folder)
        if source is None or (tokenizer := Tokenizer.from_dir(folder)) is None:
            return None
        return cls(source, tokenizer, special_token_names(folder))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt after which the assistant speaks. Raises RequestError when the template refuses the messages."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except Exception as error:  # noqa: BLE001 - a template fails at messages it was not made for as any program does
            raise RequestError(f"the chat template refuses the messages: {error}") from None

    def token_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of the rendered prompt: the template has put the special tokens in, so no others are added."""
        return self._tokenizer.encode(self.render(messages), special_tokens=False)


def _find_source(folder: Path) -> str | None:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise EngineError(f"{jinja}: not UTF-8 text (byte {error.start})") from None
    of_tokenizer = _read(folder / "tokenizer_config.json").get("chat_template")
    value = _read(folder / "chat_template.json").get("chat_template", of_tokenizer)
    if isinstance(value, list):  # several by name
        named = [entry for entry in value if isinstance(entry, dict) and entry.keys() >= {"name", "template"}]
        if len(named) < len(value):
            raise EngineError(f"{folder}: chat_template has an entry without name and template")
        value = {str(entry["name"]): entry["template"] for entry in named}.get("default")
    return value if isinstance(value, str) else None


def _read(file: Path) -> Mapping[str, Any]:
    return read_object(file, EngineError) if file.is_file() else {}


class _Generation(Extension):
    """`{% generation %}`, which tells those who train a model what it is to say; here it is what stands inside."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, and has no options."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
