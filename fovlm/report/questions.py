"""The comparisons that the runs' `versus:` ask for, and their answers.

A comparison whose sides differ in more than it asks about, or the seeds of a side in anything, is not decided, whatever
the numbers (`confounds.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fovlm.report.confounds import confounds
from fovlm.report.runs import Evidence, RunRecord
from fovlm.report.statistics import LEVEL, RULE, SEEDS, Side, Verdict, decide, paired, welch

EQUAL = 0.02  # sides whose samples or FLOPs differ by a smaller share than this had equally many
GAP_RULE = (
    f"A gap is there when the {LEVEL:.0%} interval of the mean difference within {SEEDS} or more seeds of the baseline "
    "(Student, paired) does not contain 0."
)


@dataclass(frozen=True)
class Answer:
    """A question with its verdict. `rows`: a line for each of the sides `labels`; `notes`: what a reader must know."""

    title: str
    labels: list[str]
    verdict: Verdict
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)
    rule: str = RULE
    at_equal_flops: bool = False

    @property
    def decided(self) -> bool:
        return self.verdict.winner is not None


def answers(evidence: Evidence) -> tuple[list[Answer], list[str]]:
    """The answers to every question that has finished runs on two sides, and the titles of the others."""
    asked: dict[tuple[str, str], list[str]] = {}
    for label in sorted(evidence.versus):
        versus = evidence.versus[label]
        asked.setdefault((versus.baseline, versus.question), []).append(label)
    found, unasked = [], []
    finished = evidence.labels
    for (baseline, question), labels in asked.items():
        present = [label for label in (baseline, *labels) if label in finished]
        missing = [label for label in (baseline, *labels) if label not in finished]
        if len(present) < 2:
            unasked.append(f"{question} ({' and '.join(missing)} missing)")
            continue
        if any("val_loss" in evidence.versus[label].metrics for label in labels):
            found.append(_at_the_end(evidence, question, baseline, present, missing))
        pairs = [one for one in present if one != baseline and baseline in present]
        pairs = [one for one in pairs if "val_loss_at_equal_flops" in evidence.versus[one].metrics]
        found += [_at_equal_flops(evidence, question, baseline, one) for one in pairs]
    gaps = [mode_gap(evidence, labels) for labels in evidence.families.values()]
    return found + [gap for gap in gaps if gap], unasked


def side(evidence: Evidence, label: str) -> Side:
    """The final losses of a label's seeds."""
    return Side(label, tuple(run.loss for run in evidence.side(label)))


def loss_at(run: RunRecord, flops: float) -> float | None:
    """Validation loss at a number of FLOPs, linear in log FLOPs between validations; None outside of them."""
    curve = run.curve("val_loss")
    if not curve or flops <= 0:
        return None
    x = [math.log(samples * run.flops_per_sample) for samples, _ in curve]
    at = math.log(flops)
    at = min(at, x[-1]) if at <= x[-1] + 1e-6 else at  # the end of the run is the end of its curve
    loss = float(np.interp(at, x, [loss for _, loss in curve], left=math.nan, right=math.nan))
    return None if math.isnan(loss) else loss


def _at_the_end(evidence: Evidence, question: str, baseline: str, present: list[str], missing: list[str]) -> Answer:
    """The final losses of all sides of a question."""
    sides = {label: side(evidence, label) for label in present}
    known = _known_spread(evidence, baseline)
    verdict = decide(list(sides.values()), known and known[1], confounds(evidence, present, baseline))
    notes = [v.caution for label, v in evidence.versus.items() if label in present and label != baseline and v.caution]
    seen = [run.samples for label in present for run in evidence.side(label)]
    if max(seen) > (1 + EQUAL) * min(seen):
        notes.append(f"The runs did not see as many samples: {min(seen):,.0f} to {max(seen):,.0f}.")
    if missing:
        notes.append(f"No finished run of {' and '.join(missing)}: left out.")
    if known and verdict.winner is None and any(len(one.losses) == 1 for one in sides.values()):
        notes.append(f"Seed spread known: {known[1]:.3g} nats, that of {known[0]}.")
    if len(present) == 2:
        notes += _frame_by_frame(evidence, present)
    head = ("side", "seeds", "loss, mean (nats)", "spread over seeds", _more(verdict), "samples", "FLOPs")
    rows = [_row(evidence, one, verdict) for one in sides.values()]
    return Answer(question, present, verdict, head, rows, notes)


