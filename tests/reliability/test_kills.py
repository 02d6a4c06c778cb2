"""kill -9 anywhere: after any of many kills the store opens, is clean or mended, goes on, and ends as if undisturbed.

`LARK_KILLS=500 pytest tests/reliability/test_kills.py -s` kills as often and prints what came of it.
"""

from __future__ import annotations

import os
from functools import partial

import polars as pl
from campaign import BATCH, KINDS, Campaign, Kill, findings, table, undisturbed
from places import FolderPlace
from processes import Runner
from script import differences, make_files, read

KILLS = int(os.environ.get("LARK_KILLS", "50"))
SEED = int(os.environ.get("LARK_SEED", "0"))


say = partial(print, flush=True)


def test_a_store_that_is_killed_anywhere_ends_as_one_that_never_was(tmp_path):
    files, place = tmp_path / "files", FolderPlace(tmp_path)
    files.mkdir()
    (tmp_path / "processes").mkdir()
    make_files(files)
    kills: list[Kill] = []
    n_inside, seed, again = 0, SEED, []
    with Runner(tmp_path / "processes") as runner:
        whole = place.fresh("undisturbed")
        seconds = undisturbed(runner, whole, files)
        expected = read(whole)
        while n_inside < KILLS:
            killed = place.fresh(f"killed-{seed}")
            campaign = Campaign(runner, killed, files, seconds, seed, KILLS - n_inside)
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
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200):
        say(table(kills), findings(kills), sep="\n")
    made = campaign.made * len(again)
    say(f"{n_inside} kills inside, in {len(again)} stores; {sum(again)} of {made} sketches were computed again")
    assert max(kill.rows_again for kill in kills) <= BATCH
    assert sum(kill.rows_lost + kill.rows_doubled for kill in kills) == 0
    if KILLS >= 50:
        assert {kill.step.kind for kill in kills if kill.landed == "inside"} >= KINDS
