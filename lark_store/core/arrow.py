"""Use pyarrow without pandas on the command line, to save the third of a second of its import.

pyarrow imports pandas, if it is installed, to recognise pandas objects. The command line has none of its own. In a
caller's Python process pyarrow stays as it is.
"""

from __future__ import annotations

import sys

_is_command_line = False


def set_command_line() -> None:
    """Record that this process runs a command: no other code in it uses pyarrow."""
    global _is_command_line  # noqa: PLW0603  # of the process
    _is_command_line = True


class _NoPandas:
    """A finder of modules that says there is no pandas."""

    @staticmethod
    def find_spec(name: str, _path: object = None, _target: object = None) -> None:
        """Refuse pandas, and leave all other modules to the next finder."""
        if name == "pandas":
            raise ModuleNotFoundError(name)


def skip_pandas() -> None:
    """On the command line, hide pandas from pyarrow; call this before the first use of pyarrow."""
    if not _is_command_line or "pandas" in sys.modules or "pyarrow.dataset" in sys.modules:
        return
    sys.meta_path.insert(0, _NoPandas)
    try:
        import pyarrow.dataset  # noqa: F401
    finally:
        sys.meta_path.remove(_NoPandas)


def use_pandas() -> None:
    """Make pyarrow recognise pandas objects, for libraries which hand it some."""
    import pyarrow.lib

    _ = pyarrow.lib._pandas_api.pd  # noqa: SLF001  # imports pandas, and remembers it
