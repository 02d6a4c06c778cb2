"""Find the location of a store from its path or URL, and check that of its vectors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lark_store.core.paths import check_place
from lark_store.errors import StoreError

if TYPE_CHECKING:
    from lark_store.schema.backends.base import Location

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.", re.IGNORECASE)
_SERVERS = ("postgresql", "postgres", "postgresql+psycopg")
_BUCKETS = ("s3", "gs", "az")


def location_at(place: str | Path) -> Location:
    """Return the location of the store at `place`: a folder or `postgresql://…`.

    Raises
    ------
    StoreError
        `place` is neither.
    """
    url = _URL.match(place) if isinstance(place, str) else None
    if url is None:
        from lark_store.schema.backends.local import in_folder

        return in_folder(Path(place))
    assert isinstance(place, str)
    if url[1].lower() not in _SERVERS:
        hint = "use a folder or `postgresql://…`"
        if url[1].lower() in _BUCKETS:
            hint += "; only vectors can be in a bucket: `lark-store init --store PLACE --vectors URL`"
        raise StoreError(f"a store's catalog can't be at `{place}`", hint)
    from lark_store.schema.backends.postgres import in_postgres

    return in_postgres(place)


def check_vectors(place: str) -> str:
    """Return a location for vectors in its stored form: the URL of a bucket or an absolute folder.

    Raises
    ------
    StoreError
    """
    url = _URL.match(place)
    if url is None:
        return str(check_place(Path(place), "vectors"))
    if url[1].lower() not in _BUCKETS:
        raise StoreError(f"vectors can't be at `{place}`", "use a folder, `s3://…`, `gs://…` or `az://…`")
    if re.search(r"[@?#]", place):
        raise StoreError(
            f"`{place}` contains more than a bucket and a path", "set keys and endpoints in the environment: AWS_…"
        )
    return place.rstrip("/")
