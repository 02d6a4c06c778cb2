"""K-FAC and EK-FAC against dense matrices in float64, formed and inverted whole."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from helpers.gradients import (
    CPU,
    exact_gradient64,
    masked_gradient_by_hand,
    random_tokens,
    sketch_cosines,
    whole_gradients,
)

from lark_store.errors import InputError
from lark_store.gradients.corrections import CORRECTIONS
from lark_store.gradients.corrections.fisher import CurvatureSums, EigenvalueSums, drawn_labels, kronecker_of
from lark_store.gradients.corrections.kronecker import (
    EkfacCorrector,
    KfacCorrector,
    Kronecker,
    curvature_corrector,
    damping_of,
)
from lark_store.gradients.corrections.linear_layers import linear_weights, linears_of
from lark_store.gradients.paths.batched import BatchPath, make_path
from lark_store.gradients.paths.hooks import HookPath, Sketch, choose_parameters
from lark_store.gradients.paths.masked import MaskedHookPath
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.modeling.tokens import Tokens

SMALL = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = SMALL | {"intermediate_size": 20, "num_key_value_heads": 2}
CONFIGS = {
    "Llama": hf.LlamaConfig(**LLAMA, attention_bias=True),
    "Qwen-3": hf.Qwen3Config(**LLAMA, head_dim=6),
    "GPT-NeoX": hf.GPTNeoXConfig(**SMALL, intermediate_size=20),
    "GPT-2": hf.GPT2Config(vocab_size=13, n_embd=16, n_layer=2, n_head=4, n_positions=32, n_inner=20),
}
N_LINEAR = {"Llama": 14, "Qwen-3": 14, "GPT-NeoX": 8, "GPT-2": 8}
DAMPING = 0.1


def tiny(name):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def samples(vocab=13):
    results = [random_tokens(i, n=n, vocab=vocab) for i, n in enumerate((7, 12, 4))]
    results.append(Tokens(results[1].input_ids, [6 <= i < 9 for i in range(12)], "text"))  # no target at the end
    return results


def parts(name, config):
    """Return the part and head of each output, and of each input, of a projection; None: all belong to one."""
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads

    def labels(*shape):
        """Number the pairs of the first two of three dimensions."""
        numbered = torch.arange(shape[0] * shape[1]).view(shape[0], shape[1], 1)
        return numbered.expand(shape).flatten()

    if "q_proj" in name:
        return labels(1, heads, d), None
    if "k_proj" in name or "v_proj" in name:
        return labels(1, config.num_key_value_heads, d), None
    if "query_key_value" in name:  # view(…, heads, 3 · d), then cut into three
        return labels(heads, 3, d), None
    if "attn.c_attn" in name:  # cut into three, then view(…, heads, d)
        return labels(3, heads, d), None
    if any(part in name for part in ("o_proj", "attn.c_proj", "attention.dense.")):
        return None, labels(1, heads, d)
    return None, None


def dense_factors(model, texts, seeds):
    """Return A and S of each linear weight, whole matrices with zeros between heads, and the samples' gradients.

    By hand: plain autograd, outputs that keep their gradient, sums over positions up to the last that counts.
    """
    model = copy.deepcopy(model).double().requires_grad_(True)
    kinds = (torch.nn.Linear, hf.pytorch_utils.Conv1D)
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, kinds) and "lm_head" not in n}
    layers = {n: m for n, m in layers.items() if "embed_out" not in n}
    a, s, gradients, n_positions = {}, {}, [], 0
    for tokens, seed in zip(texts, seeds, strict=True):
        seen = {}

        def remember(layer, given, out, seen=seen):
            out.retain_grad()
            seen[layer] = (given[0].detach()[0], out)

        hooks = [layer.register_forward_hook(remember) for layer in layers.values()]
        targets = [t for t, is_target in enumerate(tokens.is_target) if is_target]
        logits = model(input_ids=torch.tensor([tokens.input_ids])).logits[0][[t - 1 for t in targets]]
        labels = drawn_labels(logits.detach(), seed)
        model.zero_grad()
        (-logits.log_softmax(-1)[range(len(targets)), labels].sum() / len(targets) ** 0.5).backward()
        for hook in hooks:
            hook.remove()
        counted = max(targets)
        n_positions += counted
        results = {}
        for name, layer in layers.items():
            x, out = seen[layer]
            delta = out.grad[0]
            assert not delta[counted:].any()
            a[name] = a.get(name, 0) + x[:counted].T @ x[:counted]
            s[name] = s.get(name, 0) + delta.T @ delta
            results[name] = delta.T @ x  # (outputs, inputs), for Conv1D too
        gradients.append(results)
    for name in layers:
        of_outputs, of_inputs = parts(name, model.config)
        a[name], s[name] = a[name] / n_positions, s[name] / len(texts)
        if of_outputs is not None:
            s[name] = s[name] * (of_outputs[:, None] == of_outputs)
        if of_inputs is not None:
            a[name] = a[name] * (of_inputs[:, None] == of_inputs)
    return a, s, gradients


def power_of(matrix, p):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**-p) @ vectors.T


def fitted(model, texts, seeds, *, ekfac=False):
    """Return the factors of a fit, in float64."""
    model = copy.deepcopy(model).double()
    sums = CurvatureSums(model, CPU)
    kinds = [sums]
    for tokens, seed in zip(texts, seeds, strict=True):
        sums.take(tokens, seed)
    if ekfac:
        kinds.append(EigenvalueSums(model, CPU, sums.result()))
        for tokens, seed in zip(texts, seeds, strict=True):
            kinds[-1].take(tokens, seed)
    result = kinds[-1].result()
    return {name: kronecker_of(result, name) for name in {key.rpartition("/")[0] for key in result}}


def whole(blocks):
    return torch.block_diag(*blocks)


def sides(model, factors):
    """Return the inputs' and the outputs' whole matrix: Conv1D has its inputs as rows."""
    both = whole(factors.rows), whole(factors.columns)
    return both if isinstance(model, hf.GPT2LMHeadModel) else both[::-1]


def outputs_first(model, gradient):
    return gradient.T if isinstance(model, hf.GPT2LMHeadModel) else gradient


def path_of(kind, model, corrector, *, masked=False):
    """Return a path with unsketched gradients, and its sketcher."""
    from helpers.gradients import WholeGradients

    chosen = linear_weights(model, choose_parameters(model, None, None))
    keeper = WholeGradients(Oporp(256, 0), place([(name, tuple(p.shape)) for name, p in chosen], 256), CPU, corrector)
    if kind == "batched":
        return BatchPath(model, chosen, keeper, masked=masked), keeper
    return (MaskedHookPath if masked else HookPath)(model, chosen, keeper), keeper


BOTH_WAYS = [(correction, kind) for correction in ("kfac", "ekfac") for kind in ("batched", "hooks")]
SEEDS = [11, 12, 13, 14]


# --- the fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_factors_equal_dense_blocks_per_head(name):
    model = tiny(name)
    a, s, _ = dense_factors(model, samples(), SEEDS)
    corrector = fitted(model, samples(), SEEDS)
    assert corrector.keys() == a.keys()
    assert len(corrector) == N_LINEAR[name]
    for weight, factors in corrector.items():
        of_inputs, of_outputs = sides(model, factors)
        torch.testing.assert_close(of_inputs, a[weight], msg=weight)
        torch.testing.assert_close(of_outputs, s[weight], msg=weight)
    split = {weight for weight, factors in corrector.items() if len(factors.rows) + len(factors.columns) > 2}
    assert len(split) == {"Llama": 8, "Qwen-3": 8, "GPT-NeoX": 4, "GPT-2": 4}[name]


def test_factors_of_one_sample_are_its_own():
    model = tiny("Llama")
    one, seed = samples()[:1], SEEDS[:1]
    a, s, gradients = dense_factors(model, one, seed)
    for weight, factors in fitted(model, one, seed).items():
        torch.testing.assert_close(whole(factors.columns), a[weight], msg=weight)
        torch.testing.assert_close(whole(factors.rows), s[weight], msg=weight)
    for weight, factors in fitted(model, one, seed, ekfac=True).items():
        along = whole(factors.rows).T @ gradients[0][weight] @ whole(factors.columns)
        torch.testing.assert_close(factors.values, along.square(), msg=weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_corrected_eigenvalues_equal_the_dense_fisher_diagonal(name):
    model = tiny(name)
    a, s, gradients = dense_factors(model, samples(), SEEDS)
    for weight, factors in fitted(model, samples(), SEEDS, ekfac=True).items():
        of_inputs, of_outputs = sides(model, factors)
        for vectors, moments in ((of_inputs, a[weight]), (of_outputs, s[weight])):
            torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(vectors)).double())
            along = vectors.T @ moments @ vectors
            torch.testing.assert_close(along, torch.diag(along.diagonal()), atol=1e-10, rtol=0)
        fisher = sum(torch.outer(g[weight].flatten(), g[weight].flatten()) for g in gradients) / len(gradients)
        basis = torch.kron(of_outputs, of_inputs)
        expected = (basis.T @ fisher @ basis).diagonal().view(len(of_outputs), len(of_inputs))
        torch.testing.assert_close(outputs_first(model, factors.values), expected, msg=weight)


def gauss_newton(model, tokens, weight):
    """Return the exact Gauss–Newton matrix of a sample's mean loss for one weight: Σ over labels, no sampling."""
    parameter = dict(model.named_parameters())[weight]
    targets = [t for t, is_target in enumerate(tokens.is_target) if is_target]
    logits = model(input_ids=torch.tensor([tokens.input_ids])).logits[0][[t - 1 for t in targets]]
    total = torch.zeros(parameter.numel(), parameter.numel(), dtype=torch.float64)
    for row in logits:
        j = torch.stack([torch.autograd.grad(z, parameter, retain_graph=True)[0].flatten() for z in row])
        p = row.detach().softmax(-1)
        total += j.T @ (torch.diag(p) - torch.outer(p, p)) @ j / len(targets)
    return total


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX"])
def test_single_position_gives_the_exact_gauss_newton_matrix(monkeypatch, name):
    """Within the error of drawing labels: each entry of S may be off by five of its standard errors."""
    model, n = tiny(name).double(), 400
    tokens = Tokens([3, 5], [False, True], "text")
    sums, drawn, weights = CurvatureSums(model, CPU), {}, {"Llama": "up_proj", "GPT-NeoX": "h_to_4h"}[name]
    factors = sums.path.factors

    def recorded(tokens, seed):
        result = factors(tokens, seed)
        for key, (left, _) in result.items():
            if weights in key:
                drawn.setdefault(key, []).append(left[0])
        return result

    monkeypatch.setattr(sums.path, "factors", recorded)
    for seed in range(n):
        sums.take(tokens, seed)
    result = sums.result()
    sums.close()
    model.requires_grad_(True)
    for weight, deltas in drawn.items():
        exact_g = gauss_newton(model, tokens, weight)
        blocks = kronecker_of(result, weight)
        (s,), (a,) = blocks.rows, blocks.columns
        item = torch.stack(deltas)
        error = (item[:, :, None] * item[:, None, :]).std(dim=0) / n**0.5
        off = (torch.kron(s, a) - exact_g).abs() / torch.kron(error, a.abs()).clamp(min=1e-12)
        assert float(off.max()) < 5
        assert float((torch.kron(s, a) - exact_g).norm() / exact_g.norm()) < 0.1
        assert float((torch.kron(error, a.abs())).norm() / exact_g.norm()) < 0.1  # or the test says nothing


