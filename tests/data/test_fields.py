"""Shards that others made: `fields` says where media, texts and weights are; order and reading as with our own."""

import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataset import Dataset
from fovlm.data.packing import PackBudget
from fovlm.data.record import record_of
from fovlm.data.sample_format import Member
from fovlm.data.sample_table import Grouping
from helpers import tiny

VIDEO, PICTURE = tiny.video(2), tiny.picture(50)
CHAT = ChatTokenizer(tiny.tokenizer(["film"]), "before_frames", "answer", 60)


def tar(path: Path, samples: dict[str, dict[str, Any]]) -> Path:
    """A tar of samples {key: {extension: bytes, text, or what becomes JSON}}."""
    with tarfile.open(path, "w") as out:
        for key, files in samples.items():
            for extension, value in files.items():
                data = value if isinstance(value, bytes) else value.encode() if type(value) is str else b""
                data = data or json.dumps(value).encode()
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return path


def opened(path: Path, fields, kind="mixed", length_weight: str | None = None, prompt="what is shown ?") -> Dataset:
    source = DataSource(shards=str(path), kind=kind, prompt=prompt, fields=fields)
    grouping = Grouping(8, PackBudget(4096, 32), 64)
    sizes = {"frame_size": 16, "grouping": grouping, "length_weight": length_weight}
    return Dataset({"a": source}, {"a": 1.0}, CHAT, **sizes)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))


def read(dataset: Dataset, count: int) -> dict[str, tuple[int, list[str]]]:
    """Key -> (frames, what the model reads of each conversation) of the first positions."""
    found = {}
    for position in range(count):
        samples, issue = dataset.read(position)
        assert issue is None
        texts = [CHAT.tokenizer.decode(sample.tokens).replace(" ", "") for sample in samples]
        learnt = [CHAT.tokenizer.decode(sample.tokens[sample.weight > 0]).replace(" ", "") for sample in samples]
        asked = [text.split("user\n")[1].split("<|im_end|>")[0] for text in texts]
        key = samples[0].key.rpartition("/")[2].partition("#")[0]
        found[key] = len(samples[0].frames), [f"{q}>{a.replace('<|im_end|>', '/')}" for q, a in zip(asked, learnt)]
    return found


