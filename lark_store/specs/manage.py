"""Options of a store's contents: checkpoints, sources, sketchers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from lark_store.specs.option import option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PREDICTED_ANSWER = "predicted-answer"
TARGET_RULES = (
    "response",
    "text",
    "predicted",
    "auto",
    "assistant",
    "assistant+end",
    "last",
    "last+end",
    PREDICTED_ANSWER,
)
LOSSES = ("mean", "sum")


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """A checkpoint to add; see `Store.checkpoint_add`."""

    metrics: Mapping[str, float]
    epoch: float | None = option(None, help="Epochs of training so far.")
    step: int | None = option(None, help="Optimizer steps so far.")
    learning_rate: float | None = option(None, help="Learning rate at this step.")
    model: str | None = option(None, help="The model's name, if the config has none.")
    revision: str | None = option(None, help="The revision of a hub name.")
    tokenizer: str | Path | None = option(
        None, metavar="PLACE", help="Where the tokenizer is, if not with the weights: a folder or a hub name."
    )
    config: str | Path | None = option(
        None, metavar="PLACE", help="Where config.json is, if not with the weights: a folder or a hub name."
    )


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """A source to add; see `Store.source_add`."""

    stage: str
    columns: Mapping[str, str]
    domain: str | None = option(None, help="Subject area, for example `medical`.")
    licence: str | None = option(None, help="Licence of the text.")
    config: str | None = option(None, help="Configuration of a Hugging Face dataset.")
    split: str | None = option(None, help="Split of a Hugging Face dataset: `train`, or a part such as `train[:100]`.")
    input_format: str | None = option(
        None, help="Format of standard input (default: jsonl) or of a file without a known extension."
    )
    replace: bool = option(False, help="Replace samples whose content differs.")
    dry_run: bool = option(False, help="Read and check all rows and show the first samples; write nothing.")


@dataclass(frozen=True, kw_only=True)
class VariantSpec:
    """A format variant to add; see `Store.variant_add`."""

    template: str | Path = option("chatml", help="`chatml`, `raw` or the path of a Jinja template.")
    targets: str = option(
        "auto",
        help="`response`, `assistant` (all assistant turns of a chat), `last` (the last one), `assistant+end`, "
        "`last+end` (with the end-of-turn token), `text`, `predicted`, `predicted-answer` or `auto`.",
    )
    max_length: int = option(1024, help="Maximum length in tokens; targets are never truncated.")
    loss: str = option("mean", help="`mean` or `sum` over a sample's target tokens.")
    question: str | None = option(
        None, metavar="TEXT", help="`predicted-answer`: the question on a text, such as 'Is this statement true?'."
    )
    question_column: str | None = option(
        None, metavar="NAME", help="`predicted-answer`: the metadata column with each text's own question."
    )
    prompt: str = option(
        "Context: {document}\n\nQuestion: {question}",
        metavar="TEXT",
        help="`predicted-answer`: the prompt of a text, with `{document}` and `{question}` in their places.",
    )
    labels: Sequence[str] = option(
        (),
        flags="--label",
        metavar="TEXT",
        help="`predicted-answer`: an answer to choose from, repeatable; without labels, the answer is greedy.",
    )
    max_answer: int = option(32, metavar="TOKENS", help="`predicted-answer`: maximum length of a decoded answer.")


@dataclass(frozen=True, kw_only=True)
class SketcherSpec:
    """A sketcher, by default the paper's; see `Store.sketcher_add`."""

    k: int = option(65_536, flags="--k -k", help="Number of bins: a power of two from 256 to 1,048,576.")
    seed: int = option(0, help="Seed of the random map.")
    dtype: str = option("float16", help="Stored type of the sketches: `float16` or `float32`.")
    parameters: str | None = option(
        None, metavar="REGEX", help="Sketch only parameters whose names match (default: all)."
    )
    exclude: str | None = option(None, metavar="REGEX", help="Skip parameters whose names match.")
    correction: str = option("none")
    damping: float | None = option(
        None, help="Damping of V or G, relative to its mean (default: 0.1; 10 loses less to the sketch)."
    )
    power: float | None = option(
        None, help="Power of (G + λ)⁻¹: `0.5` (default), or `1` if queries are at another checkpoint."
    )
    min_ndim: int | None = option(None, help="Skip parameters with fewer dimensions: 2 skips norms and biases.")
    mask_template: bool = option(False, help="Mask the gradients of template tokens and of the first token.")


@dataclass(frozen=True, kw_only=True)
class SampleListSpec:
    """A page of a source's samples; see `Store.sample_list`."""

    where: str | None = option(
        None, flags="--where -w", metavar="SQL", help="Only samples matching this, such as `year > 2015`."
    )
    limit: int = option(20, flags="--limit -n", metavar="N", help="Number of samples.")
    offset: int = option(0, metavar="N", help="Skip the first N samples.")


class SampleListOptions(TypedDict, total=False):
    """The keywords of `Store.sample_list`."""

    where: str | None
    limit: int
    offset: int


class BaseCheckpointOptions(TypedDict, total=False):
    """The keywords of `Store.checkpoint_add` that are options of the command."""

    epoch: float | None
    step: int | None
    learning_rate: float | None
    revision: str | None
    config: str | Path | None


class CheckpointOptions(BaseCheckpointOptions, total=False):
    """The keywords of `Store.checkpoint_add_run`."""

    model: str | None
    tokenizer: str | Path | None


class SourceOptions(TypedDict, total=False):
    """The keywords of `Store.source_add`."""

    domain: str | None
    licence: str | None
    config: str | None
    split: str | None
    input_format: str | None
    replace: bool
    dry_run: bool


class VariantOptions(TypedDict, total=False):
    """The keywords of `Store.variant_add`."""

    template: str | Path
    targets: str
    max_length: int
    loss: str
    question: str | None
    question_column: str | None
    prompt: str
    labels: Sequence[str]
    max_answer: int


class SketcherOptions(TypedDict, total=False):
    """The keywords of `Store.sketcher_add`."""

    k: int
    seed: int
    dtype: str
    parameters: str | None
    exclude: str | None
    correction: str
    damping: float | None
    power: float | None
    min_ndim: int | None
    mask_template: bool
