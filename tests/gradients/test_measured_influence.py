"""Measured influence against plain torch scripts; a module is restored bit for bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.gradients import random_tokens
from helpers.models import build_model, random_llama
from torch.nn import functional

from lark_store import measure_influence
from lark_store.errors import InputError
from lark_store.evaluate.optimizer_step import Stepper
from lark_store.modeling.losses import Batch, losses, sample_losses

STATEMENTS = [random_tokens(seed, rule="text") for seed in range(5)]


def statement_loss(model, samples):
    return sample_losses(model, Batch(samples, model.device))


def plain_loss(model, tokens):
    """The mean cross-entropy of a statement's targets, by transformers' own logits."""
    ids = torch.tensor([tokens.input_ids])
    log_p = functional.log_softmax(model(input_ids=ids).logits[0, :-1].double(), dim=-1)
    targets = torch.tensor(tokens.is_target[1:])
    return -log_p[torch.arange(len(targets)), ids[0, 1:]][targets].mean()


def double_losses(model, samples):
    """As `statement_loss`, which rounds to float32."""
    return torch.stack([plain_loss(model, tokens) for tokens in samples])


def plain_matrix(model, optimizer, steps=1, **settings):
    """The same experiment with a fresh copy of the model for each statement."""
    rows = []
    for trained in STATEMENTS:
        tuned = copy.deepcopy(model)
        steps_left, stepper = steps, optimizer(tuned.parameters(), **settings)
        while steps_left:
            stepper.zero_grad()
            plain_loss(tuned, trained).backward()
            stepper.step()
            steps_left -= 1
        with torch.no_grad():
            rows.append([float(plain_loss(model, x) - plain_loss(tuned, x)) for x in STATEMENTS])
    return np.array(rows)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("name", "optimizer", "rate"), [("sgd", torch.optim.SGD, 1e-2), ("adamw", torch.optim.AdamW, 1e-4)]
)
def test_five_statements_equal_a_plain_script(name, optimizer, rate, steps):
    model = random_llama()
    settings = {"lr": rate} | ({"weight_decay": 0.0} if name == "adamw" else {})
    expected = plain_matrix(model, optimizer, steps, **settings)
    found = measure_influence(
        model, STATEMENTS, STATEMENTS, statement_loss, optimizer=name, learning_rate=rate, steps=steps, batch_size=2
    )
    assert found.shape == (5, 5)
    assert np.abs(expected).min() > 1e-5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_small_step_is_the_dot_product_of_the_gradients():
    model = build_model("GPT-2").double()  # Llama's norms round to float32, which a small step would not survive
    gradients = []
    for tokens in STATEMENTS:
        (loss,) = double_losses(model, [tokens])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    products = (torch.stack(gradients) @ torch.stack(gradients).T).numpy()
    influence = measure_influence(model, STATEMENTS, STATEMENTS, double_losses, learning_rate=1e-6)
    np.testing.assert_allclose(influence / 1e-6, products, rtol=0.01)


def test_one_step_equals_that_of_the_evaluation_causal():
    model = random_llama()
    influence = measure_influence(model, STATEMENTS, STATEMENTS, statement_loss, learning_rate=1e-2)
    before, stepper = losses(model, STATEMENTS), Stepper(model, 1e-2)
    effects = [stepper.effect([tokens], STATEMENTS, before).numpy() for tokens in STATEMENTS]
    np.testing.assert_allclose(influence, effects, rtol=0, atol=1e-6)


class Classifier(torch.nn.Module):
    """With frozen parameters, a batch norm, dropout, and a buffer that counts calls."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)
        )
        self.layers[0].bias.requires_grad_(False)
        self.register_buffer("n_calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.n_calls += 1
        return self.layers(x)


def images(n=6):
    rng = np.random.default_rng(0)
    return [(rng.normal(size=4), int(rng.integers(3))) for _ in range(n)]


def image_loss(module, pairs):
    x = torch.tensor(np.array([image for image, _ in pairs]), dtype=torch.float32)
    return functional.cross_entropy(module(x), torch.tensor([label for _, label in pairs]), reduction="none")


def classifier():
    torch.manual_seed(0)
    module = Classifier().train()
    module.layers[1].eval()
    image_loss(module, images()).sum().backward()
    return module


def state(module):
    tensors = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]
    modes = [layer.training for layer in module.modules()]
    return [t.detach().clone() for t in tensors], modes, [p.requires_grad for p in module.parameters()]


def assert_same(one, other):
    assert one[1:] == other[1:]
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_module_is_as_before(optimizer):
    module = classifier()
    before, norm = state(module), module.layers[1].running_mean.clone()
    influence = measure_influence(module, images(), images(), image_loss, optimizer=optimizer, learning_rate=0.1)
    assert np.abs(influence).min() > 0
    assert_same(state(module), before)
    assert torch.equal(module.layers[1].running_mean, norm)
    again = measure_influence(module, images(), images(), image_loss, optimizer=optimizer, learning_rate=0.1)
    assert (again == influence).all()


def test_the_module_is_as_before_after_an_error():
    module, calls = classifier(), []
    before = state(module)

    def failing(module, pairs):
        calls.append(len(pairs))
        if len(calls) == 3:  # the queries, after training
            raise ZeroDivisionError
        return image_loss(module, pairs)

    with pytest.raises(ZeroDivisionError):
        measure_influence(module, images(), images(), failing, learning_rate=0.1)
    assert calls == [6, 1, 6]
    assert_same(state(module), before)


def test_frozen_parameters_are_not_trained():
    module = classifier()
    whole = measure_influence(module, images(), images(), image_loss, learning_rate=0.1)
    module.layers[0].weight.requires_grad_(False)
    part = measure_influence(module, images(), images(), image_loss, learning_rate=0.1)
    assert np.abs(whole - part).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"learning_rate": 0.1, "optimizer": "lion"}, "unknown optimizer `lion`"),
        ({"learning_rate": 0.0}, "the learning rate 0.0 is not a positive number"),
        ({"learning_rate": float("nan")}, "the learning rate nan is not a positive number"),
        ({"learning_rate": 0.1, "steps": 0}, "the number of steps must be at least 1, not 0"),
        ({"learning_rate": 1e38}, "a query's loss is not finite after training on sample 0"),
    ],
)
def test_impossible_settings_are_refused(settings, fact):
    with pytest.raises(InputError) as caught:
        measure_influence(classifier(), images(), images(), image_loss, **settings)
    assert caught.value.fact == fact


def test_a_module_without_parameters_to_train_is_refused():
    with pytest.raises(InputError, match="the module has no parameter to train"):
        measure_influence(classifier().requires_grad_(False), images(), images(), image_loss, learning_rate=0.1)


def test_no_queries_or_samples_give_an_empty_matrix():
    assert measure_influence(classifier(), images(2), [], image_loss, learning_rate=0.1).shape == (2, 0)
    assert measure_influence(classifier(), [], images(2), image_loss, learning_rate=0.1).shape == (0, 2)