TALK = [{"from": "human", "value": "<image>\nis it ?"}, {"from": "gpt", "value": "yes"}]
PARTS = [{"type": "image"}, {"type": "text", "text": "is it ?"}]
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, list[str]]]] = {
    "a text beside a video": ({"mp4": VIDEO, "txt": "red\n"}, {"assistant": "txt"}, (2, ["whatisshown?>red/"])),
    "keys of a JSON": (
        {"json": {"qa": {"q": "is it ?", "a": "no"}}, "jpg": PICTURE},
        {"user": "json.qa.q", "assistant": "json.qa.a"},
        (1, ["isit?>no/"]),
    ),
    "one of several pictures": (
        {"jpg": PICTURE, "mp4": VIDEO, "txt": "red"},
        {"media": "jpg", "assistant": ["caption.txt", "txt"]},
        (1, ["whatisshown?>red/"]),
    ),
    "numbered frames": (
        {"000.png": b"no", "000.jpg": PICTURE, "001.jpg": PICTURE, "txt": "red"},
        {"media": "jpg", "assistant": "txt"},
        (2, ["whatisshown?>red/"]),
    ),
    "LLaVA's conversations": (
        {"jpg": PICTURE, "json": {"conversations": TALK + TALK}},
        {"conversations": "json.conversations"},
        (1, ["isit?>yes/yes/"]),
    ),
    "messages in parts, in a JSON of their own": (
        {
            "jpg": PICTURE,
            "chat.json": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "yes"}],
            "json": {},
        },
        {"messages": "chat.json"},
        (1, ["isit?>yes/"]),
    ),
    "several conversations": (
        {"jpg": PICTURE, "json": {"qa": [{"user": "is it ?", "assistant": "yes"}, {"assistant": "no"}]}},
        {"conversations": "json.qa"},
        (1, ["isit?>yes/", "whatisshown?>no/"]),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_where_others_have_media_and_texts(tmp_path, way):
    files, fields, expected = WAYS[way]
    assert read(opened(tar(tmp_path / "a.tar", {"k": files}), fields), 1) == {"k": expected}


def test_the_release_of_nanosmol(tmp_path):
    ids = CHAT.text({"user": "is it ?", "assistant": "no"}, None, frames=False).tokens.tolist()
    ready = {"token_ids": ids, "loss_mask": [0] * (len(ids) - 1) + [1], "source": "webvid"}
    samples = {
        "ids": {"json": ready},  # no frames: nothing to place among them
        "caption": {"000.jpg": PICTURE, "001.jpg": PICTURE, "json": ready | {"caption": "red"}},
        "beside": {"mp4": VIDEO, "txt": "blue", "json": {"videoid": 7}},
        "chat": {"jpg": PICTURE, "json": {"user": "is it ?", "assistant": "yes", "is_text_only": False}},
        "text": {"jpg": PICTURE, "json": {"user": "is it ?", "assistant": "no", "is_text_only": True}},
    }
    assert read(opened(tar(tmp_path / "a.tar", samples), "nanosmol"), 5) == {
        "ids": (0, ["isit?>/"]),
        "caption": (2, ["whatisshown?>red/"]),
        "beside": (2, ["whatisshown?>blue/"]),
        "chat": (1, ["isit?>yes/"]),
        "text": (0, ["isit?>no/"]),
    }
    pair = {"user": "is it ?", "chosen_assistant": "yes", "rejected_assistant": "no", "chosen_token_ids": ids}
    path = tar(tmp_path / "b.tar", {"k": {"jpg": PICTURE, "json": pair}})
    assert read(opened(path, "nanosmol", "preference"), 1) == {"k": (1, ["isit?>yes/", "isit?>no/"])}


def test_a_weight_of_a_sample_multiplies_its_loss_in_training_alone(tmp_path):
    said = {"jpg": PICTURE, "txt": "red"}
    path = tar(tmp_path / "a.tar", {"one": said | {"json": {"w": 0.25}}, "none": said | {"json": {}}})
    fields = {"assistant": "txt", "weight": "json.w"}
    whole = {None: [2, 2], "none": [0.5, 2], "sqrt": [0.25 * 2**0.5, 2**0.5]}  # of two tokens each
    for length_weight, expected in whole.items():
        dataset = opened(path, fields, length_weight=length_weight)
        assert sorted(float(dataset.read(n)[0][0].weight.sum()) for n in (0, 1)) == pytest.approx(expected)


def test_an_index_and_an_order_for_each_mapping(tmp_path):
    samples = {f"k{n}": {"mp4": VIDEO, "txt": "red", "json": {"t": "blue"}} for n in range(6)}
    path = tar(tmp_path / "a.tar", samples)
    one, other = opened(path, {"assistant": "txt"}), opened(path, {"assistant": "json.t"})
    assert one.hash != other.hash
    assert one.hash == opened(path, {"assistant": "txt"}).hash
    assert len(list(tmp_path.glob("a.tar.*.index"))) == 2
    keys = [[dataset.read(n)[0][0].key for n in range(12)] for dataset in (one, other)]
    assert keys[0] == keys[1]  # the mapping has no say in the order
    assert sorted(keys[0][:6]) == sorted(f"a.tar/k{n}" for n in range(6))


@pytest.mark.parametrize("turn", [{"from": [1], "value": "?"}, {"from": "human", "value": "<image>" + " " * 10**6}])
def test_hostile_turns_take_no_time_and_end_nothing(turn):
    began = time.process_time()
    file = {Member("a", "json", 0, 0, 0): json.dumps({"said": [turn, turn]}).encode()}
    assert record_of(file, {"conversations": "json.said"})["messages"][0]["content"] in ("?", "")
    assert time.process_time() - began < 1


def test_what_is_missing_or_broken_is_counted_by_cause(tmp_path):
    samples = {
        "good": {"jpg": PICTURE, "json": {"a": "red"}},
        "none": {"jpg": PICTURE, "json": {"b": "red"}},
        "cut": {"jpg": PICTURE, "json": b'{"a": "r'},
        "roles": {"jpg": PICTURE, "json": {"a": TALK[::-1]}},
        "weight": {"jpg": PICTURE, "json": {"a": "red", "w": -1}},
        "bytes": {"jpg": PICTURE, "txt": b"\xff\xfe", "json": {}},
    }
    dataset = opened(tar(tmp_path / "a.tar", samples), {"assistant": ["json.a", "txt"], "weight": "json.w"})
    assert dict(dataset.sources[0].table.broken) == {
        "no answer at the places that `fields` names": 1,
        "malformed JSON": 1,
        "the roles of messages do not alternate between user and assistant": 1,
        "weight is not a number above 0": 1,
        "text is not Unicode": 1,
    }
