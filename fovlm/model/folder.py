"""What must be right about a model's folder before it is loaded. No torch: a mistake is reported at once."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fovlm.errors import UserError, did_you_mean_path

MODEL_TYPE = "fovlm"


def check_folder(folder: Path) -> dict[str, Any]:
    """Refuse what `from_pretrained` could not load, in one line -> the content of config.json. Raises UserError."""
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder} is a file: give the folder of a model")
        raise UserError(f"no such folder: {folder}{did_you_mean_path(folder)}")
    if not (folder / "config.json").is_file():
        if (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file():
            raise UserError(f"{folder} is a run, not a model yet: fovlm convert {folder} OUT")
        raise UserError(f"{folder} is not a model (no config.json in it)")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if kind != MODEL_TYPE:
        raise UserError(f"{folder} holds a model of type '{kind}', not '{MODEL_TYPE}'")
    if "dino_config" in config:
        raise UserError(f"{folder} was converted by fovlm 0.1, whose models this version does not read: use 0.1 for it")
    index = folder / "model.safetensors.index.json"
    wanted: Iterable[str] = ("model.safetensors",)
    if index.is_file():
        try:
            wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} cannot be read: {error}") from error
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise UserError(f"{folder}: weights are missing: {', '.join(missing)}; convert or copy it again")
    return config
