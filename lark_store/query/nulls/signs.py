"""`signs`: a row is compared with itself under random signs of the sketch's bins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import InputError
from lark_store.query.nulls.base import Null

if TYPE_CHECKING:
    from lark_store.query.methods import Method
    from lark_store.query.nulls.base import Floats, TestedScores


class SignsNull(Null):
    """Random signs of the bins; see `significance.sign_null_p`."""

    name = "signs"
    meaning = "random signs of the sketch"
    needs_scales = True

    def check(self, method: Method) -> None:
        """Refuse methods other than products of sketches.

        Raises
        ------
        InputError
        """
        if not method.is_adding:
            raise InputError(
                f"`{method.name}` has no signs to shuffle", "use `--null sources`, or the name of a source"
            )

    def p_values(self, scores: TestedScores) -> Floats:
        """Return upper bounds of the p-values (N)."""
        from lark_store.stats.significance import sign_null_p

        assert scores.scale_N is not None
        return sign_null_p(-scores.score_N if scores.opponents else scores.score_N, scores.scale_N)
