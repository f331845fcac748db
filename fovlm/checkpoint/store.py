"""Checkpoints that are complete or absent: staged, sealed with checksums, and only then pointed to.

    RUN/checkpoints/step-00000100/   the engine's shards, state.json, experiment.yaml, model.json (its configuration),
                                     reference.safetensors (`reference.py`), manifest.json
    RUN/checkpoints/latest, best     one line each: the name of a folder beside them

A save writes into a hidden staging folder. When every rank has written, the manifest (size and checksum of every file)
is added, everything is flushed to disk, the folder gets its name, and only then `latest` and `best` are switched. A
kill at any moment leaves either the old state or the new one. Loading verifies the manifest before anything is read and
falls back to the newest complete checkpoint.

This file does not know deepspeed: what the engine writes are files in a folder.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from fovlm.errors import UserError
from fovlm.fileio import digest, digest_file, sync, write_atomically

log = logging.getLogger("fovlm")

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "model.json"  # not config.json, which marks a folder that transformers can load
ENGINE = "engine"  # the folder of DeepSpeed's own files
SPARE = 1.05  # free space required, relative to the estimate: file headers and the file system's own needs


@dataclass
class State:
    """Progress of a run. `cursor` is the first position of the data order that has not been trained on."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    cursor: int = 0
    data_hash: str = ""
    experiment_hash: str = ""
    world_size: int = 1
    zero_stage: int = 0
    best: float | None = None  # lowest value so far of the metric that `train.best` names
    metric: float | None = None  # that metric at this checkpoint
    skipped: int = 0  # steps that were skipped for non-finite values


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path):
        self.folder = run / "checkpoints"

    def names(self) -> list[str]:
        """The names of complete checkpoints, oldest first. Their files are not verified."""
        folders = (p.parent.name for p in self.folder.glob(f"step-*/{MANIFEST}"))
        return sorted(name for name in folders if re.fullmatch(r"step-[0-9]+", name))

    def pointed(self, pointer: str) -> str | None:
        """The name of the checkpoint that `latest` or `best` points to, if it exists."""
        path = self.folder / pointer
        name = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        return name if name in self.names() else None

    def first_whole(self, *preferred: str, verify: Callable[[Path], str]) -> Path | None:
        """The first checkpoint that `verify` finds whole: those that the pointers `preferred` name, then newest first.

        Damaged ones get a warning; None if all are damaged.
        """
        for name in dict.fromkeys([*filter(None, map(self.pointed, preferred)), *reversed(self.names())]):
            if not (problem := verify(self.folder / name)):
                return self.folder / name
            log.warning("checkpoint %s is damaged (%s): trying another", name, problem)
        return None

    def staging(self, name: str) -> Path:
        """A new staging folder for a checkpoint; those of interrupted saves are removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".staging-*"):
            shutil.rmtree(left)
        path = self.folder / f".staging-{name}"
        path.mkdir()
        return path

    def publish(self, staging: Path, manifest: dict[str, dict], state: State, best: bool) -> Path:
        """Seal a staged checkpoint, rename it, and point `latest` (and `best`) to it. One rank calls this."""
        (staging / STATE).write_text(json.dumps(asdict(state), indent=1))
        write_manifest(staging, {**manifest, STATE: describe(staging / STATE)})
        final = self.folder / staging.name.removeprefix(".staging-")
        if final.exists():  # the same step again, after falling back to an older checkpoint
            old = self.folder / f".staging-old-{final.name}"
            final.rename(old)
            staging.rename(final)
            shutil.rmtree(old)
        else:
            staging.rename(final)
        sync(self.folder)
        for pointer in ["latest", *(["best"] if best else [])]:
            write_atomically(self.folder / pointer, final.name + "\n", durable=True)
        sync(self.folder)
        return final

    def prune(self, keep_last: int, keep_best: int) -> None:
        """Remove all but the newest `keep_last`, the `keep_best` with the lowest metric, `latest` and `best`."""
        names = self.names()
        scored = [(metric, n) for n in names if (metric := _metric(self.folder / n)) is not None]
        keep = {self.pointed("latest"), self.pointed("best"), *names[-keep_last:]}
        keep |= {n for _, n in sorted(scored)[:keep_best]}
        for name in names:
            if name not in keep:
                shutil.rmtree(self.folder / name)

    def need_room(self, size: int) -> None:
        """Raise UserError if the disk has no space for a checkpoint of `size` bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < size * SPARE:
            raise UserError(
                f"a checkpoint needs {size * SPARE / 1e9:.3g} GB and {self.folder} has {free / 1e9:.3g} GB free: "
                "make room, or set FOVLM_RUNS to another disk"
            )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise UserError for the RuntimeErrors that torch.save raises when a disk is full, read-only or gone."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("inline_container|iostream|Parent directory", str(error)):
            raise
        raise UserError(
            f"{folder}: a checkpoint cannot be written: is the disk full, or read-only? Earlier checkpoints are whole; "
            "when that is fixed, the same command resumes"
        ) from error


