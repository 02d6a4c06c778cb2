"""The contract of a backend, for a folder and for PostgreSQL with S3."""

from __future__ import annotations

import pytest

from lark_store import Store
from lark_store.schema.backends.open import location_at
from lark_store.testing import BackendSuite


class TestFolder(BackendSuite):
    @pytest.fixture
    def location(self, tmp_path):
        Store.create(tmp_path / "lark.store").close()
        return location_at(tmp_path / "lark.store")


class TestPostgres(BackendSuite):
    @pytest.fixture
    def location(self, server, tmp_path):
        url = server.place(tmp_path)
        Store.create(url, vectors=server.vectors(tmp_path)).close()
        return location_at(url)
