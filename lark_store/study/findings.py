"""What a study's numbers say, in words made from them.

A difference is said to be there where its q-value (Benjamini–Hochberg over all the findings' tests) is at most 0.05 and
its interval does not reach the other side of 0. What was not tested query by query is held to its intervals: figures
whose 95% intervals have no point in common differ at p < 0.05, however they depend on each other. (Of normal
estimates with deviations a and b the distance is then above 1.96 (a + b); that of their difference is at most a + b.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.query.compare import Figure
from lark_store.query.significance import benjamini_hochberg
from lark_store.study.groups import evaluated, numbers
from lark_store.study.words import (
    ALPHA,
    NO_DIFFERENCE,
    concluded,
    interval,
    number,
    percent,
    points,
    share,
    signed,
    size,
    tested,
    verdict,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lark_store.study.results import Results

    Row = dict[str, Any]
    Qs = list[float | None]

LEXICAL = ("bm25", "bm25-okapi", "bm25plus")


@dataclass(frozen=True)
class Finding:
    """What was asked, what the numbers say, and whether they say yes (None: they don't decide)."""

    question: str
    text: str
    holds: bool | None


@dataclass(frozen=True)
class _Claim:
    """A finding to be: the p-values it rests on, and what it says once all tests are counted."""

    question: str
    say: Callable[[Qs], tuple[str, bool | None]]
    tests: list[float | None] = field(default_factory=list)


def findings(results: Results) -> list[Finding]:
    """Say what a study found, in the order of the paper's questions, and last how many tests were looked at."""
    claims = [
        *_relevance(results),
        *_dominance(results),
        *_before(results),
        *_dominance_rises(results),
        *_format_effect(results),
        *_format_effect_falls(results),
        *_methods(results),
        *_storage(results),
        *_accuracy(results),
        *_overfitting(results),
        *_truth(results),
    ]
    p = pl.Series([value for claim in claims for value in claim.tests], dtype=pl.Float64)
    q = pl.Series(benjamini_hochberg(p.fill_null(float("nan")).to_numpy()), dtype=pl.Float64).fill_nan(None).to_list()
    found, start = [], 0
    for claim in claims:
        text, holds = claim.say(q[start : start + len(claim.tests)])
        found.append(Finding(claim.question, text, holds))
        start += len(claim.tests)
    return [*found, *_counted(results, q)]


def _counted(results: Results, q: Qs) -> list[Finding]:
    tests = [value for value in q if value is not None]
    if not tests:
        return []
    passed = sum(value <= ALPHA for value in tests)
    text = (
        f"{len(tests)} differences were tested and all are counted: q-values are Benjamini–Hochberg's over the "
        f"{len(tests)}, and {passed} of them have q ≤ {ALPHA}. They speak of other queries like these "
        f"{results.queries['query_id'].n_unique()}, not of another seed, model or choice of samples."
    )
    return [Finding("How many tests were looked at", text, None)]


def _at(frame: pl.DataFrame, epoch: int) -> Iterator[Row]:
    """Yield a table's rows at one epoch."""
    yield from frame.filter(pl.col("epoch") == epoch).iter_rows(named=True)


def _relevance(results: Results) -> Iterator[_Claim]:
    """Hold each pretraining source against the others, in one variant, at the recipe's epoch."""
    mean = {
        (row["source"], row["variant"]): row["mean_max_influence"]
        for row in _at(results.influence, results.recipe.epoch)
    }
    for row in _at(results.relevance, results.recipe.epoch):
        left, right = row["source"], row["against_source"]
        both = mean[left, row["variant"]], mean[right, row["variant"]]

        def say(q: Qs, row: Row = row, both: tuple[float, float] = both) -> tuple[str, bool | None]:
            left, right = row["source"], row["against_source"]
            bounds = row["difference_low"], row["difference_high"]
            figure = f"{signed(row['difference'])} {interval(*bounds, signed)}"  # where the lower mean may be below 0
            if row["low"] is not None:
                figure = f"{percent(row['value'])} {interval(row['low'], row['high'], percent)}"
            holds = verdict(row["difference"], *bounds, q[0])
            end = concluded(holds, f"`{left}` is closer to the queries", f"`{right}` is closer to the queries")
            return (
                f"`{left}` over `{right}` as `{row['variant']}` at `{row['checkpoint']}`: {figure} in mean max "
                f"influence ({number(both[0])} against {number(both[1])}; {row['n_queries']} queries, "
                f"{tested(row['p_value'], q[0])}): {end}."
            ), holds

        yield _Claim(f"Domain relevance: `{left}` over `{right}` as `{row['variant']}`", say, [row["p_value"]])


def _dominance(results: Results) -> Iterator[_Claim]:
    """Hold fine-tuning against each pretraining group at the recipe's epoch."""
    for row in _at(results.dominance, results.recipe.epoch):
        name = f"`{row['source']}` as `{row['variant']}`"

        def say(q: Qs, row: Row = row, name: str = name) -> tuple[str, bool | None]:
            bounds = [None if row[b] is None else row[b] - 1 for b in ("low", "high")]
            holds = verdict(row["ft"] - row["pt"], bounds[0], bounds[1], q[0])
            ratio = "undefined" if row["ratio"] is None else f"{number(row['ratio'])} "
            ratio += "" if row["ratio"] is None else interval(row["low"], row["high"], number)
            wins = f"{share(row['pt_wins'])} {interval(row['pt_wins_low'], row['pt_wins_high'], share)}"
            end = concluded(holds, "fine-tuning is closer", "pretraining is closer")
            return (
                f"Fine-tuning against {name} at `{row['checkpoint']}`: mean max influence {number(row['ft'])} against "
                f"{number(row['pt'])}, ratio {ratio} on the {row['n_ratio']} of {row['n_queries']} queries that "
                f"have one ({tested(row['p_value'], q[0])}): {end}. Pretraining is ahead on {wins} of the queries."
            ), holds

        yield _Claim(f"Is fine-tuning closer than {name}?", say, [row["p_value"]])


def _before(results: Results) -> Iterator[_Claim]:
    """Say how often fine-tuning is ahead before the model was trained on it: what is closer without training at all."""
    against = results.recipe.against
    shown = pl.col("source") == against, pl.col("variant") == results.recipe.shown_as[against]
    for row in _at(results.dominance.filter(*shown), 0):
        name = f"`{against}` as `{row['variant']}`"

        def say(q: Qs, row: Row = row, name: str = name) -> tuple[str, bool | None]:
            holds = verdict(row["ft"] - row["pt"], None, None, q[0])
            end = concluded(
                holds,
                "what is alike without training, such as format and answers, puts it ahead, so being ahead later is no "
                "sign of training by itself",
                "pretraining is closer",
            )
            return (
                f"At `{row['checkpoint']}`, not yet trained on it, fine-tuning is ahead of {name} on "
                f"{share(row['ft_wins'])} of {row['n_queries']} queries ({number(row['ft'])} against "
                f"{number(row['pt'])}; {tested(row['p_value'], q[0])}): {end}."
            ), holds

        yield _Claim(f"Is fine-tuning closer than {name} before any training?", say, [row["p_value"]])


def _dominance_rises(results: Results) -> Iterator[_Claim]:
    """Compare, query by query, how often pretraining is ahead: last epoch and first, low rates and high."""
    recipe = results.recipe
    won = results.queries.drop_nulls("winner").select(
        "epoch", "query_id", win=(pl.col("winner") == "pretrain").cast(pl.Float64)
    )
    against = next(source for source in recipe.pretraining if source.name == recipe.against)
    name = f"`{against.name}` as `{against.variant}`"
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
) -> _Claim:
    """Compare how often pretraining is ahead in two spans of epochs, on the queries that both have."""
    means = [
        won.filter(pl.col("epoch").is_in(epochs)).group_by("query_id").agg(pl.col("win").mean())
        for _, epochs in (late, early)
    ]
    both = means[0].join(means[1], on="query_id").sort("query_id")
    gap = numbers(both["win"]) - numbers(both["win_right"])
    row = evaluated([Figure({}, gap, difference=gap)], {}).row(0, named=True)

    def say(q: Qs) -> tuple[str, bool | None]:
        holds = verdict(row["value"], row["low"], row["high"], q[0])
        if row["value"] is None:
            return f"No query has both {late[0]} and {early[0]}.", None
        after, before = (share(float(numbers(both[c]).mean())) for c in ("win", "win_right"))
        end = concluded(holds, "it rises", "it falls")
        return (
            f"Pretraining ({name}) is ahead of fine-tuning on {before} of the queries at {early[0]} and on {after} at "
            f"{late[0]}: {points(row['value'])} percentage points {interval(row['low'], row['high'], points)} "
            f"({row['n_queries']} queries, {tested(row['p_value'], q[0])}): {end}."
        ), holds

    return _Claim(question, say, [row["p_value"]])


