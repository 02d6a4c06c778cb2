"""Second moments of a saved optimizer, for a model of two parameters."""

from __future__ import annotations

import pytest
import torch

from lark_store.errors import CheckpointError, InputError
from lark_store.gradients.corrections.optimizer_state import moments_of, read_optimizer


@pytest.fixture
def model():
    return torch.nn.Linear(3, 2)


def state_of(names=("weight", "bias"), *, step=4.0, beta=0.5, in_group=False):
    """The state of Adam after some steps; the weight's number is 7, the bias's is 3."""
    values = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, 5.0])}
    state = {n: {"exp_avg_sq": values[name]} for n, name in zip((7, 3), names, strict=True)}
    group = {"params": [7, 3], "betas": (0.9, beta), "param_names": list(names)}
    if in_group:
        group["step"] = step
    else:
        state = {n: held | {"step": torch.tensor(step)} for n, held in state.items()}
    return {"state": state, "param_groups": [group]}


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize(("step", "beta", "divisor"), [(4, 0.5, 1 - 0.5**4), (1, 0.5, 0.5), (1, 0.0, 1.0)])
def test_moments_are_corrected_for_the_start(model, step, beta, divisor, in_group):
    moments = moments_of(state_of(step=step, beta=beta, in_group=in_group), model)
    assert moments["weight"].rows.tolist() == pytest.approx([1 / divisor, 4 / divisor])  # means of rows and columns
    assert moments["weight"].columns.tolist() == pytest.approx([1.5 / divisor, 2.5 / divisor, 3.5 / divisor])
    assert moments["bias"].rows.tolist() == pytest.approx([1 / divisor, 5 / divisor])
    assert moments["bias"].columns is None


def test_parameters_without_names_are_in_the_models_order(model):
    state = state_of()
    del state["param_groups"][0]["param_names"]
    assert moments_of(state, model)["bias"].rows.tolist() == pytest.approx([1 / (1 - 0.5**4), 5 / (1 - 0.5**4)])


def test_names_must_be_those_of_the_model(model):
    with pytest.raises(CheckpointError) as caught:
        moments_of(state_of(("weight", "weight")), model)
    assert caught.value.fact == ("the optimizer has 2 parameters, and the checkpoint trains 2; they differ in `bias`")
    state = state_of()
    state["state"][9] = state["state"][3]
    state["param_groups"][0] |= {"params": [7, 3, 9], "param_names": ["weight", "bias", "bias"]}
    with pytest.raises(CheckpointError) as caught:  # a name twice
        moments_of(state, model)
    assert caught.value.fact.endswith("has 3 parameters, and the checkpoint trains 2; they differ in `weight`")


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"step": torch.tensor(0.0)}, "no second moments of `weight`"),
        ({"step": torch.tensor(-1.0)}, "no second moments of `weight`"),
        ({"exp_avg_sq": None}, "no second moments of `weight`"),
        ({"exp_avg_sq": torch.ones(3, 2)}, r"for `weight` has the shape \(3, 2\), not \(2, 3\)"),
        ({"exp_avg_sq": torch.tensor([[1.0, 1, 1], [1, 1, -1]])}, "a number is below 0"),
    ],
)
def test_wrong_states_are_refused(model, change, fact):
    state = state_of()
    state["state"][7] |= change
    with pytest.raises(CheckpointError, match=fact):
        moments_of(state, model)


@pytest.mark.parametrize("beta", [1.0, -0.1])
def test_beta_is_from_0_to_below_1(model, beta):
    with pytest.raises(CheckpointError, match="not of Adam"):
        moments_of(state_of(beta=beta), model)


def test_file_is_found_in_its_folder(tmp_path):
    torch.save(state_of(), tmp_path / "optimizer.pt")
    state, sha256 = read_optimizer(tmp_path)
    assert read_optimizer(tmp_path / "optimizer.pt")[1] == sha256
    assert state["param_groups"] == state_of()["param_groups"]
    for broken in ({}, {"state": {}}, {"state": [], "param_groups": [1]}, {"state": {}, "param_groups": []}, [1]):
        torch.save(broken, tmp_path / "broken.pt")
        with pytest.raises(InputError, match="holds no optimizer state"):
            read_optimizer(tmp_path / "broken.pt")
