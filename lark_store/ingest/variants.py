"""Samples to tokens: templates, target rules, truncation.

A *format variant* says how a sample becomes text (`template`) and which tokens the loss is taken on (`targets`):

- `response`: the tokens that carry the response's own characters (not the template's end mark)
- `text`: every token but the first, which nothing predicts
- `predicted`: the same positions, with the model's own most likely token as the label (the paper's pseudo-labels)
- `auto`: `response` where the sample has one, else `predicted`

A sample that is too long loses the start of its prompt or, where it is one text, its end; the template and a response's
tokens are never cut.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError
from lark_store.ingest.bounds import bounded
from lark_store.schema.catalog import TARGET_RULES, FormatVariant
from lark_store.schema.paths import is_file
from lark_store.schema.records import RenderedSample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jinja2 import Template

    from lark_store.ingest.sources import Sample

RAW = "{% if text %}{{ text }}{% else %}{{ prompt }}\n{{ response }}{% endif %}"
CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
BUILT_IN = {"raw": RAW, "chatml": CHATML}
DEFAULT_MAX_LENGTH = 1024
# Stand-ins for a sample's parts while its template runs, from Unicode's private use area: where they come out is
# where the parts are, whatever the parts say.
_MARKS = {"prompt": "\ue0f0prompt\ue0f1", "response": "\ue0f0response\ue0f1", "text": "\ue0f0text\ue0f1"}
# Some chat templates (Llama 3's) print today's date unless they are given one; the same sample must stay the same text.
_DATE = "26 Jul 2024"
_LONGEST = 1 << 20  # characters that a template may put around a sample; none of them is ever cut


class UnusableSampleError(Exception):
    """A sample that can't be sketched; the message is the reason that is recorded."""


def make_variant(name: str, template: str, targets: str, max_length: int) -> FormatVariant:
    """Build a variant from a built-in template's name or a Jinja file.

    Raises
    ------
    InputError
        The rule is unknown, the length too small, the file missing or no valid template.
    """
    if targets not in TARGET_RULES:
        rules = ", ".join(f"`{r}`" for r in TARGET_RULES)
        raise InputError(f"`{targets}` is no target rule", f"the rules are {rules}")
    if not 2 <= max_length < 1 << 31:
        raise InputError(f"no sample has from 2 to {max_length} tokens to predict", "try `--max-length 1024`")
    if template in BUILT_IN:
        text = BUILT_IN[template]
    else:
        path = Path(template)
        if not is_file(path):
            raise InputError(
                f"`{template}` is neither a built-in template nor a file",
                "use `raw`, `chatml` or the path of a Jinja template that prints `prompt`, `response` and `text`",
            )
        try:
            template, text = "jinja", path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise InputError(f"`{path}` can't be read as text: {error}", "save it as UTF-8") from error
        _compile(text)
    identity = json.dumps([template, text, targets, max_length])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return FormatVariant(
        name=name,
        template=template,
        template_text=text,
        targets=targets,
        max_length=max_length,
        sha256=digest,
    )


def _compile(text: str) -> Template:
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(text)
    except TemplateSyntaxError as error:
        raise InputError(f"line {error.lineno} of the template: {error.message}", "it is a Jinja template") from error


@dataclass(frozen=True)
class Tokens:
    """A rendered sample: `input_ids` (T,), which of them are targets (T,), by which rule, and how many were cut.

    `is_content` (T,) are the tokens that carry characters of the sample itself, not of the template alone, but for the
    first token, which stands for no context at all; empty: all are.
    """

    input_ids: list[int]
    is_target: list[bool]
    rule: str
    n_cut: int = 0
    is_content: Sequence[bool] = ()

    @property
    def n_targets(self) -> int:
        """How many tokens the loss is taken on."""
        return sum(self.is_target)