def _format_effect(results: Results) -> Iterator[_Claim]:
    """Say what the template alone does at the recipe's epoch."""
    for row in _at(results.format_effect, results.recipe.epoch):

        def say(q: Qs, row: Row = row) -> tuple[str, bool | None]:
            known = row["value"] is not None
            value, low, high = (None if row[b] is None else row[b] - 1 for b in ("value", "low", "high"))
            holds = verdict(value, low, high, q[0])
            figure = f"{percent(row['value'] - 1)} {interval(low, high, percent)}" if known else "undefined"
            end = concluded(holds, "the template brings it closer", "the template takes it further away")
            return (
                f"`{row['source']}` as `chatml` over itself as `raw` at `{row['checkpoint']}`: {figure} in mean max "
                f"influence ({row['n_queries']} queries, {tested(row['p_value'], q[0])}): {end}."
            ), holds

        yield _Claim(f"Does the format alone bring `{row['source']}` closer?", say, [row["p_value"]])


def _apart(before: Row, after: Row, names: tuple[str, str, str]) -> bool | None:
    """Tell whether a figure with an interval rose (True), fell (False), or neither is shown."""
    if any(row[name] is None for row in (before, after) for name in names):
        return None
    _, low, high = names
    return True if after[low] > before[high] else False if after[high] < before[low] else None


