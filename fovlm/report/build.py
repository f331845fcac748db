"""Write the report: decisions first, then the evidence for them, the grid, what was left out, and the rules.

`write_report` writes report.md, report.html (one file, figures inside), the figures as SVG, gaze pictures as PNG, and
the numbers as CSV: runs.csv, decisions.csv, curves.csv, grid.csv, fits.csv.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from fovlm.checkpoint.run_folder import BLIND
from fovlm.report import figures, tables
from fovlm.report.collect import collect
from fovlm.report.document import escape, figure, heading, page, points, table, verdict
from fovlm.report.grid import ARCHS, LAW_RULE, OPTIMUM_RULE, TREND_RULE, Grid, grid, law_text, optimum_text, trend_text
from fovlm.report.questions import Answer, answers
from fovlm.report.runs import Evidence, RunRecord
from fovlm.report.statistics import RULE

AT_FLOOR = 0.02  # of that loss: a run that is no further below it has not learned to see
LOOKS = ("fine looks on the asked object", "coarse looks on the asked object", "looks on it by chance")
SHORT = {"F": "foveated (F)", "B": "multi-token (B)"}


def write_report(words: Iterable[str], out: Path, title: str = "What the runs say") -> Path:
    """Write the report on the runs that the words name into `out`; returns the HTML file. Raises UserError as
    `collect` does."""
    with Console(stderr=True).status("comparing, fitting and drawing"):
        evidence = collect(words)
        out.mkdir(parents=True, exist_ok=True)
        found, unasked = answers(evidence)
        cells = grid(evidence)
        blocks = [heading(title, 1), *_summary(evidence, found, cells, unasked), *_losses(evidence, out)]
        blocks += [block for answer in found for block in _answer(evidence, answer, out)]
        blocks += _training(evidence, out) + _gaze(evidence, out)
        blocks += _grid(cells, seeing_loss(evidence), out) if cells else []
        text = "\n\n".join(filter(None, blocks + _sources(evidence))) + "\n"
        (out / "report.md").write_text(text, encoding="utf-8")
        html = out / "report.html"
        html.write_text(page(title, text, out), encoding="utf-8")
        tables.write(out, evidence, found, cells)
    return html


def limits(evidence: Evidence) -> list[str]:
    """What a reader must know before taking an answer further than the runs go."""
    found, runs = [], evidence.runs
    fresh = [run for run in runs if isinstance(run.experiment.model.llm, dict) and not run.experiment.model.init_from]
    if fresh:
        found.append(
            f"The backbones start from random weights in {len(fresh)} of {len(runs)} runs: the cost of freezing them, "
            "and the best learning rates, may be different with pretrained ones."
        )
    if len({run.seed for run in runs}) > 1 and len({run.experiment.data.seed for run in runs}) == 1:
        found.append(
            "Seeds differ in the initial weights alone: their samples and the order of them are the same, so the "
            "intervals do not include what other data would change."
        )
    floors = {run.val_set: float(run.summary[BLIND]) for run in runs if run.summary.get(BLIND)}  # not all record it
    blind = [run for run in runs if run.val_set in floors and run.loss > (1 - AT_FLOOR) * floors[run.val_set]]
    if blind:
        found.append(
            f"{len(blind)} runs end less than {AT_FLOOR:.0%} below the best possible loss without the video, or above "
            f"it: {', '.join(run.name for run in blind)}. They have not learned to see in their budget, and which of "
            "two such runs is lower says nothing about seeing."
        )
    return found


def seeing_loss(evidence: Evidence) -> float | None:
    """The loss below which a cell has learned to see, where the best one without the video is known."""
    floors = {float(run.summary[BLIND]) for run in evidence.cells if run.summary.get(BLIND)}
    return (1 - AT_FLOOR) * min(floors) if floors else None


def _summary(evidence: Evidence, found: list[Answer], cells: Grid | None, unasked: list[str]) -> list[str]:
    rows = [(answer.title, answer.verdict.text) for answer in found]
    if cells is not None:
        rows += [(f"Best size at {budget}, {SHORT[arch]}", text) for arch, budget, _, text in _optima(cells)]
        rows += [(f"Growth of the best size, {SHORT[arch]}", law_text(cells, arch)) for arch in cells.archs]
        if len(cells.archs) == 2:
            rows.append(("One token against sixteen as scale grows", trend_text(cells, seeing_loss(evidence))))
    count = (
        f"{len(evidence.runs)} finished runs. Losses are final validation losses in nats per token, lower is better."
    )
    blocks = [count, heading("Decisions"), table(("question", "answer"), rows)]
    if limited := limits(evidence):
        blocks += ["What these answers do not cover:", points(limited)]
    return blocks + ([escape(f"Not asked, as finished runs are missing: {'; '.join(unasked)}.")] if unasked else [])


def _losses(evidence: Evidence, out: Path) -> list[str]:
    """All final losses, a figure for each family."""
    return [
        figure(figures.final_losses(evidence, labels, out / f"losses-{root}.svg", _floor(evidence, labels)),
               "Final validation loss: a dot for each seed, their mean and range below.")
        for root, labels in evidence.families.items()
    ]  # fmt: skip


def _answer(evidence: Evidence, answer: Answer, out: Path) -> list[str]:
    """An answer with its numbers, and a figure where FLOPs are compared."""
    blocks = [heading(answer.title), verdict(answer.verdict.text, answer.decided), table(answer.head, answer.rows)]
    blocks += [points(answer.notes), escape(f"Rule: {answer.rule}") if answer.rule != RULE else ""]
    if answer.at_equal_flops:
        drawn = figures.over_flops(evidence, answer.labels, out / f"equal_flops-{answer.labels[1]}.svg")
        blocks.append(figure(drawn, "Validation loss over the compute spent; bands: all seeds."))
    return blocks


def _training(evidence: Evidence, out: Path) -> list[str]:
    """Curves over training; the fine/coarse ratio with the reason why it decides nothing."""
    blocks = []
    for root, labels in evidence.families.items():
        for file, title, column, label, level, text in (
            ("curves", "Validation loss over training", "val_loss", "validation loss, nats per token",
             _floor(evidence, labels), "Mean and range of the seeds. Dotted, where known: the best possible loss "
             "without the video."),
            ("entropy", "Attention entropy over training", "attention_entropy", "entropy of the looks' attention", 1.0,
             "1 is attention spread evenly over the patches, 0 all on one. Mean over the layers, heads and looks of a "
             "training pack."),
            ("ratio", "Fine over coarse loss of one model", "fine_over_coarse", "loss with fine / with coarse tokens",
             1.0, "This decides nothing: the coarse tokens of a foveated model were never trained to be read for the "
             "answer, so a ratio below 1 is no evidence for foveation. A comparison with a model trained on coarse "
             "tokens is."),
        ):  # fmt: skip
            drawn = figures.over_samples(evidence, labels, column, label, out / f"{file}-{root}.svg", level)
            blocks += [heading(f"{title}: {root}"), figure(drawn, text)] if drawn else []
    return blocks


def _gaze(evidence: Evidence, out: Path) -> list[str]:
    """Where looks land, in numbers where the task knows the place, and in the last pictures of a seed of each side
    that is a baseline or changes the model."""
    rows, blocks = [], []
    for label in evidence.labels:
        runs = evidence.side(label)
        if any(key in run.summary for run in runs for key in LOOKS):
            shares = (
                ["-" if run.summary.get(key) is None else f"{run.summary[key]:.2f}" for run in runs] for key in LOOKS
            )
            rows.append((evidence.title(label), *(" / ".join(share) for share in shares)))
        versus = evidence.versus.get(label)
        pictures = sorted((runs[0].folder / "maps").glob("*.png"))
        if pictures and (versus is None or any(change.startswith("model.") for change in versus.changes)):
            copy = out / f"gaze-{label}.png"
            shutil.copyfile(pictures[-1], copy)
            caption = (
                f"{evidence.title(label)}: {pictures[-1].stem} of {runs[0].name}, validation clips; attention in red."
            )
            blocks.append(figure(copy, caption))
    numbers = table(("side", *(f"{key}, by seed" for key in LOOKS)), rows)
    return [heading("Where it looks"), numbers, *blocks] if numbers or blocks else []


def _grid(cells: Grid, seeing: float | None, out: Path) -> list[str]:
    noise = "no noise is known"
    if cells.noise is not None:
        noise = (
            f"{cells.noise:.2%} of a loss, from {cells.noise_from} ({cells.freedom} degrees of freedom), widened to "
            f"{cells.wide_noise:.2%}"
        )
    rows = [(ARCHS[arch], budget, str(sizes), text) for arch, budget, sizes, text in _optima(cells)]
    blocks = [
        heading("Scale: iso-FLOP curves and the best size of a budget"),
        figure(figures.iso_flop(cells, out / "isoflop.svg"), "Final validation loss over size at equal compute. Stars: "
               "lowest points of the parabolas through the sizes."),
        table(("architecture", "budget", "sizes", "best size"), rows),
        escape(f"Rule: {OPTIMUM_RULE} Noise here: {noise}."),
        heading("Scale: loss as a law of size and data"), *_laws(cells),
    ]  # fmt: skip
    blocks.append(escape(f"Rule: {LAW_RULE}"))
    drawn = figures.one_or_sixteen(cells, out / "one_or_sixteen.svg")
    if drawn:
        text = trend_text(cells, seeing)
        blocks += [
            heading("Scale: one token against sixteen"), verdict(text, not text.startswith("not decided")),
            figure(drawn, "Loss of the foveated model over that of the multi-token model of the same size and budget."),
            table(("budget", "best F (size)", "best B (size)", "F over B"), _bests(cells)),
            escape(f"Rule: {TREND_RULE}"),
        ]  # fmt: skip
    return blocks


def _optima(cells: Grid) -> list[tuple[str, str, int, str]]:
    """(architecture, budget, number of sizes, the best size in words)."""
    pairs = [(arch, budget) for arch in cells.archs for budget in cells.budgets if cells.of(arch, budget)]
    return [(arch, budget, len(cells.of(arch, budget)), optimum_text(cells, arch, budget)) for arch, budget in pairs]


def _bests(cells: Grid) -> Sequence[tuple[str, ...]]:
    """The lowest loss of each architecture among the sizes of a budget."""
    rows = []
    for budget in cells.budgets:
        f, b = (min(cells.of(arch, budget), key=lambda c: c.loss, default=None) for arch in ("F", "B"))
        if f and b:
            rows.append((budget, f"{f.loss:.4f} ({f.size})", f"{b.loss:.4f} ({b.size})", f"{f.loss / b.loss:.3f}"))
    return rows


def _laws(cells: Grid) -> list[str]:
    rows = []
    for arch, fit in cells.fits.items():
        values = [f"{value:.3g} [{low:.3g}, {high:.3g}]" for value, (low, high) in tables.parts(fit).values()]
        exponent = [] if fit.exponent is not None else ["-"]
        rows.append((ARCHS[arch], str(fit.points), *values, *exponent, f"{fit.spread:.2%}"))
    head = ("architecture", "points", "E", "A", "alpha", "B", "beta", "best N grows as C to the", "residual")
    texts = {arch: law_text(cells, arch) for arch in cells.archs}
    blocks = [verdict(f"{SHORT[a]}: {text}", not text.startswith("not decided")) for a, text in texts.items()]
    return [*blocks, table(head, rows)]


def _sources(evidence: Evidence) -> list[str]:
    """The rule, what was left out, and where the runs came from."""
    blocks = [heading("How it was decided"), escape(RULE), heading("Left out") if evidence.left_out else ""]
    blocks.append(table(("run", "why"), evidence.left_out))
    facts = []
    for val_set in dict.fromkeys(run.val_set for run in evidence.runs):
        runs = [run for run in evidence.runs if run.val_set == val_set]
        scored = sorted({run.summary["val_samples"] for run in runs if run.summary.get("val_samples")})
        samples = f", {'/'.join(map(str, scored))} samples scored" if scored else ""
        facts.append(f"Validation set {'+'.join(runs[0].experiment.data.val)} ({val_set}): {len(runs)} runs{samples}.")
    commits = sorted({str(run.summary.get("commit"))[:12] for run in evidence.runs})
    facts.append(f"Commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}.")
    seconds = sum(float(run.summary.get("wall_seconds", 0)) for run in evidence.runs)
    facts.append(f"{seconds / 3600:.1f} hours of wall time in all runs together.")
    return [*blocks, heading("The runs"), points(facts), table(*tables.overview(evidence.runs))]


def _floor(evidence: Evidence, labels: Sequence[str]) -> float | None:
    """The best possible loss without the video, where all summaries that have one agree."""
    runs: list[RunRecord] = [run for label in labels for run in evidence.side(label)]
    values = {float(run.summary[BLIND]) for run in runs if BLIND in run.summary}
    return values.pop() if len(values) == 1 else None
