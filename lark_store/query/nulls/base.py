"""The interface of a null: a subclass of `Null`, with one entry in the registry. N counts rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lark_store.query.methods import Method

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TestedScores:
    """One query's scores (N) and the inputs of nulls: codes of source and variant (N), and the sign null's scale (N).

    `null_sources` are the codes of the sources whose rows are the null, None for all other sources.
    """

    score_N: NDArray[Any]
    source_N: NDArray[np.integer[Any]]
    variant_N: NDArray[np.integer[Any]]
    opponents: bool = False
    scale_N: NDArray[Any] | None = None
    null_sources: set[int] | None = None


class Null:
    """A null hypothesis. `name` is its name in `--null`, `meaning` its help; `needs_scales`: it reads `scale_N`."""

    name: ClassVar[str]
    meaning: ClassVar[str]
    needs_scales: ClassVar[bool] = False

    def check(self, method: Method) -> None:
        """Check the method of the scores.

        Raises
        ------
        InputError
        """

    def p_values(self, scores: TestedScores) -> Floats | None:
        """Return one-sided p-values (N), NaN where a row isn't tested; None for no test."""
        raise NotImplementedError
