"""Alembic's entry: runs on the connection that `lark_store.migrations` hands over, and on no other."""

from alembic import context

from lark_store.schema.catalog import Base
from lark_store.schema.location import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,
)
context.run_migrations()
