"""`explain`: the tokens that carry a score, from a store, on the command line and as HTML."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pytest
import torch
from helpers.checkpoints import save_checkpoint, save_lora
from helpers.gradients import exact_gradient
from helpers.program import lark
from helpers.texts import qa_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from lark_store import NewText, Store
from lark_store.display.tokens import TOKEN_CSS
from lark_store.errors import CheckpointError, InputError, NameUnknownError, StoreError
from lark_store.modeling.token_texts import token_texts
from lark_store.modeling.tokens import Tokens

AT = {"checkpoint": "base", "sketcher": "small"}
COLUMNS = ["side", "position", "token", "token_id", "is_target", "label", "by_position", "by_target"]
PARTS = ("by_position", "by_target")


@pytest.fixture(scope="module")
def opened(scored_path):
    with Store.open(scored_path) as store:
        yield store


@pytest.fixture(scope="module")
def explainer(opened):
    return opened.explainer(**AT)


@pytest.fixture(scope="module")
def explained(explainer):
    return explainer.explain("q100", "finetune/q1")


def tokens_of(explanation, side):
    rows = explanation.side(side)
    return Tokens(rows["token_id"].to_list(), rows["is_target"].to_list(), "response")


def exact_parts(model, explanation, names=None):
    """Return the dot product and the two norms of both sides' gradients, by plain autograd."""
    gradients = [exact_gradient(model, tokens_of(explanation, side)) for side in ("query", "sample")]
    flat = [torch.cat([g.flatten() for n, g in grad.items() if names is None or names(n)]) for grad in gradients]
    return float(flat[0] @ flat[1]), float(flat[0].norm()), float(flat[1].norm())


def sums(explanation):
    return [float(explanation.side(side)[part].sum()) for side in ("query", "sample") for part in PARTS]


# --- values --------------------------------------------------------------------------------------------------------


def test_all_sums_are_the_exact_score(explained, checkpoints):
    dot, left, right = exact_parts(AutoModelForCausalLM.from_pretrained(checkpoints["base"]).eval(), explained)
    assert explained.total == explained.cosine == pytest.approx(dot / left / right, rel=1e-4)
    assert explained.dot == pytest.approx(dot, rel=1e-4)
    assert sums(explained) == pytest.approx([explained.total] * 4, rel=1e-4)
    assert explained.frame.columns == COLUMNS
    assert explained.frame.filter(~pl.col("is_target"))["by_target"].unique().to_list() == [0]


def test_the_stored_score_is_that_of_top_and_close_to_the_exact_one(opened, explained):
    hits = opened.top("q100", k=100, **AT).frame.filter(source="finetune", sample_id="q1")
    assert explained.is_stored
    assert explained.sketch_score == pytest.approx(hits["score"].item(), abs=1e-6)
    assert explained.noise == pytest.approx(hits["noise"].item(), rel=1e-3)
    assert abs(explained.sketch_score - explained.cosine) < 4 * explained.noise


def test_the_sketches_tell_the_dot_product_too(opened, explainer):
    plain = explainer.explain("q100", "finetune/q1", normalize=False)
    sql = "select grad_norm, loss from sketches where checkpoint = 'base' and variant = 'chatml' and sample_id = ?"
    (query,), (sample,) = (opened.sql(sql, [name]).rows() for name in ("q100", "q1"))
    assert (plain.unit, plain.total) == ("dot", plain.dot)
    assert plain.dot == pytest.approx(plain.cosine * query[0] * sample[0], rel=0.2)  # norms of sketches
    assert (plain.query_loss, plain.sample_loss) == pytest.approx((query[1], sample[1]), rel=1e-4)
    assert sums(plain) == pytest.approx([plain.dot] * 4, rel=1e-4)


def test_the_tokens_are_those_of_the_rendered_texts(opened, explained):
    rendered = {row["variant"]: row["text"] for row in opened.sample_show("finetune/q1").rendered.to_dicts()}
    assert "".join(explained.side("sample")["token"]) == rendered["chatml"]
    targets = explained.side("sample").filter("is_target")
    assert ("".join(targets["token"]), targets["label"].to_list()) == ("no", targets["token"].to_list())


def test_a_new_text_is_explained_as_the_stored_query_is(opened, explainer, explained):
    (row,) = opened.sql("select prompt, response from samples where source = 'test' and sample_id = 'q100'").to_dicts()
    new = explainer.explain(None, "finetune/q1", new=NewText(**row))
    assert (new.query_id, new.is_stored, new.query_variant) == ("new", False, "chatml")
    assert new.cosine == pytest.approx(explained.cosine)
    assert new.sketch_score == pytest.approx(explained.sketch_score, abs=1e-3)  # float16
    torch.testing.assert_close(new.frame["by_position"].to_torch(), explained.frame["by_position"].to_torch())


