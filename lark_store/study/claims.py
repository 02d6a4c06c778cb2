"""The claims of a study: each asks a question of its results, tests it, and says the answer in words.

A difference is reported if its q-value is at most 0.05 and its interval excludes 0. Figures not tested query by query
are compared by intervals: disjoint 95% intervals differ at p < 0.05, whatever their dependence. (For normal estimates
with deviations a and b, the distance then exceeds 1.96 (a + b), and the deviation of the difference is at most a + b.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.query.methods import METHODS
from lark_store.stats.bootstrap import Figure
from lark_store.study.groups import figure_frame, numbers
from lark_store.study.wording import (
    NO_DIFFERENCE,
    conclusion,
    interval,
    number,
    per_query_text,
    percent,
    points,
    ratio_text,
    share,
    signed,
    size,
    test_text,
    verdict,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lark_store.study.results import Results

    Row = dict[str, Any]
    Qs = list[float | None]

LEXICAL = [method.name for method in METHODS.values() if not method.reads_sketches]


@dataclass(frozen=True)
class Claim:
    """An answer before correction: its p-values, and the function from their q-values to its words."""

    question: str
    say: Callable[[Qs], tuple[str, bool | None]]
    tests: list[float | None] = field(default_factory=list)


def _rows_at(frame: pl.DataFrame, epoch: int) -> Iterator[Row]:
    """Yield a table's rows at one epoch."""
    yield from frame.filter(pl.col("epoch") == epoch).iter_rows(named=True)


def relevance(results: Results) -> Iterator[Claim]:
    """Compare pretraining sources pairwise, in one variant, at the recipe's epoch."""
    mean = {
        (row["source"], row["variant"]): row["mean_max_influence"]
        for row in _rows_at(results.influence, results.recipe.epoch)
    }
    for row in _rows_at(results.relevance, results.recipe.epoch):
        left, right = row["source"], row["against_source"]
        means = mean[left, row["variant"]], mean[right, row["variant"]]

        def say(q: Qs, row: Row = row, means: tuple[float, float] = means) -> tuple[str, bool | None]:
            left, right = row["source"], row["against_source"]
            bounds = row["difference_low"], row["difference_high"]
            figure = f"{signed(row['difference'])} {interval(*bounds, signed)}"  # if the lower mean may be below 0
            if row["low"] is not None:
                figure = f"{percent(row['value'])} {interval(row['low'], row['high'], percent)}"
            holds = verdict(row["difference"], *bounds, q[0])
            end = conclusion(holds, f"`{left}` is closer to the queries", f"`{right}` is closer to the queries")
            return (
                f"`{left}` over `{right}` as `{row['variant']}` at `{row['checkpoint']}`: {figure} in mean max "
                f"influence ({number(means[0])} against {number(means[1])}; {row['n_queries']} queries, "
                f"{test_text(row['p_value'], q[0])}): {end}.{_within_sketch(row['difference'], row['sketch_error'])}"
            ), holds

        yield Claim(f"Domain relevance: `{left}` over `{right}` as `{row['variant']}`", say, [row["p_value"]])


def _within_sketch(gap: float | None, error: float | None) -> str:
    """Warn of a gap below twice the sketch error: another seed of the sketcher might close it."""
    if gap is None or error is None or abs(gap) >= 2 * error:
        return ""
    return f" The sketch error is up to {number(error)}: another seed may reverse this."


def dominance(results: Results) -> Iterator[Claim]:
    """Compare fine-tuning with each pretraining group at the recipe's epoch."""
    for row in _rows_at(results.dominance, results.recipe.epoch):
        name = f"`{row['source']}` as `{row['variant']}`"

        def say(q: Qs, row: Row = row, name: str = name) -> tuple[str, bool | None]:
            gap, *bounds = (None if row[b] is None else row[b] - 1 for b in ("ratio", "low", "high"))
            holds = verdict(row["ft"] - row["pt"], bounds[0], bounds[1], q[0])
            wins = f"{share(row['pt_wins'])} {interval(row['pt_wins_low'], row['pt_wins_high'], share)}"
            end = conclusion(holds, "fine-tuning is closer", "pretraining is closer")
            ratio = ratio_text(row["ratio"], row["low"], row["high"])
            return (
                f"Fine-tuning against {name} at `{row['checkpoint']}`: mean max influence {number(row['ft'])} against "
                f"{number(row['pt'])}, ratio {ratio} ({row['n_queries']} queries, "
                f"{test_text(row['p_value'], q[0])}): {end}. Pretraining is ahead on {wins} of the queries."
                f"{per_query_text(row)}{_within_sketch(gap, row['sketch_error'])}"
            ), holds

        yield Claim(f"Is fine-tuning closer than {name}?", say, [row["p_value"]])


