"""Read whole weights from a ZeRO checkpoint, one at a time, without deepspeed.

DeepSpeed stores trained parameters in flat fp32 vectors, one per rank (and group):

    stage 1, 2   the parameters of a group in a row; rank r has the r-th part of that vector
    stage 3      every parameter in W equal parts, padded; rank r has the r-th part of each, in a row

Frozen parameters and buffers are stored in the type of training; tied ones once, under one name. The files are mapped
into memory and never read whole (DeepSpeed's `zero_to_fp32` copies everything first). Layout as in
deepspeed/utils/zero_to_fp32.py, release 0.19.8.

Files are unpickled with `weights_only`: tensors, plain values, and placeholders for four of DeepSpeed's classes.
"""

import math
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fovlm.errors import UserError, few
from fovlm.model.lora import BASE, A, B, is_adapter, merge, plain_name


class _Placeholder:
    """In place of DeepSpeed's small classes, whose values are not needed."""


_KNOWN = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Placeholder, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Placeholder, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Placeholder, "deepspeed.utils.tensor_fragment.fragment_address"),
]
Shapes = dict[str, tuple[int, ...]]
# What a file raises that is damaged, or was made to do harm.
MALFORMED = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
             ValueError, struct.error)  # fmt: skip
ZIP = b"PK\x03\x04"  # the first bytes of a zip archive (APPNOTE.TXT 6.3, section 4.3.7)
RELEASE_AFTER = 256 << 20  # bytes read from the mapped files before they are mapped again, which frees their memory


class Weights:
    """Named weights of a model, read one at a time.

    `shapes` has every stored weight; `ties` maps other names to the one of these that they share.
    """

    def __init__(self, origin: str):
        self.origin = origin
        self.shapes: Shapes = {}
        self.ties: dict[str, str] = {}
        self._pieces: dict[str, list[Tensor]] = {}  # name -> flat pieces, in order

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight. Raises UserError if there is none of this name."""
        stored = self.ties.get(name, name)
        if stored not in self.shapes:
            raise UserError(f"{self.origin}: '{name}' is missing")
        return self.shapes[stored]

    def dtype(self, name: str) -> torch.dtype:
        return self._pieces[self.ties.get(name, name)][0].dtype

    def read(self, name: str) -> Tensor:
        """A copy of one weight, in its stored type. Raises UserError if there is none of this name."""
        shape, pieces = self.shape(name), self._pieces[self.ties.get(name, name)]
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0].clone()
        return whole[: math.prod(shape)].view(shape)

    def add(self, name: str, shape: tuple[int, ...], pieces: list[Tensor]) -> None:
        """Add a weight. Raises UserError if the flat pieces together are too short."""
        if min(shape, default=0) < 0 or sum(len(piece) for piece in pieces) < math.prod(shape):
            raise UserError(f"{self.origin}: the shards end before the end of {name}")
        self.shapes[name], self._pieces[name] = shape, pieces


class MergedWeights(Weights):
    """The weights of `inner` with the adapters of `lora` (rank, alpha) taken into the ones that they belong to."""

    def __init__(self, inner: Weights, lora: dict[str, Any]):
        super().__init__(inner.origin)
        self.inner, self.lora = inner, lora
        self.stored = {plain_name(name): name for name in inner.shapes if not is_adapter(name)}
        self.shapes = {name: inner.shapes[stored] for name, stored in self.stored.items()}
        self.ties = {plain_name(name): plain_name(other) for name, other in inner.ties.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.inner.dtype(self.stored[self.ties.get(name, name)])

    def read(self, name: str) -> Tensor:
        stored = self.stored[self.ties.get(name, name)]
        weight, names = self.inner.read(stored), [stored.replace(BASE, part) for part in (A, B)]
        if BASE not in stored or names[0] not in self.inner.shapes:
            return weight
        return merge(weight, self.inner.read(names[0]), self.inner.read(names[1]), self.lora)


class ZeroWeights(Weights):
    """The weights of the checkpoint files in `folder`; trained ones are fp32. Raises UserError if a file is missing (it
    is named), damaged, or holds more than tensors and plain values."""

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self.folder = folder
        self._read = 0  # bytes read since the files were mapped
        self._open()

    def read(self, name: str) -> Tensor:
        if self._read > RELEASE_AFTER:
            self._open()
        weight = super().read(name)
        self._read += weight.nbytes
        return weight

    def _open(self) -> None:
        """Map the files, after releasing those mapped before."""
        self._pieces, self._read = {}, 0
        try:
            self._map()
        except MALFORMED as error:
            raise UserError(f"{self.folder}: not files of DeepSpeed's ZeRO ({error})") from error

    def _map(self) -> None:
        optimizers = _by_rank(self.folder, "*zero_pp_rank_*_optim_states.pt")
        if not optimizers:
            raise UserError(f"{self.folder}: no *_optim_states.pt of ZeRO 1, 2 or 3, so no weights to convert")
        first = optimizers[min(optimizers)]
        paths = [optimizers[rank] for rank in sorted(optimizers)]
        states = [_field(path, load_pickled(path), "optimizer_state_dict") for path in paths]
        facts = (_field(first, states[0], key) for key in ("zero_stage", "partition_count"))
        stage, count = (int(max(fact) if isinstance(fact, list) else fact) for fact in facts)  # once, or per group
        _check_complete(self.folder, optimizers, count)
        models = {0: self.folder / "mp_rank_00_model_states.pt"}
        if stage == 3:
            models = _by_rank(self.folder, "zero_pp_rank_*_model_states.pt")
            _check_complete(
                self.folder, models or {0: self.folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"}, count
            )
        elif not models[0].is_file():
            raise UserError(f"{self.folder}: {models[0].name} is missing")
        files = [load_pickled(models[rank]) for rank in sorted(models)]
        head, path = files[0], models[0]
        self.ties = {str(k): str(v) for k, v in _field(path, head, "shared_params").items()}
        groups = [{name: tuple(shape) for name, shape in group.items()} for group in _field(path, head, "param_shapes")]
        if stage == 3:
            flats = [_field(first, state, "fp32_flat_groups") for state in states]
            self._add_stage_3({name: shape for group in groups for name, shape in group.items()}, flats, count)
        else:
            flats = [_field(first, state, "single_partition_of_fp32_groups") for state in states]
            paddings = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
            for i, group in enumerate(groups):
                self._add_group(group, [flat[i] for flat in flats], paddings[i], count)
        module = head.get("module") or {}
        if stage < 3:  # whole in this file; stage 1 lists its frozen parameters nowhere else
            rest = [name for name in module if name not in self._pieces and name not in self.ties]
        else:
            rest = [name for name in _field(path, head, "buffer_names") if name in module]
            for name, shape in (head.get("frozen_param_shapes") or {}).items():
                parts = [_field(path, file, "frozen_param_fragments")[name].flatten() for file in files]
                self.add(name, tuple(shape), parts)
        for name in rest:
            self.add(name, tuple(module[name].shape), [module[name].flatten()])

    def _add_group(self, shapes: Shapes, parts: list[Tensor], paddings: list[int], count: int) -> None:
        """Stages 1 and 2: the ranks' parts in a row are the parameters of the group in a row."""
        at = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            n = math.prod(shape)
            self.add(name, shape, _slice(parts, at, at + n))
            at += n + int(padding)
        have, align = sum(len(part) for part in parts), 2 * count  # a group is padded to a multiple of 2 W
        if math.ceil(at / align) != math.ceil(have / align):
            raise UserError(f"{self.folder}: the shards hold {have} numbers, the parameters need {at}")

    def _add_stage_3(self, shapes: Shapes, flats: list[list[Tensor]], count: int) -> None:
        """Stage 3: every rank has its part of every parameter, in a row across its flat groups."""
        at = 0
        for name, shape in shapes.items():
            n = math.ceil(math.prod(shape) / count)
            self.add(name, shape, [piece for flat in flats for piece in _slice(list(flat), at, at + n)])
            at += n
        if (have := sum(len(part) for part in flats[0])) != at:
            raise UserError(f"{self.folder}: a rank's shard holds {have} numbers, the parameters need {at}")