def test_a_sample_and_itself_have_the_cosine_1(explainer):
    same = explainer.explain("songs/sea-1", "sea-1", query_variant="raw", variant="raw")
    assert (same.query_id, same.sample_id) == ("songs/sea-1", "songs/sea-1")
    assert same.cosine == pytest.approx(1, rel=1e-6)
    assert same.side("query").drop("side").equals(same.side("sample").drop("side"))
    assert not same.side("query").filter("is_target").filter(pl.col("label") != pl.col("token")).is_empty()


def test_the_sketchers_correction_and_mask_apply(scored_copy):
    scored_copy.sketcher_add("scaled", k=4096, correction="adam", min_ndim=2, mask_template=True)
    scored_copy.ingest("base", ["finetune", "test"], ["chatml"], sketcher="scaled")
    result = scored_copy.explain("q100", "finetune/q1", checkpoint="base", sketcher="scaled")
    plain = scored_copy.explain("q100", "finetune/q1", **AT)
    assert result.is_stored
    assert abs(result.cosine - plain.cosine) > 4 * result.noise
    assert abs(result.sketch_score - result.cosine) < 4 * result.noise
    template = result.frame.filter(pl.col("token").is_in(["<|im_start|>", "<|im_end|>"]))
    assert (len(template), template["by_position"].unique().to_list()) == (8, [0])
    assert sums(result) == pytest.approx([result.total] * 4, rel=1e-3)


@pytest.mark.parametrize("correction", ["kfac", "ekfac", "tensor", "adam2"])
def test_other_corrections_agree_with_their_sketches(scored_copy, correction):
    scored_copy.sketcher_add("other", k=4096, correction=correction)
    scored_copy.ingest("base", ["finetune", "test"], ["chatml"], sketcher="other")
    result = scored_copy.explain("q100", "finetune/q1", checkpoint="base", sketcher="other")
    assert result.is_stored
    assert abs(result.sketch_score - result.cosine) < 4 * result.noise
    assert sums(result) == pytest.approx([result.total] * 4, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft uses it
def test_lora_counts_the_adapters_alone(scored_copy, checkpoints, tmp_path):
    saved = save_lora(tmp_path / "lora", checkpoints["base"], tokenizer=True)
    scored_copy.checkpoint_add("lora", tmp_path / "lora")
    result = scored_copy.explain("q100", "finetune/q1", checkpoint="lora", sketcher="small")
    dot, left, right = exact_parts(saved, result, lambda name: "lora_" in name)
    assert result.cosine == pytest.approx(dot / left / right, rel=1e-4)
    assert sums(result) == pytest.approx([result.cosine] * 4, rel=1e-3)


def test_a_predicted_answer_is_the_stored_one(scored_copy):
    scored_copy.variant_add("own-answer", targets="predicted-answer", max_answer=4)
    scored_copy.ingest("base", ["test"], ["own-answer"], sketcher="small")
    result = scored_copy.explain("q100", "finetune/q1", query_variant="own-answer", **AT)
    (stored,) = scored_copy.sql("select answer from predictions where sample_id = 'q100'").rows()
    assert "".join(result.side("query").filter("is_target")["token"]) == stored[0]
    assert result.is_stored
    assert abs(result.sketch_score - result.cosine) < 4 * result.noise


def test_a_chat_has_a_loss_in_each_turn_of_the_assistant(scored_copy, tmp_path):
    turns = [("user", "Is it red?"), ("assistant", "no"), ("user", "Is it blue?"), ("assistant", "yes")]
    chat = {"id": "c1", "messages": [{"role": role, "content": content} for role, content in turns]}
    scored_copy.source_add("chats", write_jsonl(tmp_path / "chats.jsonl", [chat]), stage="finetune")
    result = scored_copy.explain("q100", "chats/c1", **AT)
    assert "".join(result.side("sample").filter("is_target")["token"]) == "noyes"
    assert (result.is_stored, result.variant) == (False, "chatml")


def test_an_explainer_keeps_the_model_and_the_querys_gradient(opened, explainer, explained):
    loaded = explainer._loaded
    model, kept = loaded._model, loaded._last
    again = explainer.explain("q100", "finetune/q1")
    assert again.frame.equals(explained.frame)
    assert explainer.explain("q100", "songs/sea-0").cosine != explained.cosine
    explainer.explain("q101", "finetune/q1")
    assert loaded._model is model
    assert loaded._last is not kept
    once = opened.explain("q101", "finetune/q1", **AT)
    assert once.frame.equals(explainer.explain("q101", "finetune/q1").frame)


def test_threads_take_turns(explainer, explained):
    samples = ["finetune/q1", "songs/sea-0"] * 2
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda name: explainer.explain("q100", name), samples))
    assert [result.sample_id for result in results] == samples
    assert results[0].frame.equals(explained.frame)
    assert results[2].frame.equals(explained.frame)
    assert results[1].frame.equals(results[3].frame)


