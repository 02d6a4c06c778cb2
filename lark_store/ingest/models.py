"""Models and tokenizers of checkpoints: loaded, or built from the config alone. No code from a checkpoint is run."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lark_store.errors import CheckpointError, InputError
from lark_store.ingest import adapters
from lark_store.ingest.checkpoints import base_folder, first_line, has_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

_ROUNDING = 0.005  # causal models differ by 0; the most that half precision may make of it
_UNKNOWN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing to the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """Load a checkpoint's tokenizer; adapters without one have that of their base."""
    from transformers import AutoTokenizer

    home = folder if has_tokenizer(folder) else base_folder(folder)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(home, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds for a broken file
        raise CheckpointError(
            f"the tokenizer in `{home}` can't be loaded: {first_line(error)}", "is it complete?"
        ) from error


def meta_model(folder: Path) -> torch.nn.Module:
    """Build a checkpoint's model without its weights: names and shapes alone.

    Raises
    ------
    CheckpointError
        The config can't be read, or names no causal language model that transformers knows; adapters do not fit it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base = base_folder(folder)
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
            model: torch.nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a config it can't use
        raise CheckpointError(
            f"`{base / 'config.json'}` describes no usable model: {first_line(error)}",
            "it must be a causal language model that transformers knows without remote code",
        ) from error
    if base == folder:
        return model
    with _attaching(folder), torch.device("meta"):
        return adapters.attach_empty(model, folder)


@contextmanager
def _attaching(folder: Path) -> Iterator[None]:
    try:
        with quiet():
            yield
    except CheckpointError:
        raise
    except Exception as error:  # peft raises many kinds for adapters that it can't use
        raise CheckpointError(
            f"the adapters in `{folder}` can't be loaded: {first_line(error)}",
            f"are its files whole, and made for the base that {adapters.CONFIG} names?",
        ) from error


def context_length(model: torch.nn.Module) -> int | None:
    """Return the longest input of a model in tokens, None if its config names no limit."""
    found = getattr(model.config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def trained_parameters(model: torch.nn.Module) -> set[str] | None:
    """Return the names of the parameters that a LoRA checkpoint trained; None for a plain model: all of them.

    These are the adapters' own, and those of modules that were trained and saved whole.
    """
    names: frozenset[str] | None = getattr(model, adapters.TRAINED, None)
    return None if names is None else set(names)


def resolve_dtype(model: torch.nn.Module, precision: str, device: torch.device) -> torch.dtype:
    """Return the type that a checkpoint's weights are loaded in: `auto` is the config's on CUDA, else float32."""
    import torch

    if precision != "auto":
        return getattr(torch, _checked(precision))  # type: ignore[no-any-return]
    configured = model.config.dtype
    return configured if device.type == "cuda" and isinstance(configured, torch.dtype) else torch.float32


def _checked(precision: str) -> str:
    if precision not in PRECISIONS:
        raise InputError(f"`{precision}` is no precision", f"one of {', '.join(PRECISIONS)}")
    return precision


def unweighted_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Build a checkpoint's model for measurements, from its config alone; parameters of one shape share their memory.

    It takes the memory of one layer and the time of all.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, initialization

    base = base_folder(folder)
    with quiet(), initialization.no_init_weights():
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype)
    model.tie_weights()  # left out along with the initial values
    if base != folder:
        with _attaching(folder):
            model = adapters.attach_empty(model, folder)
    generator = torch.Generator().manual_seed(0)
    shared: dict[tuple[int, ...], torch.Tensor] = {}
    replaced: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # a tied weight stays one parameter
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False, remove_duplicate=False):
            if old.shape not in shared:
                values = torch.ones(old.shape) if old.dim() < 2 else torch.randn(old.shape, generator=generator) / 50
                shared[old.shape] = values.to(device, dtype)
            if old not in replaced:
                replaced[old] = torch.nn.Parameter(shared[old.shape], requires_grad=False)
            module.register_parameter(name, replaced[old])
    return model.to(device).eval()


def load_model(folder: Path, device: torch.device, precision: str) -> Any:
    """Load a checkpoint's causal language model for gradients: in evaluation mode (no dropout), on `device`.

    LoRA adapters are put in place, not merged; beside a half-precision base, `auto` keeps them in float32.

    Raises
    ------
    CheckpointError
        The weights can't be read, or do not cover the whole model; the model is not causal.
    """
    dtype = precision if _checked(precision) != "auto" else "auto" if device.type == "cuda" else "float32"
    base = base_folder(folder)
    model = _load_whole(base, dtype)
    if base != folder:
        with _attaching(folder):
            model = adapters.attach(model, folder, widen=dtype == "auto")
    model = model.to(device).eval()
    _check_causal(model, folder)
    return model


def _check_causal(model: Any, folder: Path) -> None:
    """Refuse a model whose answer at a token depends on later ones: transformers loads encoders as decoders too.

    Their loss would be that of a token that was seen already.
    """
    import torch

    try:
        ids_BT = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]]) % len(model.get_input_embeddings().weight)
        with torch.no_grad():
            logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
        one_TV, other_TV = logits_BTV[:, :2].float()
    except _UNKNOWN:  # what it can't do with these four tokens says nothing; ingest records what fails
        return
    differs = float((one_TV - other_TV).square().mean().sqrt())
    if differs > _ROUNDING * float(one_TV.std()):  # false where they are no numbers
        raise CheckpointError(
            f"the model in `{folder}` looks ahead: what it predicts at a token depends on later tokens",
            "it must be a causal language model, not an encoder",
        )


def _load_whole(folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # transformers and safetensors raise many kinds for a broken file
        raise CheckpointError(
            f"the model in `{folder}` can't be loaded: {first_line(error)}", "are its files whole?"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"the weights in `{folder}` lack {len(missing)} of the model's tensors, such as `{missing[0]}`",
            "a model with random tensors would give wrong gradients; save the whole model",
        )
    return model
