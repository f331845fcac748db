"""The study of docs/evidence.md on one core: python -m benchmarks.scenes OUT [RUN ...] [--seeds N] [--steps N]

Trains runs of experiments/scenes*.yaml one after the other, seed by seed. Each writes OUT/NAME-sSEED.json, and its
weights, from which runs with `model.init_from` start. What is there is skipped, so the same command resumes. Then
OUT/table.md, runs.csv and law.png. FOVLM_DATA has the scenes, FOVLM_MODELS the encoder.

It computes what training computes (tests/test_scenes_study.py compares the losses with those of `FoveatedVLM.forward`),
in a tenth of the time, because of what is special here: a frozen encoder's keys and values of all layers come from a
file (OUT/encodings-*.npy, bf16); prompts are equally long and clips have equally many frames, so a batch is a tensor or
two, and the language model reads each prompt once. Products with the encoder's weights are in bf16, all else in fp32
(with SmolLM2 its products too are in bf16).
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.scene_gaze import baselines, controls, faithfulness, figure, gaze, outliers, pointing
from benchmarks.scene_looks import Looks, Scenes
from benchmarks.scene_report import report
from fovlm.config.schema import Experiment, load
from fovlm.fileio import write_atomically
from fovlm.model.build import build
from fovlm.model.modeling import FoveatedVLM
from fovlm.train import schedule

BATCH = 48  # questions of a step
EASY = 0.25  # of them, after the first stage, about a single large picture


def train(experiment: Experiment, scenes: Scenes, model: FoveatedVLM, log: str) -> list[dict[str, Any]]:
    """Train a model -> its validation scores as it goes; the first, at step 0, of weights that it starts from."""
    looks, optim, steps = looks_of(experiment, model), experiment.optim, experiment.train.steps or 0
    groups = [{"params": params, "name": name} for name, params in model.groups().items() if params]
    optimizer = torch.optim.AdamW(groups, betas=tuple(optim.betas), eps=optim.eps, weight_decay=optim.weight_decay)
    params = [p for group in groups for p in group["params"]]
    easy, hard = (scenes.questions[name] for name in experiment.data.mixture)
    stage = sum(experiment.data.first.values()) // BATCH
    random = np.random.default_rng(experiment.data.seed)
    orders = [_endless(len(questions), random) for questions in (easy, hard)]
    curve: list[dict[str, Any]] = []
    losses: list[float] = []
    begin, busy = time.perf_counter(), time.process_time()

    def scored(step: int) -> None:
        times = {"seconds": time.perf_counter() - begin, "processor": time.process_time() - busy}
        mean = round(float(np.mean(losses[-20:])), 4) if losses else None
        curve.append({"step": step, "train": mean, **times, **score(looks, scenes, experiment)})
        short = {name: round(row["loss"], 3) for name, row in curve[-1]["by_source"].items()}
        print(f"{log} {step}/{steps} train {mean} {short} {times['seconds']:.0f} s", flush=True)

    if experiment.model.init_from:
        scored(0)
    for step in range(1, steps + 1):
        many = BATCH if step <= stage else round(BATCH * EASY)
        chosen = [easy[next(orders[0])] for _ in range(many)] + [hard[next(orders[1])] for _ in range(BATCH - many)]
        nll = torch.cat([looks.nll(batch)[0] for batch in scenes.batches(chosen)])
        rates = schedule.rates(optim, step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        optimizer.zero_grad()
        nll.mean().backward()
        torch.nn.utils.clip_grad_norm_(params, optim.clip)
        optimizer.step()
        losses.append(nll.mean().item())
        if step % experiment.train.eval_every == 0 or step == steps:
            scored(step)
    return curve


def looks_of(experiment: Experiment, model: FoveatedVLM) -> Looks:
    """Looks of a run; a language model with released weights, which is large, computes in bf16."""
    return Looks(model, half=isinstance(experiment.model.llm, str))


def _endless(count: int, random: np.random.Generator):
    while True:
        yield from random.permutation(count).tolist()


@torch.no_grad()
def score(looks: Looks, scenes: Scenes, experiment: Experiment) -> dict[str, Any]:
    """Loss and accuracy of every validation source, and where the looks land."""
    found = {}
    for name in experiment.data.val:
        sums: dict[str, list[float]] = defaultdict(list)
        questions = scenes.questions[name]
        for start in range(0, len(questions), 96):
            for batch in scenes.batches(questions[start : start + 96]):
                nll, right, query = looks.nll(batch)
                sums["loss"] += nll.tolist()
                sums["accuracy"] += right.float().tolist()
                if looks.model.config.visual == "foveated" and query.shape[1] > 1:
                    sums["deployed"] += looks.nll(batch, rounds=query.shape[1])[0].tolist()
                if scenes.deep:
                    for key, values in pointing(gaze(looks, batch, query), batch["boxes"], scenes.size).items():
                        sums[key] += values
        found[name] = {key: float(np.mean(values)) for key, values in sums.items()} | {"questions": len(questions)}
    return {"by_source": found}


def run(name: str, seed: int, steps: int | None, out: Path) -> dict[str, Any]:
    """Train and score one run -> what its file holds."""
    overrides = [f"train.seed={seed}"] + ([f"train.steps={steps}"] if steps else [])
    experiment = load(name, overrides)
    torch.manual_seed(seed)
    model = build(experiment.model)
    model.freeze(experiment.optim.freeze)
    if experiment.model.init_from:
        model.load_state_dict(load_file(out / f"{experiment.model.init_from}-s{seed}.safetensors"), strict=False)
    scenes = Scenes(experiment, model, out)
    curve = train(experiment, scenes, model, f"{name}-s{seed}")
    save_file({n: p for n, p in model.named_parameters() if p.requires_grad}, out / f"{name}-s{seed}.safetensors")
    looks, most = looks_of(experiment, model), experiment.data.val[-1]
    result = {"run": name, "seed": seed, "experiment": experiment.hash, "curve": curve}
    result["controls"] = controls(looks, scenes, most)
    steered = scenes.deep and model.config.visual == "foveated" and experiment.model.question == "before_frames"
    if steered and experiment.data.max_frames == 1:
        result |= {"baselines": baselines(looks, scenes, most), "faithfulness": faithfulness(looks, scenes, most)}
        result["outliers"] = outliers(looks, scenes, most)
        figure(looks, scenes, most, out / f"{name}-s{seed}.png")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="*", default=["scenes", "scenes_static"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in range(arguments.seeds):
        for name in arguments.runs:
            file = arguments.out / f"{name}-s{seed}.json"
            if not file.exists():
                write_atomically(file, json.dumps(run(name, seed, arguments.steps, arguments.out), indent=1))
    found = [json.loads(file.read_text()) for file in sorted(arguments.out.glob("*-s*.json"))]
    print(report(found, arguments.out))


if __name__ == "__main__":
    main()
