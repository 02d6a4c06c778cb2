"""A store with two draws of a synthetic domain, and their influence by plain torch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from lark_store import Store, make_domain
from lark_store.domains import DOMAINS

STATEMENTS = {row["sample_id"]: row["text"] for row in make_domain("squares", draws=2)}
N_ROLES = len(DOMAINS["squares"].statements)


@pytest.fixture
def statements(tmp_path, checkpoints):
    """A store with one checkpoint, the sources `squares` and `five` (five statements of it), and the variant `text`."""
    with Store.create(tmp_path / "statements.store") as store:
        store.checkpoint_add("base", checkpoints["base"])
        store.source_add("squares", make_domain("squares", draws=2), stage="finetune")
        store.source_add("five", make_domain("squares", draws=1)[:5], stage="finetune")
        store.variant_add("text", template="raw", targets="text")
        yield store


class PlainModel:
    """The losses of texts by transformers alone."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, text):
        return self.tokenizer(text)["input_ids"]

    def loss(self, text, model=None, context=()):
        """The mean cross-entropy of all tokens of a text but the first, after a context of tokens."""
        ids = self.ids(text)
        if context and ids[0] == context[0] == self.tokenizer.bos_token_id:
            raise AssertionError
        logits = (model or self.model)(input_ids=torch.tensor([[*context, *ids]])).logits[0]
        return functional.cross_entropy(logits[len(context) : -1], torch.tensor(ids[1:]))

    @torch.no_grad()
    def in_context(self, first, second):
        context = [*self.ids(first), *self.tokenizer("\n")["input_ids"]]
        return float(self.loss(second) - self.loss(second, context=context))

    def trained(self, text, rate):
        model = copy.deepcopy(self.model)
        self.loss(text, model).backward()
        torch.optim.SGD(model.parameters(), rate).step()
        return model

    def influence(self, texts, rate):
        """The influence of each text on each, by a step of plain gradient descent, (N, N)."""
        rows = []
        for text in texts:
            model = self.trained(text, rate)
            with torch.no_grad():
                rows.append([float(self.loss(x) - self.loss(x, model)) for x in texts])
        return np.array(rows)
