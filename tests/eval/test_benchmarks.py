"""Readers of published annotation files: what they make of records as published, and of what is wrong in them."""

import json

import pytest

from fovlm.errors import UserError
from fovlm.eval.benchmarks import READERS, _list_media, read_questions
from fovlm.eval.questions import EvalQuestion, frames_of, hash_questions, subset, without_letters
from helpers.tiny import picture, video

pyarrow = pytest.importorskip("pyarrow", reason="the extra [data]")


def parquet(path, rows):
    from pyarrow import Table
    from pyarrow import parquet as files

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(Table.from_pylist(rows), path)


def mvbench(folder):
    (folder / "json").mkdir()
    record = {"question": "What moves?", "candidates": ["A ball", "A cube"], "answer": "A cube"}
    (folder / "json/moving_count.json").write_text(json.dumps([record | {"video": "video_1.mp4"}]))
    part = record | {"video": "same.mp4", "start": 2.0, "end": 4.0}
    (folder / "json/action_sequence.json").write_text(json.dumps([part]))
    part = record | {"video": "house/clip_00", "start": 0, "end": 1}
    (folder / "json/episodic_reasoning.json").write_text(json.dumps([part]))
    (folder / "json/state_change.json").write_text(json.dumps([record | {"video": "same.mp4"}]))
    for name in ("clevrer/video_validation/video_1.webm", "star/Charades_480/same.mp4", "perception/videos/same.mp4"):
        (folder / "video" / name).parent.mkdir(parents=True)
        (folder / "video" / name).write_bytes(video(6))
    frames = folder / "video/tvqa/frames_fps3_hq/house/clip_00"
    frames.mkdir(parents=True)
    for n in range(9):
        (frames / f"{n:05d}.jpg").write_bytes(picture(20 * n))


def test_mvbench_finds_each_tasks_own_videos_and_their_parts(tmp_path):
    mvbench(tmp_path)
    found = {q.category: q for q in READERS["mvbench"](tmp_path)}
    assert list(found) == ["action_sequence", "episodic_reasoning", "moving_count", "state_change"]
    assert [q.missing for q in found.values()] == [None] * 4
    assert "star" in str(found["action_sequence"].media[0])
    assert "perception" in str(found["state_change"].media[0])
    assert found["moving_count"].media[0].suffix == ".webm"  # published in several containers
    assert (found["state_change"].id, found["state_change"].answer) == ("state_change/0", 1)
    assert len(frames_of(found["state_change"], 16, 64)) == 6
    part = frames_of(found["action_sequence"], 16, 64)
    assert [round(float(f.float().mean()) / 10) for f in part] == [2, 3, 4]  # the grey level tells the second
    assert len(frames_of(found["episodic_reasoning"], 16, 64)) == 5  # one second and a half at three a second
    one = list(READERS["mvbench"](tmp_path / "json/state_change.json"))
    assert [(q.id, q.missing) for q in one] == [("state_change/0", None)]


def test_a_piece_of_a_video_that_is_cut_already_is_taken_whole(tmp_path):
    row = {
        "question": "What moves?",
        "candidates": ["A ball", "A cube"],
        "answer": "A cube",
        "start": 10.0,
        "end": 14.0,
    }
    (tmp_path / "json").mkdir()
    (tmp_path / "json/action_sequence.json").write_text(json.dumps([row | {"video": "a_10.0_14.0.mp4"}]))
    (tmp_path / "star/Charades_segment").mkdir(parents=True)
    (tmp_path / "star/Charades_segment/a_10.0_14.0.mp4").write_bytes(video(4))
    (piece,) = READERS["mvbench"](tmp_path)
    assert len(frames_of(piece, 16, 64)) == 4


def test_videomme(tmp_path):
    row = {
        "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Astronomy", "url": "u",
        "videoID": "fFj", "question_id": "001-1", "task_type": "Counting Problem", "question": "How many?",
        "answer": "C", "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
    }  # fmt: skip
    parquet(tmp_path / "videomme/test-00000-of-00001.parquet", [row])
    (q,) = READERS["videomme"](tmp_path)
    assert (q.id, q.category, q.options[2], q.answer) == ("001-1", "Counting Problem", "Three.", 2)
    assert q.extra == {"duration": "short", "domain": "Knowledge", "sub_category": "Astronomy"}
    assert q.missing is not None
    assert q.missing.name == "fFj.mp4"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/fFj.mp4").write_bytes(video(1))
    _list_media.cache_clear()
    (q,) = READERS["videomme"](tmp_path)
    assert q.missing is None


