"""The command line: parse, call the API, print. stdout is data, stderr is everything else."""

from lark_store.cli.app import app, main

__all__ = ["app", "main"]
