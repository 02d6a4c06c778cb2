"""Render chats with a checkpoint's template alone, without its tokenizer: no import of transformers or torch."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from lark_store.errors import CheckpointError
from lark_store.modeling.checkpoints import base_folder, has_tokenizer, local_folder, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from lark_store.schema.catalog import Checkpoint

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A checkpoint's chat template, with the part of a tokenizer's interface that renders texts."""

    is_fast = True  # a `Renderer` requires it; nothing is tokenized

    def __init__(self, template: str | None, special_tokens: dict[str, str]) -> None:
        self.chat_template = template
        self._special_tokens = special_tokens

    @property
    def eos_token(self) -> str | None:
        """The end of text, if known."""
        return self._special_tokens.get("eos_token")

    def apply_chat_template(self, messages: Any, *, tokenize: bool = False, **variables: Any) -> str:
        """Render messages as a tokenizer does."""
        assert not tokenize
        assert self.chat_template is not None
        template = _environment().from_string(self.chat_template)
        named = {"messages": messages, "add_generation_prompt": False, "tools": None, "documents": None}
        return template.render(**named | self._special_tokens | variables)


def chat_template_of(checkpoint: Checkpoint) -> ChatTemplate:
    """Read the chat template of a checkpoint, without checking its files' hashes.

    Raises
    ------
    CheckpointError
        Its files are missing.
    """
    folder = local_folder(checkpoint)
    home = folder if has_tokenizer(folder) else base_folder(folder)
    config = _json(home / "tokenizer_config.json")
    tokens = {name: config.get(name) or _json(home / "special_tokens_map.json").get(name) for name in _SPECIAL}
    special = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items() if value}
    return ChatTemplate(_template(home, config), special)


def _template(home: Path, config: dict[str, Any]) -> str | None:
    path = home / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"`{path}` can't be read: {error}", "is the checkpoint complete?") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # named templates
        named = {item["name"]: item["template"] for item in template}
        template = named.get("default")
    return template


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Create the environment that transformers gives chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks an assistant's turns; it prints its body."""

        tags = {"generation"}  # noqa: RUF012  # Jinja's interface

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, *, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda _: "26 Jul 2024"
    return environment
