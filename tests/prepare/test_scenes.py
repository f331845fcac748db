"""Scenes: the same bytes for a seed, boxes around what is drawn, questions whose answers are in the picture."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from fovlm.data.chat import load_tokenizer
from fovlm.errors import UserError
from fovlm.prepare.job import Job, SceneSettings
from fovlm.prepare.sources import scenes
from helpers.raw_data import GREY, bytes_of, jsonl, made, samples_of, stamps_and_films


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return stamps_and_films(tmp_path_factory.mktemp("raw"))


def drawn(raw, frames: int, ask: str) -> list[tuple[dict, list[np.ndarray]]]:
    """(record, frames) of the questions of thirty scenes."""
    settings = SceneSettings(30, "2,4", 3, frames, ask)
    job = Job("scenes", raw, raw / "unused", size=126, scenes=settings)
    return [
        (
            sample.record | asked,
            [np.asarray(Image.open(io.BytesIO(picture))).astype(int) for picture in sample.pictures],
        )
        for row in scenes.rows(job)
        for sample in [scenes.make(row, job)]
        for asked in sample.record.get("conversations", ())
    ]


@pytest.mark.parametrize("ask", ["name", "place", "left", "kind"])
def test_answers_and_boxes_are_what_the_pictures_show(raw, ask):
    for frames in (1, 3):
        for record, pictures in drawn(raw, frames, ask):
            assert len(pictures) == frames
            for n, picture in enumerate(pictures):
                outside = np.ones((126, 126), bool)
                for thing in record["objects"]:
                    left, top, right, bottom = thing["boxes"][n]
                    outside[max(top - 9, 0) : bottom + 9, max(left - 9, 0) : right + 9] = False  # JPEG rings
                    assert picture[(top + bottom) // 2, (left + right) // 2, 0] > 200, "a disc is in its box"
                assert (abs(picture[outside] - GREY) < 15).all(), "nothing is drawn outside the boxes"
            asked, shown = record["objects"][record["asked"]], record["frame"]
            cells = {cell(thing["boxes"][shown]): thing for thing in record["objects"]}
            words = record["user"].split()
            assert ("frame" in words) == (frames > 1)
            assert frames == 1 or words[-2] == str(shown + 1)
            if ask in ("name", "kind"):
                row, column = int(words[words.index("row") + 1]), int(words[words.index("column") + 1])
                assert cells[row, column] is asked
                assert record["assistant"] == asked[ask]
            elif ask == "place":
                row, column = cell(asked["boxes"][shown])
                assert words[3] == asked["name"]
                assert record["assistant"] == f"row {row} column {column}"
            else:
                row, column = cell(asked["boxes"][shown])
                assert cells[row, column + 1]["name"] == words[5]
                assert record["assistant"] == asked["name"]


def cell(box: list[int]) -> tuple[int, int]:
    """(row, column) of a box, from 1."""
    return 1 + (box[1] + box[3]) // 84, 1 + (box[0] + box[2]) // 84


def test_validation_has_films_and_names_of_its_own(raw):
    jobs = [Job("scenes", raw, raw, scenes=SceneSettings(objects="1", ask="kind", held_out=h)) for h in (False, True)]
    train, val = map(scenes.library, jobs)
    assert train.films
    assert val.films
    assert not set(train.films) & set(val.films)
    assert len(train.cutouts) + len(val.cutouts) == 40
    assert not train.cutouts.keys() & val.cutouts.keys()


def test_validation_has_pictures_of_its_own(raw, tmp_path):
    (tmp_path / "stamps").mkdir()
    files = [[f"{raw}/stamps/{scenes.NAMES[(n + k) % 16]}.png" for k in range(3)] for n in range(16)]
    rows = [
        {"file": file, "caption": f"A {name}.", "category": "animals"}
        for name, three in zip(scenes.NAMES, files, strict=True)
        for file in three
    ]
    jsonl(tmp_path / "stamps" / "stamps.jsonl", rows)
    (tmp_path / "clips").symlink_to(raw / "clips")

    def colors(pictures: int, held_out: bool) -> list[int]:
        job = Job("scenes", tmp_path, tmp_path, scenes=SceneSettings(pictures=pictures, held_out=held_out))
        return [int(cutout[20, 20, 1]) // 6 for cutout in scenes.library(job).cutouts[scenes.NAMES[3]]]

    assert (colors(2, held_out=False), colors(2, held_out=True)) == ([3, 4], [5])
    with pytest.raises(UserError, match="fewer than 4 cutouts named frog, butterfly"):
        colors(3, held_out=True)


def test_the_same_bytes_whatever_the_workers_and_a_tokenizer(raw, tmp_path):
    settings = SceneSettings(12, objects="1,3")
    made("scenes", raw, tmp_path / "a", scenes=settings, per_shard=5)
    made("scenes", raw, tmp_path / "b", scenes=settings, per_shard=5, workers=2)
    made("scenes", raw, tmp_path / "c", scenes=settings, per_shard=5, seed=1)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b") != bytes_of(tmp_path / "c")
    options = json.loads((tmp_path / "a" / "manifest.json").read_text())["settings"]["scenes"]
    assert "pictures" not in options, "sets from before --pictures can be resumed"
    found = samples_of(tmp_path / "a")
    assert {record["source"] for _, record, _ in found} == {"scenes/1", "scenes/3"}
    assert all(pictures == ["jpg"] for _, _, pictures in found)
    tokenizer = load_tokenizer(str(tmp_path / "a" / "tokenizer"))
    assert all(
        tokenizer.unk_token_id not in tokenizer(asked["user"] + " " + asked["assistant"])["input_ids"]
        for _, record, _ in found
        for asked in record["conversations"]
    )


@pytest.mark.parametrize("when", ["rejected.jsonl", "*.tar"])  # while the fork server imports, and later
def test_a_stop_ends_the_workers_and_leaks_nothing(raw, tmp_path, when):
    command = [sys.executable, "-m", "fovlm", "prepare", "scenes", str(raw), str(tmp_path), "--workers", "2"]
    with subprocess.Popen(
        [*command, "--samples", "50000", "--per-shard", "100"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        while not list(tmp_path.glob(when)):
            assert process.poll() is None
            time.sleep(0.05)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.1)
        output, _ = process.communicate(timeout=30)  # to the end of the last process
    assert (process.returncode, output) == (75, "stopped; the same command resumes\n")


def test_what_cannot_be_drawn_is_refused(raw, tmp_path):
    for objects, message in (("10", "a grid of 3 has 9 cells"), ("2,", "numbers with commas")):
        with pytest.raises(UserError, match=message):
            made("scenes", raw, tmp_path / "out", scenes=SceneSettings(objects=objects))
    with pytest.raises(UserError, match=r"stamps\.jsonl: scenes need this table"):
        made("scenes", tmp_path, tmp_path / "out")
