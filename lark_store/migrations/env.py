"""Alembic's entry point; it uses the connection from `lark_store.migrations`."""

from alembic import context

from lark_store.schema.backends.base import VERSION_TABLE
from lark_store.schema.catalog import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
    render_as_batch=True,
)
context.run_migrations()
