"""Models and tokenizers as arguments, without importing their libraries."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class ModelObject(Protocol):
    """A model of torch, wrapped for training or not."""

    def state_dict(self) -> Any:
        """Return its tensors by name."""


@runtime_checkable
class TokenizerObject(Protocol):
    """A tokenizer or processor of transformers."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Save its files to a folder."""
