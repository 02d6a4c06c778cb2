"""The paper's figures against a plain script: whole gradients by autograd, Φ, ratio of means, format effect.

The script shares nothing with the code under test: own prompts, own labels, no sketch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION, LABELS = "Is this statement true?", ["yes", "no", "maybe"]
SKETCH_ERROR = 0.005  # of a cosine at k = 2^20: 1 / √k is 0.001


class Script:
    """The paper's protocol on one checkpoint, text by text."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def gradient(self, ids, first, labels=None):
        """Return the gradient of the mean loss on the tokens from `first` on, or on other labels for them."""
        self.model.zero_grad()
        logits = self.model(torch.tensor([ids])).logits[0]
        predicted = logits[first - 1 : -1]
        targets = torch.tensor(ids[first:]) if labels is None else labels(predicted)
        cross_entropy(predicted, targets).backward()
        whole = torch.cat([p.grad.flatten() for p in self.model.parameters()]).numpy()
        return whole / np.linalg.norm(whole)

    def answered(self, prompt, answer):
        before = self.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
        return self.gradient(before + self.encode(answer), len(before))

    def raw(self, text):
        return self.gradient(self.encode(text), 1, lambda logits: logits.detach().argmax(-1))

    def formatted(self, text):
        prompt = f"Context: {text}\n\nQuestion: {QUESTION}"
        before = self.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")

        def log_p(answer):
            ids = self.encode(answer)
            with torch.no_grad():
                out = self.model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            return float(out.gather(1, torch.tensor(ids)[:, None]).sum())

        return self.answered(prompt, max(LABELS, key=log_p))


@pytest.fixture
def measured(store):
    """Return a scored store with texts close to the queries: a ratio of means near zero would be all noise."""
    rows = store.sql("select sample_id as id, prompt || ' ' || response as text from samples where source = 'finetune'")
    store.source_add("articles", rows, stage="pretrain")
    store.variant_add("formatted", targets="predicted-answer", question=QUESTION, labels=LABELS)
    store.sketcher_add("wide", k=1 << 20, dtype="float32")
    store.ingest(["base"], ["finetune", "test"], ["chatml"], sketcher="wide")
    store.ingest(["base"], ["articles"], ["raw", "formatted"], sketcher="wide")
    store.attribute(["base"], queries="test", sketcher="wide")
    return store


def phi(script, store):
    """Return Φ of each group by query, (Q,) each."""
    rows = store.sql("select source, prompt, response, text from samples order by sample_id").rows(named=True)
    of = {name: [row for row in rows if row["source"] == name] for name in ("finetune", "test", "articles")}
    queries = np.stack([script.answered(row["prompt"], row["response"]) for row in of["test"]])
    groups = {
        ("finetune", "chatml"): [script.answered(row["prompt"], row["response"]) for row in of["finetune"]],
        ("articles", "raw"): [script.raw(row["text"]) for row in of["articles"]],
        ("articles", "formatted"): [script.formatted(row["text"]) for row in of["articles"]],
    }
    return {name: (queries @ np.stack(gradients).T).max(axis=1) for name, gradients in groups.items()}


def test_figures_are_those_of_a_plain_script(measured, checkpoints):
    expected = phi(Script(checkpoints["base"]), measured)
    stored = measured.sql("select source, variant, query_id, max from source_influence order by query_id")
    for (source, variant), phi_Q in expected.items():
        actual = stored.filter(source=source, variant=variant)["max"].to_numpy()
        np.testing.assert_allclose(actual, phi_Q, atol=SKETCH_ERROR)
    means = {name: float(phi_Q.mean()) for name, phi_Q in expected.items()}
    metrics = measured.metrics(sketcher="wide")
    for (source, variant), mean in means.items():
        value = metrics.filter(metric="mean_max_influence", source=source, variant=variant)["value"].item()
        assert value == pytest.approx(mean, abs=SKETCH_ERROR)
    dominance = measured.metrics(view="dominance", sketcher="wide").filter(against_variant="formatted")
    ratio = means["finetune", "chatml"] / means["articles", "formatted"]
    assert dominance["ratio"].item() == pytest.approx(ratio, rel=0.05)
    is_defined = expected["articles", "formatted"] > 0
    single = (expected["finetune", "chatml"] / expected["articles", "formatted"])[is_defined]
    assert dominance["n_ratio"].item() == is_defined.sum() > 0
    assert dominance["r_median"].item() == pytest.approx(np.median(single), rel=0.1)
    effect = metrics.filter(metric="format_effect", source="articles", variant="formatted")["value"].item()
    assert effect == pytest.approx(means["articles", "formatted"] / means["articles", "raw"], rel=0.1)
