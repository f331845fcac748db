"""A few samples and the nll that the engine gave them when it saved: what a converted model is held against.

A checkpoint keeps them in probe.safetensors, without a pickle: frames and tokens of each sample, the nll of each token,
and the precision of the forward pass. A sample's nll does not depend on what it is packed with, so the samples are kept
and not the pack.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fovlm.data.dataset import Dataset
from fovlm.data.packing import EMPTY, PADDING, Batch, PackSize, Sample, collate
from fovlm.errors import UserError

FILE = "probe.safetensors"
SAMPLES, FRAMES = 4, 16  # at most; one sample at least


@dataclass
class ReferenceOutputs:
    """Samples, nll f32 [s] of every token of each as the model in training gave it, and its type."""

    samples: list[Sample]
    nll: list[Tensor]
    precision: str  # "float32" or "bfloat16"

    @property
    def mean(self) -> float:
        """The mean nll (nats) of all tokens that are predicted."""
        return mean_nll(self.nll)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        tensors: dict[str, Tensor] = {}
        facts = []
        for i, (sample, nll) in enumerate(zip(self.samples, self.nll, strict=True)):
            parts = {"frames": sample.frames, "tokens": sample.tokens, "weight": sample.weight, "nll": nll}
            # Copies: the two answers of a preference pair share their frames, which safetensors refuses.
            tensors |= {f"{name}.{i}": part.detach().cpu().contiguous().clone() for name, part in parts.items()}
            names = ("key", "source", "looks", "prompt", "role")
            facts.append({name: getattr(sample, name) for name in names})
        metadata = {"samples": json.dumps(facts), "precision": self.precision}
        (folder / FILE).write_bytes(save(tensors, metadata))  # its save_file makes a file that nobody else can read

    @classmethod
    def load(cls, folder: Path) -> "ReferenceOutputs | None":
        """The probe of a checkpoint; None in one that was saved without. Raises UserError."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                facts = json.loads(metadata["samples"])
                parts = [
                    {name: file.get_tensor(f"{name}.{i}") for name in ("frames", "tokens", "weight", "nll")}
                    for i in range(len(facts))
                ]
            nll = [part.pop("nll") for part in parts]
            samples = [Sample(**fact, **part) for fact, part in zip(facts, parts, strict=True)]
            return cls(samples, nll, metadata["precision"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no readable probe ({error})") from error


@dataclass
class ReferenceBatch:
    """The samples of a probe in a pack of the run's own shape, so that asking compiles nothing anew."""

    samples: list[Sample]
    batch: Batch

    def answered(self, nll: Tensor, dtype: torch.dtype) -> ReferenceOutputs:
        """The probe, from the pack's nll f32 [S] and the type that the model computes in."""
        return ReferenceOutputs(
            self.samples, by_sample(nll, self.batch, len(self.samples)), str(dtype).removeprefix("torch.")
        )


def choose_reference_batch(dataset: Dataset, budget: PackSize, tokens_per_look: int) -> ReferenceBatch | None:
    """The first samples of a data set that fit into one pack: at most SAMPLES of them and FRAMES frames.

    None when they cannot be read.
    """
    chosen: list[Sample] = []
    used = EMPTY
    for position in range(SAMPLES):
        samples, _ = dataset.read(position)
        size = sum((sample.size for sample in samples), EMPTY)
        if chosen and (not (used + size).fits(budget) or (used + size).frames > FRAMES):
            break
        chosen += samples
        used += size
    return ReferenceBatch(chosen, collate(chosen, budget, dataset.frame_size, tokens_per_look)) if chosen else None


def snug(samples: Sequence[Sample], tokens_per_look: int) -> Batch:
    """A pack with these samples and as little else as possible."""
    used = sum((sample.size for sample in samples), EMPTY)
    frames = max(used.frames, 1)
    looks = max(used.looks, 1)
    side = samples[0].frames.shape[-1]
    if all(sample.looks == len(sample.frames) for sample in samples):
        looks = frames
    elif looks == frames:  # as many looks as frames would mean one for each
        looks += 1
    return collate(list(samples), PackSize(frames, looks, used.text, used.prompt), side, tokens_per_look)


def by_sample(nll: Tensor, batch: Batch, samples: int) -> list[Tensor]:
    """A pack's nll [S] -> that of each of its samples, f32 on the CPU; 0 where there is nothing to predict from."""
    nll = torch.where(batch.predict_from.cpu() != PADDING, nll.detach().float().cpu(), 0)
    return [nll[batch.text_segment.cpu() == i] for i in range(samples)]


def mean_nll(nll: Sequence[Tensor]) -> float:
    """Mean over the tokens; a sample's first, which nothing predicts, counts as 0 everywhere."""
    together = torch.cat(list(nll)).double()
    return float(together.mean())
