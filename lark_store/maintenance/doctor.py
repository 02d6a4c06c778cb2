"""`doctor`: facts for a bug report about this machine, this installation and the store.

Nothing here raises; a broken or missing part is reported in its line.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.core.paths import exists
from lark_store.errors import LarkStoreError, masked
from lark_store.maintenance.disk_usage import tables
from lark_store.schema.locks import paused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lark_store.schema.backends.base import Location

DOCTOR = {"section": pl.String, "name": pl.String, "value": pl.String}
_PACKAGES = (
    *("lark-store", "torch", "transformers", "tokenizers", "safetensors", "peft", "triton", "lancedb", "pylance"),
    *("duckdb", "sqlalchemy", "alembic", "polars", "pyarrow", "numpy", "numba"),
)
_VARIABLES = re.compile(
    r"LARK_STORE.*|HF_(?!TOKEN).*|TRANSFORMERS_OFFLINE|OMP_NUM_THREADS|MKL_NUM_THREADS|GOMP_SPINCOUNT|CUDA_VISIBLE_DEVICES"
    r"|PYTORCH_.*|LANCE_.*|RUST_LOG|WORLD_SIZE|RANK|LOCAL_RANK|TMPDIR|AWS_(REGION|DEFAULT_REGION|ENDPOINT_URL)"
)
_SECRET_NAME = re.compile(r"password|passwd|secret|token|key|signature|credential", re.IGNORECASE)
_SECRETS = re.compile(r"(?i)([\w-]*(?:password|passwd|secret|token|key|signature|credential)[\w-]*=)[^&;\s]*")
_LOCK_TIMEOUT_S = 0.5
Lines = list[tuple[str, str, str]]


def doctor(location: Location, newest: Callable[[], str], schema_of: Callable[[Location], str]) -> pl.DataFrame:
    """Return the report; see `Store.doctor`. `newest` and `schema_of` return this lark-store's and a store's schema."""
    sections: dict[str, Callable[[], Iterator[tuple[str, object]]]] = {
        "versions": lambda: _versions(newest),
        "machine": _machine,
        "devices": _devices,
        "environment": _environment,
        "store": lambda: _store(location, newest, schema_of),
    }
    rows: Lines = []
    for section, lines in sections.items():
        try:
            rows += [(section, name, _clean(str(value))) for name, value in lines()]
        except Exception as error:  # noqa: BLE001  # a bug report is about broken parts
            rows.append((section, "fault", _clean(f"{type(error).__name__}: {error}")))
    return pl.DataFrame(rows, schema=DOCTOR, orient="row")


def _clean(text: str) -> str:
    """Return a text for a public bug report: without the secrets in URLs, and without any `password=…`.

    >>> _clean("postgresql://me:pass@host/db: fe_sendauth, password=x")
    'postgresql://***@host/db: fe_sendauth, password=***'
    """
    return _SECRETS.sub(r"\1***", masked(text))


def _versions(newest: Callable[[], str]) -> Iterator[tuple[str, object]]:
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})"
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"
    import sqlite3

    yield "sqlite", sqlite3.sqlite_version
    yield "schema", newest()


def _machine() -> Iterator[tuple[str, object]]:
    import psutil

    yield "platform", platform.platform()
    yield "processor", f"{platform.machine()}, {os.cpu_count()} cores, {_usable_cores()} usable"
    memory = psutil.virtual_memory()
    yield "memory", f"{_size(memory.total)}, {_size(memory.available)} available"
    if os.name == "posix":
        import resource

        for name, number in (("open files", resource.RLIMIT_NOFILE), ("address space", resource.RLIMIT_AS)):
            soft, hard = ("unlimited" if n == resource.RLIM_INFINITY else str(n) for n in resource.getrlimit(number))
            yield f"limit of {name}", f"{soft} (hard {hard})"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(n: float) -> str:
    return f"{n / (1 << 30):.1f} GiB"


def _devices() -> Iterator[tuple[str, object]]:
    """Report torch's devices. Only a torch that may have some is imported, which takes seconds."""
    if find_spec("torch") is None:
        raise ModuleNotFoundError("torch is not installed")
    triton = "yes" if find_spec("triton") else "no"
    if version("torch").endswith("+cpu"):
        yield from (("cuda built", "no"), ("cuda devices", 0), ("triton", triton), ("mps", "no"))
        return
    import torch

    yield "threads", torch.get_num_threads()
    yield "cuda built", torch.version.cuda or "no"
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield "cuda devices", n
    for number in range(n):
        device: Any = torch.cuda.get_device_properties(number)
        yield f"cuda:{number}", f"{device.name}, {_size(device.total_memory)}, capability {device.major}.{device.minor}"
    yield "triton", triton
    yield "mps", "yes" if torch.backends.mps.is_available() else "no"


def _environment() -> Iterator[tuple[str, object]]:
    for name in sorted(os.environ):
        if _VARIABLES.fullmatch(name):
            yield name, "***" if _SECRET_NAME.search(name) else os.environ[name]
    yield "working folder", Path.cwd()


def _store(
    location: Location, newest: Callable[[], str], schema_of: Callable[[Location], str]
) -> Iterator[tuple[str, object]]:
    if location.root is None:
        yield "catalog", location.label
    else:
        yield "path", location.root.absolute()
        yield "free disk", _free(location.root)
    try:
        schema, newest_schema = schema_of(location), newest()
    except (LarkStoreError, OSError) as error:
        yield "fault", " ".join(str(error).split())
        return
    yield "schema", schema if schema == newest_schema else f"{schema}; this lark-store has {newest_schema}"
    yield "vectors", location.vectors
    yield from _at_work(location)
    yield "snapshots", len(location.snapshots.names())
    try:
        usage = tables(location)
        yield "bytes", f"{usage['bytes'].sum():,}"
        for name, rows, files, versions, size in usage.rows():
            counts = f"{rows:,} rows, " if rows is not None else ""
            yield name, f"{counts}{files} files, " + (f"{versions} versions, " if versions else "") + f"{size:,} bytes"
    except Exception as error:  # noqa: BLE001  # a table that can't be opened
        yield "fault", f"{type(error).__name__}: {error}"


def _free(root: Path) -> str:
    place = root.absolute()
    while not exists(place) and place != place.parent:
        place = place.parent
    usage = shutil.disk_usage(place)
    return f"{_size(usage.free)} of {_size(usage.total)}"


def _at_work(location: Location) -> Iterator[tuple[str, object]]:
    try:
        with paused(location, _LOCK_TIMEOUT_S) as pause:
            yield "at work", "; ".join(pause.doing) or "nobody"
            if pause.leftovers:
                yield "left by killed processes", ", ".join(pause.leftovers)
    except (LarkStoreError, OSError) as error:
        yield "at work", " ".join(str(error).split())
