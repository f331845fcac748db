"""The training step on DeepSpeed: token-mean gradients, one decision about non-finite values, save and resume.

With `convert.py` the only file that knows deepspeed. `ds_configs/*.json` say how to run; what is trained comes from the
experiment.
"""

import contextlib
import io
import logging
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# deepspeed asks for its accelerator at import; without a GPU it would warn and choose the CPU anyway.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from fovlm import distributed
from fovlm.checkpoint import store
from fovlm.checkpoint.reference import ReferenceBatch, ReferenceOutputs
from fovlm.checkpoint.store import ENGINE
from fovlm.config.schema import OptimSettings
from fovlm.data.packing import Batch
from fovlm.errors import UserError
from fovlm.model.modeling import FoveatedVLM
from fovlm.train.losses import Loss, pair_weight, preference_loss, text_loss, text_weight

log = logging.getLogger("fovlm")


def start() -> torch.device:
    """Join the other ranks (nccl on GPUs, gloo on CPUs) and return this rank's device.

    Rank, world size and address come from the launcher's environment (`env://`). DeepSpeed's shared-memory operation
    for the CPU is switched off: compiling it takes minutes at the first start, and gloo does without.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return device


@dataclass
class StepResult:
    """What one optimizer step did, the same on every rank."""

    loss: float  # mean over the weighted tokens (or pairs) of the global batch
    first: float  # the same over each rank's first pack alone, to be held against its coarse loss
    grad_norm: float  # before clipping
    weight: float  # weighted tokens (or pairs) of the global batch
    skipped: bool  # a loss or gradient was not finite: the weights stayed as they were
    parts: dict[str, float] = field(default_factory=dict)


class Engine:
    """A model under DeepSpeed.

    `config` is the resolved DeepSpeed dict. `reference` is the frozen start of a preference run (None: text loss).
    """

    def __init__(
        self,
        model: FoveatedVLM,
        optim: OptimSettings,
        config: dict[str, Any],
        device: torch.device,
        reference: FoveatedVLM | None = None,
        dpo_beta: float = 0.1,
    ):
        self.device = device
        self.accumulation = config["gradient_accumulation_steps"]
        self.stage = config["zero_optimization"]["stage"]
        if self.stage == 3:  # it gathers weights around the forward of their own module: nobody else should use them
            model.encoder.attention = "plain"
        rates = {"connector": optim.lr_connector, "encoder": optim.lr_encoder, "llm": optim.lr_llm}
        groups = [
            {"name": name, "params": parameters, "lr": rates[name], "weight_decay": optim.weight_decay}
            for name, parameters in model.groups().items()
            if parameters
        ]
        # torch's fused AdamW runs on GPU and CPU alike, so offloading needs no operator compiled at start.
        optimizer = torch.optim.AdamW(groups, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.dtype = next(model.parameters()).dtype
        self.reference = reference.to(device, self.dtype).eval().requires_grad_(False) if reference else None
        self.dpo_beta = dpo_beta

    @property
    def model(self) -> FoveatedVLM:
        return self.deepspeed.module

    def nll(self, batch: Batch, visual: str | None = None) -> Tensor:
        """The model's nll [S] of a pack on this rank's device. Under ZeRO-3 all ranks must call it together."""
        return self.deepspeed(batch, visual=visual)

    def coarse_loss(self, batch: Batch) -> float:
        """The text loss of the ranks' packs with coarse tokens alone, mean over weighted tokens. No gradient."""
        with torch.no_grad():
            batch = batch.to(self.device)
            nll, weight = self.nll(batch, visual="coarse"), text_weight(batch)
            loss, weight = distributed.sum_over_ranks(
                [float(text_loss(nll, batch).total), float(weight)], self.device
            ).tolist()
        return loss / max(weight, 1e-9)

    def set_rates(self, rates: dict[str, float]) -> None:
        """Set each group's learning rate for the next step."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rates[group["name"]]

    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step over this rank's packs, as many as there are accumulation steps.

        The gradient is that of the mean over all weighted tokens of the global batch. DeepSpeed divides by the
        accumulation steps and averages over the ranks; multiplying by both first undoes that, and the one division by
        the total weight is ours. So ranks, accumulation and packing do not change it.
        """
        if len(batches) != self.accumulation:
            raise ValueError(f"{len(batches)} packs for {self.accumulation} accumulation steps")
        self.deepspeed.train()
        weights = [self._weight(batch) for batch in batches]
        total = max(float(distributed.sum_over_ranks([float(sum(weights))], self.device)), 1e-9)
        scale = distributed.world() * self.accumulation / total
        losses = []
        for batch in batches:
            loss = self._loss(batch.to(self.device))
            self.deepspeed.backward(loss.total * scale)
            self.deepspeed.step()
            losses.append({"loss": loss.total.detach(), **loss.parts})
        # Reading a number waits for a GPU, so it is done once, behind the whole step.
        sums = {name: float(sum(part[name] for part in losses)) for name in losses[0]}
        for batch, part in zip(batches, losses, strict=True):
            if not torch.isfinite(part["loss"]):
                log.error("rank %d: the loss is %s for samples %s", distributed.rank(), float(part["loss"]), batch.keys)
        # DeepSpeed skips a step whose gradient norm is not finite, the same on every rank, without a word.
        applied = self.deepspeed.was_step_applied()
        norm = self.deepspeed.get_global_grad_norm()
        first, first_weight, *summed = distributed.sum_over_ranks(
            [float(losses[0]["loss"]), float(weights[0]), *sums.values()], self.device
        ).tolist()
        parts = {name: value / total for name, value in zip(sums, summed, strict=True)}
        finite = applied and math.isfinite(parts["loss"])
        return StepResult(
            parts.pop("loss"), first / max(first_weight, 1e-9), float(norm or 0.0), total, not finite, parts
        )

    def _weight(self, batch: Batch) -> Tensor:
        return pair_weight(batch) if self.reference is not None else text_weight(batch)

    def _loss(self, batch: Batch) -> Loss:
        nll = self.nll(batch)
        if self.reference is None:
            return text_loss(nll, batch)
        with torch.no_grad():
            reference_nll = self.reference(batch)
        return preference_loss(nll, reference_nll, batch, self.dpo_beta)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: the weights, and fp32 master weights and two moments of what is trained."""
        size = {True: 0, False: 0}
        for p in self.model.parameters():
            size[p.requires_grad] += getattr(p, "ds_numel", p.numel())
        return (size[True] + size[False]) * self.dtype.itemsize + size[True] * 12

    def save(
        self,
        checkpoints: store.Checkpoints,
        state: store.State,
        experiment: str,
        best: bool,
        probe: ReferenceBatch | None = None,
    ) -> Path:
        """Write a checkpoint together with all ranks; see `checkpoint.py` for the order of things.

        The nll of `probe` goes with it, for a conversion to be held against. Raises UserError, on every rank and
        before anything is written, when the disk cannot hold it.
        """
        distributed.collective_call(lambda: checkpoints.need_room(self.checkpoint_bytes()))
        name = f"step-{state.step:08d}"
        staging = Path(distributed.broadcast(str(checkpoints.staging(name)) if distributed.rank() == 0 else ""))
        self.deepspeed.save_checkpoint(
            str(staging), tag=ENGINE, client_state={"iteration": state.step}, save_latest=False
        )
        torch.save(_random_states(), staging / f"random-{distributed.rank():05d}.pt")
        answered = self._ask(probe) if probe else None
        if distributed.rank() == 0:
            (staging / "experiment.yaml").write_text(experiment)
            (staging / store.CONFIG).write_text(self.model.config.to_json_string(use_diff=False))
            if answered:
                answered.save(staging)
        distributed.barrier()
        files = sorted(p for p in staging.rglob("*") if p.is_file())
        sealed = distributed.gather(store.seal(files[distributed.rank() :: distributed.world()], staging))
        final = staging
        if distributed.rank() == 0:
            manifest = {name: entry for part in sealed for name, entry in part.items()}
            final = checkpoints.publish(staging, manifest, state, best)
        return Path(distributed.broadcast(str(final)))

    @torch.no_grad()
    def _ask(self, probe: ReferenceBatch) -> ReferenceOutputs:
        self.deepspeed.eval()
        return probe.outputs(self.nll(probe.batch.to(self.device)), self.dtype)

    def load(self, path: Path, universal: Path | None = None) -> None:
        """Put weights, optimizer and random states back as `path` holds them, on every rank.

        `universal` is the folder that `to_universal` made, for another number of ranks; the engine must have been
        made with `load_universal` in its config. Files are read with `weights_only`.
        """
        with weights_only():
            self.deepspeed.load_checkpoint(str(universal or path), tag=ENGINE)
        own = path / f"random-{distributed.rank():05d}.pt"
        if own.exists():
            _set_random_states(torch.load(own, weights_only=True))


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


def to_universal(path: Path, out: Path) -> Path:
    """Turn the checkpoint at `path` into DeepSpeed's universal form in `out`, which any number of ranks can load.

    Rank 0 does the work. Raises UserError for ZeRO-3, whose universal checkpoints do not resume exactly (a loss of
    21.57 where 20.63 was right, DeepSpeed 0.19.8).
    """
    state = store.read_state(path)
    if state.zero_stage == 3:
        raise UserError(
            f"{path} was written by {state.world_size} ranks under ZeRO-3 and can only be resumed on as many: "
            "start it on that number, or train with deepspeed=zero2"
        )
    if distributed.rank() == 0:
        shutil.rmtree(out, ignore_errors=True)
        with weights_only(), contextlib.redirect_stdout(io.StringIO()):
            ds_to_universal.main(
                Namespace(
                    input_folder=str(path / ENGINE),
                    output_folder=str(out / ENGINE),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,  # what Megatron's checkpoints hold and others do not
                )
            )
    distributed.barrier()
    return out


def universal_for(path: Path, scratch: Path) -> Path | None:
    """The universal form of a checkpoint where this number of ranks needs one, made in `scratch` unless it is one."""
    if (path / store.UNIVERSAL).is_dir():  # `fovlm convert RUN OUT --to universal` made it
        return path / store.UNIVERSAL
    return to_universal(path, scratch) if store.read_state(path).world_size != distributed.world() else None


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
