"""kill -9 anywhere: after any of many kills the store opens, is clean or mended, goes on, and ends as if undisturbed.

`LARK_KILLS=500 pytest tests/reliability/test_kills.py -s` kills as often and prints the outcomes.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from functools import partial

import polars as pl
import pytest
from campaign import BATCH, KINDS, Campaign, Kill, findings, table, undisturbed
from helpers.program import PROGRAM
from helpers.texts import text_rows, write_jsonl
from places import FolderPlace, cluster_place
from processes import Runner
from script import differences, make_files, orphans, read

from lark_store import Store

KILLS = int(os.environ.get("LARK_KILLS", "4"))
SEED = int(os.environ.get("LARK_SEED", "0"))


say = partial(print, flush=True)


def tell(kills: list[Kill], n_inside: int, again: int, total: int) -> None:
    """Print the outcomes of all kills so far."""
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200):
        say(table(kills), findings(kills), sep="\n")
    say(f"{n_inside} kills inside the work of {sorted(KINDS)}; {again} of {total} sketches were computed again")


@pytest.mark.parametrize("kind", ["folder", "cluster"])
def test_store_killed_anywhere_ends_like_an_undisturbed_one(tmp_path, request, kind):
    files = tmp_path / "files"
    place = FolderPlace(tmp_path) if kind == "folder" else cluster_place(tmp_path, request)
    n_kills = KILLS if kind == "folder" else max(1, KILLS // 4)
    files.mkdir()
    (tmp_path / "processes").mkdir()
    make_files(files)
    kills: list[Kill] = []
    n_inside, seed, again = 0, SEED, []
    with Runner(tmp_path / "processes", BATCH) as runner:
        whole = place.fresh("undisturbed")
        seconds = undisturbed(runner, whole, files)
        expected = read(whole)
        while n_inside < n_kills:
            killed = place.fresh(f"killed-{seed}")
            campaign = Campaign(runner, killed, files, seconds, seed, n_kills - n_inside)
            say(f"campaign {seed}: {campaign.n_planned} kills planned")
            try:
                campaign.run()
            finally:
                say("\n".join(map(str, campaign.kills)))
            assert differences(expected, read(killed)) == []
            assert killed.others() == whole.others()
            kills += campaign.kills
            again.append(campaign.computed - campaign.made)
            n_inside += campaign.n_inside
            seed += 1
            tell(kills, n_inside, sum(again), campaign.made * len(again))
    assert max(kill.rows_again for kill in kills) <= BATCH
    assert sum(kill.rows_lost + kill.rows_doubled for kill in kills) == 0
    if n_kills >= 50:
        assert {kill.step.kind for kill in kills if kill.landed == "inside"} >= KINDS


def test_fresh_process_is_killed_and_resumes(tmp_path, checkpoints):
    place, rng = FolderPlace(tmp_path), random.Random(SEED)  # noqa: S311  no secret
    with Store.create(place.store) as store:
        store.checkpoint_add("base", checkpoints["base"])
        store.source_add("songs", write_jsonl(tmp_path / "songs.jsonl", text_rows(150)), stage="pretrain")
        store.sketcher_add("small", k=1024)
    command = [PROGRAM, "ingest", "-c", "base", "-s", "songs", "--variant", "raw", "--sketcher", "small"]
    command += ["--batch-tokens", "32", "--store", place.store]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | place.env
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "base: loading the model\n"
        time.sleep(rng.uniform(0, 1))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with Store.open(place.store) as store:
        assert store.db_check()["repair"].null_count() == 0
    subprocess.run(command, check=True, capture_output=True, env=os.environ | place.env)
    with Store.open(place.store) as store:
        assert store.db_repair().left.is_empty()
        assert store.sql("SELECT count(*), count(DISTINCT row_key) FROM sketches").row(0) == (150, 150)
        assert orphans(store) == []
