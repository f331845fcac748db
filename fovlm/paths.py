"""Where things are: the project, and the folders of data, models, runs and caches. No torch, no pydantic."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the project


def data_root() -> Path:
    """FOVLM_DATA, by default `data` in the project: relative shard patterns are below it."""
    return Path(os.environ.get("FOVLM_DATA", ROOT / "data"))


def model_root() -> Path:
    """FOVLM_MODELS, by default `models` in the project: model folders are below it."""
    return Path(os.environ.get("FOVLM_MODELS", ROOT / "models"))


def run_root() -> Path:
    """FOVLM_RUNS, by default `runs` in the project: run folders are below it."""
    return Path(os.environ.get("FOVLM_RUNS", ROOT / "runs"))


def cache_root() -> Path:
    """FOVLM_CACHE, by default `.cache` in the project: fetched shards, token counts, indices of read-only folders."""
    return Path(os.environ.get("FOVLM_CACHE", ROOT / ".cache"))


def local_folder(name: str) -> Path | None:
    """The folder of a model: `name` as given, or below FOVLM_MODELS with or without its organisation. None: no such."""
    below = model_root()
    folders = (Path(name), below / name, below / name.rsplit("/", 1)[-1])
    return next((folder for folder in folders if folder.is_dir()), None)


def in_project(path: Path) -> str:
    """A path for a message: relative to the project where it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
