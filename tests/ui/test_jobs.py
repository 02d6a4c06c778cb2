"""Questions to a model, in a second process."""

from __future__ import annotations

import re
import time

import pytest
from helpers.explorer import ODD_ID, Page
from helpers.stores import store_label

from lark_store import NewText, Store
from lark_store.errors import StoreBusyError
from lark_store.ui.jobs import Jobs

SCOPE = {"sketcher": "small", "queries": "test", "query_variant": "chatml", "method": "cosine"}


def finished(client, path):
    """Return a job's page once it is done."""
    end = time.monotonic() + 300
    while True:
        response = client.get(path)
        if 'http-equiv="refresh"' not in response.text:
            return Page(response.text)
        assert time.monotonic() < end
        time.sleep(0.2)


def test_question_is_answered_as_by_top(client, explored_path):
    form = SCOPE | {"checkpoint": "epoch-1", "prompt": "Is organ 3\r\naffected?", "response": "yes", "k": "4"}
    response = client.post("/ask", data=form)
    assert (response.status_code, response.headers["location"][:5]) == (303, "/ask/")
    page = finished(client, response.headers["location"])
    with Store.open(explored_path) as store:
        new = NewText(prompt="Is organ 3\naffected?", response="yes")
        hits = store.top(new=new, checkpoint="epoch-1", sketcher="small", k=4)
    shown = re.findall(r"((?:finetune|songs)/.+) · (?:finetune|pretrain) · ", page.text)
    assert shown[:4] == [f"{hit.source}/{hit.sample_id}" for hit in hits]
    assert "--prompt 'Is organ 3\naffected?' --response yes" in page.text


def test_model_answers_for_itself(client):
    response = client.post("/ask", data=SCOPE | {"checkpoint": "epoch-1", "prompt": "Is organ 3 affected?", "k": "2"})
    page = finished(client, response.headers["location"])
    assert "lark-store trace 'Is organ 3 affected?'" in page.text
    assert len(re.findall(r" · (?:finetune|pretrain) · ", page.text)) == 4


def test_tokens_sum_to_the_score(client, explored_path):
    form = SCOPE | {"checkpoint": "epoch-1", "query": "q100", "sample": f"finetune/{ODD_ID}", "variant": "chatml"}
    response = client.post("/tokens", data=form)
    page = finished(client, response.headers["location"])
    with Store.open(explored_path) as store:
        found = store.explain("q100", f"finetune/{ODD_ID}", checkpoint="epoch-1", sketcher="small")
    assert f"cosine {found.cosine:.4f}" in page.text
    parts = [a for tag, a in page.elements if tag == "span" and a.get("title")]
    values = [float(a["title"]) for a in parts]
    assert sum(values[len(found.side("query")) :]) == pytest.approx(found.cosine, abs=0.01)
    assert client.get(response.headers["location"] + "?by=target").status_code == 200


def test_failed_question_says_why(client):
    form = SCOPE | {"checkpoint": "epoch-1", "query": "q100", "sample": "finetune/nobody", "variant": "chatml"}
    page = finished(client, client.post("/tokens", data=form).headers["location"])
    assert "nobody" in page.text
    assert "hint: " in page.text


def test_one_question_at_a_time_until_it_is_cancelled(explored_path):
    jobs = Jobs(store_label(explored_path), None)
    options = {"checkpoint": "base", "sketcher": "small", "k": 2, "method": "cosine", "query_variant": "chatml"}
    try:
        first = jobs.start("ask", prompt="Is it?", response="no", **options)
        with pytest.raises(StoreBusyError, match="another question is being answered"):
            jobs.start("ask", prompt="Is it?", response="no", **options)
        jobs.cancel(first.number)
        assert first.state == "cancelled"
        second = jobs.start("ask", prompt="Is it?", response="no", **options)
        end = time.monotonic() + 300
        while second.state == "running":
            assert time.monotonic() < end
            time.sleep(0.1)
        assert (second.state, second.error, len(second.answer.proponents)) == ("done", None, 2)
    finally:
        jobs.close()


def test_process_that_dies_is_said_and_replaced(explored_path):
    jobs = Jobs(store_label(explored_path), None)
    options = {"checkpoint": "base", "sketcher": "small", "k": 1, "method": "cosine", "query_variant": "chatml"}
    try:
        job = jobs.start("ask", prompt="Is it?", response="no", **options)
        jobs._process.kill()
        while job.state == "running":
            time.sleep(0.05)
        assert (job.state, job.error.fact) == ("failed", "the process with the model ended")
        again = jobs.start("ask", prompt="Is it?", response="no", **options)
        while again.state == "running":
            time.sleep(0.1)
        assert again.state == "done"
    finally:
        jobs.close()


def test_wrong_forms_are_clear(client):
    for form, said in (
        (SCOPE | {"prompt": ""}, "`prompt` is missing"),
        (SCOPE | {"prompt": "a", "checkpoint": "none"}, "no checkpoint `none`"),
        (SCOPE | {"prompt": "a", "k": "1000"}, "`k` must be a number"),
    ):
        response = client.post("/ask", data=form)
        assert (response.status_code in {400, 404}, said in Page(response.text).text) == (True, True)
    huge = client.post("/ask", data={"prompt": "a" * (2 << 20)})
    assert (huge.status_code, "larger than 1 MiB" in huge.text) == (400, True)
    assert client.post("/ask", content=b"\xff=%ff").status_code == 400


@pytest.mark.parametrize("response", ["yes", None])
def test_question_is_sketched_and_answered_once(explored_path, monkeypatch, response):
    from lark_store.ingest.new_query import NewQuerySketcher
    from lark_store.modeling import answers
    from lark_store.ui.questions import ask

    done = []

    def counted(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: done.append(name) or real(*args, **options))

    counted(NewQuerySketcher, "_sketched")
    counted(answers, "answer_question")
    options = {"checkpoint": "epoch-1", "sketcher": "small", "query_variant": "chatml", "k": 2}
    with Store.open(explored_path) as store:
        found = ask(store, prompt="Is organ 3 affected?", response=response, **options)
        assert done == (["_sketched"] if response else ["answer_question", "_sketched"])
        if response:
            new = NewText(prompt="Is organ 3 affected?", response=response)
            with Store.open(explored_path) as other:
                alone = other.top(new=new, opponents=True, **options)
            assert found.opponents.frame.equals(alone.frame)
            del done[:]
            ask(store, prompt="Is organ 4 affected?", response=response, **options)
            ask(store, prompt="Is organ 4 affected?", response=response, **options | {"checkpoint": "base"})
            assert done == ["_sketched"] * 2
