"""`fovlm check` finds what is wrong with shards, `--repair` leaves it out; evaluation sets are drawn and frozen."""

import json
from pathlib import Path
from random import Random

import pytest

from fovlm.cli.main import main
from fovlm.config import schema
from fovlm.data.index import make_index, open_index
from fovlm.data.shards import find_shards, write_shards
from fovlm.errors import UserError
from fovlm.fileio import digest
from fovlm.prepare.check import check_shards, list_shards, problems
from fovlm.prepare.holdout import allocate, draw
from fovlm.prepare.job import Job
from fovlm.prepare.manifest import load_manifest
from fovlm.prepare.pipeline import prepare
from fovlm.prepare.repair import repair
from helpers import tiny


def image(key: str, value: int, answer: str = "red", source: str = "test") -> dict:
    record = tiny.conversation(answer) | {"source": source}
    return {"__key__": key, "json": record, "jpg": tiny.picture(value)}


def text(key: str, answer: str, source: str = "talk") -> dict:
    return {"__key__": key, "json": tiny.conversation(answer) | {"source": source}}


def causes(found) -> dict[str, str]:
    return {entry.key: entry.cause for scan in found for entry in scan.entries if entry.cause}


def looked_at(*patterns: Path, against: list[str] | None = None, decode: bool = True):
    return check_shards([str(pattern) for pattern in patterns], against or [], 1, decode)


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A shard with one of everything, and what is right in between."""
    samples = [
        image("good", 10),
        {**image("cut", 20), "jpg": tiny.picture(20, 64)[:-60]},
        image("empty", 30, answer=" "),
        image("again", 10),
        {"__key__": "odd", "json": b"{nonsense", "jpg": tiny.picture(40)},
        {"__key__": "video", "json": tiny.conversation("blue"), "mp4": tiny.video(2)},
        {"__key__": "pair", "json": {"user": "a", "chosen": "b", "rejected": ""}, "jpg": tiny.picture(50)},
        {"__key__": "tokens", "json": {"token_ids": [1, 2], "loss_mask": [0, 0], "source": "t"}},
        text("words", "yes"),
    ]
    write_shards(tmp_path / "raw" / "train-%05d.tar", samples)
    return tmp_path / "raw"


def test_everything_wrong_is_found_by_cause(damaged):
    found = looked_at(damaged / "*.tar")
    assert causes(found) == {
        "cut": "undecodable picture",
        "empty": "empty answer",
        "again": "duplicate",
        "odd": "malformed JSON",
        "pair": "empty answer",
        "tokens": "empty answer",
    }
    assert "cut" not in causes(looked_at(damaged / "*.tar", decode=False))


def test_repair_copies_what_is_good_and_changes_nothing_else(damaged, tmp_path):
    before = (damaged / "train-00000.tar").read_bytes()
    found = looked_at(damaged / "*.tar")
    assert repair(found, tmp_path / "clean") == 3
    assert (damaged / "train-00000.tar").read_bytes() == before
    index = make_index(tmp_path / "clean" / "train-00000.tar")
    assert index.key == ["good", "video", "words"]
    assert not index.broken
    assert problems(looked_at(tmp_path / "clean" / "*.tar")) == 0
    rejected = [json.loads(line) for line in (tmp_path / "clean" / "rejected.jsonl").read_text().splitlines()]
    assert {one["key"]: one["cause"] for one in rejected} == causes(found)


def test_a_truncated_shard_gives_what_is_left_of_it(tmp_path):
    (path,) = write_shards(tmp_path / "a" / "x-%d.tar", [image(f"k{n}", 10 * n) for n in range(4)])
    data = path.read_bytes()
    path.write_bytes(data[: int(make_index(path).offset[2]) + 700])
    found = looked_at(path)
    assert causes(found) == {"k2": "truncated tar"}
    assert repair(found, tmp_path / "b") == 2
    path.write_bytes(b"no tar at all" * 100)
    assert looked_at(path)[0].cause == "not a readable tar"


def test_a_shard_that_is_not_what_its_manifest_says(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"a{n}"}, {"role": "assistant", "content": "b"}]} for n in range(3)
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(Job("smoltalk", tmp_path / "talk.jsonl", tmp_path / "out"), 1)
    path = tmp_path / "out" / "train-00000.tar"
    assert problems(looked_at(path)) == 0
    path.write_bytes(path.read_bytes().replace(b'"assistant": "b"', b'"assistant": "c"'))
    assert looked_at(path)[0].cause == "not the checksum of the manifest"


def test_without_a_manifest_every_flipped_bit_is_found_by_the_index(tmp_path):
    (path,) = write_shards(tmp_path / "x-%d.tar", [image(f"k{n}", 10 * n) for n in range(4)])
    open_index(path, tmp_path / "cache")
    whole, random = path.read_bytes(), Random(0)
    for _ in range(40):
        at = random.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << random.randrange(8)]) + whole[at + 1 :])
        assert problems(looked_at(path, decode=False)) > 0, at
    path.write_bytes(whole)
    assert problems(looked_at(path)) == 0
    at = int(make_index(path).record_offset[2]) + 512 + 9
    path.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
    found = looked_at(path, decode=False)
    assert found[0].cause.startswith("not the checksum of its index")
    assert causes(found) == {"k2": "checksum mismatch"}


def test_overlap_is_printed_by_content(tmp_path):
    write_shards(tmp_path / "train" / "t-%d.tar", [image("a", 10), image("b", 20), image("c", 30), text("d", "yes")])
    write_shards(tmp_path / "val" / "v-%d.tar", [image("x", 10), image("y", 20, answer="blue"), text("z", " yes ")])
    found = looked_at(tmp_path / "train" / "*.tar", against=[str(tmp_path / "val" / "*.tar")])
    assert causes(found) == {
        "a": "in the evaluation set",
        "b": "pictures of the evaluation set",
        "d": "in the evaluation set",
    }


def test_an_evaluation_set_is_stratified_frozen_and_kept_apart(tmp_path):
    pictures = [image(f"i{n}", 2 * n, f"it is {n}", "vqa") for n in range(60)]
    words = [text(f"t{n}", f"it is {n}") for n in range(30)]
    rare = [text(f"r{n}", f"no {n}", "rare") for n in range(2)]
    write_shards(tmp_path / "a" / "train-%02d.tar", pictures, 16)
    write_shards(tmp_path / "b" / "train-%02d.tar", [*words, *rare], 16)
    pattern = str(tmp_path / "?" / "train-*.tar")
    val = tmp_path / "val"
    manifest = draw(pattern, val, "val", 15, 0, 1)
    assert manifest.strata == {"image vqa": 9, "text rare": 1, "text talk": 5}
    assert sorted(p.name for p in val.glob("*.tar")) == ["val-image-00000.tar", "val-text-00000.tar"]
    assert (
        digest("\n".join(make_index(p).checksum for p in sorted(val.glob("*.tar"))))
        == manifest.hash
        == load_manifest(val).hash
    )
    assert problems(looked_at(val / "*.tar")) == 0

    # The same samples out of shards that are cut otherwise.
    write_shards(tmp_path / "again" / "train-%02d.tar", [*rare, *reversed(words), *pictures], 100)
    same = draw(str(tmp_path / "again" / "*.tar"), tmp_path / "val2", "val", 15, 0, 1)
    assert same.hash == manifest.hash
    assert draw(pattern, tmp_path / "val3", "val", 15, 1, 1).hash != manifest.hash

    # What is left is disjoint from it.
    found = looked_at(Path(pattern), against=[str(val / "*.tar")])
    assert set(causes(found).values()) == {"in the evaluation set"}
    assert repair(found, tmp_path / "rest") == 92 - 15
    assert problems(looked_at(tmp_path / "rest" / "**" / "*.tar", against=[str(val / "*.tar")])) == 0

    # Frozen: asked again it is the same, otherwise it is refused; a change is noticed.
    assert draw(pattern, val, "val", 15, 0, 1).hash == manifest.hash
    with pytest.raises(UserError, match="made with samples 15, not 16"):
        draw(pattern, val, "val", 16, 0, 1)
    shard = val / "val-text-00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"it is", b"it IS"))
    for spoil in (lambda: None, shard.unlink):
        spoil()
        with pytest.raises(UserError, match="is not what was drawn"):
            draw(pattern, val, "val", 15, 0, 1)


def test_an_evaluation_set_is_not_drawn_past_a_damaged_shard(tmp_path):
    paths = write_shards(tmp_path / "train-%02d.tar", [text(f"t{n}", f"it is {n}") for n in range(20)], 10)
    paths[1].write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"train-01\.tar: not a readable tar"):
        draw(str(tmp_path / "train-*.tar"), tmp_path / "val", "val", 5, 0, 1)


def test_the_documented_commands_end_in_the_folders_that_the_ablations_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path / "data"))
    clips = [tiny.clip(f"clip{n}", 2) | {"001.jpg": tiny.picture(9 * n)} for n in range(12)]
    for folder, samples in {"openvid": clips, "cauldron": [image(f"p{n}", 9 * n) for n in range(12)]}.items():
        write_shards(Path("pool") / folder / "train-%05d.tar", samples, 6)
    assert main(["prepare", "val", "pool/*/train-*.tar", "data/val", "--samples", "8", "--workers", "1"]) == 0
    for folder in ("openvid", "cauldron"):
        pattern = f"pool/{folder}/train-*.tar"
        words = ["check", pattern, "--against", "data/val/*.tar", "--repair", f"data/{folder}", "--workers", "1"]
        assert main(words) == 0
    sources = schema.load("A8a").data.sources
    held = {name: find_shards(name, sources[name].shards) for name in ("openvid", "cauldron", "val", "val_cauldron")}
    assert {name: sum(len(make_index(shard).key) for shard in shards) for name, shards in held.items()} == {
        "openvid": 8,
        "cauldron": 8,
        "val": 4,
        "val_cauldron": 4,
    }


def test_what_is_shared_with_an_unreadable_set_is_not_called_nothing(tmp_path):
    (train,) = write_shards(tmp_path / "train-%02d.tar", [text(f"t{n}", f"it is {n}") for n in range(4)])
    (tmp_path / "val.tar").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"--against .*val\.tar: not a readable tar"):
        looked_at(train, against=[str(tmp_path / "val.tar")])


def test_shares_are_exact_and_nobody_is_left_out():
    there = {"a": 1000, "b": 500, "c": 3, "d": 1}
    shares = allocate(there, 100)
    assert sum(shares.values()) == 100
    assert shares["c"] == shares["d"] == 1
    assert shares["a"] / shares["b"] == pytest.approx(2, abs=0.1)
    with pytest.raises(UserError, match="must leave some"):
        allocate(there, 1504)
    with pytest.raises(UserError, match="4 kinds of sources"):
        allocate(there, 3)


def test_shares_end_where_a_small_kind_is_taken_whole():
    shares = allocate({"one": 1, "some": 10, "others": 10}, 20)
    assert sum(shares.values()) == 20
    assert shares["one"] == 1


def test_the_commands_status_and_its_mistakes(damaged, tmp_path, capsys):
    pattern = str(damaged / "train-{00000..00000}.tar")
    assert main(["check", pattern, "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert "empty answer" in printed
    assert "undecodable picture" in printed
    assert main(["check", pattern, "--workers", "1", "--repair", str(tmp_path / "clean")]) == 0
    assert main(["check", pattern, "--repair", str(tmp_path / "clean")]) == 2
    assert main(["check", pattern, "--repair", str(damaged / "train-00000.tar")]) == 2
    with pytest.raises(UserError, match=r"did you mean 'train-00000\.tar'"):
        list_shards([str(damaged / "train-0000.tar")])
    with pytest.raises(UserError, match=rf"it is a folder, take '{damaged}/\*\.tar'"):
        list_shards([str(damaged)])
    with pytest.raises(UserError, match=r"/train-\*/x\.tar'$"):
        list_shards([f"{damaged}/train-*/x.tar"])
    (damaged / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"link'$"):
        list_shards([str(damaged / "link")])