class Renderer:
    """Renders samples in one variant with one checkpoint's tokenizer (a fast one of transformers).

    The longest sample is the variant's `max_length` or the model's `context`, whichever is shorter.
    """

    def __init__(self, variant: FormatVariant, tokenizer: Any, context: int | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                "the checkpoint's tokenizer can't tell which characters a token covers",
                "save it as a fast tokenizer (tokenizer.json)",
            )
        self.variant = variant
        self.max_length = min(variant.max_length, context or variant.max_length)
        self.tokenizer = tokenizer
        self.own_chat = variant.template == "chatml" and bool(tokenizer.chat_template)
        self._template = None if self.own_chat else _compile(variant.template_text)

    @property
    def sha256(self) -> str:
        """The hash of what really formats: the variant and, where it is used, the tokenizer's chat template."""
        text = str(self.tokenizer.chat_template) if self.own_chat else ""
        return hashlib.sha256(json.dumps([self.variant.sha256, text]).encode()).hexdigest()

    def _run(self, parts: dict[str, str | None]) -> str:
        messages: list[dict[str, str | None]]
        if parts["text"] is not None:
            messages = [{"role": "user", "content": parts["text"]}]
        else:
            messages = [
                {"role": "user", "content": parts["prompt"]},
                {"role": "assistant", "content": parts["response"]},
            ]
        try:
            with bounded():
                if self._template is None:
                    return str(self.tokenizer.apply_chat_template(messages, tokenize=False, date_string=_DATE))
                return self._template.render(messages=messages, **parts)
        except InputError:
            raise
        except Exception as error:  # a template may raise anything that an expression can
            raise UnusableSampleError(f"the template fails: {str(error) or type(error).__name__}") from error

    def _text(self, sample: Sample) -> tuple[str, dict[str, tuple[int, int]]]:
        """Return the rendered text and where each part of the sample stands in it, in characters."""
        parts = {"prompt": sample.prompt, "response": sample.response, "text": sample.text}
        skeleton = self._run({name: None if part is None else _MARKS[name] for name, part in parts.items()})
        if len(skeleton) > _LONGEST:
            raise UnusableSampleError(f"the template alone makes {len(skeleton):,} characters")
        spans: dict[str, tuple[int, int]] = {}
        built, rest = "", skeleton
        present = [name for name, part in parts.items() if part is not None and _MARKS[name] in skeleton]
        for name in sorted(present, key=lambda n: skeleton.index(_MARKS[n])):
            before, rest = rest.split(_MARKS[name], 1)
            start = len(built) + len(before)
            built += before + str(parts[name])
            spans[name] = (start, len(built))
        if built + rest != self._run(parts):
            raise UnusableSampleError("the template rewrites the sample's text, so its targets can't be told")
        return built + rest, spans

    def render(self, sample: Sample) -> Tokens:
        """Render, tokenize, mark the targets and cut to the variant's length.

        Raises
        ------
        UnusableSampleError
            No target token, targets longer than the variant's length, or a template that fails on this sample.
        """
        text, spans = self._text(sample)
        coded = self.tokenizer(
            text,
            add_special_tokens=not self.own_chat,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids, offsets = list(coded["input_ids"]), list(coded["offset_mapping"])

        def covers(part: str) -> list[bool]:
            start, end = spans.get(part, (0, 0))
            return [a < end and b > start and b > a for a, b in offsets]

        rule = self.variant.targets
        if rule == "auto":
            rule = "response" if sample.response else "predicted"
        targets = covers("response") if rule == "response" else [True] * len(ids)
        cuttable = covers("text" if sample.text else "prompt")
        if rule == "response":
            cuttable = [c and not t for c, t in zip(cuttable, targets, strict=True)]
        keep = self._keep(cuttable, from_end=sample.text is not None)
        is_target = [targets[i] for i in keep]
        is_target[:1] = [False]
        if not any(is_target):
            raise UnusableSampleError(f"no target token under the rule `{self.variant.targets}`")
        content = [any(each) for each in zip(*map(covers, spans), strict=True)] or [False] * len(ids)
        is_content = [content[i] for i in keep]
        is_content[:1] = [False]
        return Tokens([ids[i] for i in keep], is_target, rule, len(ids) - len(keep), is_content)

    def attempt(self, sample: Sample) -> Tokens | UnusableSampleError:
        """Render, or return the reason why not."""
        try:
            return self.render(sample)
        except UnusableSampleError as error:
            return error

    def _keep(self, cuttable: list[bool], *, from_end: bool) -> list[int]:
        """Return the positions that stay when the cuttable ones, from one end, give way to the variant's length."""
        n, longest = len(cuttable), self.max_length
        where = [i for i in range(n) if cuttable[i]]
        excess = max(0, n - longest)
        if len(where) < excess:
            raise UnusableSampleError(f"{n - len(where)} of its {n} tokens can't be cut, and the longest is {longest}")
        dropped = set(where[len(where) - excess :] if from_end else where[:excess])
        return [i for i in range(n) if i not in dropped]


def show(renderer: Renderer, source: str, sample: Sample) -> RenderedSample:
    """Return one rendered sample with its loss mask, piece by piece."""
    tokens = renderer.render(sample)
    pieces = [renderer.tokenizer.decode([token]) for token in tokens.input_ids]
    return RenderedSample(
        source, sample.sample_id, renderer.variant.name, tokens.rule, pieces, tokens.is_target, tokens.n_cut
    )