def before_training(results: Results) -> Iterator[Claim]:
    """Report how often fine-tuning data is ahead before the model was trained on it."""
    source = results.recipe.against
    is_shown = pl.col("source") == source, pl.col("variant") == results.recipe.shown_as[source]
    for row in _rows_at(results.dominance.filter(*is_shown), 0):
        name = f"`{source}` as `{row['variant']}`"

        def say(q: Qs, row: Row = row, name: str = name) -> tuple[str, bool | None]:
            holds = verdict(row["ft"] - row["pt"], None, None, q[0])
            end = conclusion(
                holds,
                "similarity without training, such as format and answers, puts it ahead, so a later lead alone is no "
                "sign of training",
                "pretraining is closer",
            )
            return (
                f"At `{row['checkpoint']}`, not yet trained on it, fine-tuning is ahead of {name} on "
                f"{share(row['ft_wins'])} of {row['n_queries']} queries ({number(row['ft'])} against "
                f"{number(row['pt'])}; {test_text(row['p_value'], q[0])}): {end}."
            ), holds

        yield Claim(f"Is fine-tuning closer than {name} before any training?", say, [row["p_value"]])


def dominance_rises(results: Results) -> Iterator[Claim]:
    """Compare, query by query, how often pretraining is ahead: last and first epoch, low and high learning rates."""
    recipe = results.recipe
    won = results.queries.drop_nulls("winner").select(
        "epoch", "query_id", win=(pl.col("winner") == "pretrain").cast(pl.Float64)
    )
    pretraining = next(source for source in recipe.pretraining if source.name == recipe.against)
    name = f"`{pretraining.name}` as `{pretraining.variant}`"
    first, last = recipe.checkpoints[1], recipe.checkpoints[-1]
    if recipe.epochs > 1:
        spans = (f"`{last}`", [recipe.epochs]), (f"`{first}`", [1])
        yield _change(won, f"Does the dominance of {name} rise with training?", name, *spans)
    rates = recipe.finetune.learning_rates
    fall = next((epoch for epoch, rate in enumerate(rates[1:], 2) if rate < rates[epoch - 2]), None)
    if fall is not None:
        low, high = [*range(fall, recipe.epochs + 1)], [*range(1, fall)]
        words = f"{_span(low)} (from where the learning rate falls)", f"{_span(high)} before"
        question = f"Is the dominance of {name} higher at low learning rates?"
        yield _change(won, question, name, (words[0], low), (words[1], high))


def _span(epochs: list[int]) -> str:
    return f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"


def _change(
    won: pl.DataFrame, question: str, name: str, late: tuple[str, list[int]], early: tuple[str, list[int]]
) -> Claim:
    """Compare how often pretraining is ahead in two spans of epochs, on their common queries."""
    means = [
        won.filter(pl.col("epoch").is_in(epochs)).group_by("query_id").agg(pl.col("win").mean())
        for _, epochs in (late, early)
    ]
    joined = means[0].join(means[1], on="query_id").sort("query_id")
    gap = numbers(joined["win"]) - numbers(joined["win_right"])
    row = figure_frame([Figure({}, gap, difference=gap)], {}).row(0, named=True)

    def say(q: Qs) -> tuple[str, bool | None]:
        holds = verdict(row["value"], row["low"], row["high"], q[0])
        if row["value"] is None:
            return f"No query has figures at both {late[0]} and {early[0]}.", None
        after, before = (share(float(numbers(joined[c]).mean())) for c in ("win", "win_right"))
        end = conclusion(holds, "it rises", "it falls")
        return (
            f"Pretraining ({name}) is ahead of fine-tuning on {before} of the queries at {early[0]} and on {after} at "
            f"{late[0]}: {points(row['value'])} percentage points {interval(row['low'], row['high'], points)} "
            f"({row['n_queries']} queries, {test_text(row['p_value'], q[0])}): {end}."
        ), holds

    return Claim(question, say, [row["p_value"]])


def format_effect(results: Results) -> Iterator[Claim]:
    """Report the effect of the template alone at the recipe's epoch."""
    for row in _rows_at(results.format_effect, results.recipe.epoch):

        def say(q: Qs, row: Row = row) -> tuple[str, bool | None]:
            is_defined = row["value"] is not None
            value, low, high = (None if row[b] is None else row[b] - 1 for b in ("value", "low", "high"))
            holds = verdict(value, low, high, q[0])
            figure = f"{percent(row['value'] - 1)} {interval(low, high, percent)}" if is_defined else "undefined"
            end = conclusion(holds, "the template brings it closer", "the template takes it further away")
            end = end if is_defined else "a mean is not above 0"
            return (
                f"`{row['source']}` as `{row['variant']}` over itself as `raw` at `{row['checkpoint']}`: {figure} in "
                f"mean max influence ({row['n_queries']} queries, {test_text(row['p_value'], q[0])}): {end}."
                f"{per_query_text(row)}"
            ), holds

        question = f"Does the format alone bring `{row['source']}` as `{row['variant']}` closer?"
        yield Claim(question, say, [row["p_value"]])


