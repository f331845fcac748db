"""Find a saved run and open it: by the run's name or folder, or by the folder of one of its checkpoints.

Every file is checked against the checkpoint's manifest before anything is read. deepspeed is not needed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fovlm.checkpoint import store
from fovlm.checkpoint.store import ENGINE, MANIFEST, Checkpoints, State
from fovlm.checkpoint.zero_reader import MergedWeights, Weights, ZeroWeights
from fovlm.config.schema import Experiment
from fovlm.data.chat import TRANSFORMERS_ERRORS, load_tokenizer
from fovlm.data.tokenizers import open_tokenizer
from fovlm.errors import UserError, did_you_mean
from fovlm.model.lora import is_adapter, plain_name
from fovlm.model.modeling import FoveatedConfig, FoveatedVLM
from fovlm.model.processing import load_model
from fovlm.paths import run_root


@dataclass
class SavedRun:
    """A checkpoint and the run that it belongs to (the checkpoint's own folder when it was copied elsewhere)."""

    path: Path  # of the checkpoint
    run: Path
    experiment: Experiment
    state: State

    def model_config(self) -> FoveatedConfig:
        """The model's configuration. Raises UserError."""
        file = self.path / store.CONFIG
        try:
            return FoveatedConfig(**json.loads(file.read_text(encoding="utf-8")))
        except TRANSFORMERS_ERRORS as error:
            raise UserError(f"{file}: no readable model configuration ({error})") from error

    def tokenizer(self, name: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer `name` (a folder or id), by default the run's own. Raises UserError."""
        own = self.run / "tokenizer"
        if name is None and own.is_dir():
            return load_tokenizer(str(own))
        try:
            return load_tokenizer(name) if name else open_tokenizer(self.experiment)
        except UserError as error:
            raise UserError(f"{self.run}: has no tokenizer/ of its own; give --tokenizer FOLDER ({error})") from error

    def weights(self) -> ZeroWeights:
        """The weights, read from the ranks' shards on demand. Raises UserError (see ZeroWeights)."""
        return ZeroWeights(self.path / ENGINE)

    def merged(self) -> Weights:
        """The weights with adapters taken into those that they belong to."""
        lora = self.model_config().lora
        return MergedWeights(self.weights(), lora) if lora else self.weights()

    def model(self) -> FoveatedVLM:
        """The model with these weights, on the CPU. Raises UserError."""
        model = FoveatedVLM(self.model_config())
        self.load_into(model)
        return model

    def load_into(self, model: FoveatedVLM) -> None:
        """Copy the weights into `model`: fp32, or the stored type of frozen ones. Raises UserError if they differ."""
        stored = self.weights()
        weights = {name: stored.read(name) for name in stored.shapes}
        weights |= {name: weights[source] for name, source in stored.ties.items() if source in weights}
        _load_state(model, weights, str(self.path))


def open_run(where: str | Path, which: str | None = None) -> SavedRun:
    """Open the checkpoint that `find_checkpoint` gives. Raises UserError."""
    path = find_checkpoint(where, which)
    file = path / "experiment.yaml"
    try:
        experiment = Experiment.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{file}: not the settings of a run of this version of fovlm ({reason})") from error
    run = path.resolve().parent.parent if path.resolve().parent.name == "checkpoints" else path
    return SavedRun(path, run, experiment, store.read_state(path))


def find_checkpoint(where: str | Path, which: str | None = None, verify: Callable[[Path], str] = store.verify) -> Path:
    """The folder of a checkpoint whose files are all as they were written, of a run's folder or name or its own folder.

    `which` is best, latest, newest or a step; by default the best, else the latest, else the newest that is whole, with
    a warning for each damaged one. `verify` says what is wrong with a checkpoint ("": nothing). Raises UserError.
    """
    folder = find_folder(Path(where))
    if (folder / MANIFEST).is_file():
        if which not in (None, "newest"):
            raise UserError(f"{folder} is one checkpoint: --step {which} is for a run's folder")
        path = folder
    elif (folder / "checkpoints").is_dir():
        checkpoints = Checkpoints(folder)
        if not checkpoints.names():
            raise UserError(f"{folder}: the run has no complete checkpoint yet")
        if which in (None, "newest"):
            preferred = () if which else ("best", "latest")
            if found := checkpoints.first_whole(*preferred, verify=verify):
                return found
            path = checkpoints.folder / checkpoints.names()[-1]
            raise UserError(f"{path}: {verify(path)}; no checkpoint of this run is whole")
        path = _chosen(checkpoints, str(which))
    else:
        problem = "neither a run (no checkpoints/ in it) nor a checkpoint"
        if (folder / "config.json").is_file():
            problem = "a model already, not a run"
        elif (folder / ENGINE).is_dir():
            problem = "a checkpoint without its manifest.json: its save did not complete"
        raise UserError(f"{folder}: {problem}; give the folder of a run, or one below its checkpoints/")
    if problem := verify(path):
        others = [_step(Path(n)) for n in Checkpoints(path.parent.parent).names() if n != path.name]
        hint = f"--step {max(others)} is another" if others else "there is no other checkpoint beside it"
        raise UserError(f"{path}: {problem}; {hint}")
    return path


def load_weights(model: FoveatedVLM, where: str) -> None:
    """Start `model` from the weights of a run, a checkpoint, or a folder that `save_pretrained` wrote. Raises UserError
    when there are none, or they do not fit."""
    try:
        folder = find_folder(Path(where))
        if (folder / "config.json").is_file():
            _load_state(model, load_model(folder, torch.float32).state_dict(), str(folder))
        else:
            open_run(folder).load_into(model)
    except UserError as error:
        raise UserError(f"model.init_from={where}: {error}") from error


def _load_state(model: FoveatedVLM, weights: dict[str, torch.Tensor], where: str) -> None:
    state = model.state_dict()
    if any(map(is_adapter, state)) and not any(map(is_adapter, weights)):  # new adapters on a trained model
        plain, weights = weights, {name: weight for name, weight in state.items() if is_adapter(name)}
        weights |= {name: plain[plain_name(name)] for name in state if plain_name(name) in plain}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: its weights are not those of this model ({reason})") from error


def find_folder(where: Path) -> Path:
    """The folder `where`, as given or below FOVLM_RUNS. Raises UserError."""
    root = run_root()
    folder = next((f for f in (where, root / where) if f.is_dir()), None)
    if folder is None:
        names = [f.name for f in root.iterdir() if f.is_dir()] if root.is_dir() else []
        raise UserError(f"{where}: no such folder, nor a run below {root}{did_you_mean(where.name, names)}")
    return folder.parent if folder.name == "checkpoints" else folder


def _chosen(checkpoints: Checkpoints, which: str) -> Path:
    """The checkpoint "best", "latest" or of a step. Raises UserError when there is none."""
    run, names = checkpoints.folder.parent, checkpoints.names()
    if which == "best" and checkpoints.pointed("best") is None:
        raise UserError(f"{run}: no checkpoint is marked as best; --step latest takes the newest")
    if which in ("best", "latest"):
        return checkpoints.folder / (checkpoints.pointed(which) or names[-1])
    steps = {str(_step(Path(name))): name for name in names}
    wanted = which.removeprefix("step-").lstrip("0") or "0"
    if wanted not in steps:
        raise UserError(f"{run}: no checkpoint of step {which}; there are best, latest, {', '.join(steps)}")
    return checkpoints.folder / steps[wanted]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