def load_pickled(path: Path) -> Any:
    """Read what torch.save wrote, mapped into memory, without running code. Raises UserError."""
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP)) != ZIP:
                raise ValueError("not a file that torch.save has written since its release 1.6")
        with torch.serialization.safe_globals(list(_KNOWN)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class|operand) ([\w.]+)", str(error))
        what = f" ({found[1] or found[2]})" if found else ""
        raise UserError(
            f"{path}: holds more than tensors and plain values{what}, and reading it could run code: refused"
        ) from error
    except MALFORMED as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:160]}); is it damaged?") from error


def _by_rank(folder: Path, pattern: str) -> dict[int, Path]:
    ranks = {path: re.search(r"zero_pp_rank_(\d+)_", path.name) for path in folder.glob(pattern)}
    return {int(rank[1]): path for path, rank in ranks.items() if rank}


def _check_complete(folder: Path, found: dict[int, Path], count: int) -> None:
    """Raise UserError with the names of the ranks' files that are missing."""
    rank, path = min(found.items())
    names = [path.name.replace(f"zero_pp_rank_{rank}_", f"zero_pp_rank_{r}_") for r in range(count)]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder}: {few(missing)} missing, of the shards of {count} ranks")


def _field(path: Path, state: Any, key: str) -> Any:
    """A field that every such file has. Raises UserError if it is missing."""
    if not isinstance(state, dict) or key not in state:
        raise UserError(f"{path}: no '{key}' in it: not a file of DeepSpeed's ZeRO")
    return state[key]


def _slice(parts: list[Tensor], start: int, stop: int) -> list[Tensor]:
    """[start, stop) of the concatenated parts, as views."""
    pieces, at = [], 0
    for part in parts:
        low, high = max(start - at, 0), min(stop - at, len(part))
        if low < high:
            pieces.append(part[low:high])
        at += len(part)
    return pieces
