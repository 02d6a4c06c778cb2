"""Corrected gradients and masked templates, against dense computations in float64 and by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from conftest import save_tokenizer
from test_batched import LLAMA_LIKE, Whole, cosines, model_of, ragged
from test_gradients import CPU, exact_gradient, sample

from lark_store.ingest.batched import BatchPath, UnknownLayerError, make_path
from lark_store.ingest.corrections import Corrector, Moments, corrector_of
from lark_store.ingest.curvature import stand_in
from lark_store.ingest.gradients import HookPath, Sketch, choose_parameters, recompute_activations
from lark_store.ingest.masked import MaskedHookPath
from lark_store.ingest.moments import MomentSums
from lark_store.ingest.oporp import GradientSketcher, Oporp, place
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, Tokens, UnusableSampleError, make_variant

MODELS = ["Llama, tied", "Llama, untied", "GPT-2", "GPT-NeoX", "Qwen-3"]
POWER = {"adam": 0.25, "adam2": 0.5}


def mixtral():
    torch.manual_seed(0)
    config = hf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
    return hf.AutoModelForCausalLM.from_config(config).eval()


def fitted(model, samples):
    """Return the second moments that a fit finds."""
    chosen = choose_parameters(model, None, None)
    sums = MomentSums(chosen, CPU)
    path = HookPath(model, chosen, sums)
    for tokens in samples:
        assert isinstance(path.sketch([tokens])[0], Sketch)
        sums.commit(keep=True)
    path.close()
    return sums.means()


def exact(model, tokens):
    """Return the gradient in float64; experts are multiplied in float32 alone."""
    wide = isinstance(model, hf.MixtralForCausalLM)
    return exact_gradient(copy.deepcopy(model) if wide else copy.deepcopy(model).double(), tokens)


def dense_squares(model, samples):
    """Return V: the mean of the squared gradient, whole and in float64."""
    squares = [{name: g.double() ** 2 for name, g in exact(model, tokens).items()} for tokens in samples]
    return {name: sum(each[name] for each in squares) / len(samples) for name in squares[0]}


def dense_scale(v, power, damping):
    """Return what Adafactor makes of V, damped, to the power: a whole matrix, by the definition."""
    if v.dim() < 2:
        return (v + damping * v.mean()) ** -power
    rows, columns = v.mean(dim=-1, keepdim=True), v.mean(dim=-2, keepdim=True)
    mean = v.mean(dim=(-2, -1), keepdim=True)
    rows, columns = rows + damping * mean, columns + damping * mean
    return (rows * columns / rows.mean(dim=-2, keepdim=True)) ** -power


def path_of(kind, model, corrector, *, masked=False):
    """Return a path that keeps gradients whole, and its keeper."""
    chosen = choose_parameters(model, None, None)
    placements = place([(name, tuple(p.shape)) for name, p in chosen], 256)
    keeper = Whole(Oporp(256, 0), placements, CPU, corrector)
    if kind == "batched":
        return BatchPath(model, chosen, keeper, masked=masked), keeper
    return (MaskedHookPath if masked else HookPath)(model, chosen, keeper), keeper


def gradients_of(path, keeper, samples):
    """Sketch samples, and return their whole corrected gradients."""
    if isinstance(path, BatchPath):
        assert all(isinstance(made, Sketch) for made in path.sketch(samples))
        return keeper.gradients
    found = []
    for tokens in samples:
        keeper.gradients = [{name: torch.zeros(p.numel, dtype=torch.float64) for name, p in keeper.placements.items()}]
        assert isinstance(path.sketch([tokens])[0], Sketch)
        found += keeper.gradients
    return found


def assert_same(found, expected):
    """Compare gradients, each parameter to its own scale."""
    for gradients, exact in zip(found, expected, strict=True):
        assert gradients.keys() == exact.keys()
        for name, gradient in exact.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                gradients[name].view_as(gradient), gradient.double(), rtol=1e-4, atol=2e-5 * scale, msg=name
            )


@pytest.mark.parametrize("name", MODELS)
def test_fitted_moments_are_the_means_of_the_dense_ones(name):
    model, samples = model_of(name), ragged("text")
    v = dense_squares(model, samples)
    found = fitted(model, samples)
    assert found.keys() == v.keys()
    for parameter, squares in v.items():
        rows = squares if squares.dim() < 2 else squares.mean(dim=1)
        near = {"rtol": 1e-4, "atol": 1e-6 * float(rows.max()), "msg": parameter}
        torch.testing.assert_close(found[parameter].rows, rows, **near)
        if squares.dim() == 2:
            torch.testing.assert_close(found[parameter].columns, squares.mean(dim=0), **near)
        assert found[parameter].fits(tuple(squares.shape))
        assert not found[parameter].fits((*squares.shape, 2))


@pytest.mark.parametrize("kind", ["batched", "hooks"])
@pytest.mark.parametrize("correction", POWER)
@pytest.mark.parametrize("name", MODELS)
def test_a_corrected_gradient_is_the_exact_matrix_scaled(name, correction, kind):
    model, samples = model_of(name), ragged("text")
    v = dense_squares(model, samples[:2])
    gradients = [exact(model, tokens) for tokens in samples]
    scales = {parameter: dense_scale(squares, POWER[correction], 0.1) for parameter, squares in v.items()}
    expected = [{parameter: g * scales[parameter] for parameter, g in each.items()} for each in gradients]
    corrector = corrector_of(fitted(model, samples[:2]), correction, 0.1, CPU)
    assert_same(gradients_of(*path_of(kind, model, corrector), samples), expected)


def test_the_experts_of_a_mixture_are_corrected_each_by_itself():
    model, samples = mixtral(), [sample(i, n=24) for i in range(3)]
    v = dense_squares(model, samples)
    assert max(squares.dim() for squares in v.values()) == 3
    gradients = [exact(model, tokens) for tokens in samples]
    expected = [{n: g * dense_scale(v[n], 0.25, 0.1) for n, g in each.items()} for each in gradients]
    corrector = corrector_of(fitted(model, samples), "adam", 0.1, CPU)
    assert_same(gradients_of(*path_of("hooks", model, corrector), samples), expected)


def test_a_matrix_that_never_had_a_gradient_is_scaled_as_the_mean_of_all():
    moments = {"a": Moments.of(torch.full((4, 6), 16.0)), "b": Moments.of(torch.zeros(3, 5))}
    corrector = corrector_of(moments, "adam", 0.1, CPU)
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
    corrector = corrector_of(moments, "adam2", 0.1, CPU)
    factor = torch.full((5, 3), 1e-3, dtype=dtype)
    assert torch.isfinite(corrector.right("w", factor)).all()
    assert torch.isfinite(corrector.whole("w", torch.full((2, 3), 1e-3, dtype=dtype))).all()


# --- tensor --------------------------------------------------------------------------------------------------------


def test_each_tensor_is_scaled_to_norm_1_and_takes_the_hooks():
    model, samples = model_of("Llama, tied"), ragged("text")
    gradients = [exact(model, tokens) for tokens in samples]
    expected = [{name: g / g.norm() for name, g in each.items()} for each in gradients]
    assert_same(gradients_of(*path_of("hooks", model, Corrector(norm_1=True)), samples), expected)
    chosen = choose_parameters(model, None, None)
    placements = place([(name, tuple(p.shape)) for name, p in chosen], 1024)
    path, reason = make_path(model, chosen, GradientSketcher(Oporp(1024, 0), placements, CPU, Corrector(norm_1=True)))
    assert isinstance(path, HookPath)
    assert "must be there whole" in reason
    with pytest.raises(UnknownLayerError):
        BatchPath(model, chosen, path.sketcher)


# --- masks ---------------------------------------------------------------------------------------------------------


def masked_samples(rule="text"):
    made = []
    for tokens in ragged(rule):
        is_content = [i > 0 and i % 3 != 1 for i in range(len(tokens.input_ids))]
        made.append(Tokens(tokens.input_ids, tokens.is_target, tokens.rule, is_content=is_content))
    return made


def by_hand(model, tokens):
    """Zero the output gradient of each layer at the masked positions, and form the weights' gradients from it."""
    model = copy.deepcopy(model).double()
    model.requires_grad_(True)
    seen = []
    keep = torch.tensor(tokens.is_content)

    def remember(layer, given, out):
        out.retain_grad()
        seen.append((layer, given[0].detach(), out))

    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    logits = model(input_ids=torch.tensor([tokens.input_ids])).logits[0]
    losses = [
        -logits[t - 1].log_softmax(dim=-1)[tokens.input_ids[t]] for t, wanted in enumerate(tokens.is_target) if wanted
    ]
    torch.stack(losses).mean().backward()
    for hook in hooks:
        hook.remove()
    names = {id(p): name for name, p in model.named_parameters()}
    made = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for layer, x, out in seen:
        delta = out.grad[0] * keep[:, None]
        if isinstance(layer, torch.nn.Linear):
            made[names[id(layer.weight)]] += delta.T @ x[0]
            if layer.bias is not None:
                made[names[id(layer.bias)]] += delta.sum(dim=0)
        elif isinstance(layer, torch.nn.Embedding):
            made[names[id(layer.weight)]].index_add_(0, x[0], delta)
        else:
            normed = x[0] * (x[0].square().mean(dim=-1, keepdim=True) + layer.variance_epsilon).rsqrt()
            made[names[id(layer.weight)]] += (delta * normed).sum(dim=0)
    return {name: each.detach() for name, each in made.items()}


