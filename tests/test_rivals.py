"""Rivals, each held against a dense computation of its formula on models small enough for it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conftest import named, qa_rows, save_checkpoint, save_tokenizer, write_jsonl
from rank_bm25 import BM25Plus
from test_cli import lark
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, GPTNeoXConfig, GPTNeoXForCausalLM

from lark_store import Store, evaluate
from lark_store.errors import CheckpointError, InputError, NameUnknownError
from lark_store.evaluate.material import gather, load
from lark_store.evaluate.rivals import Given, gradients, solvers
from lark_store.evaluate.rivals.cka import aligned
from lark_store.evaluate.rivals.curvature import GaussNewton
from lark_store.evaluate.rivals.gradients import Parameters, parameters_of
from lark_store.evaluate.rivals.trak import solved
from lark_store.evaluate.scorers import matrices
from lark_store.query.lexical import words

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
    given = Given(device="cpu", note=[].append if notes is None else notes.append, **how)
    return matrices(material, [spec], given)[spec]


class Dense:
    """A model in float64, its gradients and its Gauss–Newton matrix by the plain definition."""

    def __init__(self, material, checkpoint, only=""):
        self.loaded = load(material.store, checkpoint, "cpu")
        self.loaded.model.double()
        self.at = {n: p.detach() for n, p in self.loaded.model.named_parameters() if only in n}
        self.queries, self.samples = self.loaded.tokens(material.queries), self.loaded.tokens(material.samples)

    def logits(self, at, tokens):
        made = torch.func.functional_call(self.loaded.model, at, (torch.tensor([tokens.input_ids]),)).logits[0]
        return made[[t - 1 for t, is_target in enumerate(tokens.is_target) if is_target]]

    def labels(self, tokens):
        return torch.tensor([i for i, t in zip(tokens.input_ids, tokens.is_target, strict=True) if t])

    def loss(self, at, tokens):
        return torch.nn.functional.cross_entropy(self.logits(at, tokens), self.labels(tokens))

    def margin(self, at, tokens):
        p = self.logits(at, tokens).softmax(-1).gather(1, self.labels(tokens)[:, None])
        return (p.log() - (1 - p).log()).sum()

    def probability(self, tokens):
        return self.logits(self.at, tokens).softmax(-1).gather(1, self.labels(tokens)[:, None]).mean().item()

    def parts(self, tokens, of=None):
        return list(torch.func.grad(lambda at: (of or self.loss)(at, tokens))(self.at).values())

    def rows(self, some, of=None):
        return torch.stack([torch.cat([g.flatten() for g in self.parts(tokens, of)]) for tokens in some]).detach()

    def curvature(self, some=None):
        """G, (P, P), from the whole Jacobian of each sample's logits."""
        some, rows = self.samples if some is None else some, []
        for tokens in some:
            with sdpa_kernel(SDPBackend.MATH):
                parts = torch.func.jacrev(lambda at, tokens=tokens: self.logits(at, tokens))(self.at)
            j_MVP = torch.cat([part.flatten(2) for part in parts.values()], dim=2)
            for j_VP, p_V in zip(j_MVP, self.logits(self.at, tokens).softmax(-1), strict=True):
                values, vectors = torch.linalg.eigh(torch.diag(p_V) - torch.outer(p_V, p_V))
                root_VV = vectors * values.clamp(min=0).sqrt()
                rows.append(root_VV.T @ j_VP / (len(j_MVP) * len(some)) ** 0.5)
        root_XP = torch.cat(rows).detach()
        return root_XP.T @ root_XP


_DENSE = {}


@pytest.fixture(params=MODELS)
def dense(request, material):
    if request.param not in _DENSE:
        made = Dense(material, request.param)
        _DENSE[request.param] = (made, made.curvature())
    made, matrix = _DENSE[request.param]
    return request.param, made, matrix


def products(material, checkpoint, sketcher=None):
    loaded = load(material.store, checkpoint, "cpu")
    return GaussNewton(parameters_of(material.store, loaded, sketcher), loaded.tokens(material.samples))


# --- the curvature and its inverse ---------------------------------------------------------------------------------


