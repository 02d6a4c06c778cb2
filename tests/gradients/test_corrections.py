"""Corrected gradients and masked templates, against dense computations in float64 and by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from helpers.checkpoints import save_tokenizer
from helpers.gradients import (
    CPU,
    WholeGradients,
    assert_gradients_close,
    exact_gradient,
    exact_gradient64,
    masked_gradient_by_hand,
    mean_squared_gradient,
    ragged_batch,
    random_tokens,
    sketch_cosines,
    whole_gradients,
)
from helpers.models import LLAMA_LIKE, MIXTURES, build_model

from lark_store.gradients.corrections import CORRECTIONS, Corrector
from lark_store.gradients.corrections.second_moments import Moments, MomentSums
from lark_store.gradients.corrections.tensor import NormCorrector
from lark_store.gradients.paths.batched import BatchPath, UnknownLayerError, make_path
from lark_store.gradients.paths.hooks import HookPath, Sketch, choose_parameters, recompute_activations
from lark_store.gradients.paths.masked import MaskedHookPath
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.rendering import Renderer, make_variant
from lark_store.modeling.sample import Sample
from lark_store.modeling.tokens import Tokens

MODELS = ["Llama, tied", "Llama, untied", "GPT-2", "GPT-NeoX", "Qwen-3"]
POWER = {"adam": 0.25, "adam2": 0.5}


def mixtral():
    torch.manual_seed(0)
    config = hf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
    return hf.AutoModelForCausalLM.from_config(config).eval()


def fitted(model, samples):
    """Return the second moments of a fit."""
    chosen = choose_parameters(model, None, None)
    sums = MomentSums(chosen, CPU)
    path = HookPath(model, chosen, sums)
    for tokens in samples:
        assert isinstance(path.sketch([tokens])[0], Sketch)
        sums.commit(keep=True)
    path.close()
    return sums.means()


def dense_scale(v, power, damping):
    """Return Adafactor's approximation of V, damped, to the power: a full matrix, by the definition."""
    if v.dim() < 2:
        return (v + damping * v.mean()) ** -power
    rows, columns = v.mean(dim=-1, keepdim=True), v.mean(dim=-2, keepdim=True)
    mean = v.mean(dim=(-2, -1), keepdim=True)
    rows, columns = rows + damping * mean, columns + damping * mean
    return (rows * columns / rows.mean(dim=-2, keepdim=True)) ** -power


def path_of(kind, model, corrector, *, masked=False):
    """Return a path with unsketched gradients, and its sketcher."""
    chosen = choose_parameters(model, None, None)
    placements = place([(name, tuple(p.shape)) for name, p in chosen], 256)
    keeper = WholeGradients(Oporp(256, 0), placements, CPU, corrector)
    if kind == "batched":
        return BatchPath(model, chosen, keeper, masked=masked), keeper
    return (MaskedHookPath if masked else HookPath)(model, chosen, keeper), keeper


@pytest.mark.parametrize("name", MODELS)
def test_fitted_moments_equal_dense_means(name):
    model, samples = build_model(name), ragged_batch("text")
    v = mean_squared_gradient(model, samples)
    corrector = fitted(model, samples)
    assert corrector.keys() == v.keys()
    for parameter, squares in v.items():
        rows = squares if squares.dim() < 2 else squares.mean(dim=1)
        near = {"rtol": 1e-4, "atol": 1e-6 * float(rows.max()), "msg": parameter}
        torch.testing.assert_close(corrector[parameter].rows, rows, **near)
        if squares.dim() == 2:
            torch.testing.assert_close(corrector[parameter].columns, squares.mean(dim=0), **near)
        assert corrector[parameter].fits(tuple(squares.shape))
        assert not corrector[parameter].fits((*squares.shape, 2))


@pytest.mark.parametrize("kind", ["batched", "hooks"])
@pytest.mark.parametrize("correction", POWER)
@pytest.mark.parametrize("name", MODELS)
def test_corrected_gradient_equals_the_scaled_exact_one(name, correction, kind):
    model, samples = build_model(name), ragged_batch("text")
    v = mean_squared_gradient(model, samples[:2])
    gradients = [exact_gradient64(model, tokens) for tokens in samples]
    scales = {parameter: dense_scale(squares, POWER[correction], 0.1) for parameter, squares in v.items()}
    expected = [{parameter: g * scales[parameter] for parameter, g in gradient.items()} for gradient in gradients]
    corrector = CORRECTIONS[correction].corrector(fitted(model, samples[:2]), 0.1, 0.0, CPU)
    assert_gradients_close(whole_gradients(*path_of(kind, model, corrector), samples), expected)


@pytest.mark.parametrize("kind", ["batched", "hooks"])
def test_experts_are_corrected_separately(kind):
    model, samples = mixtral(), [random_tokens(i, n=24) for i in range(3)]
    v = mean_squared_gradient(model, samples)
    assert max(squares.dim() for squares in v.values()) == 3
    gradients = [exact_gradient64(model, tokens) for tokens in samples]
    expected = [{n: g * dense_scale(v[n], 0.25, 0.1) for n, g in gradient.items()} for gradient in gradients]
    corrector = CORRECTIONS["adam"].corrector(fitted(model, samples), 0.1, 0.0, CPU)
    assert_gradients_close(whole_gradients(*path_of(kind, model, corrector), samples), expected)


