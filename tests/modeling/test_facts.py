"""Teacher forcing against generation; sampled answers against the answers' probabilities and whole samples."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.known_facts import fact_rows, facts_in, knowing_checkpoint, load

from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.facts import can_become, decoded, fact_of, force, next_logits, normalised
from lark_store.modeling.greedy import end_ids, greedy_answer
from lark_store.modeling.rendering import Renderer, make_variant
from lark_store.modeling.sample import Sample
from lark_store.modeling.sampled_answers import AnswerSampler

N_FACTS = 200


@pytest.fixture(scope="module", params=["chatml", "raw"])
def known(request, tmp_path_factory):
    """A model that knows some facts, its tokenizer, the facts, and these under teacher forcing in several batches."""
    folder = knowing_checkpoint(tmp_path_factory.mktemp("knowing") / "model", steps=20, variant=request.param)
    model, tokenizer = load(folder)
    facts = facts_in(model, tokenizer, fact_rows(N_FACTS), request.param)
    cuts = [0, 1, 3, 40, 140, N_FACTS]
    forced = [f for start, end in pairwise(cuts) for f in force(model, facts[start:end])]
    return model, tokenizer, facts, forced


def test_teacher_forcing_finds_the_answers_that_generation_gives(known):
    model, tokenizer, facts, forced = known
    generated = [greedy_answer(model, tokenizer, fact.prompt, fact.n_tokens) == fact.answer for fact in facts]
    assert [f.is_correct for f in forced] == generated
    assert 20 < sum(generated) < N_FACTS - 20


def test_wrong_output_is_how_generation_begins(known):
    model, tokenizer, facts, forced = known
    for fact, result in zip(facts, forced, strict=True):
        assert (result.output is None) == result.is_correct
        if result.output is not None:
            begun = greedy_answer(model, tokenizer, fact.prompt, len(result.output))
            assert begun == [i for i in result.output if i not in end_ids(model, tokenizer)]


def test_log_probability_is_that_of_the_tokens_one_by_one(known):
    model, _, facts, forced = known
    for fact, result in list(zip(facts, forced, strict=True))[:20]:
        total = 0.0
        for n, token in enumerate(fact.answer):
            logp = next_logits(model, [[*fact.prompt, *fact.answer[:n]]])[0].double().log_softmax(dim=-1)
            total += float(logp[token])
        if fact.ends:
            logp = next_logits(model, [[*fact.prompt, *fact.answer]])[0].double().log_softmax(dim=-1)
            total += math.log(sum(math.exp(float(logp[end])) for end in fact.ends))
        assert result.logprob == pytest.approx(total, abs=1e-5)


def test_sampled_answers_agree_with_the_probability(known):
    """Each count is binomial: chi-square over the facts within five standard deviations of its mean."""
    model, tokenizer, facts, forced = known
    sampler = AnswerSampler(model, tokenizer, n=400, temperature=1.0, seed=0)
    statistic, n_facts = 0.0, 0
    for fact, result in zip(facts, forced, strict=True):
        p = math.exp(result.logprob)
        if 0.02 < p < 0.98:
            statistic += (sampler.n_correct(fact, result) - 400 * p) ** 2 / (400 * p * (1 - p))
            n_facts += 1
    assert n_facts > 30
    assert abs(statistic - n_facts) < 5 * math.sqrt(2 * n_facts)


def test_sampled_answers_agree_with_whole_samples(known):
    """Another way of sampling: whole answers by `generate`, compared as texts."""
    model, tokenizer, facts, forced = known
    sampler = AnswerSampler(model, tokenizer, n=300, temperature=1.5, seed=1)
    torch.manual_seed(0)
    for fact, result in list(zip(facts, forced, strict=True))[:4]:
        whole = model.generate(
            torch.tensor([fact.prompt]), do_sample=True, temperature=1.5, top_k=0, num_return_sequences=300,
            max_new_tokens=fact.n_tokens, eos_token_id=list(fact.ends) or None, pad_token_id=1,
        )  # fmt: skip
        texts = [[i for i in row[len(fact.prompt) :].tolist() if i not in fact.ends] for row in whole]
        ended = [not fact.ends or bool(set(row[len(fact.prompt) :].tolist()) & set(fact.ends)) for row in whole]
        answer = normalised(decoded(tokenizer, fact.answer))
        n = sum(normalised(decoded(tokenizer, t)) == answer and e for t, e in zip(texts, ended, strict=True))
        error = math.sqrt(300 * max(n / 300 * (1 - n / 300), 0.01))
        assert abs(sampler.n_correct(fact, result) - n) < 6 * error


def test_samples_of_a_fact_depend_on_its_seed_only(known):
    model, tokenizer, facts, forced = known
    counts = [
        [
            AnswerSampler(model, tokenizer, n=50, temperature=1.0, seed=seed).n_correct(facts[i], forced[i])
            for i in order
        ]
        for seed, order in ((0, range(12)), (0, reversed(range(12))), (1, range(12)))
    ]
    assert counts[0] == counts[1][::-1]
    assert counts[0] != counts[2]


def test_a_cold_sample_is_the_greedy_answer(known):
    model, tokenizer, facts, forced = known
    sampler = AnswerSampler(model, tokenizer, n=3, temperature=1e-4, seed=0)
    counts = [sampler.n_correct(fact, result) for fact, result in zip(facts[:30], forced[:30], strict=True)]
    assert counts == [3 * result.is_correct for result in forced[:30]]


@pytest.mark.parametrize(
    ("text", "answer", "possible"),
    [("New", "New York", True), ("New ", "New York", True), (" New\n York", "New York", True), ("", "x", True),
     ("new", "New York", False), ("New York City", "New York", False), ("caf", "cafe\u0301", True),
     ("cafe", "cafe\u0301", True), ("caf\ufffd", "cafe\u0301", True), ("caf\ufffdx", "cafe\u0301", False)],
)  # fmt: skip
def test_a_text_may_become_the_answer(text, answer, possible):
    assert can_become(text, answer) == possible


def test_equal_answers_are_equal_when_normalised():
    assert normalised("caf\u00e9\u00a0 noir\n") == normalised("cafe\u0301 noir")
    assert normalised("A") != normalised("a")


def test_what_is_no_fact_says_why(tmp_path):
    _, tokenizer = load(knowing_checkpoint(tmp_path / "model", steps=1))
    renderer = Renderer(make_variant("short", "chatml", "response", 24), tokenizer)
    samples = [Sample("a", text="a text"), Sample("b", "why?", "because " * 20)]
    reasons = [fact_of(renderer, sample, {1}) for sample in samples]
    assert all(isinstance(reason, UnusableSampleError) for reason in reasons)
    assert "it has no answer" in str(reasons[0])
    assert "its answer ends at token" in str(reasons[1])
    assert np.shape(fact_of(renderer, Sample("c", "why?", "yes"), {1}).answer) == (1,)
