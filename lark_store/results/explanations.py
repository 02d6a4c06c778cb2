"""The answer of `explain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lark_store.results.tabular import Tabular

if TYPE_CHECKING:
    import polars as pl

    from lark_store.display.table import About

SIDES = ("query", "sample")
DIVISIONS = ("position", "target")
_STRONGEST = 10  # rows of each side in a table


@dataclass(frozen=True)
class ExplainedToken:
    """One token of a query or a sample (`side`), with its parts of the score.

    `by_position` is what the gradient carries at its position, `by_target` what the loss of predicting it carries, 0
    where there is no loss. `label` is the predicted token's text, `token` but for targets that the model chooses; None
    where there is no loss.
    """

    side: str
    position: int
    token: str
    token_id: int
    is_target: bool
    label: str | None
    by_position: float
    by_target: float


@dataclass(frozen=True, repr=False)
class Explanation(Tabular[ExplainedToken]):
    """The result of `explain`: a sequence of `ExplainedToken`, the query's, then the sample's.

    Each column of parts sums to `total` on each side. With `unit` `cosine`, that is the exact score `cosine`; with
    `dot`, the dot product `dot` of the two gradients, in squared nats. > 0: the token makes the sample a proponent.

    `sketch_score` is the cosine of the sketches, within about `noise` (a standard deviation) of `cosine`. `is_stored`
    tells if both are in the store, and not computed here. `query_loss` and `sample_loss` are in nats.
    """

    frame: pl.DataFrame
    query_id: str
    sample_id: str
    checkpoint: str
    sketcher: str
    query_variant: str
    variant: str
    unit: str
    cosine: float
    dot: float
    sketch_score: float
    noise: float
    is_stored: bool
    query_loss: float
    sample_loss: float
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """The sum of each column of parts, in `unit`."""
        return self.cosine if self.unit == "cosine" else self.dot

    @property
    def _rows(self) -> pl.DataFrame:
        return self.frame

    def _item(self, row: dict[str, Any]) -> ExplainedToken:
        return ExplainedToken(**row)

    def side(self, name: str) -> pl.DataFrame:
        """Return the rows of one side, `query` or `sample`, in order of position."""
        import polars as pl

        _check("side", name, SIDES)
        return self.frame.filter(pl.col("side") == name)

    def strongest(self, by: str = "position", k: int = _STRONGEST) -> pl.DataFrame:
        """Return the `k` tokens of each side with the largest parts, in order of their size."""
        import polars as pl

        _check("by", by, DIVISIONS)
        parts = [
            self.side(name).filter(pl.col(f"by_{by}") != 0).sort(pl.col(f"by_{by}").abs(), descending=True).head(k)
            for name in SIDES
        ]
        return pl.concat(parts)

    def table(self, by: str = "position", k: int = _STRONGEST) -> pl.DataFrame:
        """Return the rows of `strongest` for people: with visible spaces, and labels only if the model chose them."""
        import polars as pl

        from lark_store.display.tokens import cell

        rows = self.strongest(by, k).drop("token_id")
        if (rows["label"].is_null() | (rows["label"] == rows["token"])).all():
            rows = rows.drop("label")
        texts = [name for name in ("token", "label") if name in rows.columns]
        return rows.with_columns(pl.col(texts).map_elements(cell, return_dtype=pl.String))

    def html(self, side: str, by: str = "position") -> str:
        """Return one side's text as HTML, its tokens tinted by their parts; `display.tokens.TOKEN_CSS` has the colours.

        Everything is escaped; there are classes and no styles.

        Raises
        ------
        InputError
            The side is not `query` or `sample`, or `by` is not `position` or `target`.
        """
        from lark_store.display.tokens import tokens_html

        _check("by", by, DIVISIONS)
        rows = self.side(side)
        return tokens_html(rows["token"].to_list(), rows[f"by_{by}"].to_list(), rows["is_target"].to_list())

    def _first_rows(self, n: int) -> tuple[pl.DataFrame, int]:
        return self.table(k=n // 2), len(self.frame)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.how}"

    def _repr_html_(self) -> str:
        from html import escape

        from lark_store.display.tokens import TOKEN_CSS

        names = {"query": (self.query_id, self.query_variant), "sample": (self.sample_id, self.variant)}
        sides = [
            f"<p><b>{side}</b> {escape(name)} as {escape(variant)}</p>{self.html(side)}"
            for side, (name, variant) in names.items()
        ]
        how = "".join(f"<p>{escape(line)}</p>" for line in self.how.splitlines())
        return f"<div><style>{TOKEN_CSS}</style>{''.join(sides)}{super()._repr_html_()}{how}</div>"

    @property
    def about(self) -> About:
        """What to print around a table of tokens."""
        from lark_store.display.table import About

        facts = {"query": self.query_id, "sample": self.sample_id, "checkpoint": self.checkpoint}
        legend = [
            "by_position: carried at the token's position",
            f"by_target: carried by the loss of predicting it; each sums to the {self._named_unit}",
            "red raises it, blue lowers it",
        ]
        return About(facts=facts, legend=legend)

    @property
    def _named_unit(self) -> str:
        return "cosine" if self.unit == "cosine" else "dot product"

    @property
    def how(self) -> str:
        """The exact score, that of the sketches, and notes."""
        stored = "stored sketches" if self.is_stored else "their sketches, computed here"
        return (
            f"exact {self.sketcher} · cosine {self.cosine:.4f} at `{self.checkpoint}`; dot product {self.dot:.4g}; "
            f"{stored} give {self.sketch_score:.4f} ± {self.noise:.2g}"
            + "".join(f"\nnote: {note}" for note in self.notes)
        )


def _check(name: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        from lark_store.errors import InputError

        raise InputError(f"`{name}` is `{names[0]}` or `{names[1]}`, not `{value}`", f"the default is `{names[0]}`")
