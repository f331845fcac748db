"""Odd rows, other encodings, missing files and user errors: counted, or one line."""

import json
import sys
from dataclasses import replace

import pytest

from fovlm.cli.main import main
from fovlm.errors import SampleError, UserError
from fovlm.prepare.job import Job
from fovlm.prepare.manifest import exclusive
from fovlm.prepare.sources import messages
from helpers import tiny
from helpers.raw_data import VIDEO, conversations, jsonl, made, parquet, table


def test_a_folder_of_other_settings_or_input_is_not_mixed(tmp_path):
    raw = jsonl(tmp_path / "talk.jsonl", conversations(4))
    made("smoltalk", raw, tmp_path / "out")
    with pytest.raises(UserError, match="made with seed 0, not 1"):
        made("smoltalk", raw, tmp_path / "out", seed=1)
    jsonl(raw, conversations(5))
    with pytest.raises(UserError, match="has changed since"):
        made("smoltalk", raw, tmp_path / "out")


def test_mistakes_are_reported_in_one_line(tmp_path):
    file = table(tmp_path / "x.csv", ["video", "captions"], [["a", "b"]])
    with pytest.raises(
        UserError,
        match=r"x\.csv has no column 'caption' \(did you mean 'captions'\?\); its columns are: video, captions",
    ):
        made("openvid", file, tmp_path / "out")
    with pytest.raises(UserError, match="no such file or folder"):
        made("openvid", tmp_path / "y.csv", tmp_path / "out")
    with pytest.raises(UserError, match=r"holds no \*\.parquet"):
        made("cauldron", tmp_path, tmp_path / "out")
    table(tmp_path / "x.csv", ["video", "caption"], [["a", "b"]])
    with pytest.raises(UserError, match=r"none of the 1 videos .*looked in .*/video, .*--media DIR"):
        made("openvid", file, tmp_path / "out")
    (tmp_path / "z.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="not a readable parquet"):
        made("cauldron", tmp_path / "z.parquet", tmp_path / "out2")


def test_without_pyarrow_parquet_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "z.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="pip install 'pyarrow"):
        made("cauldron", tmp_path / "z.parquet", tmp_path / "out")


def test_a_row_without_a_value_is_bad_not_fatal(tmp_path):
    with pytest.raises(SampleError, match="no messages"):
        list(messages.read({"messages": None}, replace(Job("smoltalk", tmp_path, tmp_path))))


def test_a_row_of_the_wrong_type_is_rejected_and_the_others_are_made(tmp_path):
    (tmp_path / "a.webm").write_bytes(VIDEO)
    (tmp_path / "folder.mp4").mkdir()
    odd = ["x" * 300, "x\0y", "folder.mp4"]
    jsonl(tmp_path / "t.jsonl", [{"video": name, "answer": "Red."} for name in ["a", *odd]])
    assert made("videos", tmp_path, tmp_path / "v").rejected == {"no such video file": len(odd)}

    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, talk[1]]
    jsonl(tmp_path / "talk.jsonl", [{"messages": talk}, {"messages": 5}, {"messages": parts}])
    found = made("smoltalk", tmp_path / "talk.jsonl", tmp_path / "s")
    assert (found.total("samples"), sum(found.rejected.values())) == (2, 1)

    picture = {"bytes": tiny.picture(9), "path": None}
    texts = [{"user": "What?", "assistant": "Red.", "source": "s"}]
    parquet(tmp_path / "c.parquet", [{"images": [picture], "texts": t} for t in (texts, [None])])
    assert made("cauldron", tmp_path / "c.parquet", tmp_path / "c").total("samples") == 1
    empty = parquet(tmp_path / "e.parquet", [{"images": [picture], "texts": t} for t in (texts, [])])
    assert made("cauldron", empty, tmp_path / "e").rejected == {"no texts": 1}
    parquet(tmp_path / "i.parquet", [{"images": 5, "texts": texts}])
    with pytest.raises(UserError, match="images are not a list"):
        made("cauldron", tmp_path / "i.parquet", tmp_path / "i")
    pair = {"question": "What?", "chosen": "Red.", "rejected": "Blue."}
    jsonl(tmp_path / "r.jsonl", [pair | {"image": image} for image in (5, "x" * 300, "folder.mp4")])
    with pytest.raises(UserError, match="no sample could be made of the 3 rows"):
        made("rlaif-v", tmp_path / "r.jsonl", tmp_path / "r")


def test_the_first_row_need_not_have_every_column(tmp_path):
    (tmp_path / "a.webm").write_bytes(VIDEO)
    rows = [{"video": "a"}, {"video": "a", "answer": "Red."}]
    jsonl(tmp_path / "t.jsonl", rows)
    (tmp_path / "t.json").write_text(json.dumps(rows))
    for name in ("t.jsonl", "t.json"):
        found = made("videos", tmp_path / name, tmp_path / f"out-{name}")
        assert (found.total("samples"), found.rejected) == (1, {"no answer": 1})


def test_a_csv_of_another_encoding_is_read(tmp_path):
    (tmp_path / "a.webm").write_bytes(VIDEO)
    (tmp_path / "t.csv").write_bytes("video,caption,m\u00e9thode\na.webm,A caf\u00e9.,x\n".encode("latin-1"))
    assert made("openvid", tmp_path, tmp_path / "out").total("samples") == 1


