"""DeepSpeed's universal checkpoints: how a run resumes on another number of ranks. Imports deepspeed."""

import contextlib
import io
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

# deepspeed asks for its accelerator at import; without a GPU it would warn and choose the CPU anyway.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from fovlm import distributed
from fovlm.checkpoint import store
from fovlm.checkpoint.store import ENGINE
from fovlm.errors import UserError


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Let every `torch.load` inside, DeepSpeed's too, read tensors and plain values only, and run nothing."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own switch, which overrules weights_only=False in a call
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def universal_for(path: Path, scratch: Path) -> Path | None:
    """The universal form of a checkpoint that this number of ranks cannot load otherwise, made in `scratch`; None where
    it can.

    Rank 0 makes it, the others wait. Raises UserError for ZeRO-3, whose universal checkpoints do not resume exactly
    (a loss of 21.57 where 20.63 was right, DeepSpeed 0.19.8).
    """
    state = store.read_state(path)
    if state.world_size == distributed.world():
        return None
    if state.zero_stage == 3:
        raise UserError(
            f"{path} was written by {state.world_size} ranks under ZeRO-3 and can only resume on as many: "
            "start that many, or train with deepspeed=zero2"
        )
    if distributed.rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        with weights_only(), contextlib.redirect_stdout(io.StringIO()):
            ds_to_universal.main(
                Namespace(
                    input_folder=str(path / ENGINE),
                    output_folder=str(scratch / ENGINE),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,  # what Megatron's checkpoints hold and others do not
                )
            )
    distributed.barrier()
    return scratch


def universal_done(scratch: Path) -> None:
    """Remove what `universal_for` made, once every rank has loaded it."""
    distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