def read_state(checkpoint: Path) -> State:
    """The state in a checkpoint. Raises UserError if there is none."""
    try:
        return TypeAdapter(State).validate_json((checkpoint / STATE).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}: no readable {STATE} ({error}); is this a checkpoint of fovlm?") from error


def _metric(checkpoint: Path) -> float | None:
    """The metric of a checkpoint; None for a damaged one, which must not end a healthy run."""
    try:
        metric = read_state(checkpoint).metric
    except UserError:
        return None
    return metric if isinstance(metric, float) else None


def describe(path: Path) -> dict:
    """A file's entry in the manifest: size in bytes and checksum."""
    return {"bytes": path.stat().st_size, "blake2b": digest_file(path, 64)}


def seal(files: list[Path], root: Path) -> dict[str, dict]:
    """Flush files to disk -> their entries in the manifest. Runs in threads: hashlib releases the GIL."""

    def entry(path: Path) -> tuple[str, dict]:
        sync(path)
        return str(path.relative_to(root)), describe(path)

    with ThreadPoolExecutor(4) as pool:
        return dict(pool.map(entry, files))


def write_manifest(checkpoint: Path, files: dict[str, dict]) -> None:
    """Write the manifest, with a checksum of its own, and flush it to disk."""
    content = {"files": files, "blake2b": _checksum(files)}
    write_atomically(checkpoint / MANIFEST, json.dumps(content, indent=1, sort_keys=True), durable=True)
    sync(checkpoint)


def read_manifest(checkpoint: Path) -> dict[str, dict]:
    """The entries of a checkpoint's files. Raises ValueError or OSError if the manifest is not as it was written."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_bytes())
        files, checksum = content["files"], content["blake2b"]
        typed = all(entry.keys() == {"bytes", "blake2b"} for entry in files.values())
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a list of files with their sizes and checksums") from error
    if not typed or checksum != _checksum(files):
        raise ValueError("it has another checksum")
    return files


def _checksum(files: dict[str, dict]) -> str:
    return digest(json.dumps(files, sort_keys=True), 64)


def verify(checkpoint: Path, rank: int = 0, world: int = 1) -> str:
    """Check a checkpoint's files against its manifest, rank r of W every W-th file -> what is wrong, "" if nothing.

    The manifest must name every file but itself and hidden ones, which file systems and desktops make.
    """
    try:
        manifest = read_manifest(checkpoint)
    except (OSError, ValueError) as error:
        return f"no readable manifest: {error}"
    found = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    shown = {str(path) for path in found if not any(part.startswith(".") for part in path.parts)}
    if unknown := shown - manifest.keys() - {MANIFEST}:
        return f"{min(unknown)} is not in the manifest"
    for name in sorted(manifest)[rank::world]:
        path, size = checkpoint / name, manifest[name]["bytes"]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if describe(path) != manifest[name]:
            return f"{name} has another checksum"
    return ""