def test_a_closed_store_explains_nothing(scored_path):
    with Store.open(scored_path) as store:
        kept = store.explainer(**AT)
    with pytest.raises(StoreError, match="closed"):
        kept.explain("q100", "finetune/q1")


def test_a_snapshot_is_explained_too(scored_copy):
    scored_copy.snapshot_create("before")
    with Store.open(scored_copy.path, snapshot="before") as then:
        assert then.explain("q100", "finetune/q1", **AT).is_stored


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"query": "q9999"}, NameUnknownError, "no query `q9999`"),
        ({"query": "sea-1"}, NameUnknownError, "write `songs/sea-1`"),
        ({"query": "songs/none"}, NameUnknownError, "source `songs` has no sample `none`"),
        ({"sample": "finetune/none"}, NameUnknownError, "source `finetune` has no sample `none`"),
        ({"sample": "none"}, NameUnknownError, "no sample `none`"),
        ({"queries": "nowhere"}, NameUnknownError, "no source `nowhere`"),
        ({"variant": "nothing"}, NameUnknownError, "no variant `nothing`"),
        ({"checkpoint": "nothing"}, NameUnknownError, "no checkpoint `nothing`"),
        ({"checkpoint": None}, InputError, "the store has several checkpoints: `base` and `epoch-1`"),
        ({"query": None}, InputError, "no query is given"),
        ({"new": NewText(text="x")}, InputError, "a query id and a new text can't be combined"),
        ({"query": None, "new": NewText(prompt="x")}, InputError, "the new query is incomplete"),
        ({"attention": "none"}, InputError, "attention"),
    ],
)
def test_wrong_names_and_options(opened, arguments, kind, message):
    asked = {"query": "q100", "sample": "finetune/q1", **AT} | arguments
    with pytest.raises(kind) as caught:
        opened.explain(asked.pop("query"), asked.pop("sample"), **asked)
    assert message in str(caught.value)


def test_a_checkpoint_without_weights(scored_copy, tmp_path):
    folder = save_checkpoint(tmp_path / "gone", seed=3)
    scored_copy.checkpoint_add("gone", folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError):
        scored_copy.explain("q100", "finetune/q1", checkpoint="gone", sketcher="small")


def test_a_sample_that_fails_is_named_with_its_reason(scored_copy, tmp_path):
    template = tmp_path / "empty.jinja"
    template.write_text("{{ prompt }}")
    scored_copy.variant_add("promptless", template=str(template))
    with pytest.raises(InputError, match=r"`finetune/q1` as `promptless` has no gradient: .*omits or rewrites"):
        scored_copy.explain("q100", "finetune/q1", variant="promptless", **AT)


def test_imported_vectors_can_not_be_explained(scored_copy, tmp_path):
    frame = pl.DataFrame({"sample_id": ["q1"], "vector": [[1.0, 0.0]]})
    frame.write_parquet(tmp_path / "v.parquet")
    scored_copy.sketcher_import(
        "theirs", tmp_path / "v.parquet", checkpoint="base", source="finetune", variant="chatml"
    )
    with pytest.raises(InputError, match="the sketches of `theirs` were imported"):
        scored_copy.explain("q100", "finetune/q1", checkpoint="base", sketcher="theirs")


def test_a_query_in_two_sources_asks_for_one(scored_copy, tmp_path):
    scored_copy.source_add("test-2", write_jsonl(tmp_path / "t.jsonl", qa_rows(4, start=100)), stage="query")
    with pytest.raises(InputError, match="query `q100` is in `test` and `test-2`"):
        scored_copy.explain("q100", "finetune/q1", **AT)
    assert scored_copy.explain("q100", "finetune/q1", queries="test", **AT).is_stored


# --- tokens, for people --------------------------------------------------------------------------------------------


def test_the_texts_of_tokens_join_to_the_text(checkpoints):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["base"])
    text = "naïve 日本語 🙂🙂 the kidney\n\tno <|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "🙂" in texts
    assert "".join(token_texts(tokenizer, ids[2:3])) == tokenizer.decode(ids[2:3])


HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e\x00\"onmouseover='x' & yes"


@pytest.fixture
def hostile(scored_copy, tmp_path):
    row = {"id": "<b>x", "question": HOSTILE, "context": "Seen.", "answer": "yes"}
    scored_copy.source_add("hostile", write_jsonl(tmp_path / "h.jsonl", [row]), stage="pretrain")
    return scored_copy


def test_hostile_text_is_escaped_in_html(hostile):
    result = hostile.explain("q100", "hostile/<b>x", **AT)
    fragment, page = result.html("sample"), result._repr_html_()
    for text in (fragment, page):
        assert "<script" not in text
        assert "<b>x" not in text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)
    assert "style=" not in fragment
    plain = re.sub(r"</?(div|span)[^>]*>", "", fragment)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;�[31m��" in plain
    assert "&quot;onmouseover=&#x27;x&#x27; &amp; yes" in plain


def test_html_tints_by_sign_and_share(explained):
    fragment = explained.html("sample", by="target")
    spans = re.findall(r'<span(?: class="([^"]*)")? title="([^"]*)">', fragment)
    rows = explained.side("sample")
    assert len(spans) == len(rows)
    largest = rows["by_target"].abs().max()
    for (names, title), value, is_target in zip(spans, rows["by_target"], rows["is_target"], strict=True):
        assert float(title) == pytest.approx(value, rel=1e-3)
        assert ("t-target" in names) == is_target
        tint = re.search(r"t-([pn])([1-5])", names)
        assert (tint is not None) == (abs(value) >= 0.04 * largest)
        if tint:
            assert tint[1] == ("p" if value > 0 else "n")
            assert int(tint[2]) - 1 < 5 * abs(value) / largest <= int(tint[2]) + 1e-6
            assert f".t-{tint[1]}{tint[2]}{{" in TOKEN_CSS
    assert TOKEN_CSS in explained._repr_html_()
    with pytest.raises(InputError, match="`by` is `position` or `target`, not `layer`"):
        explained.html("sample", by="layer")
    with pytest.raises(InputError, match="`side` is `query` or `sample`, not `both`"):
        explained.html("both")


def test_the_result_is_a_sequence_of_tokens_and_a_frame(explained):
    assert len(explained) == len(explained.frame) == len(list(explained))
    assert explained[0].side == "query"
    assert explained[-1].side == "sample"
    assert explained.to_pandas()["by_target"].sum() == pytest.approx(2 * explained.cosine, rel=1e-4)
    assert "stored sketches give" in repr(explained)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_texts_and_the_strongest_tokens(scored_path, explained):
    result = lark("explain q100 finetune/q1 -c base --sketcher small -k 3", store=scored_path)
    assert result.code == 0
    assert "query q100 as chatml" in result.out
    assert "".join(explained.side("sample")["token"]).splitlines()[-1] in result.out
    assert len(re.findall(r"^sample +\d", result.out, re.MULTILINE)) == 3
    assert "\x1b" not in result.out
    assert f"exact small · cosine {explained.cosine:.4f} at `base`" in result.err


def test_the_command_needs_a_number_of_tokens(scored_path):
    for k in (0, -1):
        wrong = lark(f"explain q100 finetune/q1 -c base --sketcher small -k {k}", store=scored_path)
        assert (wrong.code, wrong.out) == (1, "")
        assert wrong.err.startswith(f"error: `-k` must be at least 1, not {k}")


def test_the_command_tints_where_there_are_colours(scored_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = lark("explain q100 finetune/q1 -c base --sketcher small --by target", store=scored_path).out
    assert re.search("\x1b\\[1;7;3[14]m", out)


def test_the_command_gives_every_token_as_data(scored_path, explained):
    line = "explain q100 finetune/q1 -c base --sketcher small --dot -f json"
    rows = lark(line, store=scored_path).rows
    assert list(rows[0]) == COLUMNS
    assert len(rows) == len(explained)
    assert sum(row["by_target"] for row in rows if row["side"] == "query") == pytest.approx(explained.dot, rel=1e-4)


def test_the_command_takes_a_new_text(scored_path):
    line = "explain finetune/q1 --prompt Why? --response no -c base --sketcher small -f csv"
    assert lark(line, store=scored_path).out.startswith(",".join(COLUMNS))
    both = lark("explain q100 finetune/q1 --text x -c base", store=scored_path)
    assert (both.code, "`explain` takes the sample alone, not 2 names" in both.err) == (1, True)
    one = lark("explain q100 -c base", store=scored_path)
    assert (one.code, "takes a query and a sample, not 1 names" in one.err) == (1, True)
