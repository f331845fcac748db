"""The report: decisions first, then the evidence for them, the grid, what was left out, and the rules.

`write_report` writes report.md, report.html (one file, figures inside), the figures as SVG, gaze pictures as PNG, and
the numbers as CSV: runs.csv, decisions.csv, curves.csv, grid.csv, fits.csv.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fovlm.report import figures, tables
from fovlm.report.collect import PICTURES, Evidence, RunRecord, collect
from fovlm.report.document import Block, Bold, Figure, Heading, Points, Table, Text, markdown, page
from fovlm.report.grid import ARCHS, LAW_RULE, OPTIMUM_RULE, TREND_RULE, Grid, grid, law_text, optimum_text, trend_text
from fovlm.report.questions import BASELINE, NAMES, Answer, answers
from fovlm.report.statistics import RULE

BLIND = "validation loss without a picture, at best"  # what the embedded task writes into a summary (`hunt_data.py`)
AT_FLOOR = 0.02  # of that loss: a run that is no further below it has not learned to see
LOOKS = ("fine looks on the asked object", "coarse looks on the asked object", "looks on it by chance")
ONE = {"F": "foveated (F)", "B": "multi-token (B)"}
LOOKING = ("LR1", "A1", "A6")  # whose gaze is shown
CHECKED = (
    "The fit was checked on synthetic losses, whose parameters it recovers within its intervals "
    "(tests/report/test_scaling_law.py), "
    "and on the 240 points that Besiroglu et al. (arXiv 2404.10102) read off a figure of Hoffmann et al.: E 1.82, "
    "A 463, alpha 0.345, B 2223, beta 0.369, against their 1.82, 482, 0.348, 2085, 0.366, each within the interval "
    "found here (docs/report.md)."
)


def write_report(words: Iterable[str], out: Path, title: str = "What the runs say") -> Path:
    """Write the report on the runs that the words name into `out`; returns the HTML file. Raises UserError as
    `collect` does."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading the runs", total=4)
        evidence = collect(words)
        out.mkdir(parents=True, exist_ok=True)
        progress.update(task, completed=1, description="comparing and fitting")
        found, unasked = answers(evidence)
        cells = grid(evidence)
        progress.update(task, completed=2, description="drawing")
        blocks = [Heading(title, 1), *_summary(evidence, found, cells, unasked), *_ablations(evidence, found, out)]
        blocks += (
            _training(evidence, out) + _gaze(evidence, out) + _grid(cells, _seeing(evidence), out) + _end(evidence)
        )
        progress.update(task, completed=3, description="writing")
        (out / "report.md").write_text(markdown(blocks), encoding="utf-8")
        html = out / "report.html"
        html.write_text(page(title, blocks), encoding="utf-8")
        tables.write(out, evidence, found, cells)
    return html


def _summary(evidence: Evidence, found: list[Answer], cells: Grid | None, unasked: list[str]) -> list[Block]:
    rows = [(answer.title, answer.verdict.text) for answer in found]
    if cells is not None:
        rows += [(f"Best size at {budget}, {ONE[arch]}", optimum_text(cells, arch, budget)) for arch in cells.archs
                 for budget in cells.budgets if cells.of(arch, budget)]  # fmt: skip
        rows += [(f"Growth of the best size, {ONE[arch]}", law_text(cells, arch)) for arch in cells.archs]
        if len(cells.archs) == 2:
            rows.append(("One token against sixteen as scale grows", trend_text(cells, _seeing(evidence))))
    told = f"{len(evidence.runs)} finished runs. Losses are final validation losses in nats per token, lower is better."
    blocks: list[Block] = [Text(told), Heading("Decisions"), Table(("question", "answer"), rows)]
    limits = _limits(evidence.runs)
    blocks += [Text("What these answers do not cover:"), Points(limits)] if limits else []
    return blocks + ([Text("Not asked, for want of finished runs: " + "; ".join(unasked) + ".")] if unasked else [])


def _limits(runs: Sequence[RunRecord]) -> list[str]:
    """What a reader must know before taking an answer further than the runs go."""
    told = []
    fresh = [run for run in runs if isinstance(run.experiment.model.llm, dict) and not run.experiment.model.init_from]
    if fresh:
        told.append(
            f"The backbones start from random weights in {len(fresh)} of {len(runs)} runs: what it costs to freeze "
            "them, and which rates are best, may be otherwise with pretrained ones."
        )
    if len({run.seed for run in runs}) > 1 and len({run.experiment.data.seed for run in runs}) == 1:
        told.append(
            "Seeds differ in the initial weights alone: their samples and the order of them are the same, so the "
            "intervals hold nothing of what other data would change."
        )
    floors = {run.val_set: float(run.summary[BLIND]) for run in runs if run.summary.get(BLIND)}  # not all record it
    lost = [run for run in runs if run.val_set in floors and run.loss > (1 - AT_FLOOR) * floors[run.val_set]]
    if lost:
        told.append(
            f"{len(lost)} runs end less than {AT_FLOOR:.0%} below the best loss without a picture, or above it: "
            f"{', '.join(run.name for run in lost)}. They have not learned to see in their budget, and which of two "
            "such runs is lower says nothing about seeing."
        )
    return told


