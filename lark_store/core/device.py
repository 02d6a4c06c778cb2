"""Devices by name. torch takes seconds to import, so the functions import it."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from lark_store.errors import InputError

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """Return a device by name; `auto` prefers CUDA, then MPS, then the CPU.

    Raises
    ------
    InputError
        The device is not available.
    """
    import torch

    if name == "auto":
        available = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(available)
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device `{name}` is not available", "use `--device auto`, `cpu`, `cuda` or `mps`") from error


def device_name(device: torch.device) -> str:
    """Return a device's human-readable name, as stored with runs."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
