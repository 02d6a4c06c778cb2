"""The transformers class of a checkpoint's model: text-only models, and multimodal ones with a text model inside.

A config may ask for an attention implementation that this machine lacks, such as `flash_attention_2`. Then the model's
default is used, and a warning says so.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

_LOG = logging.getLogger(__name__)
ATTENTIONS = ("auto", "eager", "sdpa")
_NEEDS_GPU = ("flash", "flex")


def check_attention(attention: str) -> str:
    """Return `attention` if it is valid.

    Raises
    ------
    InputError
    """
    if attention not in ATTENTIONS:
        raise InputError(f"unknown attention `{attention}`", f"use one of {', '.join(ATTENTIONS)}")
    return attention


def auto_class(config: Any) -> Any:
    """Return transformers' auto class for a config.

    A multimodal model without a text-only class is loaded whole: its text model takes text alone.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    is_multimodal = "text_config" in type(config).sub_configs
    if is_multimodal and type(config) not in AutoModelForCausalLM._model_mapping:  # noqa: SLF001  # no other test
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def text_config(model: Any) -> Any:
    """Return the config of a model's text part; a text-only model's own config."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def read_config(
    folder: Path, attention: str = "auto", device: torch.device | None = None, precision: str = "auto"
) -> Any:
    """Read a model's config and set its attention implementation; without `device`, the model will not run.

    `auto` keeps the config's own if the device and the precision support it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if check_attention(attention) != "auto":
        config._attn_implementation = attention  # noqa: SLF001  # transformers has no public setter
        return config
    for name in _requested(config):
        reason = _unavailable(name, device, precision)
        if reason is not None:
            config._attn_implementation = None  # noqa: SLF001  # the model's default
            text = "the config in `%s` asks for the attention `%s`, but %s; the default (`sdpa`) is used instead"
            _LOG.log(logging.DEBUG if device is None else logging.WARNING, text, folder, name, reason)
            break
    return config


def _requested(config: Any) -> Iterator[str]:
    """Yield the attention implementations that a config and its parts ask for."""
    parts = [config, *(getattr(config, name, None) for name in type(config).sub_configs)]
    for part in parts:
        name = getattr(part, "_attn_implementation", None)
        if isinstance(name, str):
            yield name


def _unavailable(attention: str, device: torch.device | None, precision: str) -> str | None:
    """Return why an attention implementation can't be used here, None if it can."""
    if not attention.startswith(_NEEDS_GPU):
        return None
    if device is None or device.type != "cuda":
        return "it needs CUDA"
    if attention.startswith("flex"):
        return None
    if precision == "float32":
        return "it needs half precision"
    from transformers.utils import import_utils

    version = attention.removeprefix("flash_attention_")
    is_installed = getattr(import_utils, f"is_flash_attn_{version}_available", lambda: False)
    return None if is_installed() else "it is not installed"