def _by_intervals(rose: bool | None, above: str, below: str) -> str:
    return concluded(rose, above, below) if rose is not None else f"the intervals do not lie apart, {NO_DIFFERENCE}"


def _format_effect_falls(results: Results) -> Iterator[_Claim]:
    """Compare the format effect at the first and the last trained epoch, by its intervals."""
    last = {row["source"]: row for row in _at(results.format_effect, results.recipe.epochs)}
    if results.recipe.epochs < 2:
        return
    for before in _at(results.format_effect, 1):
        after = last.get(before["source"])
        if after is None:
            continue
        rose = _apart(before, after, ("value", "low", "high"))
        end = _by_intervals(rose, "it rises", "it falls")
        figures = [
            "undefined"
            if row["value"] is None
            else f"{number(row['value'])} {interval(row['low'], row['high'], number)}"
            for row in (before, after)
        ]
        text = (
            f"The format effect (`chatml` over `raw`) of `{before['source']}` is {figures[0]} at "
            f"`{before['checkpoint']}` and {figures[1]} at `{after['checkpoint']}` ({after['n_queries']} queries): "
            f"{end}."
        )
        yield _said(
            f"Does the format effect of `{before['source']}` fall with training?",
            text,
            None if rose is None else not rose,
        )


def _said(question: str, text: str, holds: bool | None) -> _Claim:
    """Make a claim that rests on no test."""
    return _Claim(question, lambda _: (text, holds))


def _methods(results: Results) -> Iterator[_Claim]:
    """Hold the cosine's FT wins against those by the words, at the recipe's epoch."""
    for row in _at(results.methods.filter(pl.col("method").is_in(LEXICAL)), results.recipe.epoch):
        name = f"`{row['source']}` as `{row['variant']}`"

        def say(q: Qs, row: Row = row, name: str = name) -> tuple[str, bool | None]:
            holds = verdict(row["difference"], row["low"], row["high"], q[0])
            end = concluded(holds, "LARK sees fine-tuning ahead more often", "LARK sees fine-tuning ahead less often")
            return (
                f"Against {name} at `{row['checkpoint']}`, fine-tuning is ahead on {share(row['ft_wins'])} of the "
                f"queries by LARK's cosine and on {share(row['rival_ft_wins'])} by `{row['method']}`: "
                f"{points(row['difference'])} percentage points {interval(row['low'], row['high'], points)} "
                f"({row['n_queries']} queries, {tested(row['p_value'], q[0])}): {end}."
            ), holds

        yield _Claim(f"LARK against `{row['method']}`: FT wins over {name}", say, [row["p_value"]])


def _storage(results: Results) -> Iterator[_Claim]:
    """Hold the sketches on disk against full gradients of the model at hand."""
    rows = list(results.storage.iter_rows(named=True))
    sketch = next((row for row in rows if row["measured"]), None)
    if sketch is None:
        return
    full = [row for row in rows if row["model"] == sketch["model"] and not row["measured"]]
    each = size(sketch["bytes_per_sample"])
    held = f"A sketch takes {each} on disk, all {sketch['n_samples']:,} {size(sketch['bytes'])}"
    if not full:
        yield _said("What does storage cost?", f"{held}.", None)
        return
    others = ", ".join(
        f"{row['what'].removeprefix('gradients ')} {size(row['bytes_per_sample'])} each and {size(row['bytes'])} in "
        f"all ({_times(row['times_smaller'])})"
        for row in full
    )
    text = f"{held}. Gradients of the {full[0]['parameters']:,} parameters that are sketched would take {others}."
    yield _said("Are sketches smaller than gradients?", text, full[0]["times_smaller"] > 1)


