"""The weights inside a ZeRO checkpoint, whole, one at a time, and without deepspeed.

DeepSpeed cuts what is trained into flat fp32 vectors, one for each rank (and group):

    stage 1, 2   a group's parameters one behind the other; rank r has the r-th part of that vector
    stage 3      every parameter in W equal parts, padded; rank r has the r-th part of each, one behind the other

Frozen parameters and buffers lie beside them, in the type of training; tied ones are there once, under one name. The
files are mapped into memory and never read whole: DeepSpeed's own `zero_to_fp32` joins a copy of everything first.
Layout as in deepspeed/utils/zero_to_fp32.py, release 0.19.8.

Files are unpickled with `weights_only`: tensors, plain values, and stand-ins for four of DeepSpeed's classes.
"""

import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fovlm.errors import UserError


class _StandIn:
    """In place of one of DeepSpeed's small classes, none of whose values are needed here."""


_KNOWN = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
]
Shapes = dict[str, tuple[int, ...]]
ZIP = b"PK\x03\x04"  # how zip archives begin (APPNOTE.TXT 6.3, section 4.3.7)
STATE = "optimizer_state_dict"  # of a rank's optimizer file
RELEASE_AFTER = 256 << 20  # bytes read from the mapped files before their memory is given back


class ZeroWeights:
    """The weights of the checkpoint files in `folder`: names and shapes at once, values by `read`.

    `shapes` has every stored parameter and buffer; `ties` says which other names stand for one of them. With `trust`
    files are unpickled freely, which runs whatever code they hold. Raises UserError: a file is missing (it is named),
    damaged, or holds more than tensors and plain values.
    """

    def __init__(self, folder: Path, trust: bool = False):
        self.folder, self.origin, self.trust = folder, str(folder), trust
        self.shapes: Shapes = {}
        self.ties: dict[str, str] = {}
        self._pieces: dict[str, list[Tensor]] = {}  # name -> flat pieces of the mapped files, in order
        self._read = 0  # bytes since the files were mapped: they count as used memory until they are mapped anew
        self._open()

    def read(self, name: str) -> Tensor:
        """A copy of one weight: fp32 if it was trained, else in the type it was stored in."""
        if self._read > RELEASE_AFTER:
            self._open()
        pieces, shape = self._pieces[self.ties.get(name, name)], self.shapes[self.ties.get(name, name)]
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0].clone()
        self._read += whole.nbytes
        return whole[: math.prod(shape)].view(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[self.ties.get(name, name)]

    def dtype(self, name: str) -> torch.dtype:
        return self._pieces[self.ties.get(name, name)][0].dtype

    def close(self) -> None:
        """Let the files go."""
        self._pieces = {}

    def _open(self) -> None:
        """Map the files, those mapped before let go."""
        self._pieces, self._read = {}, 0
        optim = _by_rank(self.folder, "*zero_pp_rank_*_optim_states.pt")
        if not optim:
            raise UserError(f"{self.folder}: no *_optim_states.pt of ZeRO 1, 2 or 3 in it, so no weights to convert")
        first = min(optim)
        states = {rank: _field(path, self._load(path), STATE) for rank, path in optim.items()}
        of_first = (_field(optim[first], states[first], key) for key in ("zero_stage", "partition_count"))
        stage, count = (int(_most(value)) for value in of_first)
        _complete(self.folder, optim, count)
        models = {0: self.folder / "mp_rank_00_model_states.pt"}
        if stage == 3:
            models = _by_rank(self.folder, "zero_pp_rank_*_model_states.pt")
            _complete(self.folder, models or {0: self.folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"}, count)
        elif not models[0].is_file():
            raise UserError(f"{self.folder}: {models[0].name} is missing")
        files = [self._load(models[rank]) for rank in sorted(models)]
        head, path = files[0], models[0]
        self.ties = {str(k): str(v) for k, v in _field(path, head, "shared_params").items()}
        groups = [{name: tuple(shape) for name, shape in g.items()} for g in _field(path, head, "param_shapes")]
        ordered = [states[rank] for rank in sorted(states)]
        if stage == 3:
            flats = [_field(optim[first], state, "fp32_flat_groups") for state in ordered]
            self._by_parameter({name: shape for group in groups for name, shape in group.items()}, flats, count)
        else:
            flats = [_field(optim[first], state, "single_partition_of_fp32_groups") for state in ordered]
            paddings = ordered[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
            for i, group in enumerate(groups):
                self._by_group(group, [flat[i] for flat in flats], paddings[i], count)
        module = head.get("module") or {}
        if stage < 3:  # whole beside the shards; stage 1 lists its frozen parameters nowhere else
            rest = [name for name in module if name not in self._pieces and name not in self.ties]
        else:
            rest = [name for name in _field(path, head, "buffer_names") if name in module]
            for name, shape in (head.get("frozen_param_shapes") or {}).items():
                parts = [_field(path, file, "frozen_param_fragments")[name].flatten() for file in files]
                self._add(name, tuple(shape), parts)
        for name in rest:
            self._add(name, tuple(module[name].shape), [module[name].flatten()])

    def _by_group(self, shapes: Shapes, parts: list[Tensor], padding: list[int], count: int) -> None:
        """Stages 1 and 2: the parameters of a group stand one behind the other in the ranks' parts together."""
        at = 0
        for (name, shape), behind in zip(shapes.items(), padding, strict=True):
            n = math.prod(shape)
            self._add(name, shape, _cut(parts, at, at + n))
            at += n + int(behind)
        have, align = sum(len(part) for part in parts), 2 * count  # it pads a group to a multiple of 2 W
        if math.ceil(at / align) != math.ceil(have / align):
            raise UserError(f"{self.folder}: the shards hold {have} numbers where the parameters need {at}")

    def _by_parameter(self, shapes: Shapes, flats: list[list[Tensor]], count: int) -> None:
        """Stage 3: every rank has its part of every parameter, one behind the other over its flat groups."""
        at = 0
        for name, shape in shapes.items():
            n = math.ceil(math.prod(shape) / count)
            self._add(name, shape, [piece for flat in flats for piece in _cut(list(flat), at, at + n)])
            at += n
        if (have := sum(len(part) for part in flats[0])) != at:
            raise UserError(f"{self.folder}: a rank's shard holds {have} numbers where the parameters need {at}")

    def _add(self, name: str, shape: tuple[int, ...], pieces: list[Tensor]) -> None:
        if sum(len(piece) for piece in pieces) < math.prod(shape):
            raise UserError(f"{self.folder}: the shards end before {name} does")
        self.shapes[name], self._pieces[name] = shape, pieces

    def _load(self, path: Path) -> dict[str, Any]:
        return load_pickled(path, self.trust)


def load_pickled(path: Path, trust: bool = False) -> Any:
    """What torch.save wrote to a file, mapped into memory and read without running code. Raises UserError.

    With `trust` it is unpickled freely.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP)) != ZIP:
                raise ValueError("no file that torch.save has written since its release 1.6")
        with torch.serialization.safe_globals([] if trust else list(_KNOWN)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=not trust)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class|operand) ([\w.]+)", str(error))
        what = next((name for name in found.groups() if name), "") if found else ""
        raise UserError(
            f"{path}: holds more than tensors and plain values{f' ({what})' if what else ''}, and reading that could "
            "run code of whoever made it: refused; if you trust them, add --trust"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:160]}); is it damaged?") from error


def _by_rank(folder: Path, pattern: str) -> dict[int, Path]:
    found = {}
    for path in folder.glob(pattern):
        if rank := re.search(r"zero_pp_rank_(\d+)_", path.name):
            found[int(rank.group(1))] = path
    return found


def _complete(folder: Path, found: dict[int, Path], count: int) -> None:
    """Every rank's file must be there. Raises UserError that names those that are not."""
    rank, one = min(found.items())
    names = [one.name.replace(f"zero_pp_rank_{rank}_", f"zero_pp_rank_{r}_") for r in range(count)]
    if missing := [name for name in names if not (folder / name).is_file()]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{folder}: {', '.join(missing[:3])}{more} missing, of the shards of {count} ranks")


def _field(path: Path, state: Any, key: str) -> Any:
    """A field that every such file has. Raises UserError when it has not."""
    if not isinstance(state, dict) or key not in state:
        raise UserError(f"{path}: no '{key}' in it: not a file of DeepSpeed's ZeRO")
    return state[key]


def _most(value: Any) -> Any:
    """DeepSpeed keeps the number of parts once, or for every group."""
    return max(value) if isinstance(value, list) else value


def _cut(parts: list[Tensor], start: int, stop: int) -> list[Tensor]:
    """[start, stop) of the parts laid one behind the other, as views."""
    pieces, at = [], 0
    for part in parts:
        low, high = max(start - at, 0), min(stop - at, len(part))
        if low < high:
            pieces.append(part[low:high])
        at += len(part)
    return pieces