def test_products_are_those_of_the_dense_gauss_newton_matrix(material, dense):
    name, made, matrix = dense
    product = products(material, name)
    v = torch.randn(3, len(matrix), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(product.product(v).double(), v.double() @ matrix, rtol=2e-3, atol=2e-5)
    some = made.curvature([made.samples[i] for i in (1, 3)])
    torch.testing.assert_close(product.product(v, [1, 3]).double(), v.double() @ some, rtol=2e-3, atol=2e-5)
    assert product.diagonal_mean(0) == pytest.approx(float(matrix.diagonal().mean()), rel=0.15)


class Backwards(torch.autograd.Function):
    """An activation that knows its derivative backwards alone, as many fused kernels do."""

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
        return Backwards.apply(x)


def test_a_model_without_derivatives_forwards_is_a_clear_error(material):
    product = products(material, "neox")
    product.held.model.gpt_neox.layers[0].mlp.act = Fused()
    with pytest.raises(CheckpointError, match="the model can't be gone through forwards"):
        product.product(torch.randn(1, product.held.size))


def inverse(material, dense, damping):
    """The scores of a dense solve."""
    name, made, matrix = dense
    ridge = damping * products(material, name).diagonal_mean(0)
    solved_QP = torch.linalg.solve(matrix + ridge * torch.eye(len(matrix)), made.rows(made.queries).T).T
    return (solved_QP @ made.rows(made.samples).T).numpy()


def close(found, expected, rel):
    return np.abs(found - expected).max() <= rel * np.abs(expected).max()


@pytest.mark.parametrize("damping", [0.1, 10])
def test_conjugate_gradient_is_the_dense_solve(material, dense, damping):
    notes = []
    found = scores(material, f"cg:{damping},tolerance=1e-4@{dense[0]}", notes)
    assert close(found, inverse(material, dense, damping), 2e-3)
    assert "G of 4 samples" in notes[0]
    assert "not below" not in notes[0]


def test_conjugate_gradient_that_is_cut_off_says_so(material):
    notes = []
    scores(material, "cg:0.01,steps=2@neox", notes)
    assert "after 2 steps, not below 1e-03: say more `steps=`" in notes[0]


def test_lissa_converges_to_the_dense_solve(material, dense):
    notes = []
    found = scores(material, f"lissa:1000,tolerance=1e-4@{dense[0]}", notes)
    assert "not below" not in notes[0]
    assert close(found, inverse(material, dense, 1000), 2e-3)


def test_lissa_on_a_few_samples_at_a_time_comes_near(material, dense):
    expected = inverse(material, dense, 1000)
    found = scores(material, f"lissa:1000,steps=100,batch=3@{dense[0]}")
    assert close(found, expected, 0.2)
    assert not close(found, expected, 1e-4)  # it is another way, not the same products


def test_lissa_with_too_small_a_scale_is_an_error(material):
    with pytest.raises(InputError, match="LiSSA does not converge with a scale of 1e-05"):
        scores(material, "lissa:1,scale=1e-5@llama")


def test_queries_in_blocks_give_the_same(material, monkeypatch):
    whole = {spec: scores(material, spec) for spec in ("cg:1@llama", "cka@llama")}
    monkeypatch.setattr(gradients, "HELD", 1)
    monkeypatch.setattr(sys.modules[aligned.__module__], "HELD", 1)
    for spec, expected in whole.items():
        np.testing.assert_allclose(scores(material, spec), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("spec", ["cg:1@llama", "arnoldi:2@llama", "trak:256,damping=1@llama", "cka@llama"])
def test_in_half_precision_scores_are_about_the_same(material, spec):
    assert close(scores(material, spec, precision="bfloat16"), scores(material, spec), 0.2)


# --- arnoldi -------------------------------------------------------------------------------------------------------


def test_arnoldi_at_full_rank_is_the_dense_inverse(material):
    name = "llama"
    found = scores(material, f"arnoldi:40,steps=40,sketcher=norms@{name}")
    made = Dense(material, name, only="norm")
    solved_QP = torch.linalg.solve(made.curvature(), made.rows(made.queries).T).T
    assert close(found, (solved_QP @ made.rows(made.samples).T).numpy(), 2e-2)


def test_arnoldi_finds_the_leading_eigenvectors(material, dense):
    name, made, matrix = dense
    notes = []
    found = scores(material, f"arnoldi:4,steps=60@{name}", notes)
    values, vectors = torch.linalg.eigh(matrix)
    on_q, on_z = (made.rows(some) @ vectors[:, -4:] for some in (made.queries, made.samples))
    assert close(found, (on_q / values[-4:] @ on_z.T).numpy(), 1e-2)
    assert f"4 eigenvalues from {values[-1]:.3g}" in notes[0]


def test_arnoldi_of_a_matrix_of_small_rank_stops_where_its_space_ends():
    half, g, (start,) = torch.randn(15, 30, generator=torch.Generator().manual_seed(0)).double().split([12, 2, 1])
    matrix, steps = half.T @ half, []
    basis = solvers.arnoldi(lambda v: v @ matrix, start, 30, 30, steps.append)
    assert len(basis.values_R) == 12
    assert steps[-1] <= 14
    expected = g @ torch.linalg.pinv(matrix, rtol=1e-6, hermitian=True) @ g.T
    torch.testing.assert_close(basis.project(g[0]) @ basis.project(g[1]), expected[0, 1])


def test_a_basis_that_does_not_fit_is_refused(material):
    with pytest.raises(InputError, match=r"1000000000 vectors of \d+ parameters take .* GB"):
        scores(material, "arnoldi:10,steps=1000000000@llama")


# --- trak ----------------------------------------------------------------------------------------------------------


def test_trak_is_its_formula_with_explicit_gradients(material):
    # one parameter of fewer coordinates than bins: the projection is a rotation, so nothing is lost
    found = scores(material, "trak:4096,damping=0.1,sketcher=table@llama+llama-2")
    kernel, weight = 0, 0
    for name in ("llama", "llama-2"):
        made = Dense(material, name, only="embed_tokens")
        phi_Q, phi_N = (made.rows(some, made.margin).numpy() for some in (made.queries, made.samples))
        ridge = 0.1 * np.square(phi_N).sum() / 4096
        kernel = kernel + phi_Q @ np.linalg.solve(phi_N.T @ phi_N + ridge * np.eye(phi_N.shape[1]), phi_N.T) / 2
        weight = weight + (1 - np.array([made.probability(tokens) for tokens in made.samples])) / 2
    assert close(found, kernel * weight, 2e-3)


def test_trak_projects_all_parameters_without_bias(material):
    made = Dense(material, "llama")
    phi_Q, phi_N = (made.rows(some, made.margin).numpy() for some in (made.queries, made.samples))
    exact = phi_Q @ phi_N.T @ np.linalg.inv(phi_N @ phi_N.T + np.square(phi_N).sum() / 1024 * np.eye(4))
    exact = exact * (1 - np.array([made.probability(tokens) for tokens in made.samples]))
    found = [scores(material, "trak:1024,damping=1@llama", seed=seed) for seed in range(8)]
    assert close(np.mean(found, axis=0), exact, 0.15)


@pytest.mark.parametrize(("n", "k"), [(20, 7), (7, 20)])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_kernel_s_inverse_is_the_same_from_either_side(n, k, damping):
    phi = np.random.default_rng(0).normal(size=(n, k))
    ridge = damping * np.square(phi).sum() / k
    expected = np.linalg.pinv(phi.T @ phi + ridge * np.eye(k), rcond=1e-7, hermitian=True) @ phi.T
    np.testing.assert_allclose(solved(phi, damping), expected, atol=1e-10)


def test_more_dimensions_than_samples_are_noted(material):
    notes = []
    scores(material, "trak:256@llama", notes)
    assert "k = 256 is not below the 4 samples" in notes[0]


# --- alignment and representations ---------------------------------------------------------------------------------


def test_cka_is_its_formula_matrix_by_matrix(material):
    found = scores(material, "cka@neox")
    made = Dense(material, "neox")
    for q, query in enumerate(made.queries):
        for i, sample in enumerate(made.samples):
            each = []
            for a, b in zip(made.parts(query), made.parts(sample), strict=True):
                if a.dim() < 2:
                    continue
                x, y = (g if g.shape[0] <= g.shape[1] else g.T for g in (a, b))
                each.append((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))
            assert found[q, i] == pytest.approx(float(np.mean(each)), rel=1e-3)
    self = aligned([g.float() for g in made.parts(made.queries[0])])
    assert float(self @ self) == pytest.approx(1)


def test_repsim_is_the_cosine_of_hidden_states(material):
    loaded = load(material.store, "neox", "cpu")

    def states(texts, layer, last):
        rows = []
        for tokens in loaded.tokens(texts):
            made = loaded.model(torch.tensor([tokens.input_ids]), output_hidden_states=True).hidden_states[layer][0]
            kept = made[[t for t, is_content in enumerate(tokens.is_content) if is_content]]
            rows.append(kept[-1] if last else kept.mean(dim=0))
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    for spec, layer, last in (("", 2, False), (":1", 1, False), (":0,tokens=last", 0, True), (":tokens=last", 2, True)):
        expected = states(material.queries, layer, last) @ states(material.samples, layer, last).T
        np.testing.assert_allclose(scores(material, f"repsim{spec}@neox"), expected.detach(), rtol=1e-4, atol=1e-5)


def test_an_encoder_s_cosines(material, tmp_path):
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


def test_bm25plus_is_that_of_rank_bm25(material):
    found = scores(material, "bm25plus")
    other = BM25Plus(words([sample.whole for sample in material.samples]))
    expected = [other.get_scores(words([query.whole])[0]) for query in material.queries]
    assert np.corrcoef(found.ravel(), np.ravel(expected))[0, 1] > 0.999
    assert not np.allclose(found, scores(material, "bm25"))


# --- as a user meets them ------------------------------------------------------------------------------------------


def test_scores_are_held_against_conjugate_gradient_on_the_command_line(path, tmp_path):
    line = "evaluate spearman --score lissa:1000@neox --score cka@neox --reference cg:1000@neox -f json"
    made = lark(f"{line} --out {tmp_path}", store=named(path))
    assert made.code == 0, made.err
    assert made.rows[0]["value"] > 0.98
    assert made.rows[1]["value"] < 0.98
    assert "`cg:1000@neox`: λ = " in made.err
    with Store.open(path) as store:
        same = evaluate.spearman(store, ["lissa:1000@neox"], reference="cg:1000@neox", out=tmp_path)
    assert same.table["value"][0] == made.rows[0]["value"]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("cg:0.1", InputError, "`cg:0.1` needs a model"),
        ("trak", InputError, "`trak` needs a model"),
        ("repsim", InputError, "`repsim` needs a model"),
        ("cg:0.1@llama+neox", InputError, "`cg` looks at one checkpoint, not at 2"),
        ("cka@nowhere", NameUnknownError, "no checkpoint `nowhere`"),
        ("trak@llama+nowhere", NameUnknownError, "no checkpoint `nowhere`"),
        ("repsim:3@neox", InputError, "no layer 3\n\nhint: its layers are 0 to 2"),
        ("repsim:-1@neox", InputError, "no layer -1"),
        ("repsim:first@neox", InputError, "`layer`: input should be a valid integer"),
        ("repsim:tokens=first@neox", InputError, "`tokens`: input should be 'mean' or 'last'"),
        ("cg:much@neox", InputError, "`damping`: input should be a valid number"),
        ("cg:0@neox", InputError, "`damping`: input should be greater than 0"),
        ("cg:nan@neox", InputError, "`damping`: input should be"),
        ("cg:0.1,0.2@neox", InputError, "`damping` is said twice"),
        ("cg:0.1,batch=2@neox", InputError, "`batch` is no setting of `cg`"),
        ("lissa:0.1,batch=0@neox", InputError, "`batch`: input should be greater than or equal to 1"),
        ("arnoldi:10,steps=5@neox", InputError, "5 steps find no 10 eigenvectors"),
        ("cg:0.1,sketcher=norm@neox", NameUnknownError, "did you mean `norms`"),
        ("cka:table@neox", InputError, "takes none of the model's"),
        ("trak:1000@neox", InputError, "k = 1000 is not a power of two"),
        ("encoder", InputError, "`encoder` needs the files of one"),
        ("encoder:/nowhere", CheckpointError, "the encoder can't be used"),
    ],
)
def test_a_rival_that_can_not_be_asked_is_a_clear_error(material, spec, error, message):
    with pytest.raises(error) as raised:
        scores(material, spec)
    assert message in str(raised.value)


def test_parameters_are_split_as_they_were_joined(material):
    held = Parameters((model := load(material.store, "neox", "cpu").model), list(model.named_parameters()))
    whole = held.gradients(load(material.store, "neox", "cpu").tokens(material.samples[:2]))
    assert whole.shape == (2, held.size)
    for name, part in held.split(whole).items():
        assert part.shape == (2, *dict(held.chosen)[name].shape)
