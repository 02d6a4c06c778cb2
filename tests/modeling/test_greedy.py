"""Greedy answers against `generate` and against a plain loop without a cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import save_checkpoint, save_tokenizer
from helpers.models import CONFIGS, build_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.greedy import _end_of_turn, end_ids, greedy_answer

PROMPTS = ("<|im_start|>user\nIs the kidney affected?<|im_end|>\n<|im_start|>assistant\n", "the night", "no maybe no")


@pytest.fixture
def llama(checkpoints):
    folder = checkpoints["base"]
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def plain_greedy(model, ids, n):
    """Take the most likely token n times, each from a whole forward pass."""
    whole = list(ids)
    with torch.no_grad():
        for _ in range(n):
            whole.append(int(model(torch.tensor([whole]), use_cache=False).logits[0, -1].argmax()))
    return whole[len(ids) :]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_answer_is_that_of_generate(llama, prompt):
    model, tokenizer = llama
    ids = encode(tokenizer, prompt)
    inputs = torch.tensor([ids])
    whole = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    answer = greedy_answer(model, tokenizer, ids, 24)
    assert answer == [i for i in whole[0, len(ids) :].tolist() if i != tokenizer.eos_token_id]
    assert answer == plain_greedy(model, ids, len(answer))


@pytest.mark.parametrize("name", CONFIGS)
def test_answer_of_every_architecture_is_the_most_likely_tokens(llama, name):
    model, (_, tokenizer) = build_model(name), llama
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer.eos_token, tokenizer.chat_template = "<|im_start|>", None
    ids = list(range(10, 22))
    answer = greedy_answer(model, tokenizer, ids, 8)
    expected = plain_greedy(model, ids, 8)
    ends = [n for n, i in enumerate(expected) if i in end_ids(model, tokenizer)]
    assert answer == expected[: ends[0] if ends else 8]
    assert answer


def test_options_of_the_checkpoint_do_not_apply(llama, capfd, recwarn):
    model, tokenizer = llama
    ids = encode(tokenizer, PROMPTS[1])
    expected = greedy_answer(model, tokenizer, ids, 12)
    own = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        num_beams=3,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        min_new_tokens=12,
        suppress_tokens=[expected[0]],
    )
    model.generation_config = own
    assert greedy_answer(model, tokenizer, ids, 12) == expected
    assert model.generation_config is own
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_answer_ends_before_any_end_token(llama):
    model, tokenizer = llama
    ids = encode(tokenizer, PROMPTS[1])
    expected = plain_greedy(model, ids, 12)
    position = next(n for n in range(2, 12) if expected[n] not in expected[:n])
    assert expected[position] != tokenizer.eos_token_id
    model.generation_config.eos_token_id = [350, expected[position]]
    assert greedy_answer(model, tokenizer, ids, 12) == expected[:position]


def test_answer_has_at_most_max_tokens(llama):
    model, tokenizer = llama
    ids = encode(tokenizer, PROMPTS[1])
    assert greedy_answer(model, tokenizer, ids, 3) == plain_greedy(model, ids, 3)


def test_answer_stays_within_the_context(tmp_path, llama):
    folder = save_checkpoint(tmp_path / "short", max_position_embeddings=16)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), llama[1]
    model.generation_config.eos_token_id = None
    assert len(greedy_answer(model, tokenizer, range(20, 33), 9)) == 3
    with pytest.raises(UnusableSampleError, match="16 tokens fill the model's context"):
        greedy_answer(model, tokenizer, range(20, 36), 9)
    with pytest.raises(UnusableSampleError, match="no tokens"):
        greedy_answer(model, tokenizer, [], 9)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, "<|im_end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot|>{% endfor %}", "<|eot|>"),
        ("{{ raise_exception('no') }}", None),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
    ],
)
def test_end_of_turn_is_the_templates(tmp_path, llama, template, end):
    save_tokenizer(tmp_path, chat_template=template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"eos_token": "<|end of text|>", "additional_special_tokens": ["<|eot|>"]})
    model = llama[0]
    model.generation_config.eos_token_id, model.config.eos_token_id = None, -1
    expected = {"<|end of text|>"} | ({end} if end else set())
    assert set(tokenizer.convert_ids_to_tokens(sorted(end_ids(model, tokenizer)))) == expected


@pytest.mark.parametrize(("number", "end"), [(5, 5), (6, None), (3, None), (None, None)])
def test_chatmls_end_counts_if_it_is_a_special_token(number, end):
    tokenizer = SimpleNamespace(
        chat_template=None,
        convert_tokens_to_ids=lambda _: number,
        all_special_ids=[3, 5],
        added_tokens_decoder={},
        unk_token_id=3,
    )
    assert _end_of_turn(tokenizer) == end
