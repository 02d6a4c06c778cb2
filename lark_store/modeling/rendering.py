"""Samples to tokens: templates, target rules, truncation.

A *format variant* defines a sample's text (`template`) and the tokens with a loss (`targets`):

- `response`: tokens of the response's own characters (not the template's end mark); of a chat like `assistant`
- `assistant`: the contents, reasoning and tool calls of all assistant turns, except messages with `weight: 0`
- `last`: of the last assistant turn alone
- `assistant+end`, `last+end`: with the end-of-turn token after each of these turns, as trainers do: the tokens that the
  chat template marks with `{% generation %}`, if it does; the template `raw` has the tokenizer's end of text there
- `text`: every token except the first, which has no context
- `predicted`: the same positions, with the model's most likely token as label
- `predicted-answer`: the answer that the model itself predicts to a prompt, or to a question on a text
- `auto`: `response` or `assistant` if the sample has one, else `predicted`

Too long samples lose the start of the prompt or, for a plain text, its end; a chat loses the contents of its oldest
turns. The template, system prompts and targets are never cut.

A rendering must contain every field of its sample, or every content of its messages, exactly once. A template may trim
white space around them, as many chat templates do, and omit the reasoning of earlier turns. Omitting, rewriting or
completely truncating another field makes the sample unusable.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lark_store.core.paths import is_file
from lark_store.errors import InputError
from lark_store.modeling.encoded import Encoded, UnusableSampleError, chosen_answers, encode, special_ids
from lark_store.modeling.parts import parts_of
from lark_store.modeling.placing import Rendered, place_parts
from lark_store.modeling.predicted_answers import AnswerPrompt, AnswerSettings, label_tokens
from lark_store.modeling.template_limits import bounded
from lark_store.modeling.templates import compile_template
from lark_store.modeling.tokens import Tokens
from lark_store.results import RenderedSample
from lark_store.schema.catalog import FormatVariant
from lark_store.schema.chats import message_text
from lark_store.specs import LOSSES, PREDICTED_ANSWER, TARGET_RULES

if TYPE_CHECKING:
    from lark_store.modeling.parts import Span
    from lark_store.modeling.predicted_answers import Predict
    from lark_store.modeling.sample import Sample

RAW = "{% if text %}{{ text }}{% else %}{{ prompt }}\n{{ response }}{% endif %}"
CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
BUILT_IN = {"raw": RAW, "chatml": CHATML}
DEFAULT_MAX_LENGTH = 1024
# Some chat templates (Llama 3) print today's date by default; a fixed date keeps renderings reproducible.
_DATE = "26 Jul 2024"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks of the assistant's own tokens


def make_variant(
    name: str,
    template: str,
    targets: str,
    max_length: int,
    loss: str = "mean",
    answers: AnswerSettings | None = None,
) -> FormatVariant:
    """Build a variant from a built-in template's name or a Jinja file. The rule `predicted-answer` needs `answers`.

    Raises
    ------
    InputError
        The rule or loss is unknown, the length invalid, or the file missing or not a valid template.
    """
    if targets not in TARGET_RULES:
        rules = ", ".join(f"`{r}`" for r in TARGET_RULES)
        raise InputError(f"unknown target rule `{targets}`", f"the rules are {rules}")
    if loss not in LOSSES:
        raise InputError(f"unknown loss `{loss}`", "a sample's loss is the `mean` or the `sum` over its target tokens")
    if not 2 <= max_length < 1 << 31:
        raise InputError(f"a maximum length must be from 2 to 2^31 − 1, not {max_length}", "try `--max-length 1024`")
    if template in BUILT_IN:
        text = BUILT_IN[template]
    else:
        path = Path(template)
        if not is_file(path):
            raise InputError(
                f"`{template}` is neither a built-in template nor a file",
                "use `raw`, `chatml` or the path of a Jinja template with `prompt`, `response` and `text`",
            )
        try:
            template, text = "jinja", path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise InputError(f"`{path}` can't be read as text: {error}", "save it as UTF-8") from error
        compile_template(text)
    settings = answers.row if answers and targets == PREDICTED_ANSWER else None
    additions = [*(["sum"] if loss == "sum" else []), *([settings] if settings else [])]
    identity = json.dumps([template, text, targets, max_length, *additions])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return FormatVariant(
        name=name,
        template=template,
        template_text=text,
        targets=targets,
        max_length=max_length,
        sha256=digest,
        loss="sum" if loss == "sum" else None,
        answers=settings,
    )


def _raw(variables: dict[str, Any], sample: Sample) -> str:
    """Return a completion after its prompt, or the texts of a chat's messages joined by newlines."""
    if sample.messages is None:
        return f"{variables['prompt']}{variables['response']}"
    return "\n".join(map(message_text, variables["messages"]))


