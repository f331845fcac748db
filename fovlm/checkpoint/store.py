"""Checkpoints that are whole or not there: staged, verified, and only then pointed to.

    RUN/checkpoints/step-00000100/   the engine's shards, state.json, experiment.yaml, model.json (its configuration),
                                     probe.safetensors (what it answered, `probe.py`), manifest.json
    RUN/checkpoints/latest, best     one line each: the name of a folder beside them

A save writes into a hidden staging folder; when every rank has written, the manifest (size and checksum of every file)
is added, everything is flushed to disk, the folder gets its name, and at last `latest` and `best` are switched. So a
kill at any moment leaves either the old state or the new one. A load verifies the manifest before anything is read and
falls back to the newest checkpoint that is whole.

This file knows nothing of deepspeed: what the engine writes are files in a folder.
"""

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from fovlm.errors import UserError
from fovlm.fileio import digest_file, sync, write_atomically

log = logging.getLogger("fovlm")

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "model.json"  # not config.json, which marks a folder that transformers can load
ENGINE = "engine"  # the folder of DeepSpeed's own files
UNIVERSAL = "universal"  # in its place, a checkpoint in DeepSpeed's universal form
SPARE = 1.05  # room asked for beyond the estimate: file headers, and the file system's own needs


@dataclass
class State:
    """Where a run stands. `cursor` is the first position of the data order that has not been trained on."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    cursor: int = 0
    data_hash: str = ""
    experiment_hash: str = ""
    world_size: int = 1
    zero_stage: int = 0
    best: float | None = None  # best value of the metric that `train.best` names; lower is better
    metric: float | None = None  # that metric at this checkpoint
    skipped: int = 0  # steps that were skipped for non-finite values


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path):
        self.folder = run / "checkpoints"

    def names(self) -> list[str]:
        """Complete ones by their names, oldest first. Not verified."""
        return sorted(p.parent.name for p in self.folder.glob(f"step-*/{MANIFEST}"))

    def pointed(self, pointer: str) -> str | None:
        """The checkpoint that `latest` or `best` names, if it is there."""
        path = self.folder / pointer
        name = path.read_text().strip() if path.exists() else ""
        return name if name and (self.folder / name / MANIFEST).exists() else None

    def first_whole(self, *preferred: str, verify: Callable[[Path], str]) -> Path | None:
        """The first checkpoint whose files are all as they were written: those of the pointers `preferred`, then the
        newest first. Damaged ones get a warning; None when all are damaged.
        """
        for name in dict.fromkeys([*filter(None, map(self.pointed, preferred)), *reversed(self.names())]):
            if not (problem := verify(self.folder / name)):
                return self.folder / name
            log.warning("checkpoint %s is damaged (%s): trying another", name, problem)
        return None

    def staging(self, name: str) -> Path:
        """A fresh staging folder for a checkpoint; what an interrupted save left behind goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".staging-*"):
            shutil.rmtree(left)
        path = self.folder / f".staging-{name}"
        path.mkdir()
        return path

    def publish(self, staging: Path, manifest: dict[str, dict], state: State, best: bool) -> Path:
        """Seal a staged checkpoint, give it its name, and point `latest` (and `best`) to it. One rank calls this."""
        (staging / STATE).write_text(json.dumps(asdict(state), indent=1))
        manifest = {**manifest, STATE: describe(staging / STATE)}
        write_atomically(staging / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True), durable=True)
        sync(staging)
        final = self.folder / staging.name.removeprefix(".staging-")
        if final.exists():  # the same step again, after a fallback to an older checkpoint
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
        """Drop all but the newest `keep_last` and the `keep_best` with the lowest metric; `latest` and `best` stay."""
        names = self.names()
        scored = [(metric, n) for n in names if (metric := _metric(self.folder / n)) is not None]
        keep = {self.pointed("latest"), self.pointed("best"), *names[-keep_last:]}
        keep |= {n for _, n in sorted(scored)[:keep_best]}
        for name in names:
            if name not in keep:
                shutil.rmtree(self.folder / name)

    def need_room(self, bytes_needed: int) -> None:
        """Raise UserError when the disk cannot hold a checkpoint of that size."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < bytes_needed * SPARE:
            raise UserError(
                f"a checkpoint needs {bytes_needed * SPARE / 1e9:.3g} GB and {self.folder} has {free / 1e9:.3g} GB "
                "free: make room, or set FOVLM_RUNS to another disk"
            )


def read_state(checkpoint: Path) -> State:
    """The state a checkpoint holds. Raises UserError when it has none."""
    try:
        return State(**json.loads((checkpoint / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint}: no readable {STATE} ({error}); is this a checkpoint of ours?") from error


def _metric(checkpoint: Path) -> float | None:
    """The metric of a checkpoint; a damaged one has none, and must not end a healthy run."""
    try:
        return read_state(checkpoint).metric
    except UserError:
        return None


def describe(path: Path) -> dict:
    """Size in bytes and blake2b checksum of a file."""
    return {"bytes": path.stat().st_size, "blake2b": digest_file(path, 64)}


def seal(files: list[Path], root: Path) -> dict[str, dict]:
    """Flush files to disk and describe them, for the manifest. Hashing runs in threads; hashlib frees the GIL."""

    def one(path: Path) -> tuple[str, dict]:
        sync(path)
        return str(path.relative_to(root)), describe(path)

    with ThreadPoolExecutor(4) as pool:
        return dict(pool.map(one, files))


def verify(checkpoint: Path, rank: int = 0, world: int = 1) -> str:
    """Hold a checkpoint to its manifest; rank r of W looks at every W-th file. "" when good, else what is wrong."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"no readable manifest: {error}"
    for name in sorted(manifest)[rank::world]:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != manifest[name]["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {manifest[name]['bytes']}"
        if describe(path) != manifest[name]:
            return f"{name} has another checksum"
    return ""
