"""Instructions of Alpaca, in the prompt with which such data is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.modeling.forms.base import Form
from lark_store.modeling.forms.completion import completed

if TYPE_CHECKING:
    from lark_store.modeling.sample import Sample
    from lark_store.readers.fields import Fields

_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
WITHOUT_INPUT = f"{_TASK}. {_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
WITH_INPUT = (
    f"{_TASK}, paired with an input that provides further context. {_REQUEST}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def _read(fields: Fields) -> list[Sample]:
    instruction, context, output = (fields.text(name) for name in ("instruction", "input", "output"))
    if not instruction.strip():
        return []
    template = WITH_INPUT if context.strip() else WITHOUT_INPUT
    return completed(template.format(instruction=instruction, input=context), output)


ALPACA = Form(
    name="alpaca",
    needed=("instruction", "output"),
    optional=("input",),
    looks_like="`instruction`, `input`, `output` (Alpaca); the input may be empty",
    meaning="the prompt of Alpaca's trainers, and the output as its completion",
    read=_read,
    note="Alpaca rows get the prompt of Alpaca's trainers: “Below is an instruction that describes a task…”, with a "
    "newline after “### Response:”; if yours was another, write columns `prompt` and `completion`",
)
