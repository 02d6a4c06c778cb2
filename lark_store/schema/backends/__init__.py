"""Where a store is: `base` has the protocols; `local` is a folder, `postgres` a database; `copy` copies a catalog."""
