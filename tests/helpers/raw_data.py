"""Small raw data in the published formats, and what `fovlm prepare` makes of it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fovlm.data.index import make_index
from fovlm.data.sample_format import read_members
from fovlm.prepare.job import Job
from fovlm.prepare.manifest import Manifest
from fovlm.prepare.pipeline import prepare
from fovlm.prepare.sources import scenes
from helpers import tiny

VIDEO = tiny.video(3)  # 0, 1 and 2 s
GREY = 100  # of the films of `stamps_and_films`


def parquet(file: Path, rows: list[dict], group: int = 4) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=group)
    return file


def jsonl(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def table(file: Path, header: list[str], rows: list[list[str]]) -> Path:
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([header, *rows])
    return file


def made(source: str, raw: Path, out: Path, workers: int = 1, **more) -> Manifest:
    return prepare(Job(source, raw, out, size=16, **more), workers, lambda line: None)


def samples_of(out: Path) -> list[tuple[str, dict, list[str]]]:
    """(key, record, extensions of the pictures) of all samples, in the order of the shards."""
    found = []
    for path in sorted(out.glob("*.tar")):
        index, data = make_index(path), path.read_bytes()
        assert not index.broken
        for row, key in enumerate(index.key):
            at = int(index.offset[row])
            files = read_members(data[at : at + int(index.length[row])])
            record = next(json.loads(content) for member, content in files.items() if member.extension == "json")
            found.append((key, record, [member.extension for member in files if member.extension != "json"]))
    return found


def bytes_of(out: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".tar", ".json", ".jsonl")
    }


def conversations(n: int) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": f"what is {i} ?"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(n)
    ]


def openvid(folder: Path) -> Path:
    (folder / "video").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4"):
        (folder / "video" / name).write_bytes(VIDEO)
    (folder / "video" / "cut.mp4").write_bytes(VIDEO[: len(VIDEO) // 2])
    rows = [["a.mp4", 'red, "blue"\nred', "5"], ["b.mp4", "blue", "4"], ["cut.mp4", "no", "4"], ["gone.mp4", "no", "4"]]
    table(folder / "OpenVid-1M.csv", ["video", "caption", "aesthetic score"], [*rows, ["a.mp4", " ", "5"]])
    return folder


def stamps_and_films(folder: Path) -> Path:
    """What scenes are drawn from: discs of one colour, all but one on a transparent ground, and grey films."""
    more = [f"thing{letter}" for letter in "abcdefghijklmnopqrstuvwx"]
    rows = [{"file": "opaque.png", "caption": "A frog.", "category": "animals"}]
    (folder / "stamps").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "stamps" / "opaque.png")
    for n, name in enumerate([*scenes.NAMES, *more]):
        pixels = np.zeros((40, 40, 4), np.uint8)
        y, x = np.mgrid[:40, :40]
        pixels[(y - 20) ** 2 + (x - 20) ** 2 < 300] = (255, 6 * n, 0, 255)
        Image.fromarray(pixels).save(folder / "stamps" / f"{name}.png")
        rows.append({"file": f"{name}.png", "caption": f"A {name}.", "category": ["animals", "food"][n % 2]})
    jsonl(folder / "stamps" / "stamps.jsonl", rows)
    (folder / "clips").mkdir()
    for n in range(12):
        film = [Image.new("RGB", (80, 60), (GREY, GREY, GREY + k)) for k in range(4)]
        film[0].save(folder / "clips" / f"film{n}-1.webp", save_all=True, append_images=film[1:], duration=500)
    return folder