@pytest.mark.parametrize("rule", ["text", "response"])
@pytest.mark.parametrize("kind", ["batched", "hooks"])
@pytest.mark.parametrize("name", ["Llama, tied", "Llama, untied"])
def test_a_masked_gradient_is_that_of_zeroing_by_hand(name, kind, rule):
    model, samples = model_of(name), masked_samples(rule)
    expected = [by_hand(model, tokens) for tokens in samples if sum(tokens.is_content) > 1]
    found = gradients_of(*path_of(kind, model, None, masked=True), [s for s in samples if sum(s.is_content) > 1])
    assert_same(found, expected)
    assert any(
        not torch.equal(e["model.embed_tokens.weight"], exact_gradient(model, s)["model.embed_tokens.weight"])
        for e, s in zip(expected, samples, strict=False)
    )


@pytest.mark.parametrize("kind", ["batched", "hooks"])
def test_a_mask_holds_with_gradient_checkpointing_too(kind):
    model, samples = model_of("Llama, tied"), masked_samples()[:2]
    expected = [by_hand(model, tokens) for tokens in samples]
    recompute_activations(model)
    assert_same(gradients_of(*path_of(kind, model, None, masked=True), samples), expected)


@pytest.mark.parametrize("kind", ["batched", "hooks"])
def test_a_mask_and_a_correction_go_together(kind):
    model, samples = model_of("Llama, tied"), masked_samples()[:2]
    moments = fitted(model, ragged("text"))
    scales = {n: dense_scale(v, 0.25, 0.1) for n, v in dense_squares(model, ragged("text")).items()}
    expected = [{n: g * scales[n] for n, g in by_hand(model, tokens).items()} for tokens in samples]
    corrector = corrector_of(moments, "adam", 0.1, CPU)
    assert_same(gradients_of(*path_of(kind, model, corrector, masked=True), samples), expected)


