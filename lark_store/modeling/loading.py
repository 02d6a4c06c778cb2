"""Load models and tokenizers of checkpoints, or build models from their config. Code in checkpoints never runs."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lark_store.errors import CheckpointError, InputError
from lark_store.modeling import lora
from lark_store.modeling.auto_models import auto_class, check_attention, read_config, text_config
from lark_store.modeling.checkpoints import first_line, model_folder, weight_files
from lark_store.modeling.weight_keys import PREFIXES, plain_name, tensor_names, wrapped

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from lark_store.modeling.checkpoints import ModelFolder

_LOG = logging.getLogger(__name__)
_ROUNDING = 0.005  # tolerance for half precision; causal models differ by 0
_UNKNOWN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


class _Kept:
    """The last loaded model by its arguments; None: models are not kept."""

    models: dict[tuple[Any, ...], Any] | None = None


_KEPT = _Kept()


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


def load_tokenizer(folder: Path | ModelFolder) -> Any:
    """Load a checkpoint's tokenizer; adapters without one use their base's."""
    from transformers import AutoTokenizer

    home = model_folder(folder).tokenizer
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(home, use_fast=True, trust_remote_code=False)
    except Exception as error:  # broken files raise many exception types
        raise CheckpointError(
            f"the tokenizer in `{home}` can't be loaded: {first_line(error)}", "is it complete?"
        ) from error


def meta_model(folder: Path | ModelFolder) -> torch.nn.Module:
    """Build a checkpoint's model without weights, on the meta device.

    Raises
    ------
    CheckpointError
        The config is unreadable or not of a causal language model in transformers, or the adapters do not fit it.
    """
    import torch

    place = model_folder(folder)
    try:
        with quiet(), torch.device("meta"):
            config = read_config(place.config)
            model: torch.nn.Module = auto_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:  # unusable configs raise many exception types
        raise CheckpointError(
            f"`{place.config / 'config.json'}` does not describe a usable model: {first_line(error)}",
            "use a causal language model that transformers supports without remote code",
        ) from error
    if place.base == place.weights:
        return model
    with _attaching(place.weights), torch.device("meta"):
        return lora.attach_empty(model, place.weights)


@contextmanager
def _attaching(folder: Path) -> Iterator[None]:
    try:
        with quiet():
            yield
    except CheckpointError:
        raise
    except Exception as error:  # unusable adapters raise many exception types
        raise CheckpointError(
            f"the adapters in `{folder}` can't be loaded: {first_line(error)}",
            f"check that the files are complete and belong to the base model in {lora.CONFIG}",
        ) from error


def context_length(model: torch.nn.Module) -> int | None:
    """Return a model's longest input in tokens, None if its config names no limit."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def trained_parameters(model: torch.nn.Module) -> set[str] | None:
    """Return the names of the parameters trained with LoRA, or None for a plain model, with all parameters trained.

    They include the adapters and the modules trained and saved in full.
    """
    names: frozenset[str] | None = getattr(model, lora.TRAINED, None)
    return None if names is None else set(names)


