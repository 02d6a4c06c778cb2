"""Baselines, each compared with a dense computation of its formula on small models."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from helpers.checkpoints import save_checkpoint, save_tokenizer
from helpers.program import lark
from helpers.stores import store_label
from helpers.texts import qa_rows, write_jsonl
from rank_bm25 import BM25Plus
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, GPTNeoXConfig, GPTNeoXForCausalLM

from lark_store import Store, evaluate
from lark_store.core.words import words
from lark_store.errors import CheckpointError, InputError, NameUnknownError
from lark_store.evaluate.baselines import BaselineContext, full_gradients, solvers
from lark_store.evaluate.baselines.cka import aligned
from lark_store.evaluate.baselines.full_gradients import Parameters, parameters_of
from lark_store.evaluate.baselines.gauss_newton import GaussNewton
from lark_store.evaluate.baselines.trak import solved
from lark_store.evaluate.dataset import gather, load
from lark_store.evaluate.scorers import matrices
from lark_store.gradients.corrections.ekfac import EkfacFactors
from lark_store.gradients.corrections.fisher import CurvatureSums, EigenvalueSums

MODELS = ("llama", "neox")
ANSWERS = ("yes", "no", "never", "often")


def save_neox(folder, seed=0):
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=384,
        hidden_size=4,
        intermediate_size=8,
        rotary_pct=1.0,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A store of 4 samples and 3 queries, of two models with about 2,000 parameters each, one at two checkpoints."""
    root = tmp_path_factory.mktemp("rivals")
    small = {"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    tuned = [row | {"answer": answer} for row, answer in zip(qa_rows(4), ANSWERS, strict=True)]
    with Store.create(root / "lark.store") as store:
        for seed, name in enumerate(("llama", "llama-2")):
            store.checkpoint_add(name, save_checkpoint(root / name, seed=seed, initializer_range=0.3, **small))
        store.checkpoint_add("neox", save_neox(root / "neox"))
        store.source_add("finetune", write_jsonl(root / "finetune.jsonl", tuned), stage="finetune")
        store.source_add("test", write_jsonl(root / "test.jsonl", qa_rows(3, start=100)), stage="query")
        store.sketcher_add("norms", k=1024, parameters="norm", min_ndim=0)
        store.sketcher_add("table", k=1024, parameters="embed_tokens")
    return root / "lark.store"


@pytest.fixture
def store(path):
    with Store.open(path) as opened:
        yield opened


@pytest.fixture
def material(store):
    return gather(store, sources=["finetune"], variants=["chatml"], queries=None, query_variant="chatml")


def scores(material, spec, notes=None, **how):
    given = BaselineContext(device="cpu", note=[].append if notes is None else notes.append, **how)
    return matrices(material, [spec], given)[spec]


class Dense:
    """A model in float64, its gradients and its Gauss–Newton matrix by the plain definition."""

    def __init__(self, material, checkpoint, only=""):
        self.loaded = load(material.store, checkpoint, "cpu")
        self.loaded.model.double()
        self.at = {n: p.detach() for n, p in self.loaded.model.named_parameters() if only in n}
        self.queries, self.samples = self.loaded.tokens(material.queries), self.loaded.tokens(material.samples)

    def logits(self, parameters, tokens):
        result = torch.func.functional_call(self.loaded.model, parameters, (torch.tensor([tokens.input_ids]),)).logits[
            0
        ]
        return result[[t - 1 for t, is_target in enumerate(tokens.is_target) if is_target]]

    def labels(self, tokens):
        return torch.tensor([i for i, t in zip(tokens.input_ids, tokens.is_target, strict=True) if t])

    def loss(self, parameters, tokens):
        return torch.nn.functional.cross_entropy(self.logits(parameters, tokens), self.labels(tokens))

    def margin(self, parameters, tokens):
        p = self.logits(parameters, tokens).softmax(-1).gather(1, self.labels(tokens)[:, None])
        return (p.log() - (1 - p).log()).sum()

    def probability(self, tokens):
        return self.logits(self.at, tokens).softmax(-1).gather(1, self.labels(tokens)[:, None]).mean().item()

    def parts(self, tokens, function=None):
        return list(torch.func.grad(lambda at: (function or self.loss)(at, tokens))(self.at).values())

    def rows(self, texts, function=None):
        return torch.stack(
            [torch.cat([g.flatten() for g in self.parts(tokens, function)]) for tokens in texts]
        ).detach()

    def curvature(self, texts=None):
        """G, (P, P), from the whole Jacobian of each sample's logits."""
        texts, rows = self.samples if texts is None else texts, []
        for tokens in texts:
            with sdpa_kernel(SDPBackend.MATH):
                parts = torch.func.jacrev(lambda at, tokens=tokens: self.logits(at, tokens))(self.at)
            j_MVP = torch.cat([part.flatten(2) for part in parts.values()], dim=2)
            for j_VP, p_V in zip(j_MVP, self.logits(self.at, tokens).softmax(-1), strict=True):
                values, vectors = torch.linalg.eigh(torch.diag(p_V) - torch.outer(p_V, p_V))
                root_VV = vectors * values.clamp(min=0).sqrt()
                rows.append(root_VV.T @ j_VP / (len(j_MVP) * len(texts)) ** 0.5)
        root_XP = torch.cat(rows).detach()
        return root_XP.T @ root_XP


_DENSE = {}


@pytest.fixture(params=MODELS)
def dense(request, material):
    if request.param not in _DENSE:
        dense_model = Dense(material, request.param)
        _DENSE[request.param] = (dense_model, dense_model.curvature())
    dense_model, matrix = _DENSE[request.param]
    return request.param, dense_model, matrix


def products(material, checkpoint, sketcher=None):
    loaded = load(material.store, checkpoint, "cpu")
    return GaussNewton(parameters_of(material.store, loaded, sketcher), loaded.tokens(material.samples))


# --- the curvature and its inverse ---------------------------------------------------------------------------------


def test_products_equal_the_dense_gauss_newton_matrix(material, dense):
    name, dense_model, matrix = dense
    product = products(material, name)
    v = torch.randn(3, len(matrix), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(product.product(v).double(), v.double() @ matrix, rtol=2e-3, atol=2e-5)
    texts = dense_model.curvature([dense_model.samples[i] for i in (1, 3)])
    torch.testing.assert_close(product.product(v, [1, 3]).double(), v.double() @ texts, rtol=2e-3, atol=2e-5)
    assert product.diagonal_mean(0) == pytest.approx(float(matrix.diagonal().mean()), rel=0.15)


class BackwardOnly(torch.autograd.Function):
    """An activation with a backward derivative only, like many fused kernels."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(_, gradient):
        return gradient


class Fused(torch.nn.Module):
    def forward(self, x):
        return BackwardOnly.apply(x)


def test_model_without_forward_derivatives_is_a_clear_error(material):
    product = products(material, "neox")
    product.parameters.model.gpt_neox.layers[0].mlp.act = Fused()
    with pytest.raises(CheckpointError, match="the model has no forward-mode derivatives"):
        product.product(torch.randn(1, product.parameters.size))


def inverse(material, dense, damping):
    """The scores of a dense solve."""
    name, dense_model, matrix = dense
    ridge = damping * products(material, name).diagonal_mean(0)
    solved_QP = torch.linalg.solve(matrix + ridge * torch.eye(len(matrix)), dense_model.rows(dense_model.queries).T).T
    return (solved_QP @ dense_model.rows(dense_model.samples).T).numpy()


def close(actual, expected, rel):
    return np.abs(actual - expected).max() <= rel * np.abs(expected).max()


@pytest.mark.parametrize("damping", [1, 10])
def test_conjugate_gradient_equals_the_dense_solve(material, dense, damping):
    notes = []
    actual = scores(material, f"cg:{damping},tolerance=1e-4@{dense[0]}", notes)
    assert close(actual, inverse(material, dense, damping), 2e-3)
    assert "G of 4 samples" in notes[0]
    assert "not below" not in notes[0]


def test_unconverged_conjugate_gradient_is_noted(material):
    notes = []
    scores(material, "cg:0.01,steps=2@neox", notes)
    assert "after 2 steps, not below 1e-03: raise `steps=`" in notes[0]


def test_lissa_converges_to_the_dense_solve(material, dense):
    notes = []
    actual = scores(material, f"lissa:1000,tolerance=1e-4@{dense[0]}", notes)
    assert "not below" not in notes[0]
    assert close(actual, inverse(material, dense, 1000), 2e-3)


def test_lissa_converges_until_its_solution_stays(material, dense):
    notes = []
    actual = scores(material, f"lissa:1000,change=1e-7,steps=5000@{dense[0]}", notes)
    assert "raise `steps=`" not in notes[0]
    assert close(actual, inverse(material, dense, 1000), 2e-3)
    scores(material, f"lissa:1000,change=1e-7,steps=3@{dense[0]}", notes)
    assert "after 3 steps, not below a change of 1e-07: raise `steps=`" in notes[1]


def test_lissa_with_minibatches_is_close(material, dense):
    expected = inverse(material, dense, 1000)
    actual = scores(material, f"lissa:1000,steps=100,batch=3@{dense[0]}")
    assert close(actual, expected, 0.2)
    assert not close(actual, expected, 1e-4)  # it is another way, not the same products


def test_lissa_with_too_small_scale_is_an_error(material):
    with pytest.raises(InputError, match="LiSSA does not converge with a scale of 1e-05"):
        scores(material, "lissa:1,scale=1e-5@llama")


def test_gdp_equals_the_dense_dot_products(material, dense):
    name, dense_model, _ = dense
    expected = dense_model.rows(dense_model.queries) @ dense_model.rows(dense_model.samples).T
    assert close(scores(material, f"gdp@{name}"), expected.numpy(), 1e-4)


def linear_rows(dense_model, texts):
    """Gradients of the linear layers' weights, by layer."""
    chosen = [i for i, name in enumerate(dense_model.at) if "layers." in name and dense_model.at[name].dim() == 2]
    return [[dense_model.parts(tokens)[i].detach() for i in chosen] for tokens in texts], chosen


def test_ekfac_of_full_gradients_equals_its_formula(material, dense):
    name, dense_model, _ = dense
    queries, chosen = linear_rows(dense_model, dense_model.queries)
    samples, _ = linear_rows(dense_model, dense_model.samples)
    loaded, factors = load(material.store, name, "cpu"), None
    for fit_pass in (CurvatureSums, EigenvalueSums):
        running = fit_pass(loaded.model, torch.device("cpu"), factors)
        for i, tokens in enumerate(loaded.tokens(material.samples)):
            running.take(tokens, i)
        factors = running.result()
        running.close()
    bases = [EkfacFactors().parse(factors)[list(dense_model.at)[i]] for i in chosen]
    ridge = 0.5 * sum(float(b.values.sum()) for b in bases) / sum(b.values.numel() for b in bases)

    def along(gradient, base):
        rows, columns = torch.block_diag(*base.rows.double()), torch.block_diag(*base.columns.double())
        return rows.T @ gradient @ columns

    expected = [
        [
            sum(
                float((along(g, b) * along(h, b) / (b.values + ridge)).sum())
                for g, h, b in zip(q, z, bases, strict=True)
            )
            for z in samples
        ]
        for q in queries
    ]
    assert close(scores(material, f"ekfac-full:0.5@{name}"), np.array(expected), 1e-3)


def test_query_blocks_give_equal_scores(material, monkeypatch):
    whole = {spec: scores(material, spec) for spec in ("cg:10@llama", "cka@llama", "ekfac-full:1@llama")}
    monkeypatch.setattr(full_gradients, "MEMORY_LIMIT", 1)
    monkeypatch.setattr(sys.modules[aligned.__module__], "MEMORY_LIMIT", 1)
    for spec, expected in whole.items():
        np.testing.assert_allclose(scores(material, spec), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("spec", ["cg:10@llama", "arnoldi:2@llama", "trak:256,damping=1@llama", "cka@llama"])
def test_half_precision_scores_are_close(material, spec):
    assert close(scores(material, spec, precision="bfloat16"), scores(material, spec), 0.2)


# --- arnoldi -------------------------------------------------------------------------------------------------------


def test_arnoldi_at_full_rank_equals_the_dense_inverse(material):
    name = "llama"
    actual = scores(material, f"arnoldi:40,steps=40,sketcher=norms@{name}")
    dense_model = Dense(material, name, only="norm")
    solved_QP = torch.linalg.solve(dense_model.curvature(), dense_model.rows(dense_model.queries).T).T
    assert close(actual, (solved_QP @ dense_model.rows(dense_model.samples).T).numpy(), 2e-2)


def test_arnoldi_finds_the_leading_eigenvectors(material, dense):
    name, dense_model, matrix = dense
    notes = []
    actual = scores(material, f"arnoldi:4,steps=60@{name}", notes)
    values, vectors = torch.linalg.eigh(matrix)
    on_q, on_z = (dense_model.rows(texts) @ vectors[:, -4:] for texts in (dense_model.queries, dense_model.samples))
    assert close(actual, (on_q / values[-4:] @ on_z.T).numpy(), 1e-2)
    assert f"4 eigenvalues from {values[-1]:.3g}" in notes[0]


def test_arnoldi_stops_at_the_rank_of_the_matrix():
    half, g, (start,) = torch.randn(15, 30, generator=torch.Generator().manual_seed(0)).double().split([12, 2, 1])
    matrix, steps = half.T @ half, []
    basis = solvers.arnoldi(lambda v: v @ matrix, start, 30, 30, steps.append)
    assert len(basis.values_R) == 12
    assert steps[-1] <= 14
    expected = g @ torch.linalg.pinv(matrix, rtol=1e-6, hermitian=True) @ g.T
    torch.testing.assert_close(basis.project(g[0]) @ basis.project(g[1]), expected[0, 1])


def test_too_large_basis_is_refused(material):
    with pytest.raises(InputError, match=r"1000000000 vectors of \d+ parameters take .* GB"):
        scores(material, "arnoldi:10,steps=1000000000@llama")


# --- trak ----------------------------------------------------------------------------------------------------------


def test_trak_equals_its_formula(material):
    # one parameter of fewer coordinates than bins: the projection is a rotation, so nothing is lost
    actual = scores(material, "trak:4096,damping=0.1,sketcher=table@llama+llama-2")
    kernel, weight = 0, 0
    for name in ("llama", "llama-2"):
        dense_model = Dense(material, name, only="embed_tokens")
        phi_Q, phi_N = (
            dense_model.rows(texts, dense_model.margin).numpy() for texts in (dense_model.queries, dense_model.samples)
        )
        ridge = 0.1 * np.square(phi_N).sum() / 4096
        kernel = kernel + phi_Q @ np.linalg.solve(phi_N.T @ phi_N + ridge * np.eye(phi_N.shape[1]), phi_N.T) / 2
        weight = weight + (1 - np.array([dense_model.probability(tokens) for tokens in dense_model.samples])) / 2
    assert close(actual, kernel * weight, 2e-3)


def test_trak_projects_all_parameters_without_bias(material):
    dense_model = Dense(material, "llama")
    phi_Q, phi_N = (
        dense_model.rows(texts, dense_model.margin).numpy() for texts in (dense_model.queries, dense_model.samples)
    )
    exact = phi_Q @ phi_N.T @ np.linalg.inv(phi_N @ phi_N.T + np.square(phi_N).sum() / 1024 * np.eye(4))
    exact = exact * (1 - np.array([dense_model.probability(tokens) for tokens in dense_model.samples]))
    actual = [scores(material, "trak:1024,damping=1@llama", seed=seed) for seed in range(8)]
    assert close(np.mean(actual, axis=0), exact, 0.15)


@pytest.mark.parametrize(("n", "k"), [(20, 7), (7, 20)])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_kernel_inverse_is_equal_from_either_side(n, k, damping):
    phi = np.random.default_rng(0).normal(size=(n, k))
    ridge = damping * np.square(phi).sum() / k
    expected = np.linalg.pinv(phi.T @ phi + ridge * np.eye(k), rcond=1e-7, hermitian=True) @ phi.T
    np.testing.assert_allclose(solved(phi, damping), expected, atol=1e-10)


def test_more_dimensions_than_samples_are_noted(material):
    notes = []
    scores(material, "trak:256@llama", notes)
    assert "k = 256 is not below the 4 samples" in notes[0]


# --- alignment and representations ---------------------------------------------------------------------------------


def test_cka_equals_its_formula(material):
    actual = scores(material, "cka@neox")
    dense_model = Dense(material, "neox")
    for q, query in enumerate(dense_model.queries):
        for i, sample in enumerate(dense_model.samples):
            item = []
            for a, b in zip(dense_model.parts(query), dense_model.parts(sample), strict=True):
                if a.dim() < 2:
                    continue
                x, y = (g if g.shape[0] <= g.shape[1] else g.T for g in (a, b))
                item.append((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))
            assert actual[q, i] == pytest.approx(float(np.mean(item)), rel=1e-3)
    self = aligned([g.float() for g in dense_model.parts(dense_model.queries[0])])
    assert float(self @ self) == pytest.approx(1)


def test_repsim_equals_cosine_of_hidden_states(material):
    loaded = load(material.store, "neox", "cpu")

    def states(texts, layer, last):
        rows = []
        for tokens in loaded.tokens(texts):
            result = loaded.model(torch.tensor([tokens.input_ids]), output_hidden_states=True).hidden_states[layer][0]
            kept = result[[t for t, is_content in enumerate(tokens.is_content) if is_content]]
            rows.append(kept[-1] if last else kept.mean(dim=0))
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    for spec, layer, last in (
        ("", 2, False),
        (":1", 1, False),
        (":0,tokens=last", 0, True),
        (":tokens=last", 2, True),
        (":-2", 1, False),
    ):
        expected = states(material.queries, layer, last) @ states(material.samples, layer, last).T
        np.testing.assert_allclose(scores(material, f"repsim{spec}@neox"), expected.detach(), rtol=1e-4, atol=1e-5)


def test_encoder_cosines(material, tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=384, max_position_embeddings=128, **shape)).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert", chat_template=None)
    model, tokenizer = (kind.from_pretrained(tmp_path / "bert") for kind in (AutoModel, AutoTokenizer))

    def embedded(texts):
        rows = [model(torch.tensor([tokenizer(t.whole)["input_ids"]])).last_hidden_state[0].mean(0) for t in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1).detach()

    expected = embedded(material.queries) @ embedded(material.samples).T
    np.testing.assert_allclose(scores(material, f"encoder:{tmp_path / 'bert'}"), expected, rtol=1e-4)


def test_bm25plus_equals_rank_bm25(material):
    actual = scores(material, "bm25plus")
    other = BM25Plus(words([sample.whole for sample in material.samples]))
    expected = [other.get_scores(words([query.whole])[0]) for query in material.queries]
    assert np.corrcoef(actual.ravel(), np.ravel(expected))[0, 1] > 0.999
    assert not np.allclose(actual, scores(material, "bm25"))


# --- as a user meets them ------------------------------------------------------------------------------------------


def test_command_compares_scores_with_conjugate_gradient(path, tmp_path):
    line = "evaluate spearman --score lissa:1000@neox --score cka@neox --reference cg:1000@neox -f json"
    result = lark(f"{line} --out {tmp_path}", store=store_label(path))
    assert result.code == 0, result.err
    assert result.rows[0]["value"] > 0.98
    assert result.rows[1]["value"] < 0.98
    assert "`cg:1000@neox`: λ = " in result.err
    with Store.open(path) as store:
        same = evaluate.spearman(store, ["lissa:1000@neox"], reference="cg:1000@neox", out=tmp_path)
    assert same.table["value"][0] == result.rows[0]["value"]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("cg:0.1", InputError, "`cg:0.1` needs a model"),
        ("trak", InputError, "`trak` needs a model"),
        ("repsim", InputError, "`repsim` needs a model"),
        ("cg:0.1@llama+neox", InputError, "`cg` takes one checkpoint, not 2"),
        ("cka@nowhere", NameUnknownError, "no checkpoint `nowhere`"),
        ("trak@llama+nowhere", NameUnknownError, "no checkpoint `nowhere`"),
        ("repsim:3@neox", InputError, "no layer 3\n\nhint: choose a layer from 0 to 2"),
        ("repsim:-4@neox", InputError, "no layer -4"),
        ("repsim:first@neox", InputError, "`layer`: input should be a valid integer"),
        ("repsim:tokens=first@neox", InputError, "`tokens`: input should be 'mean' or 'last'"),
        ("cg:much@neox", InputError, "`damping`: input should be a valid number"),
        ("cg:0@neox", InputError, "`damping`: input should be greater than 0"),
        ("cg:nan@neox", InputError, "`damping`: input should be"),
        ("cg:0.1,0.2@neox", InputError, "`damping` is given twice"),
        ("cg:0.1,batch=2@neox", InputError, "`batch` is not a setting of `cg`"),
        ("lissa:0.1,batch=0@neox", InputError, "`batch`: input should be greater than or equal to 1"),
        ("arnoldi:10,steps=5@neox", InputError, "5 steps can't find 10 eigenvectors"),
        ("cg:0.1,sketcher=norm@neox", NameUnknownError, "did you mean `norms`"),
        ("cka:table@neox", InputError, "matches none of the model's"),
        ("gdp:table@neox", InputError, "matches none of the model's"),
        ("ekfac-full:0@neox", InputError, "`damping`: input should be greater than 0"),
        ("ekfac-full:1,sketcher=norms@llama", InputError, "linear"),
        ("lissa:1,change=0@neox", InputError, "`change`: input should be greater than 0"),
        ("trak:1000@neox", InputError, "k = 1000 is not a power of two"),
        ("encoder", InputError, "`encoder` needs a sentence encoder"),
        ("encoder:/nowhere", CheckpointError, "the encoder can't be used"),
    ],
)
def test_invalid_baseline_is_a_clear_error(material, spec, error, message):
    with pytest.raises(error) as raised:
        scores(material, spec)
    assert message in str(raised.value)


def test_split_inverts_join_of_parameters(material):
    held = Parameters((model := load(material.store, "neox", "cpu").model), list(model.named_parameters()))
    whole = held.gradients(load(material.store, "neox", "cpu").tokens(material.samples[:2]))
    assert whole.shape == (2, held.size)
    for name, part in held.split(whole).items():
        assert part.shape == (2, *dict(held.chosen)[name].shape)