@pytest.mark.parametrize("correction", ["adam", "adam2"])
def test_without_any_gradient_nothing_is_scaled(correction):
    moments = {"a": Moments.of(torch.zeros(4, 6)), "b": Moments.of(torch.zeros(5))}
    corrector = CORRECTIONS[correction].corrector(moments, 0.1, 0.0, CPU)
    for name, shape in (("a", (4, 6)), ("b", (5,))):
        torch.testing.assert_close(corrector.whole(name, torch.full(shape, 3.0)), torch.full(shape, 3.0))


def test_matrix_without_gradient_is_scaled_by_the_mean():
    moments = {"a": Moments.of(torch.full((4, 6), 16.0)), "b": Moments.of(torch.zeros(3, 5))}
    corrector = CORRECTIONS["adam"].corrector(moments, 0.1, 0.0, CPU)
    for name, shape in (("a", (4, 6)), ("b", (3, 5))):
        scaled = corrector.whole(name, torch.ones(shape))
        assert torch.isfinite(scaled).all()
        assert scaled.unique().numel() == 1
    assert float(corrector.whole("a", torch.ones(4, 6))[0, 0]) == pytest.approx((16 * 1.1) ** -0.25, rel=1e-5)
    floor = 16 * 4 / 7
    assert float(corrector.whole("b", torch.ones(3, 5))[0, 0]) == pytest.approx(floor**-0.25, rel=1e-5)


def test_without_a_correction_nothing_is_computed():
    gradient = torch.randn(3, 4)
    plain = Corrector()
    assert plain.whole("w", gradient) is gradient
    assert plain.left("w", gradient) is gradient
    assert plain.right("w", gradient) is gradient
    assert plain.vector("w", gradient) is gradient
    assert plain.rows("w", torch.tensor([0, 1, 1]), gradient) is gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_large_scale_does_not_overflow(dtype):
    moments = {"w": Moments.of(torch.full((2, 3), 1e-14))}
    corrector = CORRECTIONS["adam2"].corrector(moments, 0.1, 0.0, CPU)
    factor = torch.full((5, 3), 1e-3, dtype=dtype)
    assert torch.isfinite(corrector.right("w", factor)).all()
    assert torch.isfinite(corrector.whole("w", torch.full((2, 3), 1e-3, dtype=dtype))).all()


# --- tensor --------------------------------------------------------------------------------------------------------


def test_each_tensor_is_scaled_to_norm_1_by_the_hooks():
    model, samples = build_model("Llama, tied"), ragged_batch("text")
    gradients = [exact_gradient64(model, tokens) for tokens in samples]
    expected = [{name: g / g.norm() for name, g in gradient.items()} for gradient in gradients]
    assert_gradients_close(whole_gradients(*path_of("hooks", model, NormCorrector()), samples), expected)
    chosen = choose_parameters(model, None, None)
    placements = place([(name, tuple(p.shape)) for name, p in chosen], 1024)
    path, reason = make_path(model, chosen, GradientSketcher(Oporp(1024, 0), placements, CPU, NormCorrector()))
    assert isinstance(path, HookPath)
    assert "needs the whole gradient" in reason
    with pytest.raises(UnknownLayerError, match="needs the whole gradient"):
        BatchPath(model, chosen, path.sketcher)


# --- masks ---------------------------------------------------------------------------------------------------------


def masked_samples(rule="text"):
    results = []
    for tokens in ragged_batch(rule):
        is_content = [i > 0 and i % 3 != 1 for i in range(len(tokens.input_ids))]
        results.append(Tokens(tokens.input_ids, tokens.is_target, tokens.rule, is_content=is_content))
    return results


@pytest.mark.parametrize("rule", ["text", "response"])
@pytest.mark.parametrize("kind", ["batched", "hooks"])
@pytest.mark.parametrize("name", ["Llama, tied", "Llama, untied"])
def test_masked_gradient_equals_zeroing_by_hand(name, kind, rule):
    model, samples = build_model(name), masked_samples(rule)
    expected = [masked_gradient_by_hand(model, tokens) for tokens in samples if sum(tokens.is_content) > 1]
    actual = whole_gradients(*path_of(kind, model, None, masked=True), [s for s in samples if sum(s.is_content) > 1])
    assert_gradients_close(actual, expected)
    assert any(
        not torch.equal(e["model.embed_tokens.weight"], exact_gradient(model, s)["model.embed_tokens.weight"])
        for e, s in zip(expected, samples, strict=False)
    )


@pytest.mark.parametrize("kind", ["batched", "hooks"])
def test_masking_works_with_gradient_checkpointing(kind):
    model, samples = build_model("Llama, tied"), masked_samples()[:2]
    expected = [masked_gradient_by_hand(model, tokens) for tokens in samples]
    recompute_activations(model)
    assert_gradients_close(whole_gradients(*path_of(kind, model, None, masked=True), samples), expected)


