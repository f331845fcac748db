"""The report of the study of scenes: tables, raw numbers, and loss against the number of pictures."""

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fovlm.fileio import write_atomically
from fovlm.report.statistics import welch

CHANCE = math.log(16) / 2  # nats a token: one of sixteen names, and a token that ends the answer
LAW = {
    "law": "one steered token",
    "law_static": "one static token",
    "law_pooled4": "4 pooled tokens, three times the steps",
    "law_pooled16": "16 pooled tokens, three times the steps",
    "law_crop": "the same at twice the resolution",
}
TIMES = Path(__file__).parent / "results" / "scene_time.csv"  # of benchmarks/scene_time.py
SCORES = ("loss", "deployed", "accuracy", "pointing", "mass")


def report(results: list[dict[str, Any]], out: Path) -> str:
    """Write OUT/table.md, runs.csv, law.png and time.png -> the tables."""
    text = tables(results)
    write_atomically(out / "table.md", text)
    with open(out / "runs.csv", "w", newline="", encoding="utf-8") as file:
        columns = ["run", "seed", "step", "processor", "source", "questions", *SCORES, "anywhere"]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(results))
    law([result for result in results if result["run"] in LAW], out / "law.png")
    time(results, out / "time.png")
    return text


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each run, step and validation source."""
    return [
        {"run": result["run"], "seed": result["seed"], "step": scored["step"], "processor": round(scored["processor"])}
        | {"source": source, **{name: round(value, 4) for name, value in row.items()}}
        for result in results
        for scored in result["curve"]
        for source, row in scored["by_source"].items()
    ]


def tables(results: list[dict[str, Any]]) -> str:
    """The last scores of all runs as Markdown, those of the same validation sources in one table."""
    studies: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for result in results:
        last = result["curve"][-1]["by_source"]
        studies.setdefault(tuple(last), defaultdict(list))[result["run"]].append(last)
    return "\n".join(table(sides, list(sources)) for sources, sides in studies.items())


def table(sides: dict[str, list[dict[str, Any]]], sources: list[str]) -> str:
    """Mean over seeds and the seeds; and how the loss on the hardest scenes differs from that of the first run, with
    Welch's 95 % interval."""
    lines = []
    for what in SCORES:
        some = {name: seeds for name, seeds in sides.items() if what in seeds[0][sources[0]]}
        if some:
            lines += [f"| {what} | {' | '.join(sources)} |", "|---" * (len(sources) + 1) + "|"]
        for name, seeds in some.items():
            values = [[seed[source][what] for seed in seeds] for source in sources]
            cells = [f"{statistics.fmean(v):.3f} ({', '.join(f'{x:.3f}' for x in v)})" for v in values]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += [""] if some else []
    first, *others = ([seed[sources[-1]]["loss"] for seed in seeds] for seeds in sides.values())
    for name, losses in zip(list(sides)[1:], others, strict=True):
        lines.append(f"{name} - {next(iter(sides))}, {sources[-1]}: {welch(losses, first)}")
    return "\n".join(lines) + "\n"


def law(results: list[dict[str, Any]], path: Path) -> None:
    """Loss against the number of pictures, of the runs of experiments/scenes_law.yaml: mean and range of the seeds."""
    runs: dict[str, list[list[float]]] = defaultdict(list)
    numbers: list[int] = []
    for result in results:
        last = result["curve"][-1]["by_source"]
        numbers = [int(source.removeprefix("objects")) for source in last]
        runs[result["run"]].append([row["loss"] for row in last.values()])
    drawn = Figure((7, 4), layout="constrained")
    axis = drawn.add_subplot()
    for name, losses in sorted(runs.items(), key=lambda run: list(LAW).index(run[0])):
        mean, least, most = np.mean(losses, 0), np.min(losses, 0), np.max(losses, 0)
        axis.errorbar(numbers, mean, [mean - least, most - mean], marker="o", capsize=3, label=LAW[name])
    axis.axhline(CHANCE, color="grey", linestyle=":", label="chance")
    axis.set(xlabel="pictures in the frame", ylabel="loss, nats a token", xticks=numbers, ylim=(0, None))
    axis.legend(loc="lower left", bbox_to_anchor=(0, 0.2))  # where no interval is
    drawn.savefig(path, dpi=110)


def time(results: list[dict[str, Any]], path: Path) -> None:
    """Loss with the most pictures against minutes of one core, encoder included: a line for each run and seed, to the
    end of its longest training."""
    with open(TIMES, encoding="utf-8") as file:
        seconds = {row["run"]: float(row["seconds"]) for row in csv.DictReader(file)}
    drawn = Figure((7, 4.5), layout="constrained")
    axis = drawn.add_subplot()
    for color, name in enumerate(LAW):
        for result in (result for result in results if result["run"] == name and name in seconds):
            later = [r for r in results if r["run"] == f"{name}_longer" and r["seed"] == result["seed"]]
            points = [(0, row) for row in result["curve"]]
            points += [(result["curve"][-1]["step"], row) for more in later for row in more["curve"]]
            minutes = [(before + row["step"]) * seconds[name] / 60 for before, row in points]
            losses = [list(row["by_source"].values())[-1]["loss"] for _, row in points]
            label = LAW[name].split(",")[0] if result["seed"] == 0 else None
            axis.plot(minutes, losses, marker=".", color=f"C{color}", label=label)
    axis.axhline(CHANCE, color="grey", linestyle=":", label="chance")
    axis.set(xlabel="minutes of one core", ylabel="loss, nats a token", xscale="log", ylim=(0, None))
    drawn.legend(loc="outside lower center", ncols=3)
    drawn.savefig(path, dpi=110)
