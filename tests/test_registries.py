"""A variant costs its own module and an entry in a registry: options, help, docs and searches know it by that alone."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from lark_store.errors import InputError
from lark_store.gradients.corrections import CORRECTIONS, correction_help, kinds_help
from lark_store.gradients.corrections.adam import AdamCorrection
from lark_store.query.methods import METHODS, Method, method_help
from lark_store.query.methods.cosine import Cosine
from lark_store.query.nulls import NULLS, null_help
from lark_store.query.nulls.base import Null
from lark_store.readers import READERS


class EighthRoot(AdamCorrection):
    """A correction of three lines: V^(−1/8)."""

    name = "adam8"
    meaning = "V^(−1/8)"
    exponent = 0.125


class Halved(Cosine):
    """A method of three lines: half the cosine."""

    name = "halved"
    meaning = "half the cosine"

    def weighted(self, cosine_QN, norm_Q, norm_N):  # noqa: ARG002
        return cosine_QN / 2


class Certain(Null):
    """A null that rejects every row."""

    name = "certain"
    meaning = "rejects all"

    def p_values(self, scores):
        return np.full(len(scores.score_N), 1e-6)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Add a correction, a method and a null to the registries."""
    for registry, variant in ((CORRECTIONS, EighthRoot()), (METHODS, Halved()), (NULLS, Certain())):
        monkeypatch.setitem(registry, variant.name, variant)


def test_a_new_correction_is_added_fitted_sketched_and_searched(store):
    store.sketcher_add("plain", k=256)
    added = store.sketcher_add("eighth", k=256, correction="adam8")
    assert (added.correction, added.damping, added.power) == ("adam8", 0.1, None)
    for sketcher in ("plain", "eighth"):
        report = store.ingest("base", ["finetune", "test"], ["chatml"], sketcher=sketcher)
    assert report.notes[0].startswith("fitted the missing second moments of checkpoint `base`")
    cosines = [store.scores(["q100"], checkpoint="base", sketcher=name).matrix for name in ("plain", "eighth")]
    assert not np.allclose(*cosines, atol=1e-3)
    assert store.top("q100", checkpoint="base", sketcher="eighth").score == "eighth · cosine"
    assert store.plan("base", ["songs"], ["raw"], sketcher="eighth").checkpoints["seconds_per_sample"][0] > 0


def test_options_of_other_corrections_are_checked_for_a_new_one(store):
    with pytest.raises(InputError, match="the correction `adam8` has no power"):
        store.sketcher_add("eighth", k=256, correction="adam8", power=0.5)
    with pytest.raises(InputError) as caught:
        store.sketcher_add("eighth", k=256, correction="adam9")
    assert caught.value.hint == "use one of `none`, `tensor`, `adam`, `adam2`, `kfac`, `ekfac`, `adam8`"


def test_a_new_method_ranks_streams_sums_and_tests(scored_copy):
    options = {"checkpoint": "base", "sketcher": "small", "k": 5}
    full, half = (scored_copy.top("q100", method=name, null="signs", **options) for name in ("cosine", "halved"))
    assert half.score == "small · halved"
    assert half.frame["sample_id"].equals(full.frame["sample_id"])
    for column in ("score", "noise"):
        np.testing.assert_array_equal(half.frame[column], full.frame[column] / 2)
    np.testing.assert_allclose(half.frame["p_value"], full.frame["p_value"], rtol=1e-6)
    report = scored_copy.attribute("base", queries="test", sketcher="small", method="halved")
    assert set(report["status"]) == {"scored"}
    best = "select max(score) from influence where method = ? and checkpoint = 'base'"
    cosine, halved = (scored_copy.sql(best, [name]).item() for name in ("cosine", "halved"))
    assert halved == cosine / 2
    assert Method.of("halved-sum") == Method("halved", "sum")


def test_a_new_null_gives_p_values(scored):
    hits = scored.top("q100", checkpoint="base", sketcher="small", null="certain")
    assert set(hits.frame["p_value"]) == {1e-6}
    assert "against `certain`" in hits.how


def test_a_new_file_format_is_read(store, tmp_path, monkeypatch):
    monkeypatch.setitem(READERS, ".lines", lambda path: ({"text": line} for line in path.read_text().splitlines()))
    (tmp_path / "poems.lines").write_text("a rose\na daisy\n", encoding="utf-8")
    assert store.source_add("poems", tmp_path / "poems.lines", stage="pretrain").n_added == 2


def test_help_and_messages_name_new_variants():
    assert "`adam8` (V^(−1/8))" in correction_help()
    assert kinds_help("and") == "`adam` (also used by `adam2` and `adam8`), `kfac` and `ekfac`"
    assert "`halved` (half the cosine)" in method_help()
    assert "`certain` (rejects all)" in null_help()
    with pytest.raises(InputError) as caught:
        Method.of("quartered")
    assert "`centred`, `halved`, `tracin`, `bm25`" in caught.value.hint


SCRIPT = """
from lark_store.gradients.corrections import CORRECTIONS
from lark_store.query.methods import METHODS
from test_registries import EighthRoot, Halved
CORRECTIONS["adam8"], METHODS["halved"] = EighthRoot(), Halved()
from lark_store.cli.app import app
for command in ("sketcher add", "top"):
    app([*command.split(), "--help"], standalone_mode=False)
from lark_store.query.sql.reference import reference
print(reference())
"""


def test_the_programs_help_and_reference_name_new_variants():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "1000"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for text in (
        "adam8 (V^(−1/8))",
        "halved (half the cosine)",
        "adam2, kfac, ekfac, adam8 or imported",
    ):
        assert text in done.stdout