def _ablations(evidence: Evidence, found: list[Answer], out: Path) -> list[Block]:
    """Every answer with its numbers; all final losses in one figure ahead of them."""
    blocks: list[Block] = []
    floor = _fact(evidence, BLIND)
    for roles, name, caption in (
        ([r for r in NAMES if r not in PICTURES], "losses", "Final validation loss: a dot for each seed, their mean "
         "and range below."),
        (PICTURES, "losses_pictures", "The same on picture data, which has a validation set of its own."),
    ):  # fmt: skip
        drawn = figures.final_losses(evidence, roles, out / f"{name}.svg", None if roles == PICTURES else floor)
        blocks += [Figure(drawn, caption)] if drawn else []
    for answer in found:
        blocks += [Heading(answer.title), Text(answer.asks), Bold(answer.verdict.text, answer.decided)]
        blocks += [Table(answer.head, answer.rows)] if answer.rows else []
        blocks += [Points(answer.notes)] if answer.notes else []
        if answer.rule != RULE:
            blocks.append(Text(f"Rule: {answer.rule}"))
        if answer.title.endswith("equal FLOPs"):
            drawn = figures.over_flops(evidence, (BASELINE, "B1"), out / "equal_flops.svg")
            blocks += [Figure(drawn, "Validation loss over the compute spent; bands: all seeds.")] if drawn else []
    return blocks


def _training(evidence: Evidence, out: Path) -> list[Block]:
    """Curves over training; the fine/coarse ratio with the reason why it decides nothing."""
    roles = [role for role in NAMES if role not in PICTURES]
    blocks: list[Block] = []
    for file, title, column, label, level, text in (
        ("curves", "Validation loss over training", "val_loss", "validation loss, nats per token",
         _fact(evidence, BLIND), "Mean and range of the seeds. Dotted, where known: the best loss without a picture."),
        ("entropy", "Attention entropy over training", "attention_entropy", "entropy of the looks' attention", 1.0,
         "1 is attention spread evenly over the patches, 0 all on one. Mean over the layers, heads and looks of a "
         "training pack."),
        ("ratio", "Fine over coarse loss of one model", "fine_over_coarse", "loss with fine / with coarse tokens", 1.0,
         "This decides nothing: the coarse tokens of a foveated model were never trained to be read for the "
         "answer, so a ratio below 1 is no evidence for foveation. The question above, LR1 against A6, is."),
    ):  # fmt: skip
        drawn = figures.over_samples(evidence, roles, column, label, out / f"{file}.svg", level)
        blocks += [Heading(title), Figure(drawn, text)] if drawn else []
    return blocks


def _gaze(evidence: Evidence, out: Path) -> list[Block]:
    """Where looks land, in numbers where the task knows the place, and in the last pictures of a seed of each role."""
    rows = []
    for role in NAMES:
        runs = [run for run in evidence.side(role) if any(key in run.summary for key in LOOKS)]
        if runs:
            shares = (
                ["-" if run.summary.get(key) is None else f"{run.summary[key]:.2f}" for run in runs] for key in LOOKS
            )
            rows.append((NAMES[role], *(" / ".join(share) for share in shares)))
    blocks: list[Block] = []
    for role in LOOKING:
        runs = evidence.side(role)
        pictures = sorted((runs[0].folder / "maps").glob("*.png")) if runs else []
        if pictures:
            copy = out / f"gaze-{role}.png"
            shutil.copyfile(pictures[-1], copy)
            told = f"{NAMES[role]}: {pictures[-1].stem} of {runs[0].name}, validation clips; attention in red."
            blocks.append(Figure(copy, told))
    table: list[Block] = [Table(("side", *(f"{key}, by seed" for key in LOOKS)), rows)] if rows else []
    return [Heading("Where it looks"), *table, *blocks] if table or blocks else []