def test_videos_that_were_not_found_are_made_once_they_are(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.webm").write_bytes(VIDEO)
    table(tmp_path / "raw" / "t.csv", ["video", "caption"], [["a.webm", "Red."]])
    with pytest.raises(UserError, match="give --media DIR"):
        made("openvid", tmp_path / "raw", tmp_path / "out")
    found = made("openvid", tmp_path / "raw", tmp_path / "out", media=tmp_path / "elsewhere")
    assert (found.total("samples"), found.complete) == (1, True)


def test_shards_with_too_many_missing_files_are_made_again(tmp_path):
    for folder, names in (("wrong", "a"), ("right", "ab")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.webm").write_bytes(VIDEO)
    asked = table(tmp_path / "t.csv", ["file", "a"], [["a.webm", "Red."], ["b.webm", "Blue."]])
    settings = {"columns": (("video", "file"), ("answer", "a")), "max_bad": 0.1}
    for _ in range(2):
        with pytest.raises(UserError, match=r"1 of 2 rows are rejected.*correct them, or --media"):
            made("table", asked, tmp_path / "out", media=tmp_path / "wrong", **settings)
    assert made("table", asked, tmp_path / "out", media=tmp_path / "right", **settings).total("samples") == 2


def test_a_data_set_that_is_partly_there_is_prepared_as_far_as_it_goes(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "v0.mp4").write_bytes(VIDEO)
    table(raw / "OpenVid-1M.csv", ["video", "caption"], [[f"v{n}.mp4", "Red."] for n in range(12)])
    found = made("openvid", raw, tmp_path / "out", per_shard=3)
    assert (found.total("samples"), found.rejected) == (1, {"no such video file": 11})
    for n in range(12):
        (raw / f"v{n}.mp4").write_bytes(VIDEO)
    found = made("openvid", raw, tmp_path / "out", per_shard=3)
    assert (found.total("samples"), found.rejected) == (10, {"no such video file": 2})  # those of a shard that had some


def test_a_part_without_any_conversation_says_so(tmp_path):
    raw = jsonl(tmp_path / "talk.jsonl", conversations(1))
    stage = next(s for s in (1, 2, 3) if s != messages.stage_of(conversations(1)[0]))
    with pytest.raises(UserError, match=f"of the 1 rows in .*mostly: they are of other stages than {stage}"):
        made("smoltalk", raw, tmp_path / "out", stage=stage)


def test_what_could_not_be_read_at_all_is_made_once_it_can(tmp_path):
    (tmp_path / "a.webm").write_bytes(b"not yet")
    table(tmp_path / "t.csv", ["video", "caption"], [["a.webm", "Red."]])
    with pytest.raises(UserError, match="no sample could be made"):
        made("openvid", tmp_path, tmp_path / "out")
    (tmp_path / "a.webm").write_bytes(VIDEO)
    assert made("openvid", tmp_path, tmp_path / "out").total("samples") == 1


def test_tables_that_repeat_each_other_are_not_read_together(tmp_path):
    (tmp_path / "a.webm").write_bytes(VIDEO)
    for name in ("OpenVid-1M", "OpenVidHD"):
        table(tmp_path / f"{name}.csv", ["video", "caption"], [["a.webm", "Red."]])
    with pytest.raises(UserError, match=r"would come twice: give .*OpenVid-1M\.csv as IN"):
        made("openvid", tmp_path, tmp_path / "both")
    assert made("openvid", tmp_path / "OpenVidHD.csv", tmp_path / "one").total("samples") == 1

    talk = [{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}]
    for name in ("all", "part"):
        parquet(tmp_path / "talk" / "data" / name / "train-0.parquet", talk)
    with pytest.raises(UserError, match=r"would come twice: give .*/data/all as IN"):
        made("smoltalk", tmp_path / "talk", tmp_path / "chats")
    assert made("smoltalk", tmp_path / "talk" / "data" / "all", tmp_path / "chats").total("samples") == 1


def test_two_commands_do_not_write_into_one_folder(tmp_path):
    jsonl(tmp_path / "t.jsonl", [{"messages": []}])
    with exclusive(tmp_path / "out"), pytest.raises(UserError, match="another command is writing"):
        made("smoltalk", tmp_path, tmp_path / "out")


def test_a_folder_that_cannot_be_written_to_is_reported_in_one_line(tmp_path, capsys):
    table(tmp_path / "t.csv", ["video", "caption"], [["a.webm", "Red."]])
    assert main(["prepare", "openvid", str(tmp_path), str(tmp_path / "t.csv"), "--workers", "1"]) == 2
    assert f"{tmp_path / 't.csv'}: File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smoltalk", "raw", "raw"], "raw holds the raw data: take another folder for OUT"),
        (["smoltalk", "raw", "out", "--name", "a/b"], "--name a/b"),
        (["smoltalk", "raw", "out", "--samples", "5"], "--samples is for val"),
    ],
)
def test_commands_that_would_not_do_what_they_say(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "raw" / "t.jsonl", conversations(2))
    assert main(["prepare", *words, "--workers", "1"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["raw", "t.jsonl"]