def _apart(before: Row, after: Row, names: tuple[str, str, str]) -> bool | None:
    """Return whether a figure rose (True), fell (False), or its intervals overlap (None)."""
    if any(row[name] is None for row in (before, after) for name in names):
        return None
    _, low, high = names
    return True if after[low] > before[high] else False if after[high] < before[low] else None


def _by_intervals(rose: bool | None, above: str, below: str) -> str:
    return conclusion(rose, above, below) if rose is not None else f"the intervals overlap, {NO_DIFFERENCE}"


def format_effect_falls(results: Results) -> Iterator[Claim]:
    """Compare the format effect at the first and the last trained epoch, by its intervals."""
    group = itemgetter("source", "variant")
    last = {group(row): row for row in _rows_at(results.format_effect, results.recipe.epochs)}
    if results.recipe.epochs < 2:
        return
    for before in _rows_at(results.format_effect, 1):
        after = last.get(group(before))
        if after is None:
            continue
        rose = _apart(before, after, ("value", "low", "high"))
        end = _by_intervals(rose, "it rises", "it falls")
        figures = [ratio_text(row["value"], row["low"], row["high"]) for row in (before, after)]
        text = (
            f"The format effect (`{before['variant']}` over `raw`) of `{before['source']}` is {figures[0]} at "
            f"`{before['checkpoint']}` and {figures[1]} at `{after['checkpoint']}` ({after['n_queries']} queries): "
            f"{end}."
        )
        yield _untested(
            f"Does the format effect of `{before['source']}` as `{before['variant']}` fall with training?",
            text,
            None if rose is None else not rose,
        )


def _untested(question: str, text: str, holds: bool | None) -> Claim:
    """Return a claim without a test."""
    return Claim(question, lambda _: (text, holds))


def methods(results: Results) -> Iterator[Claim]:
    """Compare FT wins by the cosine with those by lexical methods, at the recipe's epoch."""
    for row in _rows_at(results.methods.filter(pl.col("method").is_in(LEXICAL)), results.recipe.epoch):
        name = f"`{row['source']}` as `{row['variant']}`"

        def say(q: Qs, row: Row = row, name: str = name) -> tuple[str, bool | None]:
            holds = verdict(row["difference"], row["low"], row["high"], q[0])
            end = conclusion(holds, "LARK sees fine-tuning ahead more often", "LARK sees fine-tuning ahead less often")
            return (
                f"Against {name} at `{row['checkpoint']}`, fine-tuning is ahead on {share(row['ft_wins'])} of the "
                f"queries by LARK's cosine and on {share(row['rival_ft_wins'])} by `{row['method']}`: "
                f"{points(row['difference'])} percentage points {interval(row['low'], row['high'], points)} "
                f"({row['n_queries']} queries, {test_text(row['p_value'], q[0])}): {end}."
            ), holds

        yield Claim(f"LARK against `{row['method']}`: FT wins over {name}", say, [row["p_value"]])


def storage(results: Results) -> Iterator[Claim]:
    """Compare the sketches on disk with full gradients of the model."""
    rows = list(results.storage.iter_rows(named=True))
    sketch = next((row for row in rows if row["measured"]), None)
    if sketch is None:
        return
    full = [row for row in rows if row["model"] == sketch["model"] and not row["measured"]]
    sketch_size = size(sketch["bytes_per_sample"])
    summary = f"A sketch takes {sketch_size} on disk, all {sketch['n_samples']:,} take {size(sketch['bytes'])}"
    if not full:
        yield _untested("How much storage do sketches take?", f"{summary}.", None)
        return
    gradient_sizes = ", ".join(
        f"{size(row['bytes_per_sample'])} each and {size(row['bytes'])} in total "
        f"{row['what'].removeprefix('gradients ')} ({_times(row['times_smaller'])})"
        for row in full
    )
    text = f"{summary}. Gradients of the {full[0]['parameters']:,} sketched parameters would take {gradient_sizes}."
    yield _untested("Are sketches smaller than gradients?", text, full[0]["times_smaller"] > 1)


def _times(smaller: float) -> str:
    return f"{smaller:,.1f} times as much" if smaller >= 1 else f"{1 / smaller:,.1f} times less"