def _grid(cells: Grid | None, seeing: float | None, out: Path) -> list[Block]:
    if cells is None:
        return []
    blocks: list[Block] = [Heading("Scale: iso-FLOP curves and the best size of a budget")]
    drawn = figures.iso_flop(cells, out / "isoflop.svg")
    blocks += [Figure(drawn, "Final validation loss over size at equal compute. Stars: lowest points of the parabolas "
                             "through the sizes.")] if drawn else []  # fmt: skip
    rows = [
        (ARCHS[arch], budget, str(len(cells.of(arch, budget))), optimum_text(cells, arch, budget))
        for arch in cells.archs
        for budget in cells.budgets
        if cells.of(arch, budget)
    ]
    noise = (
        "no noise is known"
        if cells.noise is None
        else (
            f"{cells.noise:.2%} of a loss, from {cells.noise_from} ({cells.freedom} degrees of freedom), widened to "
            f"{cells.reach:.2%}"
        )
    )
    blocks.append(Table(("architecture", "budget", "sizes", "best size"), rows))
    blocks.append(Text(f"Rule: {OPTIMUM_RULE} Noise here: {noise}."))
    blocks += [Heading("Scale: loss as a law of size and data"), *_laws(cells)]
    drawn = figures.law(cells, out / "law.svg")
    blocks += [Figure(drawn, "Measured losses against the fitted law.")] if drawn else []
    blocks += [Text(f"Rule: {LAW_RULE}"), Text(CHECKED)]
    if len(cells.archs) == 2:
        told = trend_text(cells, seeing)
        blocks += [Heading("Scale: one token against sixteen"), Bold(told, not told.startswith("not decided"))]
        drawn = figures.one_or_sixteen(cells, out / "one_or_sixteen.svg")
        blocks += [Figure(drawn, "Loss of the foveated model over that of the multi-token model of the same size and "
                                 "budget.")] if drawn else []  # fmt: skip
        blocks += [Table(("budget", "best F (size)", "best B (size)", "F over B"), _bests(cells))]
        blocks.append(Text(f"Rule: {TREND_RULE}"))
    return blocks


def _bests(cells: Grid) -> Sequence[tuple[str, ...]]:
    """The lowest loss of each architecture among the sizes of a budget."""
    rows = []
    for budget in cells.budgets:
        f, b = (min(cells.of(arch, budget), key=lambda c: c.loss, default=None) for arch in ("F", "B"))
        if f and b:
            rows.append((budget, f"{f.loss:.4f} ({f.size})", f"{b.loss:.4f} ({b.size})", f"{f.loss / b.loss:.3f}"))
    return rows


def _laws(cells: Grid) -> list[Block]:
    rows = []
    for arch, fit in cells.fits.items():
        told = [f"{value:.3g} [{low:.3g}, {high:.3g}]" for value, (low, high) in tables.parts(fit).values()]
        if fit.exponent is None:
            told.append("-")
        rows.append((ARCHS[arch], str(fit.points), *told, f"{fit.spread:.2%}"))
    head = ("architecture", "points", "E", "A", "alpha", "B", "beta", "best N grows as C to the", "residual")
    said = {arch: law_text(cells, arch) for arch in cells.archs}
    blocks: list[Block] = [Bold(f"{ONE[a]}: {text}", not text.startswith("not decided")) for a, text in said.items()]
    return blocks + ([Table(head, rows)] if rows else [])


def _end(evidence: Evidence) -> list[Block]:
    """What was left out, where the runs came from, and the rule."""
    blocks: list[Block] = [Heading("How it was decided"), Text(RULE)]
    if evidence.left_out:
        blocks += [Heading("Left out"), Table(("run", "why"), evidence.left_out)]
    sets = {run.val_set: "+".join(run.experiment.data.val) for run in evidence.runs}
    told = [f"Validation set {name} ({hash_}): {_count(evidence, hash_)}." for hash_, name in sets.items()]
    if any(hash_.startswith("unrecorded") for hash_ in sets):
        told.append("An unrecorded set is told from the settings; that its shards were the same is taken on trust.")
    commits = sorted({str(run.summary.get("commit"))[:12] for run in evidence.runs})
    told.append(f"Commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}.")
    seconds = sum(float(run.summary.get("wall_seconds", 0)) for run in evidence.runs)
    told.append(f"{seconds / 3600:.1f} hours of wall time in all runs together.")
    return [*blocks, Heading("The runs"), Points(told), Table(*tables.overview(evidence.runs))]


def _count(evidence: Evidence, val_set: str) -> str:
    runs = [run for run in evidence.runs if run.val_set == val_set]
    scored = {run.summary["val_samples"] for run in runs if run.summary.get("val_samples")}
    return f"{len(runs)} runs" + (f", {'/'.join(map(str, sorted(scored)))} samples scored" if scored else "")


def _seeing(evidence: Evidence) -> float | None:
    """The loss below which a cell has learned to see, where the best one without a picture is known."""
    floors = {float(run.summary[BLIND]) for run in evidence.cells if run.summary.get(BLIND)}
    return (1 - AT_FLOOR) * min(floors) if floors else None


def _fact(evidence: Evidence, key: str) -> float | None:
    """A fact that all summaries agree on, among the runs that are compared with the baseline."""
    runs: list[RunRecord] = [run for run in evidence.runs if run.role and run.role not in PICTURES]
    values = {float(run.summary[key]) for run in runs if key in run.summary}
    return values.pop() if len(values) == 1 else None
