"""Files that somebody made to hang, crash or run code."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fovlm.checkpoint import store
from fovlm.checkpoint.locate import open_run
from fovlm.checkpoint.run_folder import read_metrics, read_summary
from fovlm.checkpoint.zero_reader import load_pickled
from fovlm.config import experiments
from fovlm.config.schema import Experiment, ModelSettings, load
from fovlm.data.chat import ChatTokenizer, conversations, load_tokenizer
from fovlm.data.record import record_of
from fovlm.data.sample_format import Member, list_members
from fovlm.errors import SampleError, UserError
from fovlm.estimate.shapes import geometry
from fovlm.media.decode import decode_media
from fovlm.media.tolerant import decode_some, kind_of
from fovlm.model.build import build
from helpers import ROOT, memory, tiny
from helpers.faults import Row, survives


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, call: Callable[..., object], *arguments: object):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def test_hostile_pickles(row: Row, tmp_path: Path):
    """A pickle that would run code, in every form and place of a file of weights.
    It is refused with one line, and nothing runs."""
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()"
    calls = [
        *((exec, code), (eval, code), (compile, code, "x", "exec"), (open, str(mark), "w"), (Path.touch, mark)),
        *((os.system, f"touch {mark}"), (subprocess.call, ["touch", str(mark)])),
        *((getattr, Path, "touch"), (__import__, "this")),
    ]
    for call, *arguments in calls:
        bomb = Payload(call, *arguments)
        places = [
            bomb,
            [bomb],
            {"a": bomb},
            {"optimizer_state_dict": {"b": (1, bomb)}},
            {bomb: 1},
            {"t": torch.ones(2), "c": bomb},
        ]
        for n, value in enumerate(places):
            file = tmp_path / "weights.pt"
            torch.save(value, file)
            problem = survives(lambda file=file: load_pickled(file), UserError)
            row.check(not problem and not mark.exists(), f"{call.__name__} {n}: {problem}")
        for protocol in range(6):
            file.write_bytes(pickle.dumps(bomb, protocol=protocol))
            problem = survives(lambda file=file: load_pickled(file), UserError)
            row.check(not problem and not mark.exists(), f"{call.__name__}, protocol {protocol}: {problem}")


def test_hostile_model_folders(row: Row, saved_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model folder with code of its own (`auto_map`), pickled weights, no weights, or a damaged configuration.
    It is refused with one line, and nothing of it runs, though the terminal would say yes."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    mark = tmp_path / "ran"
    code = {name: ["code.C", "code.C"] if name == "AutoTokenizer" else "code.C" for name in
            ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")}  # fmt: skip
    bombs = pickle.dumps(Payload(Path.touch, mark))
    texts = [
        *(json.dumps({"model_type": "hostile", "auto_map": code}), json.dumps({"auto_map": code}), "{}", "[]", ""),
        *("{" * 10**4, json.dumps({"model_type": "llama", "hidden_size": "wide"}), "\x00"),
        json.dumps({"model_type": ["llama"]}),
    ]
    three = ("config.json", "tokenizer_config.json", "tokenizer.json")
    small = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for n, text in enumerate(texts):
        for files in (three[:1], three[1:2], three):
            folder = Path(shutil.copytree(saved_model, tmp_path / f"model-{n}-{len(files)}-{files[0][:1]}"))
            (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: ...\n")
            (folder / "pytorch_model.bin").write_bytes(bombs)
            for file in files:
                (folder / file).write_text(text)
            model = ModelSettings(llm=str(folder), encoder=str(folder), tokenizer=str(folder))
            for work in (lambda model=model: build(model), lambda folder=folder: load_tokenizer(str(folder)),
                         lambda model=model: geometry(model.model_copy(update={"encoder": small})),
                         lambda folder=folder: open_run(folder)):  # fmt: skip
                problem = survives(work, UserError)
                row.check(not problem and not mark.exists(), f"{files} {text[:30]}: {problem}")


def test_hostile_yaml(row: Row, tmp_path: Path):
    """YAML of any kind: bombs of aliases, deep nesting, tags, long numbers, and what hypothesis makes up.
    It is read or refused with one line, within seconds."""
    deep = 10**4
    bombs = [
        "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
        *("[" * deep, "{a: " * deep, "- " * deep, "&a [*a]", "? " * deep, "9" * deep, "é" * 10**5, "|\n" + " " * deep),
        *(
            "!!python/object/apply:os.system [x]",
            "!!timestamp x",
            "!!int ''",
            "!!binary ü",
            "a: 1\na: 2",
            "<<: [{a: 1}]",
        ),
        *("\t", "\x00", "%YAML 9.9\n---\n", "--- 1\n--- 2", "'", '"\\x', "a: b: c", "&a", "*a", "0x" + "f" * deep),
        *("1e" + "9" * 400, "<<: [{a: 1}]"),
    ]
    for text in bombs:
        problem = survives(lambda text=text: Experiment.parse(text), ValueError)
        row.check(not problem, f"{text[:20]}: {problem}")
        problem = survives(lambda text=text: load("quickstart", [f"model.llm={text}"]), UserError)
        row.check(not problem, f"setting {text[:20]}: {problem}")

    text = st.text(alphabet=st.sampled_from("ab:,[]{}&*!|>-? \n\t'\"#%@0.9eé\0~")).map(str.encode)

    @given(text | st.binary(max_size=9))
    @fuzzed(row, 30, 5000)
    def fuzz(text: bytes) -> None:
        (tmp_path / "x.yaml").write_bytes(text)
        problem = survives(lambda: experiments.names(tmp_path), UserError)
        row.check(not problem, f"{text!r}: {problem}")

    fuzz()


def fuzzed(row: Row, short: int, full: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Settings for hypothesis: so many examples, always the same ones."""
    return settings(max_examples=len(row.times(short, full)), deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


def test_hostile_json(row: Row, tmp_path: Path):
    """JSON of any kind in place of a manifest, a state, a metric, a summary or a sample: what hypothesis makes up.
    It is damage, said in one line: no other error, no acceptance of a checkpoint."""
    known = ["files", "blake2b", "bytes", "step", "a.pt", "user", "assistant", "turns", "messages", "role", "content",
             "conversations", "token_ids", "loss_mask", "frames_at", "chosen", "rejected", "from", "value",
             "weight"]  # fmt: skip
    keys = st.sampled_from(known) | st.text()
    chat = ChatTokenizer(tiny.tokenizer(), "before_frames", "answer", 20)

    places = ("user", "assistant", "turns", "messages", "conversations", "chosen", "rejected", "weight")
    fields = {name: f"json.{name}" for name in places}

    def read_record(text: bytes) -> None:
        for mapping in ({}, *({"user": "json.user", name: fields[name]} for name in places), fields):
            with suppress(SampleError):
                for record in conversations(record_of({Member("a", "json", 0, 0, 0): text}, mapping)):
                    chat.texts(record, "what ?", True, "chosen" in record)

    plain = st.none() | st.booleans() | st.floats() | st.integers() | st.just(10**400) | st.text()
    value = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(keys, inner))

    @given(value.map(json.dumps) | st.text())
    @fuzzed(row, 30, 3000)
    def fuzz(text: str) -> None:
        for name in (store.MANIFEST, store.STATE, "metrics.jsonl", "run_summary.json"):
            (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        problem = survives(lambda: (read_metrics(tmp_path), read_summary(tmp_path)))
        problem = problem or survives(lambda: store.read_state(tmp_path), UserError)
        verdict: list[str] = []
        problem = problem or survives(lambda: verdict.append(store.verify(tmp_path)))
        problem = problem or survives(lambda: read_record(text.encode("utf-8", "surrogatepass")))
        row.check(not problem and verdict != [""], f"{text!r}: {problem}")

    fuzz()


def pictures() -> Iterator[tuple[str, bytes]]:
    """A small file of every format that samples may have."""
    image = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    for extension, format in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")):
        out = io.BytesIO()
        image.save(out, format)
        yield extension, out.getvalue()
    for extension in ("mp4", "mkv"):
        yield extension, tiny.video(2, format={"mkv": "matroska"}.get(extension, extension))


def test_hostile_pictures_and_videos(row: Row):
    """Pictures and videos with bytes changed, cut, repeated or added, by hypothesis: as samples, and as a user's file.
    They decode to frames of the right form, or end in a named cause, within seconds."""
    wholes = list(pictures())

    @given(st.sampled_from(wholes), st.data())
    @fuzzed(row, 40, 6000)
    def fuzz(whole: tuple[str, bytes], data: st.DataObject) -> None:
        extension, content = whole[0], bytearray(whole[1])
        for _ in range(data.draw(st.integers(1, 6))):
            at = data.draw(st.integers(0, len(content) - 1))
            piece = data.draw(
                st.sampled_from([b"", b"\xff" * 4, b"\0" * 8, b"\x7f\xff\xff\xff"]) | st.binary(max_size=6)
            )
            content[at : at + data.draw(st.integers(0, 8))] = piece
            content = content or bytearray(b"\0")

        def sample() -> None:
            frames = decode_media([(extension, bytes(content))], 1, 28, 4)
            assert frames.shape[1:] == (3, 28, 28)
            assert len(frames) <= 4

        def given_by_a_user() -> None:
            if kind := kind_of(file := io.BytesIO(content)):
                assert 1 <= len(decode_some(file, kind, 28, 4).frames) <= 4

        for work in (sample, given_by_a_user):
            problem = survives(work, SampleError)
            row.check(not problem, f"{extension}, {work.__name__}: {problem}")

    fuzz()


# What a worker has before it reads anything, in MB.
IDLE = """
import fovlm.data.dataloader, pathlib, re
print(int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) >> 10)
"""


def test_memory_of_a_worker(row: Row, tmp_path: Path):
    """Samples of up to 10 MB that are made to fill the memory: pictures, videos, texts, JSON, headers of tars.
    A worker that reads one takes less than 512 MB in all, and so does indexing it."""
    row.times(0, 1)
    names = memory.write_all(tmp_path)
    idle = int(python("-c", IDLE))
    peaks = []
    for line in python("-m", "helpers.memory", str(tmp_path), FOVLM_CACHE=str(tmp_path)).splitlines():
        name, more, said = line.split(" ", 2)
        peaks.append(idle + int(more))
        row.check(peaks[-1] < 512 and "status" not in said, f"{name}: {peaks[-1]} MB, {said}")
    row.check(len(peaks) == len(names), f"{len(peaks)} of {len(names)} read")
    row.meaning += f" The most was {max(peaks)} MB, of which a worker has {idle} MB before it reads anything."


def python(*arguments: str, **env: str) -> str:
    """The output of Python with the project and these tests on its path."""
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run([sys.executable, *arguments], env={**os.environ, **paths, **env}, stdout=subprocess.PIPE,
                          text=True, check=True).stdout  # fmt: skip


def test_hostile_archives(row: Row):
    """Tars with bytes changed, cut, repeated or added, by hypothesis.
    Every member is inside the file, or the damage is named, within seconds."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.json", "a.jpg", "é" * 90 + ".json", "b.json"):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(600)))
    whole = out.getvalue()

    @given(st.data())
    @fuzzed(row, 60, 8000)
    def fuzz(data: st.DataObject) -> None:
        content = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 4))):
            field = data.draw(st.sampled_from([0, 100, 124, 130, 148, 156, 257]))
            at = 512 * data.draw(st.integers(0, len(whole) // 512 - 1)) + field
            large = b"\x80\0\0\0" + b"\xff" * 8
            piece = data.draw(st.sampled_from([large, b"77777777777", b"x", b"L", b"S", b"-1"]))
            content[at : at + len(piece)] = piece

        def read() -> None:
            members = list(list_members(io.BytesIO(content), len(content)))
            assert all(0 <= m.offset <= m.offset + m.length <= len(content) for m in members)

        problem = survives(read, ValueError)
        row.check(not problem, problem)

    fuzz()