def accuracy(results: Results) -> Iterator[Claim]:
    """Compare the accuracy before and after fine-tuning, by intervals."""
    rows = results.checkpoints.drop_nulls("accuracy").rows(named=True)
    if len(rows) < 2:
        return
    before, after = rows[0], rows[-1]
    best = max(rows, key=lambda row: row["accuracy"])
    rose = _apart(before, after, ("accuracy", "accuracy_low", "accuracy_high"))
    end = _by_intervals(rose, "it rose", "it fell")
    figures = [
        f"{share(row['accuracy'])} {interval(row['accuracy_low'], row['accuracy_high'], share)}"
        for row in (before, after)
    ]
    evaluated = "" if after["n_evaluated"] is None else f" ({after['n_evaluated']} questions)"
    text = (
        f"Accuracy is {figures[0]} at `{before['checkpoint']}` and {figures[1]} at `{after['checkpoint']}`{evaluated}: "
        f"{end}. It is highest at `{best['checkpoint']}`, {share(best['accuracy'])}."
    )
    yield _untested("Does fine-tuning raise accuracy?", text, rose)


def overfitting(results: Results) -> Iterator[Claim]:
    """Test whether the queries' loss rose between consecutive checkpoints."""
    losses = results.queries.drop_nulls("loss").select("checkpoint", "query_id", "loss")
    steps = []
    for earlier, later in pairwise(results.recipe.checkpoints):
        before, after = (losses.filter(pl.col("checkpoint") == name) for name in (earlier, later))
        joined = after.join(before, on="query_id").sort("query_id")
        gap = numbers(joined["loss"]) - numbers(joined["loss_right"])
        steps.append(Figure({"earlier": earlier, "later": later}, gap, difference=gap))
    names = {"earlier": pl.String, "later": pl.String}
    rows = figure_frame(steps, names).drop_nulls("value").rows(named=True)
    if not rows:
        return

    def say(q: Qs) -> tuple[str, bool | None]:
        rises = [(row, q_value) for row, q_value in zip(rows, q, strict=True) if row["value"] > 0]
        if not rises:
            fell = " and ".join(f"{signed(row['value'])} to `{row['later']}`" for row in rows)
            return f"The mean loss on the queries never rose ({fell}, nats): no sign of overfitting.", False
        verdicts = [verdict(row["value"], row["low"], row["high"], q_value) for row, q_value in rises]
        parts = [
            f"by {signed(row['value'])} nats {interval(row['low'], row['high'], signed)} from `{row['earlier']}` to "
            f"`{row['later']}` ({row['n_queries']} queries, {test_text(row['p_value'], q_value)}): "
            + ("the model overfits there" if yes else NO_DIFFERENCE)
            for (row, q_value), yes in zip(rises, verdicts, strict=True)
        ]
        advice = " Exclude such a checkpoint from sums over checkpoints." if any(verdicts) else ""
        return f"The mean loss on the queries rose {'; '.join(parts)}.{advice}", True if any(verdicts) else None

    yield Claim("Does the model overfit?", say, [row["p_value"] for row in rows])


def truth(results: Results) -> Iterator[Claim]:
    """Report the method which finds a query's own samples best at the last epoch, and the cosine's distances."""
    epoch = results.recipe.epochs
    table = sorted(_rows_at(results.truth, epoch), key=lambda row: -row["mrr"])
    gaps = [row for row in _rows_at(results.truth_gaps, epoch) if row["metric"] == "mrr"]
    if not table:
        return
    best = table[0]
    nearest = next((row["method"] for row in table if row["method"] != "cosine"), None)

    def say(q: Qs) -> tuple[str, bool | None]:
        holds, parts = None, []
        for row, q_value in zip(gaps, q, strict=True):
            better = verdict(row["difference"], row["low"], row["high"], q_value)
            end = conclusion(better, "`cosine` is better", f"`{row['method']}` is better")
            gap = f"{signed(row['difference'])} {interval(row['low'], row['high'], signed)}"
            parts.append(f"`cosine` minus `{row['method']}`: {gap} ({test_text(row['p_value'], q_value)}), {end}")
            holds = better if row["method"] == nearest else holds
        ranks = f"mean reciprocal rank {number(best['mrr'])} {interval(best['mrr_low'], best['mrr_high'], number)}"
        recall = f"recall@10 {share(best['recall_at_10'])} {interval(best['recall_low'], best['recall_high'], share)}"
        return (
            f"At `{best['checkpoint']}` `{best['method']}` ranks a query's own samples highest among "
            f"{best['n_samples']:,}: {ranks}, {recall}, {best['n_queries']} queries. {'; '.join(parts)}"
        ).rstrip() + ("." if parts else ""), holds

    yield Claim("Does `cosine` find the samples stating the answer best?", say, [row["p_value"] for row in gaps])


# In the order of the paper's questions.
CLAIMS = (
    relevance,
    dominance,
    before_training,
    dominance_rises,
    format_effect,
    format_effect_falls,
    methods,
    storage,
    accuracy,
    overfitting,
    truth,
)