@pytest.mark.parametrize("kind", ["batched", "hooks"])
@pytest.mark.parametrize("name", ["Llama, untied", "GPT-2", "GPT-NeoX"])
def test_where_all_is_content_the_mask_changes_nothing(name, kind):
    model, samples = model_of(name), ragged("text")
    expected = [exact(model, tokens) for tokens in samples]
    assert_same(gradients_of(*path_of(kind, model, None, masked=True), samples), expected)


@pytest.mark.parametrize("name", [*MODELS, "Gemma-3", "BLOOM", "Phi-3"])
def test_every_model_is_masked_in_batches_as_by_the_hooks(name):
    model = model_of(name)
    hooked = copy.deepcopy(model)
    chosen = choose_parameters(model, None, None, 2)
    assert all(p.dim() == 2 for _, p in chosen)
    placements = place([(n, tuple(p.shape)) for n, p in chosen], 4096)
    sketcher = GradientSketcher(Oporp(4096, 0), placements, CPU)
    path, reason = make_path(model, chosen, sketcher, masked=True)
    assert isinstance(path, BatchPath), reason
    hooks = MaskedHookPath(hooked, choose_parameters(hooked, None, None, 2), sketcher)
    samples = [tokens for tokens in masked_samples() if sum(tokens.is_content) > 1]
    assert min(cosines(path.sketch(samples), hooks.sketch(samples))) > 0.9999
    plain = [Tokens(s.input_ids, s.is_target, s.rule) for s in samples]
    assert max(cosines(path.sketch(samples), path.sketch(plain))) < 0.99


