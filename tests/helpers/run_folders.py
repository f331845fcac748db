"""Run folders as the logger writes them, without training: for the tests of the report."""

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

from fovlm.checkpoint.run_folder import append_metrics, best_losses, final_values, read_metrics
from fovlm.config import schema
from fovlm.config.schema import Experiment

PICTURES = {"image": 86.0, "words": 14.0}
DIFFERENT: dict[str, dict[str, Any]] = {
    "F1": {"optim": {"freeze": ["encoder", "llm"]}},
    "F2": {"optim": {"freeze": ["llm"]}},
    "LR2": {"optim": {"lr_connector": 2e-2}},
    "A1": {"model": {"deep_query": False}},
    "A6": {"model": {"visual": "coarse"}},
    "B1": {"model": {"visual": "multi_token"}},
    "A8a": {"data": {"image_frames": 1, "mixture": PICTURES}},
    "A8b": {"data": {"image_frames": 16, "mixture": PICTURES}},
    "D1": {"data": {"mixture": {"video": 55.0, "image": 30.0, "words": 15.0}}},
}
MODE = {"foveated": "coarse_fine", "coarse": "coarse_only", "multi_token": "multi_token"}


def write_run(
    root: Path,
    name: str,
    loss: float,
    seed: int = 0,
    role: str = "LR1",
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A run of `role`'s settings (and `settings` over them) whose validation loss falls to `loss` as samples pass; the
    `versus` is that of the experiment of its name."""
    experiment = experiment_of(name, seed, DIFFERENT.get(role, {}), settings or {})
    label = name.rpartition("-s")[0] if name[-3:-1] == "-s" else name
    if label in schema.experiments.names():
        experiment = experiment.model_copy(update={"versus": schema.load(label).versus})
    facts = {"data_hash": "d1"} if role == "D1" else {"val_hash": "pictures"} if role[:2] == "A8" else {}
    return write_experiment(root, experiment, loss, **facts | more)


def write_experiment(
    root: Path,
    experiment: Experiment,
    loss: float,
    status: str = "finished",
    samples: int = 4000,
    flops_per_sample: float = 1e8,
    **facts: Any,
) -> Path:
    """The folder of a run whose validation loss falls to `loss`; `facts` go into its summary."""
    folder = root / experiment.name
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(experiment.dump())
    mode = MODE[experiment.model.visual]
    for step in range(1, 9):
        seen = samples * step / 8
        falling = loss * (samples / seen) ** 0.5
        row = {"seconds": 2.0 * step, "loss": falling, "grad_norm": 1 / step, "samples": seen}
        if mode == "coarse_fine":
            row |= {"attention_entropy": 1 - step / 20, "fine_over_coarse": 1 - step / 30, "loss_coarse": 2.0}
        if step % 2 == 0:
            row |= {"val_loss": falling, f"val_loss_{mode}": falling}
        if step == 8 and mode == "coarse_fine":
            row["val_loss_autoregressive"] = falling * 1.01
        append_metrics(folder, {"step": step, **row})
    rows = read_metrics(folder)
    summary = {
        "name": experiment.name, "status": status, "step": 8, "samples": samples, "flops": samples * flops_per_sample,
        "data_hash": "d", "val_hash": "v", "commit": "0" * 40, "wall_seconds": 16.0, "best": best_losses(rows),
        "final": final_values(rows), **facts,
    }  # fmt: skip
    (folder / "run_summary.json").write_text(json.dumps(summary))
    return folder


def experiment_of(name: str, seed: int, *over: dict[str, Any]) -> Experiment:
    """Quickstart under another name and seed, with settings over it."""
    values = copy.deepcopy(_quickstart())
    for settings in (*over, {"train": {"seed": seed}}):
        for section, new in settings.items():
            values[section] |= new
    return Experiment.model_validate(values | {"name": name})


def write_seeds(root: Path, role: str, losses: list[float], group: str = "nano-", **more: Any) -> None:
    """NAME, NAME-s1, NAME-s2 ... with these losses."""
    for seed, loss in enumerate(losses):
        write_run(root, f"{group}{role}" + (f"-s{seed}" if seed else ""), loss, seed, role, **more)


def write_grid(root: Path, noise: float = 0.0) -> None:
    """Three sizes, three budgets, two architectures, with losses that have a best size within each budget."""
    widths = {"XS": 32, "S": 64, "M": 128}
    for b, budget in enumerate((4e11, 1.6e12, 6.4e12)):
        for s, (size, width) in enumerate(widths.items()):
            for arch, role in (("F", "LR1"), ("B", "B1")):
                model = {"llm": _quickstart()["model"]["llm"] | {"hidden_size": width, "intermediate_size": 2 * width}}
                bowl = 1.0 - 0.2 * b + 0.1 * (s - 0.5 - 0.5 * b) ** 2
                loss = bowl * (1.0 if arch == "F" else 1.2 - 0.05 * b) * (1 + noise * math.sin(7 * b + 3 * s))
                settings = {"model": model | ({"visual": "multi_token"} if arch == "B" else {}),
                            "train": {"steps": None, "flops": budget}}  # fmt: skip
                cost = 1e8 * width / 32
                write_run(root, f"nano-{size}-C{b + 1}-{arch}", loss, 0, role, settings, samples=int(budget / cost),
                          flops_per_sample=cost)  # fmt: skip


@functools.cache
def _quickstart() -> dict[str, Any]:
    return schema.load("quickstart").model_dump()