def _times(smaller: float) -> str:
    return f"{smaller:,.1f} times as much" if smaller >= 1 else f"{1 / smaller:,.1f} times less"


def _accuracy(results: Results) -> Iterator[_Claim]:
    """Compare the accuracy before fine-tuning and after it, by intervals."""
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
    asked = "" if after["n_evaluated"] is None else f" ({after['n_evaluated']} questions)"
    text = (
        f"Accuracy is {figures[0]} at `{before['checkpoint']}` and {figures[1]} at `{after['checkpoint']}`{asked}: "
        f"{end}. It is highest at `{best['checkpoint']}`, {share(best['accuracy'])}."
    )
    yield _said("Does fine-tuning raise accuracy?", text, rose)


def _overfitting(results: Results) -> Iterator[_Claim]:
    """Test whether the queries' loss rose between two checkpoints that follow each other."""
    losses = results.queries.drop_nulls("loss").select("checkpoint", "query_id", "loss")
    steps = []
    for earlier, later in pairwise(results.recipe.checkpoints):
        before, after = (losses.filter(pl.col("checkpoint") == name) for name in (earlier, later))
        both = after.join(before, on="query_id").sort("query_id")
        gap = numbers(both["loss"]) - numbers(both["loss_right"])
        steps.append(Figure({"earlier": earlier, "later": later}, gap, difference=gap))
    names = {"earlier": pl.String, "later": pl.String}
    rows = evaluated(steps, names).drop_nulls("value").rows(named=True)
    if not rows:
        return

    def say(q: Qs) -> tuple[str, bool | None]:
        rises = [(row, of) for row, of in zip(rows, q, strict=True) if row["value"] > 0]
        if not rises:
            fell = " and ".join(f"{signed(row['value'])} to `{row['later']}`" for row in rows)
            return f"The mean loss on the queries rose at no epoch ({fell}, nats): no sign of overfitting.", False
        shown = [verdict(row["value"], row["low"], row["high"], of) for row, of in rises]
        parts = [
            f"by {signed(row['value'])} nats {interval(row['low'], row['high'], signed)} from `{row['earlier']}` to "
            f"`{row['later']}` ({row['n_queries']} queries, {tested(row['p_value'], of)}): "
            + ("the model overfits there" if yes else NO_DIFFERENCE)
            for (row, of), yes in zip(rises, shown, strict=True)
        ]
        advice = " Leave such a checkpoint out of sums over checkpoints." if any(shown) else ""
        return f"The mean loss on the queries rose {'; '.join(parts)}.{advice}", True if any(shown) else None

    yield _Claim("Does the model overfit?", say, [row["p_value"] for row in rows])


def _truth(results: Results) -> Iterator[_Claim]:
    """Say which method finds a query's own samples at the last epoch, and how far the cosine is from the others."""
    epoch = results.recipe.epochs
    table = sorted(_at(results.truth, epoch), key=lambda row: -row["mrr"])
    gaps = [row for row in _at(results.truth_gaps, epoch) if row["metric"] == "mrr"]
    if not table:
        return
    best = table[0]
    nearest = next((row["method"] for row in table if row["method"] != "cosine"), None)

    def say(q: Qs) -> tuple[str, bool | None]:
        holds, parts = None, []
        for row, of in zip(gaps, q, strict=True):
            better = verdict(row["difference"], row["low"], row["high"], of)
            end = concluded(better, "`cosine` is better", f"`{row['method']}` is better")
            gap = f"{signed(row['difference'])} {interval(row['low'], row['high'], signed)}"
            parts.append(f"`cosine` less `{row['method']}`: {gap} ({tested(row['p_value'], of)}), {end}")
            holds = better if row["method"] == nearest else holds
        ranks = f"mean reciprocal rank {number(best['mrr'])} {interval(best['mrr_low'], best['mrr_high'], number)}"
        recall = f"recall@10 {share(best['recall_at_10'])} {interval(best['recall_low'], best['recall_high'], share)}"
        return (
            f"At `{best['checkpoint']}` `{best['method']}` ranks a query's own samples highest among "
            f"{best['n_samples']:,}: {ranks}, {recall}, {best['n_queries']} queries. {'; '.join(parts)}"
        ).rstrip() + ("." if parts else ""), holds

    yield _Claim("Does `cosine` find the samples that state the answer best?", say, [row["p_value"] for row in gaps])