def test_scienceqa(tmp_path):
    row = {
        "image": {"bytes": picture(9), "path": None}, "question": "Which?", "choices": ["a", "b"], "answer": 1,
        "hint": "Look.", "subject": "natural science", "topic": "biology", "grade": "grade2",
    }  # fmt: skip
    parquet(tmp_path / "data/test-0.parquet", [row, row | {"image": None, "hint": ""}])
    parquet(tmp_path / "data/train-0.parquet", [row])
    with_picture, without = READERS["scienceqa"](tmp_path)
    assert (with_picture.question, with_picture.answer) == ("Look.\nWhich?", 1)
    assert with_picture.category == "natural science"
    assert with_picture.prompt(letters=True) == "Look.\nWhich?\nA. a\nB. b\nAnswer with the letter."
    assert with_picture.answers(letters=True) == ["A", "B"]
    assert frames_of(with_picture, 16, 64).shape == (1, 3, 16, 16)
    assert (without.media, without.extra["shows"]) == ((), "text only")
    parquet(tmp_path / "bad/test.parquet", [row | {"answer": 2}])
    with pytest.raises(UserError, match="row 0: its answer 2 is not a number of its 2 choices"):
        list(READERS["scienceqa"](tmp_path / "bad"))
    parquet(tmp_path / "worse/test.parquet", [{"question": "?", "answer": 1}])
    with pytest.raises(UserError, match="no column 'choices'"):
        list(READERS["scienceqa"](tmp_path / "worse"))


def test_tables_that_may_be_the_same_questions_are_refused(tmp_path):
    row = {"image": None, "question": "Which?", "choices": ["a", "b"], "answer": 1}
    for part in ("FULL", "IMG"):
        parquet(tmp_path / f"ScienceQA-{part}/test-0.parquet", [row])
    with pytest.raises(UserError, match=r"ScienceQA-FULL and in .*ScienceQA-IMG, .* give one of them"):
        read_questions("scienceqa", tmp_path)
    assert len(read_questions("scienceqa", tmp_path / "ScienceQA-IMG")) == 1
    row = {"question_id": "001-1", "videoID": "x", "question": "?", "options": ["A. a", "B. b"], "answer": "A"}
    parquet(tmp_path / "films/test.parquet", [row, row])
    with pytest.raises(UserError, match="holds question 001-1 twice"):
        read_questions("videomme", tmp_path / "films")


