"""The general readers: table, llava, messages. Rows about one file are one sample; bad rows are counted and named."""

import base64
import json
from pathlib import Path

import pytest

from fovlm.cli.main import main
from fovlm.data.tables import blocks_of, read_block
from fovlm.errors import UserError
from fovlm.prepare.manifest import load_manifest
from helpers import tiny
from helpers.raw_data import VIDEO, bytes_of, jsonl, made, parquet, samples_of, table

PICTURE = tiny.picture(50)
COLUMNS = (("image", "file"), ("question", "q"), ("answer", "a"))


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICTURE)
    return folder


def talk(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": who, "value": value} for who, value in turns]


def records(out: Path) -> list[tuple[dict, int]]:
    return sorted(((record, len(files)) for _, record, files in samples_of(out)), key=str)


@pytest.mark.parametrize("format", ["csv", "jsonl", "json", "parquet"])
def test_rows_about_one_file_are_read_as_one(tmp_path, format):
    """Neighbours, also across the blocks of a text file; in a JSON list also those further away."""
    names = ["a"] * 3 + ["b"] + ["c"] * 150 + ["d", "a"]
    rows = [{"file": name, "a": str(n)} for n, name in enumerate(names)]
    file = tmp_path / f"t.{format}"
    if format == "csv":
        table(file, ["file", "a"], [[row["file"], row["a"]] for row in rows])
    elif format == "json":
        file.write_text(json.dumps(rows))
    else:
        {"jsonl": jsonl, "parquet": lambda f, r: parquet(f, r, group=1000)}[format](file, rows)
    blocks = blocks_of(file, (("file",),), ("file",))
    found = [row for block in blocks for row in read_block(block, ("file", "a"))]
    assert len(found) == sum(block.rows for block in blocks)
    files = [{row["file"] for _, row in one["rows"]} for one in found]
    apart = [["a"], ["b"], ["c"], ["d"], ["a"]]
    assert files == [set(one) for one in (apart[:4] if format == "json" else apart)]
    lines = sorted((line, row["a"]) for one in found for line, row in one["rows"])
    assert lines == [(n, str(n)) for n in range(len(names))]


def test_rows_with_the_bytes_of_a_picture_are_not_compared(tmp_path):
    rows = [{"file": {"bytes": PICTURE, "path": "x"}, "q": "what ?", "a": str(n)} for n in range(5)]
    manifest = made("table", parquet(tmp_path / "t.parquet", rows, group=3), tmp_path / "out", columns=COLUMNS)
    assert (manifest.total("samples"), manifest.total("rows")) == (5, 5)


def test_a_table_of_pictures_videos_and_texts(tmp_path):
    media = pictures(tmp_path / "media", "p/a.jpg")
    (media / "v.mp4").write_bytes(VIDEO)
    rows = [
        {"file": "p/a.jpg", "q": "what ?", "a": "red"},
        {"file": "p/a.jpg", "q": "how ?", "a": "so"},
        {"film": "v", "q": "", "a": "a film"},
        {"film": str(media / "v.mp4"), "a": 3},
        {"q": "why ?", "a": "because", "source": "mine"},
    ]
    raw = jsonl(tmp_path / "t.jsonl", rows)
    columns = (*COLUMNS, ("video", "film"))
    manifest = made("table", raw, tmp_path / "out", media=media, columns=columns)
    several = [{"user": "what ?", "assistant": "red"}, {"user": "how ?", "assistant": "so"}]
    assert records(tmp_path / "out") == sorted(
        [
            ({"conversations": several, "source": "table"}, 1),
            ({"user": "", "assistant": "a film", "source": "table"}, 3),
            ({"user": "", "assistant": "3", "source": "table"}, 3),
            ({"user": "why ?", "assistant": "because", "source": "mine"}, 0),
        ],
        key=str,
    )
    assert (manifest.total("rows"), manifest.total("samples"), manifest.rejected) == (5, 4, {})


@pytest.mark.parametrize("format", ["csv", "jsonl", "json", "parquet"])
def test_a_table_of_texts_alone(tmp_path, format):
    """No column has files: every row is a sample, also next to an equal one. One without an answer is named."""
    cells = [["why ?", f"because {n // 2}"] for n in range(11)] + [["how ?", ""]]
    rows = [{"q": question, "a": answer} for question, answer in cells]
    raw = tmp_path / f"t.{format}"
    write = {"csv": lambda f, r: table(f, ["q", "a"], cells), "jsonl": jsonl, "parquet": parquet}
    write.get(format, lambda f, r: f.write_text(json.dumps(r)))(raw, rows)
    made("table", raw, tmp_path / "out", columns=COLUMNS[1:], max_bad=0.1)
    assert records(tmp_path / "out") == sorted(
        [({"user": q, "assistant": a, "source": "table"}, 0) for q, a in cells[:-1]], key=str
    )
    (rejected,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert (rejected["row"], rejected["cause"]) == (11, "no a")


def test_llava(tmp_path):
    pictures(tmp_path / "media", "a.jpg", "b.jpg")
    asked = talk(("human", "<image>\nwhat ?"), ("gpt", "red"))
    longer = talk(("human", "how ?\n<image>"), ("gpt", "so"), ("human", "why ?"), ("gpt", "because"))
    rows = [
        {"id": 1, "image": "a.jpg", "conversations": asked},
        {"id": 2, "image": "b.jpg", "conversations": asked},
        {"id": 3, "image": "a.jpg", "conversations": longer},
        {"id": 4, "conversations": talk(("human", "hello ?"), ("gpt", "yes"))},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    made("llava", tmp_path / "llava.json", tmp_path / "out", media=tmp_path / "media")
    roles = ["user", "assistant"] * 2
    said = ["how ?", "so", "why ?", "because"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    one = {"user": "what ?", "assistant": "red"}
    assert records(tmp_path / "out") == sorted(
        [
            ({"conversations": [one, {"messages": turns}], "source": "llava"}, 1),
            (one | {"source": "llava"}, 1),
            ({"user": "hello ?", "assistant": "yes", "source": "llava"}, 0),
        ],
        key=str,
    )


PARTS = {
    "a path in the part": ([{"type": "image", "image": "a.jpg"}], {}),
    "a path in a column": ([{"type": "image"}], {"images": ["a.jpg"]}),
    "a data URL": (
        [{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(PICTURE).decode()}}],
        {},
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_messages_with_typed_parts(tmp_path, name):
    part, more = PARTS[name]
    pictures(tmp_path / "media", "a.jpg")
    content = [*part, {"type": "text", "text": "what ?"}]
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]} | more,
        {"messages": [{"role": "user", "content": "a ?"}, {"role": "assistant", "content": "b"}]},
    ]
    made("messages", jsonl(tmp_path / "t.jsonl", rows), tmp_path / "out", media=tmp_path / "media")
    assert records(tmp_path / "out") == [
        ({"user": "a ?", "assistant": "b", "source": "messages"}, 0),
        ({"user": "what ?", "assistant": "red", "source": "messages"}, 1),
    ]


def test_videos_in_a_folder_of_parquet_files_with_keys_of_a_json_column(tmp_path):
    """As FineVideo has them: bytes of an mp4, and what is known about it in a struct or a JSON text."""
    about = [{"title": f"film {n}", "qa": [{"q": f"{k} ?", "a": f"{n}{k}"} for k in range(n)]} for n in range(4)]
    for n in (0, 1):
        parquet(tmp_path / "raw" / f"{n}.parquet", [{"mp4": VIDEO, "json": about[n]}])
    parquet(tmp_path / "raw" / "deeper" / "2.parquet", [{"mp4": VIDEO, "json": json.dumps(about[n])} for n in (2, 3)])
    made("table", tmp_path / "raw", tmp_path / "titles", columns=(("video", "mp4"), ("answer", "json.title")))
    said = [{"user": "", "assistant": f"film {n}", "source": "table"} for n in range(4)]
    assert records(tmp_path / "titles") == [(record, 3) for record in said]
    columns = (("video", "mp4"), ("question", "json.qa.q"), ("answer", "json.qa.a"))
    manifest = made("table", tmp_path / "raw", tmp_path / "asked", columns=columns, max_bad=0.25)
    assert manifest.rejected == {"no json.qa.a": 1}  # the film without a question
    one = {"user": "0 ?", "assistant": "10", "source": "table"}
    several = [[{"user": f"{k} ?", "assistant": f"{n}{k}"} for k in range(n)] for n in (2, 3)]
    more = [{"conversations": some, "source": "table"} for some in several]
    assert records(tmp_path / "asked") == [(record, 3) for record in sorted([one, *more], key=str)]
    with pytest.raises(UserError, match=r"no column 'jsn.title' .did you mean"):
        made("table", tmp_path / "raw", tmp_path / "no", columns=(("video", "mp4"), ("answer", "jsn.title")))


def test_ratings_of_finevision_choose_exchanges(tmp_path):
    texts = [{"user": f"{n} ?", "assistant": str(n)} for n in range(3)]
    row = {"images": [{"bytes": PICTURE, "path": None}], "texts": texts, "source": "fine"}
    rows = [row | {"relevance_ratings": rated} for rated in ([5, 2, 4], [1, 1, None], [5])]
    raw = parquet(tmp_path / "raw.parquet", rows)
    manifest = made("finevision", raw, tmp_path / "out", ratings=(("relevance", 4),))
    assert records(tmp_path / "out") == [({"conversations": [texts[0], texts[2]], "source": "fine"}, 1)]
    assert manifest.rejected == {"no relevance_ratings for each of the texts": 1, "rated too low": 1}


def test_the_bytes_do_not_depend_on_workers(tmp_path):
    names = [f"{n}.jpg" for n in range(12)]
    media = pictures(tmp_path / "media", *names)
    rows = [{"file": name, "q": f"{k} ?", "a": str(k)} for name in names for k in range(3)]
    raw = jsonl(tmp_path / "t.jsonl", rows)
    for workers in (1, 3):
        made("table", raw, tmp_path / f"{workers}", workers, media=media, columns=COLUMNS, per_shard=4)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "3")
    assert load_manifest(tmp_path / "1").total("samples") == 12
    made("table", raw, tmp_path / "1", media=media, columns=COLUMNS, per_shard=4)  # whole: nothing to do


GOOD = {"image": "a.jpg", "conversations": talk(("human", "<image>what ?"), ("gpt", "red"))}
BAD = {
    "no such picture file": GOOD | {"image": "gone.jpg"},
    "the path leads out of the folder": GOOD | {"image": "../a.jpg"},
    "the marks <image> and <video> do not fit the files": GOOD | {"conversations": talk(("human", "?"), ("gpt", "no"))},
    "the roles of messages do not alternate between user and assistant": GOOD
    | {"conversations": talk(("gpt", "red"), ("human", "<image>what ?"))},
    "empty answer": GOOD | {"conversations": talk(("human", "<image>what ?"), ("gpt", " "))},
    "no conversations": {"image": "a.jpg"},
    "several pictures or videos in one row": {
        "image": ["a.jpg", "a.jpg"],
        "conversations": talk(("human", "<image><image>what ?"), ("gpt", "red")),
    },
    "a URL in place of a file": GOOD | {"image": "https://example.org/a.jpg"},
}


def test_bad_rows_are_counted_by_cause_and_named(tmp_path, capsys):
    pictures(tmp_path / "media", "a.jpg")
    raw = jsonl(tmp_path / "t.jsonl", [GOOD, *BAD.values()])
    with raw.open("a") as file:
        file.write('{"image": "a.jpg", "conv')  # a line cut in half
    words = ["prepare", "llava", str(raw), str(tmp_path / "out"), "--media", str(tmp_path / "media"), "--workers", "1"]
    assert main([*words, "--max-bad", "0.95"]) == 0
    printed = capsys.readouterr().out
    manifest = load_manifest(tmp_path / "out")
    assert manifest.rejected == dict.fromkeys([*BAD, "malformed JSON"], 1)
    assert (manifest.total("rows"), manifest.total("samples")) == (10, 1)
    assert "  rejected 1 of 10 rows: no such picture file (gone.jpg of row 1 of t.jsonl)" in printed
    assert "  rejected 1 of 10 rows: malformed JSON (row 9 of t.jsonl)" in printed
    assert f'out: {{kind: mixed, shards: "{tmp_path}/out/train-00000.tar"' in printed
    assert main(words) == 2  # the same folder, by default at most a tenth
    assert "9 of 10 rows are rejected, more than --max-bad 0.1 of all" in capsys.readouterr().err


def test_bad_rows_of_messages_are_counted_by_cause(tmp_path):
    pictures(tmp_path / "media", "a.jpg")
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    good = [*shown, {"role": "assistant", "content": "red"}]
    bad = {
        "no such picture file": {"images": ["gone.jpg"], "messages": good},
        "more files than parts of messages that show one": {"images": ["a.jpg", "a.jpg"], "messages": good},
        "fewer files than parts of messages that show one": {"messages": good},
        "the roles of messages do not alternate between user and assistant": {
            "images": ["a.jpg"],
            "messages": good[::-1],
        },
        "empty answer": {"images": ["a.jpg"], "messages": [*shown, {"role": "assistant", "content": None}]},
        "no messages": {"images": ["a.jpg"], "messages": []},
    }
    raw = jsonl(tmp_path / "t.jsonl", [{"images": ["a.jpg"], "messages": good}, *bad.values()])
    raw.write_text(raw.read_text() + '{"images": ["a.j')
    manifest = made("messages", raw, tmp_path / "out", media=tmp_path / "media")
    assert manifest.rejected == dict.fromkeys([*bad, "malformed JSON"], 1)
    assert manifest.total("samples") == 1


def test_five_of_many_missing_files_are_named_and_one_row_costs_the_others_nothing(tmp_path, capsys):
    pictures(tmp_path / "media", "a.jpg")
    rows = [{"file": f"gone{n}.jpg", "q": "?", "a": "red"} for n in range(7)]
    rows += [{"file": "a.jpg", "q": "?", "a": answer} for answer in ("red", "", "blue")]
    raw = jsonl(tmp_path / "t.jsonl", rows)
    words = ["table", str(raw), str(tmp_path / "out"), "--image", "file", "--question", "q", "--answer", "a"]
    assert main(["prepare", *words, "--media", str(tmp_path / "media"), "--workers", "1", "--max-bad", "1"]) == 0
    printed = capsys.readouterr().out
    assert "rejected 7 of 10 rows: no such picture file (gone" in printed
    assert printed.count("gone") == 5
    assert "rejected 1 of 10 rows: no a (row 8 of t.jsonl)" in printed
    ((record, files),) = records(tmp_path / "out")
    assert ([one["assistant"] for one in record["conversations"]], files) == (["red", "blue"], 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table", "t.csv", "out", "--answer", "answr"], "no column 'answr' (did you mean 'answer'?)"),
        (["table", "t.csv", "out"], "--answer COLUMN is missing"),
        (["llava", "t.csv", "out", "--image", "file"], "--image names a column for the source table"),
        (["llava", "t.json", "out", "--media", "nowhere"], "--media: no folder nowhere"),
        (["finevision", "t.json", "out", "--rating", "relevence=4"], "did you mean 'relevance'?"),
        (["tabel", "t.csv", "out"], "did you mean 'table'?"),
        (["videos", "t.csv", "out", "--videos", "."], "no option --videos: renamed to --media"),
    ],
)
def test_mistakes_in_the_command_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "t.csv", ["file", "answer"], [["a", "b"]])
    (tmp_path / "t.json").write_text(json.dumps([GOOD]))
    assert main(["prepare", *words, "--workers", "1"]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_table_without_any_file_says_where_it_looked(tmp_path):
    raw = jsonl(tmp_path / "t.jsonl", [{"film": "gone.mp4", "a": "red"}] * 3)
    with pytest.raises(UserError, match=r"none of the 3 videos exists \(looked in .*: give --media DIR"):
        made("table", raw, tmp_path / "out", columns=(("video", "film"), ("answer", "a")))