def resolve_dtype(model: torch.nn.Module, precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype for a checkpoint's weights: `auto` is the config's on CUDA, else float32."""
    import torch

    if precision != "auto":
        return getattr(torch, check_precision(precision))  # type: ignore[no-any-return]
    configured = model.config.dtype
    return configured if device.type == "cuda" and isinstance(configured, torch.dtype) else torch.float32


def check_precision(precision: str) -> str:
    """Return `precision` if it is valid.

    Raises
    ------
    InputError
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision `{precision}`", f"use one of {', '.join(PRECISIONS)}")
    return precision


def unweighted_model(
    folder: Path | ModelFolder, dtype: torch.dtype, device: torch.device, attention: str = "auto"
) -> Any:
    """Build a checkpoint's model for measurements, from its config; parameters of equal shape share memory.

    It needs the memory of one layer and the time of all layers.
    """
    import torch
    from transformers import initialization

    place = model_folder(folder)
    with quiet(), initialization.no_init_weights():
        precision = "float32" if dtype == torch.float32 else "auto"
        config = read_config(place.config, attention, device, precision)
        with _supporting(attention):
            model = auto_class(config).from_config(config, trust_remote_code=False, dtype=dtype)
    model.tie_weights()  # skipped along with initialisation
    if place.base != place.weights:
        with _attaching(place.weights):
            model = lora.attach_empty(model, place.weights)
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


@contextmanager
def kept_loaded() -> Iterator[None]:
    """Inside, `load_model` keeps the last model and returns it again when it is asked for the same."""
    previous, _KEPT.models = _KEPT.models, {}
    try:
        yield
    finally:
        _KEPT.models = previous


def load_model(folder: Path | ModelFolder, device: torch.device, precision: str, attention: str = "auto") -> Any:
    """Load a checkpoint's causal language model in evaluation mode (no dropout) on `device`.

    LoRA adapters are attached, not merged; on a half-precision base, `auto` keeps them in float32. `attention` is
    `eager`, `sdpa` or `auto`: the config's, if this machine has it.

    Raises
    ------
    CheckpointError
        The weights are unreadable or incomplete, or the model is not causal.
    """
    key = (model_folder(folder), str(device), precision, attention)
    if _KEPT.models is None:
        return _load(folder, device, precision, attention)
    if key not in _KEPT.models:
        _KEPT.models.clear()  # two may not fit into memory
        _KEPT.models[key] = _load(folder, device, precision, attention)
    return _KEPT.models[key]


def _load(folder: Path | ModelFolder, device: torch.device, precision: str, attention: str) -> Any:
    dtype = precision if check_precision(precision) != "auto" else "auto" if device.type == "cuda" else "float32"
    place = model_folder(folder)
    check_attention(attention)
    with _supporting(attention):
        model = _load_whole(place, dtype, attention, device)
    if place.base != place.weights:
        with _attaching(place.weights):
            model = lora.attach(model, place.weights, widen=dtype == "auto")
    model = model.to(device).eval()
    _check_causal(model, place.weights)
    return model


@contextmanager
def _supporting(attention: str) -> Iterator[None]:
    """Name the attention where a model does not support it."""
    try:
        yield
    except (ValueError, CheckpointError) as error:
        if attention == "auto" or "attention implementation" not in str(error):
            raise
        raise InputError(f"the model does not support `--attention {attention}`", "use `--attention eager`") from error


def _check_causal(model: Any, folder: Path) -> None:
    """Refuse a model that sees later tokens: transformers also loads encoders as decoders.

    Their loss would measure a token that is part of the input.
    """
    import torch

    try:
        ids_BT = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]]) % len(model.get_input_embeddings().weight)
        with torch.no_grad():
            logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
        first_TV, second_TV = logits_BTV[:, :2].float()
    except _UNKNOWN:  # inconclusive; ingest records samples that fail
        return
    difference = float((first_TV - second_TV).square().mean().sqrt())
    if difference > _ROUNDING * float(first_TV.std()):  # false for NaN
        raise CheckpointError(
            f"the model in `{folder}` is not causal: its predictions depend on later tokens",
            "use a causal language model, not an encoder",
        )


def _load_whole(place: ModelFolder, dtype: str, attention: str, device: torch.device) -> Any:
    from transformers import GenerationConfig

    folder = place.base
    options: dict[str, Any] = {}
    if place.config != folder:  # transformers would look for it beside the weights
        options["generation_config"] = GenerationConfig()
    try:
        with quiet():
            prefixed = wrapped(tensor_names(weight_files(folder)))
            if prefixed:
                options["key_mapping"] = dict.fromkeys(PREFIXES, "")
            config = read_config(place.config, attention, device, dtype)
            model, info = auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # broken files raise many exception types
        raise CheckpointError(
            f"the model in `{folder}` can't be loaded: {first_line(error)}", "are its files complete?"
        ) from error
    missing = sorted(info["missing_keys"])
    if prefixed:
        _check_plain_names(folder, prefixed, missing, sorted(info["unexpected_keys"]))
    if missing:
        raise CheckpointError(
            f"the weights in `{folder}` lack {len(missing)} of the model's tensors, such as `{missing[0]}`",
            "save the complete model: random tensors in their place would give wrong gradients",
        )
    return model


def _check_plain_names(folder: Path, prefixed: list[str], missing: list[str], unexpected: list[str]) -> None:
    """Report that prefixes were removed, if all names then match the model's."""
    if missing or unexpected:
        raise CheckpointError(
            f"the weights in `{folder}` have names of a wrapped model, such as `{prefixed[0]}`; without the prefix, "
            + (f"`{missing[0]}` is missing" if missing else f"`{unexpected[0]}` is unknown to the model"),
            "save the model itself with `save_pretrained`: `model.module` of DDP, `model._orig_mod` of torch.compile",
        )
    _LOG.warning(
        "the weights in `%s` have names of a wrapped model, such as `%s`; they were loaded as `%s`",
        folder,
        prefixed[0],
        plain_name(prefixed[0]),
    )
