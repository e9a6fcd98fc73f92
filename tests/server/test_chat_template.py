"""Chat templates: what they may say, and those that cannot be used. Oracle: the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from trtc.core.errors import EngineError, RequestError
from trtc.runtime.server.chat_template import ChatTemplate

from .requests import MESSAGES

TINY_OPT = Path(__file__).parents[2] / "examples" / "tiny-opt"


def folder_with(tmp_path: Path, name: str, content: bytes) -> Path:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_OPT / file, tmp_path)
    (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("chat_template.jinja", b"{% for %}", "chat template of the engine cannot be read: Expected"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja: not UTF-8 text \(byte 0\)"),
        ("chat_template.json", b"[]", r"chat_template\.json: must be a JSON object"),
        ("tokenizer_config.json", json.dumps({"chat_template": ["x"]}).encode(), "without name and template"),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "x"}]}).encode(),
            "without name and template",
        ),
    ],
)
def test_a_template_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        ChatTemplate.from_dir(folder_with(tmp_path, name, content))


@pytest.mark.parametrize(
    "source",
    ["{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ messages[0].content + 1 }}", "{{ '%d' % 'x' }}"],
)
def test_a_template_that_fails_refuses_the_messages(tmp_path: Path, source: str) -> None:
    """Whatever it raises: the request has the fault, or the template, but not the server."""
    template = ChatTemplate.from_dir(folder_with(tmp_path, "chat_template.jinja", source.encode()))
    assert template is not None
    with pytest.raises(RequestError, match=r"the chat template refuses the messages: \S"):
        template.token_ids([{"role": "user", "content": str(MESSAGES[0]["content"])}])


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}|{% endfor %}",
        "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ 'with' if tools is not none else 'without' }} tools, {{ documents is none }}, {{ bos_token }}",
    ],
)
def test_what_templates_may_say(tmp_path: Path, source: str) -> None:
    """Oracle: transformers."""
    from transformers import AutoTokenizer

    template = ChatTemplate.from_dir(folder_with(tmp_path, "chat_template.jinja", source.encode()))
    messages = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b"}]
    expected = AutoTokenizer.from_pretrained(TINY_OPT).apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert template is not None and template.render(messages) == expected


def test_special_tokens_of_an_older_folder(tmp_path: Path) -> None:
    """Their names stand in special_tokens_map.json alone. Oracle: transformers."""
    from transformers import AutoTokenizer

    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}"
    folder = folder_with(tmp_path, "chat_template.jinja", source.encode())
    shutil.copy(TINY_OPT / "special_tokens_map.json", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    messages = [{"role": "user", "content": "a"}]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    template = ChatTemplate.from_dir(folder)
    assert expected == "</s>a</s><pad>"
    assert template is not None and template.render(messages) == expected
