"""Validation: the nll of fixed samples in every evaluation mode (`model/modes.py`), and maps of where it looks."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fovlm import distributed
from fovlm.data.dataloader import PackLoader, samples_that_fill
from fovlm.data.dataset import Dataset
from fovlm.data.packing import Batch, PackBudget
from fovlm.model.autoregressive import autoregressive
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.modes import AS_TRAINED, MODES
from fovlm.tables import text_table
from fovlm.train.attention_maps import save_maps, watched_samples
from fovlm.train.losses import per_sample

if TYPE_CHECKING:  # a converted model is scored without deepspeed
    from fovlm.train.engine import Engine


@dataclass
class Score:
    """Mean nll (nats) per weighted token, over all `tokens` and by source, and its standard error over samples."""

    loss: float
    tokens: float
    by_source: dict[str, float] = field(default_factory=dict)
    error: float = 0.0


class Validator:
    """Scores the first samples of `dataset`, as many as fill `packs` packs: the same on any number of ranks.

    Maps of the looks go to `maps_folder`. Under ZeRO-3 there are no maps and no autoregressive scores: ranks would need
    each other's weights at different times.
    """

    def __init__(
        self,
        dataset: Dataset,
        budget: PackBudget,
        packs: int,
        engine: "Engine",
        tokenizer: PreTrainedTokenizerBase,
        maps_folder: Path,
    ):
        self.dataset, self.budget, self.engine, self.tokenizer = dataset, budget, engine, tokenizer
        self.maps_folder = maps_folder
        self.samples = samples_that_fill(packs, dataset, budget)
        visual = engine.model.config.visual
        self.as_trained = AS_TRAINED[visual]
        self.modes = [mode for mode in MODES[visual] if mode != "autoregressive" or engine.stage < 3]
        self.step = -1  # of `scores`
        self.scores: dict[str, Score] = {}

    def run(self, step: int, every_mode: bool = False) -> dict[str, float]:
        """Score the model of `step` as trained, or in every mode -> the metrics that are new at this step."""
        if step != self.step:
            self.step, self.scores = step, {}
        modes = [mode for mode in (self.modes if every_mode else [self.as_trained]) if mode not in self.scores]
        if not modes:
            return {}
        new = evaluate(self.engine.model, self.batches(), modes, self.engine.device, self.engine.nll)
        self.scores = {mode: (self.scores | new)[mode] for mode in self.modes if mode in self.scores or mode in new}
        if distributed.rank() == 0 and self.engine.stage < 3 and self.as_trained != "multi_token":
            samples = watched_samples(self.dataset)
            model, device = self.engine.model, self.engine.device
            save_maps(model, samples, self.budget, self.tokenizer, self.maps_folder, step, device)
        row = {"val_loss": self.loss} if self.as_trained in new else {}
        for mode, score in new.items():
            row |= {f"val_loss_{mode}": score.loss} | {f"val_loss_{mode}/{s}": v for s, v in score.by_source.items()}
        return row

    @property
    def loss(self) -> float:
        """The loss as trained, of the last step that was scored."""
        return self.scores[self.as_trained].loss

    def batches(self) -> Iterator[Batch]:
        """This rank's packs of the validation samples."""
        loader = PackLoader(
            self.dataset,
            self.budget,
            distributed.world(),
            rank=distributed.rank(),
            world=distributed.world(),
            stop=self.samples,
            tokens_per_look=self.engine.model.config.tokens_per_look,
        )
        return (batch for step in loader for batch in step.batches)


def nll_in_mode(model: FoveatedVLM, batch: Batch, mode: str, forward: Callable[..., Tensor] | None = None) -> Tensor:
    """The pack's nll [S] in one mode. `forward` replaces the model's, e.g. by that of the engine around it."""
    forward = forward or model
    if mode == "autoregressive":
        return autoregressive(model, batch)
    return forward(batch, visual="coarse" if mode == "coarse_only" else None)


@torch.no_grad()
def evaluate(
    model: FoveatedVLM,
    batches: Iterable[Batch],
    modes: Iterable[str],
    device: torch.device | str = "cpu",
    forward: Callable[..., Tensor] | None = None,
) -> dict[str, Score]:
    """Score this rank's packs in each mode and sum over the ranks. Every rank gets the same numbers."""
    model.eval()
    sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(5))  # n, w, n², nw, w² of nll and weight
    modes = list(modes)
    for batch in batches:
        batch = batch.to(device)
        weight = per_sample((batch.predict_from >= 0).float(), batch).tolist()
        for mode in modes:
            nll = per_sample(nll_in_mode(model, batch, mode, forward).float(), batch).tolist()
            for source, n, w in zip(batch.sources, nll, weight, strict=True):
                sums[mode, source] += [n, w, n * n, n * w, w * w]
    totals: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(5))
    for of_rank in distributed.gather(dict(sums)):
        for key, part in of_rank.items():
            totals[key] += part
    return {mode: _score({source: part for (m, source), part in sorted(totals.items()) if m == mode}) for mode in modes}


def _score(totals: dict[str, np.ndarray]) -> Score:
    """From the sums by source. The error is that of a ratio: samples weigh differently."""
    nll, tokens, nn, nw, ww = sum(totals.values(), np.zeros(5)).tolist()
    loss = nll / max(tokens, 1.0)
    error = max(nn - 2 * loss * nw + loss**2 * ww, 0.0) ** 0.5 / max(tokens, 1.0)
    by_source = {source: float(part[0] / part[1]) for source, part in totals.items() if part[1]}
    return Score(loss, tokens, by_source, error)


def score_tables(scores: dict[str, Score], facts: dict[str, float]) -> str:
    """The end of a run as text: validation loss by mode and source, and what the synthetic task measures."""
    sources = sorted({source for score in scores.values() for source in score.by_source})
    rows = [("validation loss", "all", *sources)] if scores else []
    for mode, score in scores.items():
        rows.append((f"  {mode}", *(f"{value:.4f}" for value in (score.loss, *(score.by_source[s] for s in sources)))))
    tables = [text_table(rows), text_table([(name, f"{value:.4f}") for name, value in facts.items()])]
    return "\n".join(table for table in tables if table)