def test_a_mixture_of_experts_is_masked_by_the_hooks():
    model, samples = mixtral(), masked_samples()
    chosen = choose_parameters(model, None, None)
    placements = place([(n, tuple(p.shape)) for n, p in chosen], 4096)
    path, reason = make_path(model, chosen, GradientSketcher(Oporp(4096, 0), placements, CPU), masked=True)
    assert isinstance(path, MaskedHookPath), reason
    assert isinstance(path.sketch(samples[:1])[0], Sketch)
    path.close()
    expected = [exact(model, tokens) for tokens in ragged("text")[:2]]
    assert_same(gradients_of(*path_of("hooks", model, None, masked=True), ragged("text")[:2]), expected)


def test_a_sample_whose_content_says_nothing_is_a_reason():
    model = model_of("Llama, tied")
    tokens = Tokens([1, 2, 3, 4], [False, False, True, True], "text", is_content=[False] * 4)
    for kind in ("batched", "hooks"):
        path, _ = path_of(kind, model, None, masked=True)
        (made,) = path.sketch([tokens])
        assert isinstance(made, UnusableSampleError)
        assert "the gradient is zero" in str(made)


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


def test_the_template_is_all_but_the_samples_own_characters(tokenizer):
    kept, rest, tokens = content(tokenizer, "chatml", prompt="Is the kidney affected?", response="yes")
    assert kept == "Is the kidney affected?yes"
    assert rest == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    assert len(tokens.is_content) == len(tokens.input_ids)


def test_the_first_position_is_never_content(tokenizer):
    kept, rest, tokens = content(tokenizer, "raw", text="A song about the sea.")
    assert rest == tokenizer.decode(tokens.input_ids[:1])
    assert rest + kept == "A song about the sea."


def test_what_is_cut_off_takes_its_mark_along(tokenizer):
    kept, _, tokens = content(tokenizer, "chatml", prompt="never " * 40 + "the sea", response="yes", max_length=40)
    assert tokens.n_cut > 0
    assert kept.endswith(" the seayes")
    assert len(tokens.is_content) == 40


def test_the_stand_in_of_a_plan_has_the_shapes_of_the_real_one():
    model = model_of("Llama, untied")
    chosen = choose_parameters(model, None, None)
    placements = place([(n, tuple(p.shape)) for n, p in chosen], 256)
    for kind in ("none", "adam", "adam2", "tensor"):
        path, _ = path_of("hooks", model, stand_in(kind, placements, CPU, model))
        assert isinstance(path.sketch(ragged("text")[:1])[0], Sketch)
        path.close()