@pytest.mark.parametrize("kind", ["batched", "hooks"])
def test_masking_and_correction_combine(kind):
    model, samples = build_model("Llama, tied"), masked_samples()[:2]
    moments = fitted(model, ragged_batch("text"))
    scales = {n: dense_scale(v, 0.25, 0.1) for n, v in mean_squared_gradient(model, ragged_batch("text")).items()}
    expected = [{n: g * scales[n] for n, g in masked_gradient_by_hand(model, tokens).items()} for tokens in samples]
    corrector = CORRECTIONS["adam"].corrector(moments, 0.1, 0.0, CPU)
    assert_gradients_close(whole_gradients(*path_of(kind, model, corrector, masked=True), samples), expected)


@pytest.mark.parametrize("kind", ["batched", "hooks"])
@pytest.mark.parametrize("name", ["Llama, untied", "GPT-2", "GPT-NeoX"])
def test_mask_of_pure_content_changes_nothing(name, kind):
    model, samples = build_model(name), ragged_batch("text")
    expected = [exact_gradient64(model, tokens) for tokens in samples]
    assert_gradients_close(whole_gradients(*path_of(kind, model, None, masked=True), samples), expected)


@pytest.mark.parametrize("name", [*MODELS, "Gemma-3", "BLOOM", "Phi-3", *MIXTURES])
def test_batched_masking_equals_the_hooks(name):
    model = build_model(name)
    hooked = copy.deepcopy(model)
    chosen = choose_parameters(model, None, None, 2)
    assert all(p.dim() >= 2 for _, p in chosen)
    placements = place([(n, tuple(p.shape)) for n, p in chosen], 4096)
    sketcher = GradientSketcher(Oporp(4096, 0), placements, CPU)
    path, reason = make_path(model, chosen, sketcher, masked=True)
    assert isinstance(path, BatchPath), reason
    hooks = MaskedHookPath(hooked, choose_parameters(hooked, None, None, 2), sketcher)
    samples = [tokens for tokens in masked_samples() if sum(tokens.is_content) > 1]
    assert min(sketch_cosines(path.sketch(samples), hooks.sketch(samples))) > 0.9999
    plain = [Tokens(s.input_ids, s.is_target, s.rule) for s in samples]
    assert max(sketch_cosines(path.sketch(samples), path.sketch(plain))) < 0.99


def test_hooks_mask_a_mixture_of_experts():
    model = mixtral()
    expected = [exact_gradient64(model, tokens) for tokens in ragged_batch("text")[:2]]
    assert_gradients_close(
        whole_gradients(*path_of("hooks", model, None, masked=True), ragged_batch("text")[:2]), expected
    )


def test_sample_without_content_gradient_fails():
    model = build_model("Llama, tied")
    tokens = Tokens([1, 2, 3, 4], [False, False, True, True], "text", is_content=[False] * 4)
    for kind in ("batched", "hooks"):
        path, _ = path_of(kind, model, None, masked=True)
        (sketch,) = path.sketch([tokens])
        assert isinstance(sketch, UnusableSampleError)
        assert "the gradient is zero" in str(sketch)


# --- which tokens are content --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return hf.AutoTokenizer.from_pretrained(folder)


def content(tokenizer, template, *, max_length=256, **parts):
    row = {"prompt": None, "response": None, "text": None} | parts
    tokens = Renderer(make_variant("v", template, "auto", max_length), tokenizer).render(Sample("a", **row))
    pieces = [tokenizer.decode([i]) for i in tokens.input_ids]
    kept = "".join(piece for piece, keep in zip(pieces, tokens.is_content, strict=True) if keep)
    rest = "".join(piece for piece, keep in zip(pieces, tokens.is_content, strict=True) if not keep)
    return kept, rest, tokens


def test_template_is_everything_but_the_samples_text(tokenizer):
    kept, rest, tokens = content(tokenizer, "chatml", prompt="Is the kidney affected?", response="yes")
    assert kept == "Is the kidney affected?yes"
    assert rest == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    assert len(tokens.is_content) == len(tokens.input_ids)


def test_the_first_position_is_never_content(tokenizer):
    kept, rest, tokens = content(tokenizer, "raw", text="A song about the sea.")
    assert rest == tokenizer.decode(tokens.input_ids[:1])
    assert rest + kept == "A song about the sea."


def test_truncation_cuts_the_content_mask_too(tokenizer):
    kept, _, tokens = content(tokenizer, "chatml", prompt="never " * 40 + "the sea", response="yes", max_length=40)
    assert tokens.n_cut > 0
    assert kept.endswith(" the seayes")
    assert len(tokens.is_content) == 40


def test_plan_placeholder_has_the_real_shapes():
    model = build_model("Llama, untied")
    chosen = choose_parameters(model, None, None)
    placements = place([(n, tuple(p.shape)) for n, p in chosen], 256)
    for kind in ("none", "adam", "adam2", "tensor"):
        path, _ = path_of("hooks", model, CORRECTIONS[kind].stand_in(placements, model, CPU))
        assert isinstance(path.sketch(ragged_batch("text")[:1])[0], Sketch)
        path.close()
