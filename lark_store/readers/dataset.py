"""Rows of a Hugging Face dataset: a folder from `save_to_disk`, or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lark_store.core.arrow import use_pandas
from lark_store.core.text import coded
from lark_store.errors import InputError
from lark_store.readers.base import Row, StructRow, check_columns

if TYPE_CHECKING:
    from collections.abc import Iterator

_SLICE = re.compile(r"(.+)\[-?\d*%?:-?\d*%?\]")


def read_dataset(name: str, config: str | None, split: str | None) -> Iterator[Row]:
    """Read rows of a dataset: a folder, or a name on the hub."""
    import datasets

    use_pandas()  # datasets reads CSV and JSON with pandas
    saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config, split=split)
    except Exception as error:  # no network, unknown name or config: many exception types
        fact = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"`{name}` can't be read as a dataset: {fact}",
            "give a file (.jsonl, .parquet, .csv), a folder from `save_to_disk`, or a Hugging Face name with "
            "`--config` and `--split`",
        ) from error
    if saved:
        data = _select_split(name, data, config, split)
    if isinstance(data, dict) and len(data) == 1:
        (data,) = data.values()
    if not isinstance(data, datasets.Dataset):
        raise InputError(f"`{name}` has the splits {', '.join(coded(data))}", "choose one with `--split`")
    check_columns(Path(name), data.column_names)
    try:
        yield from map(
            StructRow, data.with_format(None)
        )  # numpy and pandas formats turn integers with gaps into floats
    except Exception as error:  # damaged files, values outside Python's range, undecodable images, …
        raise InputError(f"`{name}` can't be read as a dataset: {error}", "is it complete?") from error


def _select_split(name: str, data: Any, config: str | None, split: str | None) -> Any:
    """Return the requested split of a saved dataset, or `data` unchanged without one."""
    if config is not None:
        raise InputError(f"`{name}` is a saved dataset, without configurations", "omit `--config`")
    if split is None:
        return data
    if not isinstance(data, dict):
        raise InputError(f"`{name}` has no splits, so no `{split}`", "omit `--split`")
    match = _SLICE.fullmatch(split)
    if (match[1] if match else split) not in data:
        raise InputError(
            f"`{name}` has no split `{split}`; it has {', '.join(coded(data))}", "choose one with `--split`"
        )
    return data[split] if match is None else _slice_of(data[match[1]], match[1], split)


def _slice_of(data: Any, name: str, split: str) -> Any:
    """Return a part of a split, such as `train[:100]` or `train[50%:]`."""
    import datasets

    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(data)})
    return data.select(range(part.from_ or 0, len(data) if part.to is None else part.to))