def test_scale_follows_a_samples_mean_loss():
    model, n = tiny("Llama").double(), 600
    tokens = samples()[3]
    sums = CurvatureSums(model, CPU)
    weight = "model.layers.1.mlp.up_proj.weight"
    norms = []
    for seed in range(n):
        left, right = sums.path.factors(tokens, seed)[weight]
        norms.append(float((left.T @ right).square().sum()))
    sums.close()
    model.requires_grad_(True)
    norms = torch.tensor(norms)
    expected = float(gauss_newton(model, tokens, weight).trace())
    assert abs(float(norms.mean()) - expected) < 4 * float(norms.std()) / n**0.5
    assert float(norms.std()) / n**0.5 < 0.1 * expected


def test_labels_are_drawn_reproducibly_from_the_softmax():
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(drawn_labels(logits, 5), drawn_labels(logits, 5))
    drawn = torch.cat([drawn_labels(logits, seed) for seed in range(4000)])
    share = torch.bincount(drawn, minlength=7) / 4000
    p = logits[0].softmax(-1)
    assert float(((share - p).abs() / (p * (1 - p) / 4000).sqrt()).max()) < 4
    assert drawn_labels(torch.tensor([[-1e9, 50.0, -1e9]]), 1).tolist() == [1]


# --- the correction ------------------------------------------------------------------------------------------------