class Renderer:
    """Renders samples in one variant with a checkpoint's fast tokenizer.

    The maximum length is the smaller of the variant's `max_length` and the model's `context`.
    """

    def __init__(self, variant: FormatVariant, tokenizer: Any, context: int | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                "the checkpoint's tokenizer does not map tokens to characters",
                "save it as a fast tokenizer (tokenizer.json)",
            )
        self.variant = variant
        self.max_length = min(variant.max_length, context or variant.max_length)
        self.tokenizer = tokenizer
        self.own_chat = variant.template == "chatml" and bool(tokenizer.chat_template)
        self._template = None if self.own_chat else compile_template(variant.template_text)

    @classmethod
    def of_row(cls, row: dict[str, Any], tokenizer: Any, context: int | None = None) -> Self:
        """Return the renderer of a row of the view `variants`, with its template's text."""
        return cls(FormatVariant(**row | {"loss": None if row["loss"] == "mean" else row["loss"]}), tokenizer, context)

    @property
    def sha256(self) -> str:
        """The hash of the variant and of the tokenizer's chat template, if used."""
        text = str(self.tokenizer.chat_template) if self.own_chat else ""
        return hashlib.sha256(json.dumps([self.variant.sha256, text]).encode()).hexdigest()

    def _apply(self, variables: dict[str, Any], **options: Any) -> Any:
        """Run the tokenizer's own chat template."""
        tools = {"tools": variables["tools"]} if "tools" in variables else {}
        return self.tokenizer.apply_chat_template(variables["messages"], date_string=_DATE, **tools, **options)

    def _run(self, sample: Sample, variables: dict[str, Any]) -> str:
        """Run the template."""
        try:
            with bounded():
                if self.variant.template == "raw" and sample.text is None and sample.response is None:
                    return _raw(variables, sample) + self._end
                if self._template is None:
                    return str(self._apply(variables, tokenize=False))
                return self._template.render(**variables) + self._end
        except InputError:
            raise
        except Exception as error:  # template expressions raise any exception type
            raise UnusableSampleError(f"the template fails: {str(error) or type(error).__name__}") from error

    @property
    def _end(self) -> str:
        """The end of text that the template `raw` appends for target rules with the end of turns."""
        if self.variant.template != "raw" or not self.variant.targets.endswith("+end"):
            return ""
        if not self.tokenizer.eos_token:
            raise UnusableSampleError(f"the tokenizer has no end of text, which `{self.variant.targets}` needs")
        return str(self.tokenizer.eos_token)

    def _left_out(self, name: str) -> UnusableSampleError:
        """Build the error of a sample with a part missing from its rendering."""
        if self.own_chat:
            return UnusableSampleError(
                f"the tokenizer's chat template omits or rewrites the sample's `{name}`; "
                "use a variant with the template `raw` or a Jinja file"
            )
        hint = (
            f"write `{{% if {name} %}}{{{{ {name} }}}}{{% endif %}}` where it belongs"
            if name in {"prompt", "response", "text"}
            else "print it in a loop over `messages`"
        )
        return UnusableSampleError(f"the template omits or rewrites the sample's `{name}`; {hint}")

    def text(self, sample: Sample) -> str:
        """Return a sample's whole text, as the model would see it without a maximum length.

        A predicted answer is not part of it.

        Raises
        ------
        UnusableSampleError
            It fails in the template.
        """
        if self.variant.targets == PREDICTED_ANSWER:
            rendered, end = self._asked(sample, AnswerSettings.of_variant(self.variant))
            return rendered.text[:end]
        return self._placed(sample).text

    def _asked(self, sample: Sample, settings: AnswerSettings) -> tuple[Rendered, int]:
        """Run the template on a sample with a stand-in for its answer; return also where the answer begins."""
        asked, layout = settings.ask(sample)
        rendered = place_parts(layout, partial(self._run, asked), self._left_out, lists=self._template is None)
        return rendered, chosen_answers(rendered.spans, "last")[-1].start

    def _placed(self, sample: Sample) -> Rendered:
        """Run the template and find the sample's parts."""
        return place_parts(parts_of(sample), partial(self._run, sample), self._left_out, lists=self._template is None)

    def render(self, sample: Sample, predict: Predict | None = None) -> Tokens:
        """Render, tokenize, mark targets and truncate a sample.

        `predict` gives the tokens of the answer to a prompt, (A,), under the rule `predicted-answer`.

        Raises
        ------
        UnusableSampleError
            The sample has no target, does not fit the length, or fails in the template.
        """
        if self.variant.targets == PREDICTED_ANSWER:
            return self._render_answer(sample, predict)
        rendered = self._placed(sample)
        spans = rendered.spans
        encoded = encode(self.tokenizer, rendered.text, add_special_tokens=not self.own_chat)
        rule = self._rule(spans)
        targets = self._targets(rule, encoded, rendered)
        cuttable = encoded.covered([s for s in spans if s.part.name != "response" and not s.part.is_fixed])
        if rule not in {"text", "predicted"}:
            cuttable = [c and not t for c, t in zip(cuttable, targets, strict=True)]
        elif sample.messages is not None:
            cuttable = encoded.covered([s for s in spans if not s.part.is_fixed])
        keep = self._keep(cuttable, self.max_length, from_end=sample.text is not None)
        self._check_whole(encoded, spans, keep)
        is_target = [targets[i] for i in keep]
        is_target[:1] = [False]
        if not any(is_target):
            raise UnusableSampleError(f"no target token under the rule `{self.variant.targets}`")
        return Tokens(
            [encoded.ids[i] for i in keep],
            is_target,
            rule,
            len(encoded.ids) - len(keep),
            _content(encoded, spans, keep),
            self.variant.loss == "sum",
            _notes(encoded, rendered),
        )

    def _render_answer(self, sample: Sample, predict: Predict | None) -> Tokens:
        """Render a sample whose targets are a predicted answer."""
        if predict is None:
            raise UnusableSampleError("its answer is predicted by a checkpoint's model, which is not loaded here")
        prompt = self.prompt(sample)
        answer = predict(prompt)
        text = self.tokenizer.decode(answer, clean_up_tokenization_spaces=False) if answer else ""
        if not text.strip():
            raise UnusableSampleError("the checkpoint predicts an empty answer; give the variant labels to choose from")
        n_prompt, n_answer = len(prompt.input_ids), len(answer)
        return Tokens(
            [*prompt.input_ids, *answer],
            [False] * n_prompt + [True] * n_answer,
            PREDICTED_ANSWER,
            prompt.n_cut,
            [*prompt.is_content, *[True] * n_answer],
            self.variant.loss == "sum",
            prompt.notes,
            text,
        )

    def prompt(self, sample: Sample, settings: AnswerSettings | None = None) -> AnswerPrompt:
        """Return the prompt for a predicted answer: the rendered sample up to its answer, truncated to leave room.

        `settings` are by default the variant's.

        Raises
        ------
        UnusableSampleError
            The sample does not fit the length, or fails in the template.
        """
        settings, special = settings or AnswerSettings.of_variant(self.variant), not self.own_chat
        rendered, end = self._asked(sample, settings)
        before, spans = rendered.text[:end], [span for span in rendered.spans if span.end <= end]
        encoded = encode(self.tokenizer, before, add_special_tokens=special).without_end()
        options = [label_tokens(self.tokenizer, before, encoded.ids, x, special=special) for x in settings.labels]
        room = self.max_length - max(map(len, options), default=settings.max_answer)
        cuttable = encoded.covered([span for span in spans if not span.part.is_fixed])
        keep = self._keep(cuttable, room, from_end=sample.text is not None)
        self._check_whole(encoded, spans, keep)
        return AnswerPrompt(
            [encoded.ids[i] for i in keep],
            options,
            settings.max_answer,
            _content(encoded, spans, keep),
            len(encoded.ids) - len(keep),
            _notes(encoded, rendered),
        )

    def around_answer(self, sample: Sample) -> tuple[list[int], list[int], list[int]]:
        """Return a sample's tokens before its (last) answer, those of the answer, and those after it; none is cut.

        Raises
        ------
        UnusableSampleError
            It has no answer, fails in the template, or its answer ends beyond the maximum length.
        """
        rendered = self._placed(sample)
        encoded = encode(self.tokenizer, rendered.text, add_special_tokens=not self.own_chat)
        covered = encoded.covered(chosen_answers(rendered.spans, "last"))
        if not any(covered):
            raise UnusableSampleError("it has no answer: a fact is a prompt with a response")
        start, end = covered.index(True), len(covered) - covered[::-1].index(True)
        if end >= self.max_length:
            raise UnusableSampleError(f"its answer ends at token {end}, but the maximum length is {self.max_length}")
        return encoded.ids[:start], encoded.ids[start:end], encoded.ids[end:]

    def _targets(self, rule: str, encoded: Encoded, rendered: Rendered) -> list[bool]:
        """Tell which tokens are targets, (T,)."""
        if rule in {"text", "predicted"}:
            return [True] * len(encoded.ids)
        answers = chosen_answers(rendered.spans, rule)
        targets = encoded.covered(answers)
        if not rule.endswith("+end"):
            return targets
        if self.own_chat and _GENERATION.search(str(self.tokenizer.chat_template)):
            mask = self._apply(rendered.variables, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return encoded.generated(mask["assistant_masks"], answers, rendered.spans)
        return encoded.with_ends(targets, answers, rendered.spans, special_ids(self.tokenizer))

    def _rule(self, spans: list[Span]) -> str:
        """Return the target rule of a sample with these parts."""
        if self.variant.targets != "auto":
            return self.variant.targets
        answers = [span.part for span in spans if span.part.is_answer]
        if not answers:
            return "predicted"
        return "response" if answers[0].name == "response" else "assistant"

    def _check_whole(self, encoded: Encoded, spans: list[Span], keep: list[int]) -> None:
        """Refuse a sample with a part without tokens, or a field without remaining tokens."""
        for span in spans:
            name, covers = span.part.name, encoded.covered([span])
            if not span.part.text.strip() or any(covers[i] for i in keep):
                continue
            if not any(covers):
                raise UnusableSampleError(f"the tokenizer has no token for its `{name}`")
            if name in {"prompt", "response", "text"}:
                raise UnusableSampleError(
                    f"truncation to {self.max_length} tokens leaves nothing of its `{name}`; use a variant with a "
                    "larger `--max-length`"
                )

    def attempt(self, sample: Sample, predict: Predict | None = None) -> Tokens | UnusableSampleError:
        """Render a sample, or return the error."""
        try:
            return self.render(sample, predict)
        except UnusableSampleError as error:
            return error

    @staticmethod
    def _keep(cuttable: list[bool], longest: int, *, from_end: bool) -> list[int]:
        """Return the positions to keep after cutting excess tokens from one end of the cuttable ones."""
        n = len(cuttable)
        candidates = [i for i in range(n) if cuttable[i]]
        excess = max(0, n - longest)
        if len(candidates) < excess:
            raise UnusableSampleError(
                f"{n - len(candidates)} of its {n} tokens can't be cut, but the maximum length is {longest}"
            )
        dropped = set(candidates[len(candidates) - excess :] if from_end else candidates[:excess])
        return [i for i in range(n) if i not in dropped]


def _content(encoded: Encoded, spans: list[Span], keep: list[int]) -> list[bool]:
    """Tell which of the kept tokens have characters of the sample; the first has no context."""
    content = encoded.covered(spans)
    return [content[i] and n > 0 for n, i in enumerate(keep)]


def _notes(encoded: Encoded, rendered: Rendered) -> tuple[str, ...]:
    """Return notes about parts that the template omits, and about the tokens."""
    return (*(f"the template omits the {name}" for name in rendered.omitted), *encoded.notes)


def show(renderer: Renderer, source: str, sample: Sample, predict: Predict | None = None) -> RenderedSample:
    """Return a rendered sample with its loss mask, token by token."""
    tokens = renderer.render(sample, predict)
    pieces = [renderer.tokenizer.decode([token]) for token in tokens.input_ids]
    return RenderedSample(
        source,
        sample.sample_id,
        renderer.variant.name,
        tokens.rule,
        pieces,
        tokens.is_target,
        tokens.n_cut,
        tokens.notes,
    )
