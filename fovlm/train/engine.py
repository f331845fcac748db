"""The training step on DeepSpeed: token-mean gradients, one decision about non-finite values, save and load.

`ds_configs/*.json` say how to run; what is trained comes from the experiment.
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fovlm.checkpoint.universal import weights_only  # before deepspeed: it chooses the accelerator

# isort: split
import deepspeed
from deepspeed.runtime.zero import stage_1_and_2

from fovlm import distributed
from fovlm.checkpoint import store
from fovlm.checkpoint.reference import ReferenceBatch, ReferenceOutputs
from fovlm.checkpoint.store import ENGINE, Checkpoints, State
from fovlm.config.schema import OptimSettings
from fovlm.data.packing import Batch
from fovlm.data.prefetch import DeviceCopies
from fovlm.model.modeling import FoveatedVLM
from fovlm.train.gradients import gather_weights, lighten
from fovlm.train.losses import Loss, pair_weight, preference_loss, text_loss, text_weight


def start(hang_minutes: float = 30) -> torch.device:
    """Join the other ranks and return this rank's device.

    Tensors on GPUs are reduced by nccl, tensors and objects on the host by gloo. A collective call fails five minutes
    after `hang_minutes`, when the watchdog of the run has said where it hangs; DeepSpeed's own limit is ten minutes.
    Rank, world size and address come from the launcher's environment (`env://`). DeepSpeed's shared-memory operation
    for the CPU is switched off: compiling it takes minutes at the first start, and gloo does without.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"  # NUM_GPUS=0 sets it
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(minutes=hang_minutes + 5)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
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
    nonfinite: list[str] = field(default_factory=list)  # of this rank alone: losses that are not finite, with samples


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
            model.encoder.attention = "none"
        rates = {"connector": optim.lr_connector, "encoder": optim.lr_encoder, "llm": optim.lr_llm}
        groups = [
            {"name": name, "params": parameters, "lr": rates[name], "weight_decay": optim.weight_decay}
            for name, parameters in model.groups().items()
            if parameters
        ]
        # torch's fused AdamW runs on GPU and CPU alike, so offloading needs no operator compiled at start.
        optimizer = torch.optim.AdamW(groups, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if self.stage < 3:
            lighten(self.deepspeed.optimizer, self.stage, "offload_optimizer" in config["zero_optimization"])
            if device.type == "cpu":
                stage_1_and_2.all_gather_dp_groups = gather_weights
        self.dtype = next(model.parameters()).dtype
        self.reference = reference.to(device, self.dtype).eval().requires_grad_(False) if reference else None
        if self.reference:  # sums in the order of the model, although it is frozen
            self.reference.encoder.attention = model.encoder.form
        self.dpo_beta = dpo_beta
        self.copies = DeviceCopies(device)

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

    def step(self, batches: list[Batch]) -> Callable[[], StepResult]:
        """One optimizer step over this rank's packs, as many as there are accumulation steps -> how to read its result.

        The gradient is that of the mean over all weighted tokens of the global batch: ranks, accumulation and packing
        do not change it. ZeRO-3 averages over the ranks, so there the factor has their number in it.

        Nothing here reads from the device before the optimizer step. The result is copied to the host while the next
        step starts; reading it waits for the copy alone. Every rank may read at a time of its own.
        """
        if len(batches) != self.accumulation:
            raise ValueError(f"{len(batches)} packs for {self.accumulation} accumulation steps")
        self.deepspeed.train()
        weights = [self._weight(batch) for batch in batches]  # on the host, like their sum over the ranks
        total, first_weight = (max(w, 1e-9) for w in distributed.sum_over_ranks([sum(weights), weights[0]]).tolist())
        scale = (distributed.world() if self.stage == 3 else 1) / total
        losses: list[dict[str, Tensor]] = []
        for batch in self.copies.ahead(batches):
            loss = self._loss(batch)
            self.deepspeed.backward(loss.total * scale, scale_wrt_gas=False)
            self.deepspeed.step()
            losses.append({"loss": loss.total.detach(), **loss.parts})
        # DeepSpeed skips a step whose gradient norm is not finite, the same on every rank, without a message.
        applied, norm = self.deepspeed.was_step_applied(), self.deepspeed.get_global_grad_norm()
        names, keys, device = list(losses[0]), [batch.keys for batch in batches], self.device
        packs = torch.stack([part for parts in losses for part in parts.values()]).double().view(len(batches), -1)
        sums = distributed.sum_over_ranks(torch.cat([packs[0, :1], packs.sum(0)]), device)
        norm = torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float64, device=device).reshape(1)
        read = start_copy(torch.cat([norm, sums, packs[:, 0]]))

        def result() -> StepResult:
            norm, first, *values = read()
            packs = zip(keys, values[len(names) :], strict=True)
            nonfinite = [f"the loss is {value} for samples {some}" for some, value in packs if not math.isfinite(value)]
            parts = {name: value / total for name, value in zip(names, values, strict=False)}
            loss = parts.pop("loss")
            skipped = not (applied and math.isfinite(loss))
            return StepResult(loss, first / first_weight, norm, total, skipped, parts, nonfinite)

        return result

    def _weight(self, batch: Batch) -> float:
        return float(pair_weight(batch) if self.reference is not None else text_weight(batch))

    def _loss(self, batch: Batch) -> Loss:
        if self.reference is None and self.stage < 3:  # ZeRO-3 has the weights only inside their modules' forward
            return Loss(self.deepspeed(batch, weight=batch.weight), {})
        nll = self.nll(batch)
        if self.reference is None:
            return text_loss(nll, batch)
        with torch.no_grad():
            reference_nll = self.reference(batch)
        return preference_loss(nll, reference_nll, batch, self.dpo_beta)

    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: the weights, and fp32 master weights and two moments of what is trained."""
        size = {True: 0, False: 0}
        for p in self.model.parameters():
            size[p.requires_grad] += getattr(p, "ds_numel", p.numel())
        return (size[True] + size[False]) * self.dtype.itemsize + size[True] * 12

    def save(
        self, checkpoints: Checkpoints, state: State, experiment: str, best: bool, probe: ReferenceBatch | None = None
    ) -> Path:
        """Write a checkpoint together with all ranks; see `store.py` for the order of its parts.

        The nll of `probe` goes with it, to verify a conversion against. Raises UserError, on every rank and
        before anything is written, when the disk cannot hold it.
        """
        distributed.collective_call(lambda: checkpoints.need_room(self.checkpoint_bytes()))
        name = f"step-{state.step:08d}"
        staging = Path(distributed.broadcast(str(checkpoints.staging(name)) if distributed.rank() == 0 else ""))
        with store.disk_errors(staging):
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

        `universal` is the folder that `universal_for` made, for another number of ranks; the engine must have been
        made with `load_universal` in its config. Files are read with `weights_only`.
        """
        with weights_only():
            self.deepspeed.load_checkpoint(str(universal or path), tag=ENGINE)
        own = path / f"random-{distributed.rank():05d}.pt"
        if own.exists():
            _set_random_states(torch.load(own, weights_only=True))


def start_copy(numbers: Tensor) -> Callable[[], list[float]]:
    """Start copying a vector to the host -> a function that waits for the copy, and for nothing launched later."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
