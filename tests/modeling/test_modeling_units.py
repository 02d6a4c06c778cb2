"""Unit tests of the path from rows to sketches, without a model or a store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers.gradients import CPU
from hypothesis import given
from hypothesis import strategies as st

from lark_store.core.hashing import content_hash
from lark_store.errors import InputError
from lark_store.gradients.corrections.fisher import drawn_labels
from lark_store.gradients.paths import hooks
from lark_store.gradients.paths.hooks import check_tokens, choose_parameters, failure, finish, is_device_lost
from lark_store.modeling import losses
from lark_store.modeling.batching import TOKENS, batches, budget, windows
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.losses import Batch
from lark_store.modeling.predicted_answers import AnswerSettings
from lark_store.modeling.rendering import CHATML, RAW, Renderer, make_variant
from lark_store.modeling.sample import Sample
from lark_store.modeling.tokens import Tokens

# --- batches, tokens, gradients ---------------------------------------------------------------------------------------


def test_budget_is_requested_or_the_devices_and_fits_in_memory():
    assert [budget(None, device, None) for device in TOKENS] == [1024, 2048, 8192]
    assert budget(300, "cpu", None) == 300
    assert (budget(300, "cpu", 200), budget(100, "cpu", 200), budget(None, "cpu", 7)) == (100 + 100, 100, 7)


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 64), st.integers(1, 9))
def test_batches_hold_each_sample_once_within_the_budget(lengths, most, size):
    cut = list(windows(lengths, size))
    assert [n for window in cut for n in window] == lengths
    assert all(len(window) == size for window in cut[:-1])
    result = list(batches(lengths, lambda n: n, lambda: most))
    assert [n for batch in result for n in batch] == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 or batch[0] * len(batch) <= most for batch in result)
    for batch, after in pairwise(result):  # none could take one more
        assert max(batch[0], 1) * (len(batch) + 1) > most, (batch, after)


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [([1, 1, 1], 3, [[1, 1, 1]]), ([0, 0, 0], 2, [[0, 0], [0]]), ([2, 3, 1], 1, [[3], [2], [1]])],
)
def test_short_samples_fill_a_batch(lengths, most, expected):
    assert list(batches(lengths, lambda n: n, lambda: most)) == expected


def toy(n=5):
    """A model of a table of tokens, and three more parameters."""
    model = torch.nn.ModuleDict(
        {"table": torch.nn.Embedding(n, 2), "norm": torch.nn.LayerNorm(2), "head": torch.nn.Linear(2, n, bias=False)}
    )
    model.get_input_embeddings = lambda: model["table"]
    return model


def test_parameters_are_chosen_by_name_and_dimensions():
    def names(*asked):
        return [name for name, _ in choose_parameters(toy(), *asked)]

    assert names(None, None) == ["table.weight", "norm.weight", "norm.bias", "head.weight"]
    assert names(None, None, 1) == names(None, None, 0) == names(None, None)
    assert names(None, None, 2) == ["table.weight", "head.weight"]
    assert names("weight", "table|head") == ["norm.weight"]
    with pytest.raises(InputError, match="matches none of the model's 4 parameters") as none:
        names("nothing", None)
    assert none.value.hint == "its parameters include `table.weight`, `norm.weight`, `norm.bias`, `head.weight`"
    with pytest.raises(InputError, match="matches none of the model's 4 parameters"):
        names(None, None, 3)


def test_some_parameters_are_named_if_none_matches():
    with pytest.raises(InputError) as none:
        choose_parameters(torch.nn.Linear(2, 2), "nothing", None)
    assert none.value.hint == "its parameters include `weight`, `bias`"


def test_labels_are_drawn_from_each_targets_own_distribution():
    logits = torch.tensor([[99.0, 0.0, 0.0], [0.0, 0.0, 99.0]])
    assert all(drawn_labels(logits, seed).tolist() == [0, 2] for seed in range(20))


def test_tokens_within_the_vocabulary_are_known():
    check_tokens(toy(5), Tokens([0, 4], [False, True], "text"))
    with pytest.raises(UnusableSampleError, match="token 5 is outside the model's vocabulary of 5"):
        check_tokens(toy(5), Tokens([5, 0], [False, True], "text"))


def test_failure_reason_is_the_first_line_or_type():
    tokens = Tokens([1, 2, 3], [False, True, True], "text")
    assert str(failure(tokens, ValueError("one\ntwo"))) == "the model fails on its 3 tokens: one"
    assert str(failure(tokens, KeyError())) == "the model fails on its 3 tokens: KeyError"


def test_device_is_lost_unless_out_of_memory():
    class AcceleratorError(RuntimeError):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks.torch, "AcceleratorError", AcceleratorError)
        assert is_device_lost(AcceleratorError("an illegal memory access"))
        assert not is_device_lost(AcceleratorError("CUDA error: out of memory"))
        assert not is_device_lost(RuntimeError("an illegal memory access"))
    assert hooks.is_out_of_memory(MemoryError())
    assert hooks.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not hooks.is_out_of_memory(ValueError("x"))


@pytest.mark.parametrize(
    ("vector", "loss", "reason"),
    [
        ([3.0, 4.0], 1.5, None),
        ([3.0, float("nan")], 1.5, "the gradient is not finite (loss 1.5, norm nan)"),
        ([3.0, float("inf")], 1.5, "the gradient is not finite (loss 1.5, norm inf)"),
        ([3.0, 4.0], float("inf"), "the gradient is not finite (loss inf, norm 5)"),
        ([3.0, 4.0], float("nan"), "the gradient is not finite (loss nan, norm 5)"),
        ([0.0, 0.0], 1.5, "the gradient is zero (loss 1.5)"),
    ],
)
def test_a_sketch_is_scaled_to_the_root_of_k_if_it_has_a_direction(vector, loss, reason):
    raw = torch.tensor(vector)
    result = finish(raw, loss)
    assert raw.nan_to_num().tolist() == torch.tensor(vector).nan_to_num().tolist()  # left as it was
    if reason:
        assert str(result) == reason
    else:
        assert result.vector.tolist() == pytest.approx([0.6 * 2**0.5, 0.8 * 2**0.5])
        assert (result.grad_norm, result.loss) == (5.0, 1.5)


class Head(torch.nn.Module):
    """Gives logits of which each tells its sample and position; may name its output layer."""

    def __init__(self, *, named, takes_positions=True):
        super().__init__()
        self.head, self.named, self.seen = torch.nn.Linear(3, 4, bias=False), named, {}
        if not takes_positions:
            self.forward = lambda input_ids, use_cache, attention_mask=None: (
                use_cache or self._run(input_ids, attention_mask=attention_mask)
            )

    def get_output_embeddings(self):
        return self.head if self.named else None

    def forward(self, input_ids, use_cache, position_ids=None, attention_mask=None):
        assert not use_cache
        return self._run(input_ids, position_ids=position_ids, attention_mask=attention_mask)

    def _run(self, input_ids, **others):
        self.seen = {name: None if value is None else value.tolist() for name, value in others.items()}
        hidden = torch.stack([input_ids, input_ids**2, torch.ones_like(input_ids)], dim=-1).float() / 10
        return SimpleNamespace(logits=self.head(hidden))


SAMPLES = [
    Tokens([3, 1, 2, 0], [False, False, True, True], "text"),
    Tokens([2, 3], [False, True], "predicted"),
    Tokens([1, 0, 3], [False, True, False], "response"),
]


@pytest.mark.parametrize("pad_left", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_losses_are_the_mean_cross_entropy_of_each_samples_targets(named, pad_left):
    torch.manual_seed(0)
    model = Head(named=named)
    actual = losses.sample_losses(model, Batch(SAMPLES, CPU, pad_left))
    for loss, tokens in zip(actual, SAMPLES, strict=True):
        ids = torch.tensor(tokens.input_ids)
        log_p = model._run(ids[None]).logits[0].log_softmax(dim=-1)
        item = [
            -log_p[t - 1][log_p[t - 1].argmax() if tokens.rule == "predicted" else ids[t]]
            for t, is_target in enumerate(tokens.is_target)
            if is_target
        ]
        torch.testing.assert_close(loss, torch.stack(item).mean())
    assert not model.head._forward_pre_hooks


def test_loss_of_a_summed_sample_is_a_sum():
    torch.manual_seed(0)
    model = Head(named=True)
    plain = losses.sample_losses(model, Batch(SAMPLES, CPU))
    summed = [replace(SAMPLES[0], is_summed=True), replace(SAMPLES[1], is_summed=True), SAMPLES[2]]
    actual = losses.sample_losses(model, Batch(summed, CPU))
    torch.testing.assert_close(actual, plain * torch.tensor([2.0, 1.0, 1.0]))  # the first has two targets


def test_model_gets_positions_if_accepted_and_a_mask_for_left_padding():
    model = Head(named=True)
    losses.sample_losses(model, Batch(SAMPLES, CPU))
    assert model.seen == {"position_ids": [[0, 1, 2, 3]] * 3, "attention_mask": None}
    losses.sample_losses(model, Batch(SAMPLES, CPU, pad_left=True))
    assert model.seen == {
        "position_ids": [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 1, 2]],
        "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]],
    }
    losses.sample_losses(model, Batch(SAMPLES[1:], CPU))
    assert model.seen["position_ids"] == [[0, 1, 2]] * 2
    losses.sample_losses(model, Batch(SAMPLES[:1], CPU))
    assert model.seen["position_ids"] is None
    other = Head(named=True, takes_positions=False)
    losses.sample_losses(other, Batch(SAMPLES, CPU, pad_left=True))
    assert other.seen == {"attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]}


def test_content_is_given_by_position_and_target():
    marked = Tokens([3, 1, 2, 0], [False, True, False, True], "text", is_content=[False, False, True, True])
    batch = Batch([SAMPLES[0], marked], CPU)
    assert [item.tolist() for item in batch.content] == [[0, 1, 2, 3], [2, 3]]
    assert [item.tolist() for item in batch.content_targets] == [[0, 1], [1]]  # the position before a target
    assert [item.tolist() for item in batch.predictors] == [[0, 0, 1, 1], [1, 2, 0, 2]]
    assert [item.tolist() for item in Batch([SAMPLES[1], marked], CPU, pad_left=True).predictors] == [
        [0, 1, 1],
        [2, 0, 2],
    ]


# --- variants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, (1 << 31) - 1])
def test_length_limits_of_a_variant(length):
    assert make_variant("v", "raw", "auto", length).max_length == length


@pytest.mark.parametrize("length", [-1, 0, 1, 1 << 31])
def test_a_length_out_of_range_is_refused(length):
    with pytest.raises(InputError, match=f"a maximum length must be from 2 to .*, not {length}"):
        make_variant("v", "raw", "auto", length)


def test_variants_hash_covers_all_fields():
    results = [("raw", "auto", 8), ("raw", "text", 8), ("raw", "auto", 9), ("chatml", "auto", 8)]
    assert len({make_variant("v", *item).sha256 for item in results}) == 4
    assert make_variant("a", *results[0]).sha256 == make_variant("b", *results[0]).sha256


def test_hash_of_a_variant_is_that_of_older_stores():
    def sha256(*parts):
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    settings = AnswerSettings.greedy(3)
    assert make_variant("v", "raw", "auto", 8, answers=settings).answers is None  # for another rule
    assert make_variant("v", "raw", "auto", 8, answers=settings).sha256 == sha256("raw", RAW, "auto", 8)
    assert make_variant("v", "chatml", "text", 9, "sum").sha256 == sha256("chatml", CHATML, "text", 9, "sum")
    predicted = make_variant("v", "raw", "predicted-answer", 8, answers=settings)
    assert predicted.sha256 == sha256("raw", RAW, "predicted-answer", 8, settings.row)


class Letters:
    """A fast tokenizer of one token a letter."""

    is_fast, chat_template, bos_token_id = True, None, None

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text], "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def letters(rule, longest, context=None, **parts):
    rendered = Renderer(make_variant("v", "raw", rule, longest), Letters(), context).render(Sample("a", **parts))
    return "".join(map(chr, rendered.input_ids)), "".join("x" if t else "." for t in rendered.is_target), rendered.n_cut


@pytest.mark.parametrize(
    ("rule", "longest", "context", "parts", "expected"),
    [
        ("text", 6, None, {"text": "abcdef"}, ("abcdef", ".xxxxx", 0)),  # just fits
        ("text", 5, None, {"text": "abcdef"}, ("abcde", ".xxxx", 1)),
        ("text", 2, None, {"text": "abcdef"}, ("ab", ".x", 4)),
        ("text", 9, 4, {"text": "abcdef"}, ("abcd", ".xxx", 2)),  # the model's context is shorter
        ("text", 4, 9, {"text": "abcdef"}, ("abcd", ".xxx", 2)),
        ("response", 6, None, {"prompt": "abc", "response": "yz"}, ("abc\nyz", "....xx", 0)),
        ("response", 4, None, {"prompt": "abc", "response": "yz"}, ("c\nyz", "..xx", 2)),
        ("text", 4, None, {"prompt": "abc", "response": "yz"}, ("c\nyz", ".xxx", 2)),
        ("auto", 9, None, {"prompt": "abc", "response": "yz"}, ("abc\nyz", "....xx", 0)),
        ("auto", 9, None, {"text": "abc"}, ("abc", ".xx", 0)),
    ],
)
def test_truncation_is_minimal_and_at_the_variants_end(rule, longest, context, parts, expected):
    assert letters(rule, longest, context, **parts) == expected


def test_first_token_is_no_content():
    rendered = Renderer(make_variant("v", "raw", "text", 9), Letters()).render(Sample("a", prompt="ab", response="yz"))
    assert rendered.is_content == [False, True, False, True, True]  # the template's newline is none


def test_uncuttable_sample_fails():
    with pytest.raises(UnusableSampleError, match="truncation to 3 tokens leaves nothing of its `prompt`"):
        letters("response", 3, prompt="abc", response="yz")
    with pytest.raises(UnusableSampleError, match="3 of its 6 tokens can't be cut, but the maximum length is 2"):
        letters("response", 2, prompt="abc", response="yz")
    with pytest.raises(InputError, match="does not map tokens to characters"):
        Renderer(make_variant("v", "raw", "auto", 8), SimpleNamespace(chat_template=None))


# --- samples ----------------------------------------------------------------------------------------------------------


def test_content_hash_distinguishes_parts():
    parts = [
        ("a", "b", None),
        ("a", None, "b"),
        ("ab", None, None),
        ("a", "", "b"),
        ("", None, None),
        (None, None, None),
    ]
    assert len({content_hash(*part) for part in parts}) == len(parts)
    assert content_hash("a", None) == "df14bf1df5b1b943b5f00292dc45b64cffa2e73f3b4355983de394be4497405e"
    assert content_hash("naïve Ä", None, "") == "42a0c910d329dfdab72066b202548a533ae2329ef4f6717c22bc53c1f72a73d0"