def pope_lines(file, count: int = 2):
    file.parent.mkdir(parents=True, exist_ok=True)
    asked = {"text": "Is there a dog in the image?", "label": "yes"}
    rows = [asked | {"question_id": n, "image": f"COCO_{n}.jpg"} for n in range(1, count + 1)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_pope_has_its_pictures_beside_the_folders_of_its_questions(tmp_path):
    """coco/coco_pope_random.json beside val2014, a link as often as not, and beside what LLaVA made of it."""
    pope_lines(tmp_path / "pope/coco/coco_pope_random.json")
    (tmp_path / "pope/llava_pope_test.jsonl").write_text(
        '{"question_id": 1, "image": "COCO_1.jpg", "text": "Is it?"}\n'
    )
    (tmp_path / "pictures/val2014").mkdir(parents=True)
    for n in (1, 2):
        (tmp_path / f"pictures/val2014/COCO_{n}.jpg").write_bytes(picture(n))
    (tmp_path / "pope/val2014").symlink_to(tmp_path / "pictures/val2014")
    for where in ("pope", "pope/coco", "pope/coco/coco_pope_random.json"):
        found = read_questions("pope", tmp_path / where)
        assert [(q.id, q.missing) for q in found] == [("random/1", None), ("random/2", None)], where


def test_pope_over_other_pictures_is_another_benchmark(tmp_path):
    for edition in ("coco", "aokvqa", "gqa"):
        pope_lines(tmp_path / f"POPE/{edition}/{edition}_pope_random.json", {"coco": 1, "aokvqa": 2, "gqa": 3}[edition])
    assert [len(read_questions("pope", tmp_path / f"POPE{part}")) for part in ("", "/aokvqa", "/gqa")] == [1, 2, 3]
    (tmp_path / "POPE/coco/coco_pope_random.json").unlink()
    with pytest.raises(UserError, match="of aokvqa and gqa, separate benchmarks: give the folder of one"):
        read_questions("pope", tmp_path / "POPE")
    for copy in ("coco/coco_pope_random.json", "again/coco_pope_random.jsonl"):
        pope_lines(tmp_path / "POPE" / copy)
    with pytest.raises(UserError, match="holds question random/1 twice"):
        read_questions("pope", tmp_path / "POPE")


def test_pope_in_both_editions(tmp_path):
    lines = [
        {"question_id": n, "image": f"COCO_{n}.jpg", "text": "Is there a dog in the image?", "label": label}
        for n, label in ((1, "yes"), (2, "no"))
    ]
    for kind in ("random", "adversarial"):
        (tmp_path / f"coco_pope_{kind}.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014/COCO_1.jpg").write_bytes(picture(3))
    found = list(READERS["pope"](tmp_path))
    assert [(q.id, q.category, q.answer) for q in found[1:3]] == [
        ("adversarial/2", "adversarial", 1),
        ("random/1", "random", 0),
    ]
    assert [q.missing is None for q in found] == [True, False, True, False]
    row = {"id": "0", "question_id": "1", "question": "Is it?", "answer": "yes", "category": "popular"}
    parquet(tmp_path / "p/Full/test.parquet", [row | {"image": {"bytes": picture(1), "path": "x"}}])
    (q,) = READERS["pope"](tmp_path / "p")
    assert (q.category, q.options, q.answer) == ("popular", ("yes", "no"), 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "?", "candidates": ["a"], "answer": "a"}, "question 0: no 'video'"),
        ({"video": "x.mp4", "question": "?", "candidate": ["a"], "answer": "a"}, "did you mean 'candidate'"),
        ({"video": "x.mp4", "question": "?", "candidates": ["a"], "answer": "b"}, "is not one of its candidates"),
        ({"video": "../x.mp4", "question": "?", "candidates": ["a"], "answer": "a"}, "leads out of the folder"),
    ],
)
def test_errors_name_file_and_number(tmp_path, record, message):
    (tmp_path / "task.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=message) as error:
        list(READERS["mvbench"](tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", READERS)
def test_an_empty_folder_is_a_mistake(tmp_path, name):
    with pytest.raises(UserError, match="holds no"):
        list(READERS[name](tmp_path))
    with pytest.raises(UserError, match="no such file or folder"):
        list(READERS[name](tmp_path / "nowhere"))


def test_sets_have_a_hash_of_their_content_and_small_ones_are_drawn_alike():
    made = [EvalQuestion(f"q{n}", "c", (), "?", ("a", "b"), 0) for n in range(50)]
    assert subset(made, 9) == subset(made, 9) != made[:9]
    assert [q.id for q in subset(made, 9)] == sorted((q.id for q in subset(made, 9)), key=lambda i: int(i[1:]))
    other = [*made[:-1], EvalQuestion("q49", "c", (), "?", ("a", "b"), 1)]
    assert hash_questions(made) == hash_questions(list(made)) != hash_questions(other)
    assert without_letters(["A. x", "B. y"]) == ("x", "y")
    assert without_letters(["A. x", "A. y"]) == ("A. x", "A. y")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question_id": 1, "image": ', "line 2 is not JSON"),
        ('[{"question_id": 1}]', "line 2 is not a JSON object"),
        ('{"image": "a.jpg", "text": 7, "label": "yes"}', "question 1: 'text' is '7', not a text"),
        ('{"image": "a.jpg", "text": "Is it?", "label": true}', "question 1: 'label' is 'True', not a text"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, said):
    good = '{"image": "a.jpg", "text": "Is it?", "label": "yes"}'
    (tmp_path / "coco_pope_random.json").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=said):
        list(READERS["pope"](tmp_path))
