"""Multimodal models with a text model inside: text alone, against plain autograd one sample at a time."""

from __future__ import annotations

import pytest
import torch
from helpers.gradients import CPU, assert_gradients_close, exact_gradient, random_tokens, whole_gradients
from helpers.gradients import WholeGradients as Keeper
from helpers.multimodal import MODELS, build_multimodal
from transformers import AutoConfig

from lark_store.gradients.paths.batched import BatchPath, make_path
from lark_store.gradients.paths.hooks import HookPath, choose_parameters
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.modeling.loading import context_length, load_model, meta_model, unweighted_model

ONE_BY_ONE = {"Qwen-3.5", "Llama-4"}  # their text models have layers without a rule
SAMPLES = [random_tokens(i, n=n, rule="text", vocab=290) for i, n in enumerate((9, 17, 3))]


def opened(model):
    chosen = choose_parameters(model, None, None)
    keeper = Keeper(Oporp(256, 0), place([(name, tuple(p.shape)) for name, p in chosen], 256), CPU)
    return chosen, keeper


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A saved model with its name and folder."""
    model, folder = build_multimodal(request.param), tmp_path_factory.mktemp("multimodal")
    model.save_pretrained(folder)
    return request.param, model, folder


def test_saved_model_is_loaded_with_its_text_model(saved):
    _, model, folder = saved
    loaded = load_model(folder, CPU, "auto")
    ids = torch.tensor([SAMPLES[0].input_ids])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    shapes = [(name, p.shape) for name, p in loaded.named_parameters()]
    assert [(name, p.shape) for name, p in meta_model(folder).named_parameters()] == shapes
    assert [(name, p.shape) for name, p in unweighted_model(folder, torch.float32, CPU).named_parameters()] == shapes
    assert context_length(loaded) == 256
    assert AutoConfig.from_pretrained(folder).model_type == model.config.model_type


def test_gradients_equal_autograd_per_sample(saved):
    name, _, folder = saved
    model = load_model(folder, CPU, "float32")
    expected = []
    for tokens in SAMPLES:
        gradient = exact_gradient(model, tokens)
        unused = {n: torch.zeros_like(p) for n, p in model.named_parameters() if gradient[n] is None}
        expected.append(gradient | unused)
    chosen, keeper = opened(model)
    path, reason = make_path(model, chosen, keeper)
    assert name in ONE_BY_ONE or isinstance(path, BatchPath), reason
    assert_gradients_close(whole_gradients(path, keeper, SAMPLES), expected)


def test_used_layer_outside_the_text_model_decides(monkeypatch):
    model = build_multimodal("Gemma-3")
    tower, forward = model.model.vision_tower, model.lm_head.forward

    def through_the_tower(hidden):
        return forward(hidden) + tower(torch.zeros(1, 3, 28, 28)).pooler_output.sum()

    monkeypatch.setattr(model.lm_head, "forward", through_the_tower)
    chosen, keeper = opened(model)
    path, reason = make_path(model, chosen, keeper)
    assert isinstance(path, HookPath)
    assert "vision_tower" in reason
