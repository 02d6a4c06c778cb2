"""Answers that a checkpoint predicts itself, as targets: the rule `predicted-answer`.

The reference paper formats a pretraining document like a fine-tuning sample: the document where the context stands, a
question, and an assistant turn. As such text has no label, the checkpoint's own answer is the label.

Shape letters: T tokens of a prompt, A of an answer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

from lark_store.errors import InputError
from lark_store.modeling.encoded import UnusableSampleError, encode
from lark_store.modeling.parts import DocumentParts, parts_of
from lark_store.modeling.sample import Sample
from lark_store.specs import PREDICTED_ANSWER, VariantSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.modeling.parts import Layout
    from lark_store.schema.catalog import FormatVariant

    Predict = Callable[["AnswerPrompt"], list[int]]  # the tokens of an answer, (A,)

DOCUMENT, QUESTION = "{document}", "{question}"
_STAND_IN = "answer"  # in place of the answer until it is predicted


@dataclass(frozen=True)
class AnswerPrompt:
    """A prompt for an answer: `input_ids` (T,), ending where the answer starts.

    `options` are the tokens of each label to choose from, (A,) each; without labels, the answer is greedy and has at
    most `max_tokens`. `is_content` (T,) and `n_cut` are those of `Tokens`.
    """

    input_ids: list[int]
    options: list[list[int]]
    max_tokens: int
    is_content: list[bool]
    n_cut: int = 0
    notes: tuple[str, ...] = ()

    def stand_in(self) -> list[int]:
        """Return an answer of the maximum length, to estimate work without a model."""
        return max(self.options, key=len) if self.options else (self.input_ids * self.max_tokens)[: self.max_tokens]


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """The settings of a variant with the rule `predicted-answer`; see `Store.variant_add`."""

    prompt: str
    question: str | None
    question_column: str | None
    labels: list[str]
    max_answer: int

    @classmethod
    def of_spec(cls, spec: VariantSpec) -> Self | None:
        """Return the settings of a new variant; None for another target rule.

        Raises
        ------
        InputError
            A setting is invalid, or given with another target rule.
        """
        names = [declared.name for declared in fields(cls)]
        if spec.targets != PREDICTED_ANSWER:
            defaults = VariantSpec()
            given = next((n for n in names if getattr(spec, n) not in (getattr(defaults, n), [])), None)
            if given is not None:
                raise InputError(
                    f"`{given}` belongs to the target rule `{PREDICTED_ANSWER}`, not `{spec.targets}`",
                    f"add `--targets {PREDICTED_ANSWER}`",
                )
            return None
        if spec.question is not None and spec.question_column is not None:
            raise InputError("a variant has one question, not two", "use `--question` or `--question-column`")
        if spec.prompt.count(DOCUMENT) != 1 or spec.prompt.count(QUESTION) > 1:
            raise InputError(
                f"the prompt {spec.prompt!r} needs `{DOCUMENT}` once and `{QUESTION}` at most once",
                "try `--prompt '{document} {question}'`",
            )
        labels = list(spec.labels)
        if any(not label.strip() for label in labels) or len(set(labels)) < len(labels) or len(labels) == 1:
            raise InputError("labels must be two or more different texts", "for example `--label yes --label no`")
        if not 1 <= spec.max_answer < spec.max_length - 1:
            raise InputError(
                f"`--max-answer` must be from 1 to {spec.max_length - 2}, not {spec.max_answer}",
                f"the maximum length of {spec.max_length} tokens includes the answer; try `--max-answer 32`",
            )
        return cls(**{name: getattr(spec, name) for name in names} | {"labels": labels})

    @classmethod
    def greedy(cls, max_answer: int) -> Self:
        """Return the settings of a greedy answer to a prompt."""
        return cls(prompt=DOCUMENT, question=None, question_column=None, labels=[], max_answer=max_answer)

    @classmethod
    def of_variant(cls, variant: FormatVariant) -> Self:
        """Return the settings of a stored variant."""
        answers: Any = variant.answers
        return cls(**(json.loads(answers) if isinstance(answers, str) else answers))

    @property
    def row(self) -> dict[str, Any]:
        """The settings as stored."""
        return asdict(self)

    def ask(self, sample: Sample) -> tuple[Sample, Layout]:
        """Return the sample with a stand-in for its answer, and its parts.

        A text becomes the document of a prompt. A prompt or a chat loses its own answer, and any later messages.

        Raises
        ------
        UnusableSampleError
            A text has no question.
        """
        if sample.messages is not None:
            asked = replace(sample, messages=_asked_messages(sample.messages))
            return asked, parts_of(asked)
        if sample.text is None:
            asked = sample.with_answer(_STAND_IN)
            return asked, parts_of(asked)
        before, after = (text.replace(QUESTION, self._question(sample)) for text in self.prompt.split(DOCUMENT))
        layout = DocumentParts(before, sample.text, after, _STAND_IN)
        return Sample(sample.sample_id, prompt=layout.prompt(sample.text), response=_STAND_IN), layout

    def _question(self, sample: Sample) -> str:
        """Return the question on a text."""
        if QUESTION not in self.prompt:
            return ""
        if self.question is not None:
            return self.question
        if self.question_column is None:
            raise UnusableSampleError("the variant has no question on a text; add one with `--question`")
        value = sample.meta.get(self.question_column)
        if not isinstance(value, str) or not value.strip():
            raise UnusableSampleError(f"it has no question in the column `{self.question_column}`")
        return value


def _asked_messages(messages: str) -> str:
    """Return a chat up to its last assistant turn, which becomes the stand-in."""
    turns = json.loads(messages)
    last = max((n for n, message in enumerate(turns) if message["role"] == "assistant"), default=len(turns))
    if not last:
        raise UnusableSampleError("the chat has no message before its answer")
    return json.dumps([*turns[:last], {"role": "assistant", "content": _STAND_IN}], ensure_ascii=False)


def label_tokens(tokenizer: Any, before: str, ids: Sequence[int], label: str, *, special: bool) -> list[int]:
    """Return a label's tokens after the text `before`, whose tokens are `ids`.

    Raises
    ------
    UnusableSampleError
        The label's first characters share a token with the text before.
    """
    encoded = encode(tokenizer, before + label, add_special_tokens=special).without_end()
    if encoded.ids[: len(ids)] != list(ids) or len(encoded.ids) == len(ids):
        raise UnusableSampleError(f"the label `{label}` shares a token with the template's text before it")
    return encoded.ids[len(ids) :]


class AnswerPredictor:
    """Predicts answers with a checkpoint's model: the most likely label, or by greedy decoding."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, prompt: AnswerPrompt) -> list[int]:
        """Return the tokens of the answer, (A,)."""
        from lark_store.modeling.greedy import greedy_answer

        if not prompt.options:
            return greedy_answer(self.model, self.tokenizer, prompt.input_ids, prompt.max_tokens)
        return prompt.options[int(self.label_losses(prompt).argmin())]

    def label_losses(self, prompt: AnswerPrompt) -> Any:
        """Return −log p of each label after the prompt, summed over its tokens, in nats: a tensor (L,)."""
        import torch

        from lark_store.modeling.losses import Batch, sample_losses
        from lark_store.modeling.tokens import Tokens

        n_prompt = len(prompt.input_ids)
        samples = [
            Tokens(prompt.input_ids + option, [False] * n_prompt + [True] * len(option), "response", is_summed=True)
            for option in prompt.options
        ]
        with torch.no_grad():
            return sample_losses(self.model, Batch(samples, next(self.model.parameters()).device))
