"""Rows of the scorecard: runs whose shards are at an S3 server, on a cache that does not hold all of them."""

import time

import pytest

from fovlm.checkpoint import store
from fovlm.checkpoint.store import Checkpoints
from fovlm.data.shard_cache import ShardCache
from helpers.servers import s3_server
from helpers.training import rows


@pytest.fixture(scope="module")
def s3(home):
    with s3_server(home, "shards") as env:
        yield env


def test_killed_while_it_reads_from_s3(row, whole, s3):
    """Two ranks that read from S3 killed with SIGKILL.

    The same command resumes; all losses, the weights and the hash of the data are those of local shards.
    """
    at = "s3://shards/data/"
    remote = [f"data.sources.video.shards={at}video-*.tar", f"data.sources.words.shards={at}words-{{00..01}}.tar",
              "data.cache_gb=1.5e-4"]  # fmt: skip
    for trial in row.times(1, 20):
        name = f"s3-{trial}"
        env = whole.env | s3 | {"FOVLM_CACHE": str(whole.home / name / "cache")}
        ranks = whole.forked.start(2, whole.words(name, *remote), env)
        until, killed = time.monotonic() + 60, 2 + trial % 4
        while len(rows(whole.home, name)) < killed and time.monotonic() < until and None in ranks.ended():
            time.sleep(0.01)
        ranks.kill()
        ranks.wait()
        assert len(rows(whole.home, name)) >= killed, ranks.said()
        ranks = whole.forked.start(2, whole.words(name, *remote), env)
        status, problem = ranks.wait(), ""
        if status != [0, 0]:
            problem = f"the resume ended with {status}: {ranks.said()[-800:]}"
        elif [one["loss"] for one in rows(whole.home, name)] != whole.losses:
            problem = "other losses"
        ends = [Checkpoints(whole.run(run)).first_whole(verify=store.verify) for run in (name, "whole")]
        if not problem and len({store.read_state(end).data_hash for end in ends}) != 1:
            problem = "another hash of the data"
        row.check(not (problem or whole.state(name)), f"killed after step {killed}: {problem or whole.state(name)}")
        # What a run holds may exceed the limit until something needs room; what it leaves, nobody holds.
        cache = ShardCache(whole.home / name / "cache" / "shards", 150_000)
        row.check(cache.make_room(), "a shard in the cache is held by nobody and cannot be removed")
