"""Make shards of a folder with real clips, pictures and chats, for the runs of experiments/real.yaml.

    python -m scripts.real_shards RAW OUT

RAW/clips/{clips.jsonl, *.webp}     animated WebP clips, {file, caption} a line
RAW/stamps/{stamps.jsonl, *.png}    pictures, {file, caption, category} a line
RAW/chat.jsonl                      {"messages": [{role, content}, {role, content}]} a line

OUT gets clips-000.tar (8 frames a clip, evenly spread), clips_val-000.tar (every seventh clip), stamps-000.tar and
chat-000.tar. Frames are 224 x 224 JPEG.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from fovlm.data.shards import write_shards
from fovlm.media.clip import read_clip
from fovlm.media.encode import encode_jpeg

SIZE, FRAMES, HELD_OUT = 224, 8, 7
FPS = 30  # of the animations: frames are drawn from all of theirs


def jpegs(path: Path) -> list[bytes]:
    """Up to FRAMES frames of a clip, or one of a picture, as JPEG."""
    frames = read_clip(path, SIZE, FRAMES, FPS).frames
    return [encode_jpeg(frame.permute(1, 2, 0).numpy()) for frame in frames]


def rows(file: Path) -> Iterator[dict]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def conversation(assistant: str, source: str, user: str = "") -> dict:
    return {"user": user, "assistant": assistant, "source": source}


def clips(folder: Path) -> Iterator[dict]:
    for row in rows(folder / "clips.jsonl"):
        frames = {f"{n:03d}.jpg": jpeg for n, jpeg in enumerate(jpegs(folder / row["file"]))}
        yield {"__key__": key_of(row), "json": conversation(row["caption"], "clips"), **frames}


def stamps(folder: Path) -> Iterator[dict]:
    for row in rows(folder / "stamps.jsonl"):
        record = conversation(row["caption"], "stamps", "What is this?")
        yield {"__key__": key_of(row), "json": record, "jpg": jpegs(folder / row["file"])[0]}


def key_of(row: dict) -> str:
    return Path(row["file"]).stem.replace(".", "_")


def chats(file: Path) -> Iterator[dict]:
    for i, row in enumerate(rows(file)):
        user, assistant = (turn["content"] for turn in row["messages"])
        yield {"__key__": f"chat{i:05d}", "json": conversation(assistant, "chat", user)}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    raw, out = Path(sys.argv[1]), Path(sys.argv[2])
    every = list(clips(raw / "clips"))
    write_shards(out / "clips-%03d.tar", (clip for i, clip in enumerate(every) if i % HELD_OUT))
    write_shards(out / "clips_val-%03d.tar", every[::HELD_OUT])
    write_shards(out / "stamps-%03d.tar", stamps(raw / "stamps"))
    write_shards(out / "chat-%03d.tar", chats(raw / "chat.jsonl"), per_shard=10_000)


if __name__ == "__main__":
    main()
