"""Reference outputs: a few samples and the NLL that the model in training gave them, to verify a conversion with.

A checkpoint stores them in reference.safetensors, without pickle: frames and tokens of each sample, the NLL of each
token and the precision of the forward pass. A sample's NLL does not depend on what it is packed with, so the samples
are stored and not the pack.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fovlm.data.dataset import Dataset
from fovlm.data.packing import EMPTY, PADDING, Batch, PackBudget, Sample, collate
from fovlm.errors import UserError

FILE = "reference.safetensors"
SAMPLES, FRAMES = 4, 16  # at most; at least one sample
FACTS = ("key", "source", "looks", "prompt", "role", "shares")  # of a Sample
TENSORS = ("frames", "tokens", "weight")


@dataclass
class ReferenceOutputs:
    """Samples, the NLL f32 [s] of every token of each, and the precision it was computed in."""

    samples: list[Sample]
    nll: list[Tensor]
    precision: str  # "float32" or "bfloat16"

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for i, (sample, nll) in enumerate(zip(self.samples, self.nll, strict=True)):
            parts = {"nll": nll, **{name: getattr(sample, name) for name in TENSORS}}
            # Copies: the two answers of a preference pair share their frames, which safetensors refuses.
            tensors |= {f"{name}.{i}": part.detach().cpu().contiguous().clone() for name, part in parts.items()}
        facts = [{name: getattr(sample, name) for name in FACTS} for sample in self.samples]
        metadata = {"samples": json.dumps(facts), "precision": self.precision}
        (folder / FILE).write_bytes(save(tensors, metadata))  # `save_file` would make it readable by its owner alone

    @classmethod
    def load(cls, folder: Path) -> "ReferenceOutputs | None":
        """Read it from a checkpoint; None if it has none. Raises UserError."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                samples = [
                    Sample(**facts, **{name: file.get_tensor(f"{name}.{i}") for name in TENSORS})
                    for i, facts in enumerate(json.loads(metadata["samples"]))
                ]
                nll = [file.get_tensor(f"nll.{i}") for i in range(len(samples))]
            return cls(samples, nll, metadata["precision"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); is it damaged?") from error


@dataclass
class ReferenceBatch:
    """The reference samples in a pack of the run's own shape, for which its model is compiled already."""

    samples: list[Sample]
    batch: Batch

    def outputs(self, nll: Tensor, dtype: torch.dtype) -> ReferenceOutputs:
        """The reference outputs from the pack's NLL f32 [S] and the type that the model computes in."""
        return ReferenceOutputs(self.samples, split_nll(nll, self.batch, len(self.samples)), str(dtype).split(".")[1])


def choose_reference_batch(dataset: Dataset, budget: PackBudget, tokens_per_look: int) -> ReferenceBatch | None:
    """The first samples of a dataset that fit into one pack, at most SAMPLES and FRAMES; None if none can be read."""
    chosen: list[Sample] = []
    used = EMPTY
    for position in range(SAMPLES):
        samples, _ = dataset.read(position)
        size = sum((sample.size for sample in samples), EMPTY)
        if chosen and (not budget.holds(used + size) or (used + size).frames > FRAMES):
            break
        chosen += samples
        used += size
    return ReferenceBatch(chosen, collate(chosen, dataset.frame_size, tokens_per_look)) if chosen else None


def collate_tight(samples: Sequence[Sample], tokens_per_look: int) -> Batch:
    """A pack of these samples with as little padding as possible."""
    used = sum((sample.size for sample in samples), EMPTY)
    size = replace(used, frames=max(used.frames, 1), looks=max(used.looks, 1))
    return collate(list(samples), samples[0].frames.shape[-1], tokens_per_look, size=size)


def split_nll(nll: Tensor, batch: Batch, samples: int) -> list[Tensor]:
    """A pack's NLL [S] -> that of each of its samples, f32 on the CPU; 0 for tokens that nothing predicts."""
    nll = torch.where(batch.predict_from.cpu() != PADDING, nll.detach().float().cpu(), 0)
    return [nll[batch.text_segment.cpu() == i] for i in range(samples)]


def mean_nll(nll: Sequence[Tensor]) -> float:
    """The mean over all tokens of all samples."""
    return float(torch.cat(list(nll)).double().mean())
