"""Check the messages of a chat: roles, contents, weights."""

from __future__ import annotations

from typing import Any

from lark_store.core.text import coded, joined
from lark_store.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "observation", "ipython")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
_KINDS = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
_MEDIA = ("image", "audio", "video", "file", "document")
_CALLS = ("tool_calls", "function_call")


def kind_of(value: object) -> str:
    """Name the kind of a value for a message.

    >>> kind_of(3), kind_of(None)
    ('a number', 'null')
    """
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def translate(role: object) -> str:
    """Return the advice for a role of another name.

    >>> translate("gpt"), translate(3)
    ('translate it with `--column role.assistant=gpt`', 'translate another with `--column role.user=NAME`')
    """
    if not isinstance(role, str) or not role or not role.isprintable():
        return "translate another with `--column role.user=NAME`"
    return f"translate it with `--column role.{SHAREGPT_ROLES.get(role.lower(), 'user')}={role}`"


def check_message(message: dict[str, Any]) -> None:
    """Check one message.

    Raises
    ------
    InputError
        The role is unknown, or a value has the wrong type.
    """
    _check_role(message.get("role"))
    _check_content(message)
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise InputError(f"its `weight` is `{weight}`", "a weight is 0 (context only) or 1 (a target)")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise InputError(
            "its `tool_calls` are not a list of objects", 'for example [{"type": "function", "function": {…}}]'
        )
    for key in ("reasoning_content", "name", "tool_call_id"):
        if not isinstance(message.get(key), str | None):
            raise InputError(f"its `{key}` is {kind_of(message[key])}, not text", "write it as text, or remove it")


def _check_role(role: object) -> None:
    if role is None:
        raise InputError(
            "it has no `role`",
            "a message has `role` and `content`; name its own keys with `--column messages.role=KEY` and "
            "`--column messages.content=KEY`",
        )
    if role not in ROLES:
        label = f"the unknown role `{role}`" if isinstance(role, str) else f"{kind_of(role)} as its role"
        raise InputError(
            f"it has {label}",
            f"the roles are {joined(coded(ROLES), 'and')}; {translate(role)}",
        )


def _check_content(message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and any(message.get(key) for key in _CALLS)):
        return
    if content is None:
        raise InputError(
            "it has no `content`",
            "only a message with `tool_calls` may lack it; name another key with `--column messages.content=KEY`",
        )
    if not isinstance(content, list):
        raise InputError(f"its `content` is {kind_of(content)}, not text", "write it as text, in quotes")
    for part in content:
        _check_part(part)


def _check_part(part: object) -> None:
    """Check a part of a content: text alone."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part, dict) and isinstance(part.get("text"), str):
        return
    if isinstance(kind, str) and any(medium in kind for medium in _MEDIA):
        raise InputError(
            f"its `content` has a part of type `{kind}`", "only text can be sketched: remove such samples or parts"
        )
    raise InputError(
        f"its `content` has a part that is {kind_of(part) if kind is None else f'of type `{kind}`'}, not a text part",
        'a text part is {"type": "text", "text": "…"}',
    )