def dense_corrected(model, factors, gradients, power, damping, *, ekfac):
    """Form each layer's damped matrix, raise it to the power, and multiply."""
    numel = sum(g.numel() for g in gradients[0].values())
    diagonals, result = 0.0, {}
    for factor in factors.values():
        of_inputs, of_outputs = sides(model, factor)
        if ekfac:
            diagonals += float(factor.values.sum())
        else:
            diagonals += float(torch.kron(of_outputs, of_inputs).trace())
    total = damping * diagonals / numel
    for weight, factor in factors.items():
        a, s = sides(model, factor)
        one_a, one_s = torch.eye(len(a)).double(), torch.eye(len(s)).double()
        if ekfac:
            basis = torch.kron(s, a)
            scale = (outputs_first(model, factor.values).flatten() + total) ** -power
            result[weight] = basis @ torch.diag(scale) @ basis.T
        else:
            pi = ((a.trace() / len(a)) / (s.trace() / len(s))) ** 0.5
            result[weight] = power_of(torch.kron(s + total**0.5 / pi * one_s, a + total**0.5 * pi * one_a), power)
    corrected = []
    for factor in gradients:
        corrected.append({})
        for weight, g in factor.items():
            own = outputs_first(model, g.double())
            corrected[-1][weight] = outputs_first(model, (result[weight] @ own.flatten()).view_as(own))
    return corrected


