"""Sentence encoders: a text as one unit vector, whose cosines say how alike two texts are in meaning.

Any encoder that transformers loads without remote code, a folder or a hub name. Its tokens' last hidden states are
pooled as the files of sentence-transformers beside it say (their mean, the first or the last token's), by their mean
where there are none, and scaled to norm 1. Texts longer than the encoder takes lose their end.

Shape letters: B texts, T tokens, D dimensions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lark_store.errors import CheckpointError
from lark_store.ingest.batches import batches, budget
from lark_store.ingest.checkpoints import examine, first_line, read_json
from lark_store.ingest.models import load_tokenizer, quiet
from lark_store.schema.vectors import EMBEDDING_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

_VERSION = 1  # of how a vector is made of an encoder's files; a change gives them another identity
_POOLINGS = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "lasttoken": "last"}
_MODULES = ("Transformer", "Pooling", "Normalize")
_LONGEST = 512  # tokens, of an encoder that names no limit
_NO_LIMIT = 1 << 24  # transformers writes 10^30 for none


@dataclass
class Encoder:
    """An encoder's files, and how a text becomes a vector; the model is loaded when the first text comes."""

    name: str
    folder: Path
    pooling: str
    max_length: int
    sha256: str
    device: torch.device
    _loaded: tuple[Any, Any] | None = None

    @property
    def table(self) -> str:
        """The Lance table of its embeddings."""
        return EMBEDDING_PREFIX + self.sha256[:8]

    def encode(self, texts: Sequence[str]) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Yield some texts' numbers and their unit vectors, (B, D), batch by batch; texts of like length go together.

        Raises
        ------
        CheckpointError
            The model can't be loaded, or gives something else than numbers.
        """
        tokenizer, _ = self._parts()
        made = tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        numbered = list(enumerate(made))
        for batch in batches(numbered, lambda one: len(one[1]), lambda: budget(None, self.device.type, None)):
            yield [number for number, _ in batch], self._vectors([ids for _, ids in batch])

    def _vectors(self, ids: list[list[int]]) -> NDArray[np.float32]:
        tokenizer, model = self._parts()
        longest = max(1, *(len(one) for one in ids))
        ids_BT = torch.full((len(ids), longest), tokenizer.pad_token_id or 0)
        mask_BT = torch.zeros_like(ids_BT)
        for row, one in enumerate(ids):
            ids_BT[row, : len(one)] = torch.tensor(one)
            mask_BT[row, : len(one)] = 1
        mask_BT[:, 0] = 1  # a text of no token
        ids_BT, mask_BT = ids_BT.to(self.device), mask_BT.to(self.device)
        try:
            with torch.no_grad():
                hidden_BTD = model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise self._unusable(f"can't encode a text: {first_line(error)}", "does it take texts alone?") from error
        unit_BD = torch.nn.functional.normalize(_pooled(hidden_BTD, mask_BT, self.pooling), dim=1)
        if not bool(unit_BD.isfinite().all()):
            raise self._unusable("gives something else than numbers", "are its weights whole?")
        found: NDArray[np.float32] = unit_BD.cpu().numpy()
        return found

    def _parts(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = (load_tokenizer(self.folder), self._load())
        return self._loaded

    def _load(self) -> Any:
        from transformers import AutoModel

        how = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
        try:
            with quiet():
                model, info = AutoModel.from_pretrained(self.folder, dtype=torch.float32, **how)
        except Exception as error:  # transformers and safetensors raise many kinds for a broken file
            raise self._unusable(f"can't be loaded: {first_line(error)}", "are its files whole?") from error
        missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)  # which is not used
        if missing:
            fact = f"lacks {len(missing)} of the model's tensors, such as `{missing[0]}`"
            raise self._unusable(fact, "random tensors would give wrong vectors; save the whole model")
        if model.config.is_encoder_decoder:
            raise self._unusable("has a decoder too", "take an encoder alone, such as a BERT")
        return model.to(self.device).eval()

    def _unusable(self, fact: str, hint: str) -> CheckpointError:
        return CheckpointError(f"the encoder `{self.name}` {fact}", hint)


def _pooled(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return one vector per text, (B, D), of its tokens' hidden states."""
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
        No such folder or hub name, no weights as safetensors, no tokenizer, or a pooling that is not known here.
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
    """Return how sentence-transformers pools the encoder: `mean`, `cls` or `last`."""
    for module in _modules(folder):
        if module not in _MODULES:
            raise CheckpointError(
                f"`{folder}` has a module `{module}` after its model",
                f"of sentence-transformers' modules {', '.join(_MODULES)} are known here; take another encoder",
            )
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    said = read_json(path)
    modes = [key.removeprefix("pooling_mode_") for key, on in said.items() if key.startswith("pooling_mode_") and on]
    if isinstance(said.get("pooling_mode"), str):
        modes = [said["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise CheckpointError(f"`{path}` pools by {modes}", "the mean, `cls` and `lasttoken` are known here")
    return _POOLINGS[modes[0]]


def _modules(folder: Path) -> list[str]:
    """Return the kinds of modules that sentence-transformers puts together, none where it has no part in it."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        return [str(module["type"]).rsplit(".", 1)[-1] for module in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"`{path}` can't be read: {first_line(error)}", "is the encoder whole?") from error


def _max_length(folder: Path) -> int:
    """Return the longest text in tokens: what sentence-transformers takes, else what tokenizer and config allow."""
    own = folder / "sentence_bert_config.json"
    limits = [read_json(own).get("max_seq_length")] if own.is_file() else []
    tokenizer = folder / "tokenizer_config.json"
    limits += [read_json(tokenizer).get("model_max_length")] if tokenizer.is_file() else []
    limits.append(read_json(folder / "config.json").get("max_position_embeddings"))
    named = [int(limit) for limit in limits if isinstance(limit, int | float) and 1 <= limit < _NO_LIMIT]
    return min(named, default=_LONGEST)
