"""Read the lists of messages of a row: from objects or JSON, in OpenAI's or ShareGPT's spelling."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from lark_store.core.text import coded, joined
from lark_store.errors import InputError
from lark_store.modeling.forms.chat_checks import SHAREGPT_ROLES, check_message, kind_of, translate
from lark_store.modeling.sample import Sample
from lark_store.readers.base import StructRow
from lark_store.readers.fields import Fields, is_blank
from lark_store.readers.json_text import parse
from lark_store.schema.chats import content_text

if TYPE_CHECKING:
    from collections.abc import Mapping

Message = dict[str, Any]
_JSON_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(role|content|from|value)"\s*:')


def is_list(fields: Fields, name: str) -> bool:
    """Tell whether a field may hold a list of messages: a list, or JSON of one."""
    value = fields.value(name)
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def is_messages(fields: Fields, name: str) -> bool:
    """Tell whether a field holds messages and no text: a list of other items than texts, or JSON of messages."""
    value = fields.value(name)
    if isinstance(value, str):
        return bool(_JSON_MESSAGES.match(value))
    return isinstance(value, list) and not all(isinstance(item, str) for item in value)


def are_messages(fields: Fields, names: tuple[str, str]) -> bool:
    """Tell whether two fields hold messages, or both hold text; of two texts, both must be JSON of messages.

    Raises
    ------
    InputError
        One is text, the other a list.
    """
    are = {name: is_messages(fields, name) for name in names}
    if any(are[name] and not isinstance(fields.value(name), str) for name in names) and not all(are.values()):
        text = next(name for name in names if not are[name])
        raise InputError(
            f"column `{fields.column(text)}` is text, but the other of `{names[0]}` and `{names[1]}` is a list of "
            "messages",
            "give both as text, or both as messages",
        )
    return all(are.values())


def chat(messages: list[Message], fields: Fields, ending: str = "") -> Sample:
    """Return messages and the row's tools as a sample."""
    tools = tools_of(fields)
    return Sample(
        ending,
        messages=_as_json(messages),
        tools=_as_json(tools) if tools else None,
    )


def is_empty(messages: list[Message]) -> bool:
    """Tell whether no message has a text or a call."""
    return all(is_blank(content_text(message.get("content"))) and not message.get("tool_calls") for message in messages)


def as_context(messages: list[Message]) -> list[Message]:
    """Return messages with weight 0 for their assistant turns: context, no targets."""
    return [message | {"weight": 0} if message["role"] == "assistant" else message for message in messages]


def messages_of(fields: Fields, name: str) -> list[Message]:
    """Return the messages of a field, checked; the keys of each keep their order.

    Raises
    ------
    InputError
        The value is not a list of messages, or a message is invalid.
    """
    column = fields.column(name)
    items = _list_of(fields, name)
    keys = {theirs: ours for ours, theirs in fields.renamed("messages").items()}
    roles = {theirs: ours for ours, theirs in fields.renamed("role").items()}
    messages = []
    for number, item in enumerate(items, 1):
        try:
            messages.append(_message(item, keys, roles))
        except InputError as error:
            raise InputError(f"message {number} of column `{column}`: {error.fact}", error.hint) from error
    return messages


def _message(item: object, keys: Mapping[str, str], roles: Mapping[str, str]) -> Message:
    if not isinstance(item, dict):
        raise InputError(
            f"it is {kind_of(item)}, not an object", 'a message is an object: {"role": "user", "content": "…"}'
        )
    message = {keys.get(key, key): value for key, value in item.items()}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, roles)
    elif isinstance(message.get("role"), str):
        message["role"] = roles.get(message["role"], message["role"])
    weight = message.get("weight")
    if isinstance(weight, float) and weight in {0, 1}:  # a column of numbers with gaps
        message["weight"] = int(weight)
    check_message(message)
    return message


def _from_sharegpt(message: Message, roles: Mapping[str, str]) -> Message:
    """Translate `from` and `value` to `role` and `content`."""
    speaker = message["from"]
    role = (SHAREGPT_ROLES | dict(roles)).get(speaker) if isinstance(speaker, str) else None
    if role is None:
        label = f"`{speaker}`" if isinstance(speaker, str) else kind_of(speaker)
        raise InputError(
            f"it is from {label}, an unknown role",
            f"known are {joined(coded(SHAREGPT_ROLES), 'and')}; {translate(speaker)}",
        )
    rest = {key: value for key, value in message.items() if key not in {"from", "value"}}
    return {"role": role, **({"content": message["value"]} if "value" in message else {}), **rest}


def tools_of(fields: Fields) -> list[Any]:
    """Return the tools of a chat: the field `tools`, or `functions` of OpenAI's older format as tools.

    Raises
    ------
    InputError
        They are not a list of objects.
    """
    name = next((name for name in ("tools", "functions") if not is_blank(fields.value(name))), None)
    if name is None:
        return []
    tools = _list_of(fields, name)
    if not all(isinstance(tool, dict) for tool in tools):
        raise InputError(
            f"column `{fields.column(name)}` is not a list of objects",
            'a tool is an object: {"type": "function", "function": {"name": "…", "parameters": {…}}}',
        )
    return [{"type": "function", "function": tool} for tool in tools] if name == "functions" else tools


def _list_of(fields: Fields, name: str) -> list[Any]:
    """Return the list in a field, also if it is saved as JSON; without the nulls that a struct adds."""
    column, value = fields.column(name), fields.value(name)
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = parse(value, f"column `{column}`", 'write a list of objects: [{"role": "user", "content": "…"}]')
    elif isinstance(fields.row, StructRow):
        value = _without_nulls(value, is_message=name not in {"tools", "functions"})
    if not isinstance(value, list):
        raise InputError(
            f"column `{column}` holds {kind_of(value)}, not a list",
            f"map another column with `--column {name}=COLUMN`, or a nested one with `--column {name}={column}.KEY`",
        )
    return value


def _without_nulls(value: Any, *, is_message: bool) -> Any:
    """Copy a value of a columnar file without the null keys of its structs, except the content of a message."""
    if isinstance(value, list):
        return [_without_nulls(item, is_message=is_message) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_nulls(item, is_message=False)
        for key, item in value.items()
        if item is not None or (is_message and key == "content")
    }


def _as_json(value: list[Any]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the chat can't be written as JSON: {error}", "use texts, numbers, lists and objects"
        ) from error
