"""Sentence encoders: texts to unit vectors whose cosines measure similarity of meaning.

An encoder is any folder or hub name that transformers loads without remote code. Its last hidden states are pooled as
its sentence-transformers files specify (mean, first or last token; mean without such files) and scaled to norm 1.
Texts longer than the encoder's limit lose their end.

Shape letters: B texts, T tokens, D dimensions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lark_store.errors import CheckpointError
from lark_store.modeling.batching import batches, budget
from lark_store.modeling.checkpoints import examine, first_line, read_json
from lark_store.modeling.loading import load_tokenizer, quiet
from lark_store.schema.table_schemas import EMBEDDING_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

_VERSION = 1  # part of an encoder's identity; increment when the computation of vectors changes
_POOLINGS = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "lasttoken": "last"}
_MODULES = ("Transformer", "Pooling", "Normalize")
_DEFAULT_LENGTH = 512  # tokens, if the encoder names no limit
_NO_LIMIT = 1 << 24  # transformers writes 10^30 for no limit


@dataclass
class Encoder:
    """An encoder's files and settings; the model is loaded on first use."""

    name: str
    folder: Path
    pooling: str
    max_length: int
    sha256: str
    device: torch.device
    _loaded: tuple[Any, Any] | None = None

    @property
    def table(self) -> str:
        """The Lance table of the encoder's embeddings."""
        return EMBEDDING_PREFIX + self.sha256[:8]

    def encode(self, texts: Sequence[str]) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Yield indices of texts and their unit vectors, (B, D), in batches of similar length.

        Raises
        ------
        CheckpointError
            The model can't be loaded, fails on a text or gives non-finite vectors.
        """
        tokenizer, _ = self._parts()
        token_ids = tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        numbered = list(enumerate(token_ids))
        for batch in batches(numbered, lambda pair: len(pair[1]), lambda: budget(None, self.device.type, None)):
            yield [number for number, _ in batch], self._vectors([ids for _, ids in batch])

    def _vectors(self, ids: list[list[int]]) -> NDArray[np.float32]:
        tokenizer, model = self._parts()
        longest = max(1, *(len(text_ids) for text_ids in ids))
        ids_BT = torch.full((len(ids), longest), tokenizer.pad_token_id or 0)
        mask_BT = torch.zeros_like(ids_BT)
        for row, text_ids in enumerate(ids):
            ids_BT[row, : len(text_ids)] = torch.tensor(text_ids)
            mask_BT[row, : len(text_ids)] = 1
        mask_BT[:, 0] = 1  # for texts without tokens
        ids_BT, mask_BT = ids_BT.to(self.device), mask_BT.to(self.device)
        try:
            with torch.no_grad():
                hidden_BTD = model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise self._unusable(f"can't encode a text: {first_line(error)}", "use a text-only encoder") from error
        unit_BD = torch.nn.functional.normalize(_pooled(hidden_BTD, mask_BT, self.pooling), dim=1)
        if not bool(unit_BD.isfinite().all()):
            raise self._unusable("gives non-finite vectors", "are its weights complete?")
        vectors: NDArray[np.float32] = unit_BD.cpu().numpy()
        return vectors

    def _parts(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = (load_tokenizer(self.folder), self._load())
        return self._loaded

    def _load(self) -> Any:
        from transformers import AutoModel

        options = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
        try:
            with quiet():
                model, info = AutoModel.from_pretrained(self.folder, dtype=torch.float32, **options)
        except Exception as error:  # broken files raise many exception types
            raise self._unusable(f"can't be loaded: {first_line(error)}", "are its files complete?") from error
        missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)  # the pooler is unused
        if missing:
            fact = f"lacks {len(missing)} of the model's tensors, such as `{missing[0]}`"
            raise self._unusable(fact, "save the complete model: random tensors would give wrong vectors")
        if model.config.is_encoder_decoder:
            raise self._unusable("also has a decoder", "use an encoder-only model such as BERT")
        return model.to(self.device).eval()

    def _unusable(self, fact: str, hint: str) -> CheckpointError:
        return CheckpointError(f"the encoder `{self.name}` {fact}", hint)


def _pooled(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool the tokens' hidden states into one vector per text, (B, D)."""
    if pooling == "cls":
        return hidden_BTD[:, 0]
    if pooling == "last":
        return hidden_BTD[torch.arange(len(hidden_BTD)), mask_BT.sum(dim=1) - 1]
    weights_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    return (hidden_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)


def open_encoder(name: str, device: torch.device) -> Encoder:
    """Find and hash an encoder's files.

    Raises
    ------
    CheckpointError
        The folder, safetensors weights or tokenizer is missing, or the pooling is unsupported.
    """
    try:
        files = examine(name)
        pooling, max_length = _pooling(files.folder), _max_length(files.folder)
    except CheckpointError as error:
        raise CheckpointError(f"the encoder can't be used: {error.fact}", error.hint) from error
    identity = (files.weights_sha256, files.tokenizer_sha256, pooling, max_length, _VERSION)
    sha256 = hashlib.sha256(" ".join(map(str, identity)).encode()).hexdigest()
    return Encoder(name, files.folder, pooling, max_length, sha256, device)


def _pooling(folder: Path) -> str:
    """Return the encoder's pooling in sentence-transformers: `mean`, `cls` or `last`."""
    for module in _modules(folder):
        if module not in _MODULES:
            raise CheckpointError(
                f"`{folder}` has the unsupported module `{module}`",
                f"use an encoder with the sentence-transformers modules {', '.join(_MODULES)} only",
            )
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    settings = read_json(path)
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix) for key, flag in settings.items() if key.startswith(prefix) and flag]
    if isinstance(settings.get("pooling_mode"), str):
        modes = [settings["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise CheckpointError(f"`{path}` has the unsupported pooling {modes}", "use `mean`, `cls` or `lasttoken`")
    return _POOLINGS[modes[0]]


def _modules(folder: Path) -> list[str]:
    """Return the kinds of sentence-transformers modules; empty without `modules.json`."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        return [str(module["type"]).rsplit(".", 1)[-1] for module in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"`{path}` can't be read: {first_line(error)}", "is the encoder complete?") from error


def _max_length(folder: Path) -> int:
    """Return the longest text in tokens, by sentence-transformers, tokenizer and config."""
    sentence = folder / "sentence_bert_config.json"
    limits = [read_json(sentence).get("max_seq_length")] if sentence.is_file() else []
    tokenizer = folder / "tokenizer_config.json"
    limits += [read_json(tokenizer).get("model_max_length")] if tokenizer.is_file() else []
    limits.append(read_json(folder / "config.json").get("max_position_embeddings"))
    positive = [int(limit) for limit in limits if isinstance(limit, int | float) and 1 <= limit < _NO_LIMIT]
    return min(positive, default=_DEFAULT_LENGTH)
