"""`Store`, samples: show and list them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.specs import SampleListSpec
from lark_store.store.base import Part, keywords

if TYPE_CHECKING:
    from typing import Unpack

    import polars as pl

    from lark_store.query.answers.samples import SampleDetails
    from lark_store.specs import SampleListOptions


class SampleMethods(Part):
    """The methods that show samples."""

    def sample_show(self, name: str) -> SampleDetails:
        """Return a sample with its metadata, its sketches and failures, and its text in each format variant.

        `name` is `SOURCE/ID`, or an id that only one source has. Rendering takes the newest checkpoint's chat template;
        no model or tokenizer is loaded.

        Raises
        ------
        NameUnknownError, InputError
        """
        from lark_store.query.answers.samples import sample_details

        return sample_details(self._db, name)

    @keywords(SampleListSpec)
    def sample_list(self, source: str, **options: Unpack[SampleListOptions]) -> pl.DataFrame:
        """Return samples of a source in its order: `limit` of them after the first `offset`.

        Columns: sample_id, prompt, response, text, label, meta (JSON). `where` is an SQL condition on source, stage,
        domain, these columns and the keys of the samples' metadata.

        Raises
        ------
        NameUnknownError, InputError, QueryError
        """
        from lark_store.query.answers.samples import list_samples

        spec = SampleListSpec(**options)
        return list_samples(self._db, source, spec.where, spec.limit, spec.offset)