def assert_near(actual, expected):
    for gradients, ones in zip(actual, expected, strict=True):
        assert gradients.keys() == ones.keys()
        for name, gradient in ones.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                gradients[name].view_as(gradient), gradient, rtol=1e-3, atol=1e-4 * scale, msg=name
            )


def select_linear_weights(model, gradients):
    names = {linear.name for linear in linears_of(model)}
    return [{name: g for name, g in gradient.items() if name in names} for gradient in gradients]


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize(("correction", "kind"), BOTH_WAYS)
@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX", "GPT-2"])
def test_corrected_gradient_equals_the_dense_one(name, correction, kind, power):
    model, ekfac = tiny(name), correction == "ekfac"
    factors = fitted(model, samples(), SEEDS, ekfac=ekfac)
    gradients = select_linear_weights(model, [exact_gradient64(model, tokens) for tokens in samples()])
    expected = dense_corrected(model, factors, gradients, power, DAMPING, ekfac=ekfac)
    corrector = curvature_corrector(factors, DAMPING, power, CPU)
    assert isinstance(corrector, EkfacCorrector if ekfac else KfacCorrector)
    assert_near(whole_gradients(*path_of(kind, model, corrector), samples()), expected)


@pytest.mark.parametrize(("correction", "kind"), BOTH_WAYS)
def test_masking_and_curvature_combine(correction, kind):
    model, ekfac = tiny("Llama"), correction == "ekfac"
    masked = []
    for tokens in samples()[:2]:
        is_content = [i > 0 and i % 3 != 1 for i in range(len(tokens.input_ids))]
        masked.append(Tokens(tokens.input_ids, tokens.is_target, tokens.rule, is_content=is_content))
    factors = fitted(model, samples(), SEEDS, ekfac=ekfac)
    plain = select_linear_weights(model, [exact_gradient64(model, tokens) for tokens in masked])
    gradients = select_linear_weights(model, [masked_gradient_by_hand(model, tokens) for tokens in masked])
    assert not any(torch.allclose(a[n].double(), b[n]) for a, b in zip(plain, gradients, strict=True) for n in a)
    expected = dense_corrected(model, factors, gradients, 0.5, DAMPING, ekfac=ekfac)
    corrector = curvature_corrector(factors, DAMPING, 0.5, CPU)
    assert_near(whole_gradients(*path_of(kind, model, corrector, masked=True), masked), expected)


