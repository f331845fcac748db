"""Raw data of every source becomes shards that training reads: the same bytes whatever the workers or kills."""

import json
from pathlib import Path

import numpy as np
import pytest

from fovlm.cli.main import main
from fovlm.config.schema import DataSource as Declared
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataset import Dataset
from fovlm.data.index import make_index
from fovlm.data.tables import Block, blocks_of, read_block
from fovlm.errors import UserError
from fovlm.prepare import pipeline
from fovlm.prepare.manifest import load_manifest
from fovlm.prepare.shard_plan import plan_shards
from fovlm.prepare.sources import messages
from helpers import tiny
from helpers.raw_data import VIDEO, bytes_of, conversations, jsonl, made, openvid, parquet, samples_of, table


def test_openvid_gives_frames_and_counts_what_it_rejects_by_cause(tmp_path):
    manifest = made("openvid", openvid(tmp_path / "raw"), tmp_path / "out")
    found = {key: (record, pictures) for key, record, pictures in samples_of(tmp_path / "out")}
    assert set(found) == {"OpenVid-1M-00000000", "OpenVid-1M-00000001"}
    record, pictures = found["OpenVid-1M-00000000"]
    assert record == {"user": "", "assistant": 'red, "blue"\nred', "source": "openvid"}
    assert pictures == ["000.jpg", "001.jpg", "002.jpg"]
    assert manifest.rejected.pop("empty answer", 0) + manifest.rejected.get("no caption", 0) == 1
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    causes = {one["row"]: one["cause"] for one in rejected}
    assert causes[3] == "no such video file"
    assert set(causes) == {2, 3, 4}
    assert sum(manifest.rejected.values()) == 3
    assert (manifest.total("samples"), manifest.total("frames"), manifest.complete) == (2, 6, True)
    assert manifest.hash == load_manifest(tmp_path / "out").hash


def test_long_videos_are_thinned_out(tmp_path):
    made("openvid", openvid(tmp_path / "raw"), tmp_path / "out", max_frames=2)
    assert all(pictures == ["000.jpg", "001.jpg"] for _, _, pictures in samples_of(tmp_path / "out"))


def test_videos_with_questions(tmp_path):
    raw = tmp_path / "raw"
    jsonl(
        raw / "list.jsonl",
        [{"video": "a", "question": "what is this ?", "answer": "red"}, {"video": "../a", "answer": "no"}],
    )
    (raw / "a.mkv").write_bytes(tiny.video(2, format="matroska"))
    manifest = made("videos", raw, tmp_path / "out")
    ((_, record, pictures),) = samples_of(tmp_path / "out")
    assert record == {"user": "what is this ?", "assistant": "red", "source": "videos"}
    assert len(pictures) == 2
    assert manifest.rejected == {"the path leads out of the folder": 1}


def test_cauldron_makes_one_sample_of_the_exchanges_about_a_picture(tmp_path):
    image = {"bytes": tiny.picture(50, 40), "path": None}
    texts = [
        {"user": "what ?", "assistant": "red", "source": "vqa"},
        {"user": "yes ?", "assistant": "no", "source": "vqa"},
    ]
    rows = [{"images": [image], "texts": texts}, {"images": [image, image], "texts": texts}]
    rows.append({"images": [{"bytes": b"nonsense", "path": None}], "texts": texts})
    parquet(tmp_path / "raw" / "vqa" / "train-0.parquet", rows)
    manifest = made("cauldron", tmp_path / "raw", tmp_path / "out")
    ((_, record, pictures),) = samples_of(tmp_path / "out")
    asked = [{"user": "what ?", "assistant": "red"}, {"user": "yes ?", "assistant": "no"}]
    assert (record, pictures) == ({"conversations": asked, "source": "vqa"}, ["jpg"])
    assert manifest.rejected == {"not a picture": 1, "several pictures in one row": 1}


def test_rlaif_v_pairs(tmp_path):
    row = {"image": {"bytes": tiny.picture(9), "path": "x"}, "question": "what ?", "chosen": "red", "rejected": "blue"}
    parquet(tmp_path / "raw" / "0.parquet", [row | {"origin_dataset": "coco"}, row | {"rejected": "red"}])
    manifest = made("rlaif-v", tmp_path / "raw", tmp_path / "out")
    ((_, record, _),) = samples_of(tmp_path / "out")
    assert record == {"user": "what ?", "chosen": "red", "rejected": "blue", "source": "coco"}
    assert manifest.rejected == {"chosen and rejected are the same": 1}
    assert make_index(tmp_path / "out" / "train-00000.tar").kind(0) == "preference"


def test_smoltalk_turns_system_messages_and_stages(tmp_path):
    talk = [
        ("system", "be brief"),
        ("user", "a ?"),
        ("assistant", "b"),
        ("user", "c ?"),
        ("assistant", "d"),
        ("user", "e"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in talk], "source": "magpie"}
    raw = parquet(
        tmp_path / "raw.parquet", [row, {"messages": [{"role": "assistant", "content": "x"}] * 2, "source": "y"}]
    )
    manifest = made("smoltalk", raw, tmp_path / "all")
    ((_, record, pictures),) = samples_of(tmp_path / "all")
    assert (record, pictures) == ({"messages": row["messages"], "source": "magpie"}, [])
    assert manifest.rejected == {"the roles of messages do not alternate between user and assistant": 1}
    rows = conversations(60)
    jsonl(tmp_path / "talk.jsonl", rows)
    parts = [
        made("smoltalk", tmp_path / "talk.jsonl", tmp_path / f"s{stage}", stage=stage).total("samples")
        for stage in (1, 2, 3)
    ]
    assert sum(parts) == 60
    assert min(parts) > 8
    assert {messages.stage_of(row) for row in rows} == {1, 2, 3}


