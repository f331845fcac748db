"""Where things are: the project, the folders of data, models, runs and caches, packages. No torch, no pydantic.

The project is the checkout, with `experiments/` and `ds_configs/` beside the package. An installed package has these
inside it, and the project is the current folder.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "experiments").is_dir()  # `setup.py` puts it there
SHIPPED = PACKAGE if INSTALLED else PACKAGE.parent  # holds experiments/ and ds_configs/
ROOT = Path.cwd() if INSTALLED else PACKAGE.parent  # the project
TRAIN = "fovlm train" if INSTALLED else "./launch.sh"  # what users type to train a run


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
    """FOVLM_CACHE, by default `.cache` in the project: fetched shards, tokens, indices of read-only folders."""
    return Path(os.environ.get("FOVLM_CACHE", ROOT / ".cache"))


def local_folder(name: str) -> Path | None:
    """The folder of a model: `name` as given, or below FOVLM_MODELS with or without its organisation. None: no such."""
    below = model_root()
    folders = (Path(name), below / name, below / name.rsplit("/", 1)[-1])
    return next((folder for folder in folders if os.path.isdir(folder)), None)


def in_project(path: Path) -> str:
    """A path for a message: relative to the project, or to the package's own files, where it is inside."""
    return next((str(path.relative_to(top)) for top in (ROOT, SHIPPED) if path.is_relative_to(top)), str(path))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