@pytest.mark.parametrize("correction", ["kfac", "ekfac"])
def test_huge_damping_gives_a_multiple_of_the_gradient(correction):
    model = tiny("GPT-NeoX")
    factors = fitted(model, samples(), SEEDS, ekfac=correction == "ekfac")
    total = damping_of(factors, 1e14)
    gradients = select_linear_weights(model, [exact_gradient64(model, tokens) for tokens in samples()])
    expected = [{name: g.double() / total for name, g in gradient.items()} for gradient in gradients]
    corrector = curvature_corrector(factors, 1e14, 1.0, CPU)
    assert_near(whole_gradients(*path_of("hooks", model, corrector), samples()), expected)


def chosen_again(model):
    return linear_weights(model, choose_parameters(model, None, None))


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", CONFIGS)
def test_batched_correction_equals_single(name, kind, monkeypatch):
    model = tiny(name)
    factors = fitted(model, samples(), SEEDS, ekfac=kind == "ekfac")
    placements = place([(n, tuple(p.shape)) for n, p in chosen_again(model)], 4096)
    sketcher = GradientSketcher(Oporp(4096, 0), placements, CPU, curvature_corrector(factors, 0.1, 0.5, CPU))
    monkeypatch.setattr("lark_store.gradients.paths.products._HELD", 700)  # of all weights some samples at a time
    path, reason = make_path(model, chosen_again(model), sketcher)
    assert isinstance(path, BatchPath), reason
    alone = [path.sketch([one])[0] for one in samples()]
    assert min(sketch_cosines(path.sketch(samples()), alone)) > 0.999999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_too(dtype):
    torch.manual_seed(0)
    rows, columns = (torch.eye(n // 2).repeat(2, 1, 1) * 1e6 for n in (4, 6))
    kfac, ekfac = (
        KfacCorrector({"w": Kronecker(rows, columns)}),
        EkfacCorrector({"w": Kronecker(torch.eye(4)[None], torch.eye(6)[None], torch.full((4, 6), 1e6))}),
    )
    factor = torch.full((5, 6), 1e-2, dtype=dtype)
    assert torch.isfinite(kfac.right("w", factor)).all()
    for corrector in (kfac, ekfac):
        result = corrector.whole("w", torch.full((4, 6), 1e-2, dtype=dtype))
        assert result.dtype == torch.float32
        assert torch.isfinite(result).all()


def test_layer_without_gradient_is_damped_like_the_others():
    lively = Kronecker(torch.eye(2)[None] * 4, torch.eye(3)[None])
    still = Kronecker(torch.zeros(1, 2, 2), torch.zeros(1, 3, 3))
    corrector = curvature_corrector({"a": lively, "b": still}, 0.1, 1.0, CPU)
    total = 0.1 * 4 * 6 / 12
    assert float(corrector.whole("b", torch.ones(2, 3))[0, 0]) == pytest.approx(1 / total, rel=1e-5)
    alone = curvature_corrector({"b": still}, 0.1, 1.0, CPU)
    assert torch.isfinite(alone.whole("b", torch.ones(2, 3))).all()


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_plan_placeholder_has_the_real_shapes(kind):
    model = tiny("GPT-2")
    placements = place([(n, tuple(p.shape)) for n, p in chosen_again(model)], 256)
    stand = CORRECTIONS[kind].stand_in(placements, model, CPU)
    real = curvature_corrector(fitted(model, samples(), SEEDS, ekfac=kind == "ekfac"), 0.1, 0.5, CPU)
    assert type(stand) is type(real)
    ours, theirs = (c.bases if kind == "ekfac" else c.roots for c in (stand, real))
    assert {n: (k.rows.shape, k.columns.shape) for n, k in ours.items()} == {
        n: (k.rows.shape, k.columns.shape) for n, k in theirs.items()
    }
    path, _ = path_of("hooks", model, stand)
    assert isinstance(path.sketch(samples()[:1])[0], Sketch)


def test_only_linear_weights_are_selected():
    model = tiny("Llama")
    with pytest.raises(InputError, match="none of the 5 selected parameters is the weight of a linear layer"):
        linear_weights(model, choose_parameters(model, "norm", None))
    names = {name for name, _ in chosen_again(model)}
    assert all(name.endswith("proj.weight") for name in names)


def test_a_model_without_linear_layers_has_no_curvature():
    model = tiny("Llama")
    for layer in model.model.layers:
        layer.self_attn, layer.mlp = torch.nn.Identity(), torch.nn.Identity()
    with pytest.raises(InputError, match="is the weight of a linear layer in the model's blocks"):
        CurvatureSums(model, CPU)