def test_benchmarks_come_with_their_options_and_say_what_is_missing(tmp_path):
    raw = tmp_path / "mvbench"
    (raw / "json").mkdir(parents=True)
    (raw / "video").mkdir()
    row = {"video": "a.mp4", "question": "what ?", "candidates": ["red", "blue"], "answer": "blue"}
    others = [row | {"video": name} for name in ("gone.mp4", "cut.mkv")]
    (raw / "json" / "moving_count.json").write_text(json.dumps([row, *others]))
    (raw / "video" / "a.mp4").write_bytes(VIDEO)
    whole = tiny.video(9, format="matroska")
    (raw / "video" / "cut.mkv").write_bytes(whole[: len(whole) // 2])  # half of it can be read
    with pytest.raises(UserError, match="1 of 3 questions are missing"):
        made("mvbench", raw, tmp_path / "out")
    manifest = made("mvbench", raw, tmp_path / "out", skip_missing=True)
    ((_, record, pictures),) = samples_of(tmp_path / "out")
    assert (record["user"], record["assistant"], record["options"], record["answer"]) == (
        "what ?",
        "blue",
        ["red", "blue"],
        1,
    )
    assert len(pictures) == 3
    assert manifest.rejected == {"no such video or picture file": 1, "video or picture undecodable or cut short": 1}


def test_what_is_made_is_what_training_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))
    made("openvid", openvid(tmp_path / "raw"), tmp_path / "out")
    declared = Declared(kind="video", shards=str(tmp_path / "out" / "train-*.tar"), prompt="what is this ?")
    data = Dataset(
        {"openvid": declared},
        {"openvid": 1.0},
        ChatTokenizer(tiny.tokenizer(), "after_frames", "answer", 64),
        frame_size=14,
    )
    (sample,), bad = data.read(0)
    assert bad is None
    assert sample.frames.shape == (3, 3, 14, 14)
    assert sample.frames.float().mean((1, 2, 3)).tolist() == pytest.approx([0, 10, 20], abs=3)  # the seconds, tenfold


def test_the_bytes_depend_on_the_seed_and_not_on_workers_or_kills(tmp_path, monkeypatch):
    raw = parquet(tmp_path / "raw.parquet", conversations(40))
    made("smoltalk", raw, tmp_path / "one", per_shard=8)
    made("smoltalk", raw, tmp_path / "three", workers=3, per_shard=8)
    whole = bytes_of(tmp_path / "one")
    assert len(whole) == 7  # five shards, the manifest, what was rejected
    assert bytes_of(tmp_path / "three") == whole
    made("smoltalk", raw, tmp_path / "other", per_shard=8, seed=1)
    assert bytes_of(tmp_path / "other")["train-00000.tar"] != whole["train-00000.tar"]

    calls = []

    def killed_in_the_third(job, task):
        calls.append(task.number)
        if len(calls) == 3:
            (job.out / ".train-00002.tar.killed.unfinished").write_bytes(b"half")
            raise KeyboardInterrupt
        return make_shard(job, task)

    make_shard = pipeline.make_shard
    monkeypatch.setattr(pipeline, "make_shard", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        made("smoltalk", raw, tmp_path / "killed", per_shard=8)
    manifest = load_manifest(tmp_path / "killed")
    assert not manifest.complete
    assert set(manifest.shards) == {"train-00000.tar", "train-00001.tar"}
    made("smoltalk", raw, tmp_path / "killed", per_shard=8)
    assert calls == [0, 1, 2, 2, 3, 4]  # what was complete was kept
    assert bytes_of(tmp_path / "killed") == whole


def test_every_row_is_in_one_shard_and_shards_are_mixed():
    blocks = [Block(Path("a"), "jsonl", 64 * n, 64) for n in range(40)]
    tasks = plan_shards(blocks, 100, seed=3)
    rows = [(block.first + int(n)) for task in tasks for block, taken in task.parts for n in taken]
    assert sorted(rows) == list(range(40 * 64))
    assert {task.rows for task in tasks} <= set(range(90, 101))
    assert min(len(task.parts) for task in tasks[:-8]) >= 10
    assert all((np.diff(taken) > 0).all() for task in tasks for _, taken in task.parts)


def test_tables_of_any_length_and_quoting(tmp_path):
    rows = [[f"v{i}", 'two\nlines, "quoted"' if i % 3 else ""] for i in range(150)]
    file = table(tmp_path / "a.csv", ["video", "caption"], rows)
    read = [row for block in blocks_of(file, (("video",),)) for row in read_block(block, ())]
    assert [[row["video"], row["caption"]] for row in read] == rows
    lines = jsonl(tmp_path / "a.jsonl", [{"n": i} for i in range(130)])
    with lines.open("a") as out:
        out.write('\n{"n": 130}\nbroken\n')
    read = [row for block in blocks_of(lines, ()) for row in read_block(block, ())]
    assert read == [*({"n": i} for i in range(131)), "malformed JSON"]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path))
    jsonl(tmp_path / "talk.jsonl", conversations(4))
    out = tmp_path / "pool" / "some-talk"
    assert main(["prepare", "smoltalk", str(tmp_path / "talk.jsonl"), str(out), "--workers", "1"]) == 0
    assert 'some_talk: {kind: text, shards: "pool/some-talk/train-00000.tar"}' in capsys.readouterr().out
    assert main(["prepare", "openvd", "a", "b"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert "did you mean 'openvid'?" in printed.err
