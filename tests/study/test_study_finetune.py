"""Fine-tuning: the loss, the rates, the checkpoints; cut off anywhere and gone on, the weights are the same."""

from __future__ import annotations

import pytest
import torch
from helpers.checkpoints import save_checkpoint
from helpers.texts import qa_rows
from safetensors.torch import load_file

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, StoreError
from lark_store.modeling.forms.rows import make_sample
from lark_store.study import recipe as recipes
from lark_store.study.finetune import finetune

RATES = [3e-3, 1e-3, 1e-4]
RECIPE = """
device = "cpu"
[model]
path = "base"
[finetune]
learning_rates = [3e-3, 1e-3, 1e-4]
{more}
[[source]]
name = "finetune"
stage = "finetune"
uri = "qa.jsonl"
[[source]]
name = "test"
stage = "query"
uri = "qa.jsonl"
[[source]]
name = "songs"
stage = "pretrain"
uri = "songs.jsonl"
"""


class CutError(Exception):
    """Simulates a machine failure."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model") / "base")


def begin(folder, base, name="study", more=""):
    """Write a recipe and make its store."""
    if not (folder / "base").exists():
        (folder / "base").symlink_to(base)
    path = folder / f"{name}.toml"
    path.write_text(RECIPE.format(more=more), encoding="utf-8")
    recipe = recipes.read(path)
    Store.create(recipe.store).close()
    return recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """The recipe of an uninterrupted training."""
    recipe = begin(tmp_path_factory.mktemp("whole"), base)
    train(recipe, base)
    return recipe


def train(recipe, base, n=10, cut=None):
    def on_progress(progress):
        if progress.done == cut:
            raise CutError

    samples = [make_sample(row, {}) for row in qa_rows(n)]
    with Store.open(recipe.store) as store:
        finetune(store, recipe, base, samples, on_progress)


def weights(recipe, epoch):
    with Store.open(recipe.store) as store:
        path = store.sql("select path from checkpoints where name = ?", [f"epoch-{epoch}"]).item()
    return {
        name: value.clone() for name, value in load_file(f"{path}/model.safetensors").items()
    }  # not a view of the file


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_each_epoch_is_a_checkpoint_with_its_step_rate_and_loss(whole):
    with Store.open(whole.store) as store:
        frame = store.show().checkpoints.sort("epoch")
        losses = store.sql("select value from checkpoint_metrics where name = 'train_loss' order by checkpoint")
    assert frame["name"].to_list() == ["epoch-1", "epoch-2", "epoch-3"]
    assert frame["epoch"].to_list() == [1, 2, 3]
    assert frame["step"].to_list() == [3, 6, 9]
    assert frame["learning_rate"].to_list() == pytest.approx(RATES)
    assert losses["value"].is_sorted(descending=True)
    left = {path.name for path in whole.root.glob("checkpoints/*/*")}
    assert "model.safetensors" in left
    assert not left & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_weights_equal_a_plain_training_loop(tmp_path, base):
    """One batch per epoch, so that no order matters: AdamW on the mean over samples of the answer's mean loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lark_store.modeling.rendering import Renderer, make_variant

    recipe = begin(tmp_path, base, "plain", "batch_size = 4\nweight_decay = 0.1\nmax_grad_norm = 0.5")
    train(recipe, base, n=4)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    renderer = Renderer(make_variant("chatml", "chatml", "auto", 1024), AutoTokenizer.from_pretrained(base))
    samples = [renderer.render(make_sample(row, {})) for row in qa_rows(4)]
    decayed = [p for name, p in model.named_parameters() if p.dim() > 1]
    others = [p for name, p in model.named_parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    for rate in RATES:
        losses = []
        for sample in samples:
            ids = torch.tensor([sample.input_ids])
            targets = [t for t, is_target in enumerate(sample.is_target) if is_target]
            ln_p = model(ids).logits[0].log_softmax(-1)
            losses.append(-torch.stack([ln_p[t - 1, ids[0, t]] for t in targets]).mean())
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    trained = weights(recipe, 3)
    start = load_file(base / "model.safetensors")
    for name, expected in model.state_dict().items():
        if name in trained:
            moved = (expected - start[name]).abs().max()
            assert (trained[name] - expected).abs().max() < 0.02 * moved, name


@pytest.mark.parametrize(
    "cut", [2, 3, 5, 9], ids=["before any checkpoint", "at the first", "in epoch 2", "at the last"]
)
def test_interrupted_training_resumes_with_equal_weights(tmp_path, base, whole, cut):
    broken = begin(tmp_path, base)
    with pytest.raises(CutError):
        train(broken, base, cut=cut)
    train(broken, base)
    assert all(same(weights(whole, epoch), weights(broken, epoch)) for epoch in (1, 2, 3))


@pytest.mark.parametrize(
    ("fault", "ends_in"), [(KeyboardInterrupt(), KeyboardInterrupt), (StoreError("the disk is full"), CheckpointError)]
)
def test_checkpoint_missing_from_the_store_is_retrained(tmp_path, base, whole, monkeypatch, caplog, fault, ends_in):
    torn = begin(tmp_path, base)
    add = Store.checkpoint_add

    def cut_off(store, name, *args, **options):
        if name == "epoch-2":
            raise fault
        return add(store, name, *args, **options)

    monkeypatch.setattr(Store, "checkpoint_add", cut_off)
    with pytest.raises(ends_in):
        train(torn, base)
    assert ("the disk is full" in caplog.text) == (ends_in is CheckpointError)
    monkeypatch.undo()
    (torn.root / "checkpoints" / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    train(torn, base)
    assert all(same(weights(whole, epoch), weights(torn, epoch)) for epoch in (1, 2, 3))


def test_moved_training_resumes_at_its_new_path(tmp_path, base, whole):
    (tmp_path / "old").mkdir()
    recipe = begin(tmp_path / "old", base)
    with pytest.raises(CutError):
        train(recipe, base, cut=5)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = recipes.read(tmp_path / "new" / "study.toml")
    train(moved, base)
    assert all(same(weights(whole, epoch), weights(moved, epoch)) for epoch in (1, 2, 3))
    with Store.open(moved.store) as store:
        paths = store.sql("select path from checkpoints where name like 'epoch-%'")["path"]
    assert paths.str.starts_with(str((tmp_path / "new").resolve())).all()
    assert not list(moved.root.glob("checkpoints/*/optimizer.pt"))


def test_training_without_its_state_can_not_resume(tmp_path, base):
    recipe = begin(tmp_path, base)
    with pytest.raises(CutError):
        train(recipe, base, cut=4)
    (recipe.root / "checkpoints" / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match="its optimizer state is gone"):
        train(recipe, base)


def test_seeds_change_the_order(tmp_path, base, whole):
    other = begin(tmp_path, base).model_copy(update={"seed": 1})
    train(other, base)
    assert not same(weights(whole, 1), weights(other, 1))


def test_gradient_accumulation_equals_the_full_batch(tmp_path, base, whole):
    parts = begin(tmp_path, base, more="micro_batch_size = 2")
    train(parts, base)
    for name, value in weights(whole, 1).items():
        assert torch.allclose(value, weights(parts, 1)[name], atol=2e-3), name


def test_untrainable_sample_is_named(tmp_path, base):
    recipe = begin(tmp_path, base)
    samples = [make_sample({"id": "x", "prompt": "p", "response": "yes " * 400}, {})]
    with Store.open(recipe.store) as store, pytest.raises(InputError, match=r"1 samples of `finetune`.*`x`: "):
        finetune(store, recipe, base, samples, lambda _: None)


def test_unknown_optimizer(tmp_path, base):
    recipe = begin(tmp_path, base, more='optimizer = "adamw_tortch"')
    with pytest.raises(InputError, match="transformers refuses"):
        train(recipe, base)
