"""The loss of a text after another in one context, against a plain script."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.gradients import random_tokens
from helpers.models import build_model, random_llama
from torch.nn import functional

from lark_store.modeling.in_context import joined, separator_of
from lark_store.modeling.losses import losses
from lark_store.modeling.tokens import Tokens

TEXTS = [random_tokens(seed, n=10 + 3 * seed) for seed in range(5)]


@torch.no_grad()
def plain_loss(model, context, tokens):
    """The mean negative log-probability of all tokens but the first, token by token."""
    values = []
    for n in range(1, len(tokens.input_ids)):
        logits = model(input_ids=torch.tensor([[*context, *tokens.input_ids[:n]]])).logits[0, -1]
        values.append(-float(functional.log_softmax(logits.double(), dim=-1)[tokens.input_ids[n]]))
    return float(np.mean(values))


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@pytest.mark.parametrize("separator", [[], [7, 8]])
def test_five_texts_equal_a_plain_script(name, separator):
    model = random_llama() if name == "Llama" else build_model(name)
    expected = [
        [plain_loss(model, [], x) - plain_loss(model, [*z.input_ids, *separator], x) for x in TEXTS] for z in TEXTS
    ]
    before = losses(model, TEXTS)
    found = [(before - losses(model, [joined(z, x, separator) for x in TEXTS])).numpy() for z in TEXTS]
    assert np.abs(expected).min() > 1e-5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_only_a_shared_first_token_is_left_out():
    one, other = Tokens([1, 5], [False, True], "text"), Tokens([2, 1], [False, True], "text")
    assert joined(one, one, bos=1).input_ids == [1, 5, 5]
    assert joined(one, other, bos=1).input_ids == [1, 5, 2, 1]
    assert joined(other, one, bos=1).input_ids == [2, 1, 1, 5]
    assert joined(one, one).input_ids == [1, 5, 1, 5]


def test_raw_texts_are_separated_by_a_line_break(checkpoints):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["base"])
    assert tokenizer.decode(separator_of("raw", tokenizer)) == "\n"
    assert separator_of("chatml", tokenizer) == separator_of("jinja", tokenizer) == []