def _at_equal_flops(evidence: Evidence, question: str, baseline: str, label: str) -> Answer:
    """Two sides with as much computed: at the FLOPs that the cheaper one ends with."""
    pair = {one: evidence.side(one) for one in (baseline, label)}
    ends = {one: [run.flops for run in runs] for one, runs in pair.items()}
    budget = min(min(of) for of in ends.values())
    cheap, dear = sorted(ends, key=lambda one: np.mean(ends[one]))
    losses = {one: [loss_at(run, budget) for run in runs] for one, runs in pair.items()}
    sides = [Side(one, tuple(v for v in values if v is not None)) for one, values in losses.items()]
    empty = [one.name for one in sides if not one.losses]
    if empty:
        text = f"not decided: {' and '.join(empty)} has no validation on both sides of {budget:.3g} FLOPs"
        verdict = Verdict(None, text, {})
    else:
        verdict = decide(sides, None, confounds(evidence, list(pair), baseline))
        if verdict.winner == cheap and max(ends[dear]) > (1 + EQUAL) * budget:
            verdict = _also_in_the_end(evidence, verdict, cheap, dear)
    rows = [
        (evidence.title(one.name), str(len(one.losses)), f"{one.mean:.4f}" if one.losses else "-", f"{budget:.3g}",
         f"{pair[one.name][0].flops_per_sample:.3g}", str(verdict.differences.get(one.name, "")))
        for one in sides
    ]  # fmt: skip
    notes = [
        "The loss of the side that trains longer is read between its validations, before its learning rate has "
        "decayed: this is to its disadvantage. The other is called better only when it also beats that side's final "
        "losses, which took more FLOPs. In the grid every run has a whole schedule for its budget."
    ]
    head = ("side", "seeds", "loss there (nats)", "FLOPs", "FLOPs a sample", _more(verdict))
    title = f"{question} ({label}, at equal FLOPs)"
    return Answer(title, [baseline, label], verdict, head, rows, notes, at_equal_flops=True)


def _also_in_the_end(evidence: Evidence, there: Verdict, cheap: str, dear: str) -> Verdict:
    """The verdict at the FLOPs of the cheaper side, kept when that side also beats the other one's final losses."""
    if decide([side(evidence, cheap), side(evidence, dear)]).winner == cheap:
        return there
    final = welch(side(evidence, dear).losses, side(evidence, cheap).losses)
    text = (
        f"not decided: {dear} was read before its learning rate had decayed, and {cheap} is not better than its final "
        f"loss, with more FLOPs ({dear} minus {cheap}: {final} nats)"
    )
    return Verdict(None, text, there.differences, there.level)


def mode_gap(evidence: Evidence, labels: list[str]) -> Answer | None:
    """What inference frame by frame loses against the way of training, for every side of a family scored in both; the
    verdict is on its baseline, the first."""
    gaps = {label: paired(found) for label in labels if (found := _gaps(evidence.side(label)))}
    if not gaps:
        return None
    base, other = labels[0], confounds(evidence, labels[:1])
    seeds, gap = len(_gaps(evidence.side(base))), gaps.get(base)
    winner = None
    if gap is None:
        text = f"not decided: no run of {base} was scored in both modes"
    elif other:
        text = f"not decided: {other}"
    elif seeds < SEEDS:
        text = f"not decided ({seeds} of {SEEDS} seeds of {base}): {gap} nats"
    elif not gap.excludes_zero:
        text = f"not decided: the interval contains 0, {gap} nats"
    else:
        winner, text = "gap", f"{base} is {'worse' if gap.value > 0 else 'better'} frame by frame: {gap} nats"
    rows = [(evidence.title(label), str(len(_gaps(evidence.side(label)))), str(gap)) for label, gap in gaps.items()]
    title = f"Mode gap of {base}: is it worse frame by frame, as it is deployed, than as it was trained?"
    head = ("side", "seeds", "autoregressive minus coarse_fine (nats)")
    return Answer(title, labels, Verdict(winner, text, {}), head, rows, rule=GAP_RULE)


def _gaps(runs: list[RunRecord]) -> list[float]:
    scored = [(run.mode("autoregressive"), run.mode("coarse_fine")) for run in runs]
    return [deployed - trained for deployed, trained in scored if deployed is not None and trained is not None]


def _known_spread(evidence: Evidence, baseline: str) -> tuple[str, float] | None:
    """(label, seed spread) of the baseline, else of the side of its family with most seeds; None without any."""
    family = evidence.families.get(evidence.root(baseline), [])
    sides = [side(evidence, label) for label in family if not confounds(evidence, [label])]
    known = sorted(sides, key=lambda one: (one.name != baseline, -len(one.losses)))
    return next(((one.name, one.spread) for one in known if one.spread), None)


def _frame_by_frame(evidence: Evidence, pair: list[str]) -> list[str]:
    """The comparison with the side that has another mode in deployment, where the other side has not."""
    deployed = {label: [v for run in evidence.side(label) if (v := run.mode("autoregressive")) is not None]
                for label in pair}  # fmt: skip
    a, b = sorted(pair, key=lambda label: not deployed[label])
    if not deployed[a] or deployed[b]:
        return []
    losses = [run.loss for run in evidence.side(b)]
    gap = welch(deployed[a], losses)
    return [f"{a} frame by frame, as deployed, minus {b}: {gap} nats ({len(deployed[a])} and {len(losses)} seeds)."]


def _more(verdict: Verdict) -> str:
    """The head of the column of differences, with the level that each interval is at."""
    return f"more than the best [{100 * verdict.level:.3g} % interval]"


def _row(evidence: Evidence, one: Side, verdict: Verdict) -> tuple[str, ...]:
    runs = evidence.side(one.name)
    more = str(verdict.differences.get(one.name, "lowest"))
    spread = f"{one.spread:.4f}" if one.spread is not None else "-"
    samples, flops = np.mean([run.samples for run in runs]), np.mean([run.flops for run in runs])
    title = evidence.title(one.name)
    return title, str(len(one.losses)), f"{one.mean:.4f}", spread, more, f"{samples:,.0f}", f"{flops:.3g}"
