"""The questions that the ablations ask, each with its sides, what may differ between them, and the answer.

A question whose sides differ in more than it asks about, or the seeds of a side in anything, is not decided, whatever
the numbers (`alike.py`).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fovlm.report.collect import Evidence, RunRecord
from fovlm.report.confounds import confounds
from fovlm.report.statistics import (
    LEVEL,
    RULE,
    SEEDS,
    Difference,
    Side,
    Verdict,
    decide,
    interval,
    paired,
    pooled,
    welch,
)

BASELINE = "LR1"
SAMPLES_APART = 0.02  # of the samples seen; sides further apart than this did not see "equal samples"
NAMES = {
    "F1": "F1, both backbones frozen", "F2": "F2, language model frozen", "LR1": "LR1, baseline",
    "LR2": "LR2, connector to backbones 100:1", "LR3": "LR3, 3:1", "LR4": "LR4, 1:1",
    "A1": "A1, one shallow attention", "A6": "A6, static query alone", "B1": "B1, 16 pooled tokens a frame",
    "A8a": "A8a, a picture is 1 look", "A8b": "A8b, a picture is 16 looks", "D1": "D1, pictures in the mix",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """`varies`: the key paths, or their beginnings, that make the difference between the sides."""

    title: str
    asks: str
    roles: tuple[str, ...]
    varies: tuple[str, ...]
    caution: str = ""


@dataclass(frozen=True)
class Answer:
    """A question with its verdict. `rows`: a line for each side; `notes`: what a reader must know beside the number."""

    title: str
    asks: str
    rule: str
    verdict: Verdict
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)

    @property
    def decided(self) -> bool:
        return self.verdict.winner is not None


QUESTIONS = (
    Question("Freeze strategy", "Must the backbones be trained?", ("F1", "F2", "LR1"),
             ("optim.freeze",)),
    Question("Learning-rate ratio", "How much faster should the connector learn than the backbones?",
             ("LR1", "LR2", "LR3", "LR4"), ("optim.lr_connector",)),
    Question("Deep query", "Does it help that the query goes through all layers of the encoder?", ("LR1", "A1"),
             ("model.deep_query",)),
    Question("Foveation", "Does it help that the language model steers the gaze, on the same samples?", ("LR1", "A6"),
             ("model.visual",),
             "Both models are trained for what they are scored at. LR1 does more work on each sample: two passes."),
    Question("Pictures as 1 or 16 frames", "Do more looks at a picture see more?", ("A8a", "A8b"),
             ("data.image_frames",)),
    Question("Data mix", "Do pictures in the mix help video?", ("LR1", "D1"), ("data.mixture",),
             "With as many samples in all, D1 sees fewer videos."),
    Question("One token against sixteen, at equal samples", "What does one foveated token a frame lose or win?",
             ("LR1", "B1"), ("model.visual",)),
)  # fmt: skip


def answers(evidence: Evidence) -> tuple[list[Answer], list[str]]:
    """The answers to every question that has finished runs on two sides, and the titles of the others."""
    sides = {role: side(evidence, role) for role in NAMES if evidence.side(role)}
    known = pooled({role: one for role, one in sides.items() if not confounds(evidence, (role,), ())}, BASELINE)
    found, unasked = [], []
    for question in QUESTIONS:
        present = [role for role in question.roles if role in sides]
        if len(present) < 2:
            unasked.append(f"{question.title} ({' and '.join(r for r in question.roles if r not in sides)} missing)")
            continue
        other = confounds(evidence, present, question.varies)
        verdict = decide([sides[role] for role in present], known[1] if known else None, other)
        answer = Answer(
            question.title, question.asks, RULE, verdict,
            ("side", "seeds", "loss, mean (nats)", "spread over seeds", _more(verdict),
             "samples", "FLOPs"),
            [_row(evidence, role, sides[role], verdict) for role in present],
            [question.caution] if question.caution else [],
        )  # fmt: skip
        seen = [run.samples for role in present for run in evidence.side(role)]
        if max(seen) > (1 + SAMPLES_APART) * min(seen):
            answer.notes.append(f"The runs did not see as many samples: {min(seen):,.0f} to {max(seen):,.0f}.")
        missing = [role for role in question.roles if role not in sides]
        if missing:
            answer.notes.append(f"No finished run of {' and '.join(missing)}: left out.")
        if known and not answer.decided and any(len(sides[role].losses) == 1 for role in present):
            answer.notes.append(f"Seed spread known: {known[1]:.3g} nats, that of {known[0]}.")
        if question.title == "Foveation":
            answer.notes.extend(_in_deployment(evidence))
            answer.notes.extend(_for_less(evidence, "LR1", "A6"))
        found.append(answer)
    both = equal_flops(evidence)
    if both:
        found.append(both)
    gap = mode_gap(evidence)
    if gap:
        found.append(gap)
    return found, unasked


def side(evidence: Evidence, role: str) -> Side:
    """The final losses of a role's seeds."""
    return Side(role, tuple(run.loss for run in evidence.side(role)))


def loss_at(run: RunRecord, flops: float) -> float | None:
    """Validation loss at a number of FLOPs: between validations linear in log FLOPs; None before the first or beyond
    the last."""
    points = [(math.log(samples * run.flops_per_sample), loss) for samples, loss in run.curve("val_loss")]
    at = math.log(flops) if flops > 0 else -math.inf
    if points and points[-1][0] <= at <= points[-1][0] + 1e-6:
        return points[-1][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


def equal_flops(evidence: Evidence) -> Answer | None:
    """LR1 against B1 with as much computed: at the FLOPs that the cheaper one ends with."""
    pair = {role: evidence.side(role) for role in ("LR1", "B1")}
    if not all(pair.values()):
        return None
    ends = {role: [run.samples * run.flops_per_sample for run in runs] for role, runs in pair.items()}
    budget = min(min(ends[role]) for role in ends)
    cheap, dear = sorted(ends, key=lambda role: statistics.fmean(ends[role]))
    losses = {role: [loss_at(run, budget) for run in runs] for role, runs in pair.items()}
    sides = [Side(role, tuple(v for v in values if v is not None)) for role, values in losses.items()]
    empty = [one.name for one in sides if not one.losses]
    if empty:
        text = f"not decided: {' and '.join(empty)} has no validation on both sides of {budget:.3g} FLOPs"
        verdict = Verdict(None, text, {})
    else:
        verdict = decide(sides, None, confounds(evidence, ("LR1", "B1"), ("model.visual",)))
        if verdict.winner == cheap and max(ends[dear]) > (1 + SAMPLES_APART) * budget:
            verdict = _to_the_end(evidence, verdict, cheap, dear)
    rows = [
        (NAMES[one.name], str(len(one.losses)), f"{one.mean:.4f}" if one.losses else "-", f"{budget:.3g}",
         f"{pair[one.name][0].flops_per_sample:.3g}",
         interval(verdict.differences[one.name]) if one.name in verdict.differences else "")
        for one in sides
    ]  # fmt: skip
    notes = [
        "The loss of the side that goes on longer is read between its validations, where its learning rate has not yet "
        "come down: this is to its disadvantage. The other is called better only when it also beats that side's final "
        "losses, which took more FLOPs. The grid, where every run has a whole schedule for its budget, compares at "
        "equal FLOPs as it is."
    ]
    if not all(run.summary.get("flops") for runs in pair.values() for run in runs):
        notes.append("FLOPs of a sample were not recorded: upper bounds from the settings are used.")
    return Answer(
        "One token against sixteen, at equal FLOPs", "And with as much computed?", RULE, verdict,
        ("side", "seeds", "loss there (nats)", "FLOPs", "FLOPs a sample", _more(verdict)), rows, notes,
    )  # fmt: skip


def _to_the_end(evidence: Evidence, there: Verdict, cheap: str, dear: str) -> Verdict:
    """The verdict at the FLOPs of the cheaper side, kept when that side also beats the dearer one's final losses."""
    if decide([side(evidence, cheap), side(evidence, dear)]).winner == cheap:
        return there
    final = interval(welch(side(evidence, dear).losses, side(evidence, cheap).losses))
    text = (
        f"not decided: {dear} was read before its learning rate came down, and {cheap} is not better than it is in the "
        f"end, with more FLOPs ({dear} less {cheap}: {final} nats)"
    )
    return Verdict(None, text, there.differences, there.level)


def mode_gap(evidence: Evidence) -> Answer | None:
    """What deployment (frame by frame) loses against the way of training, for every role that was scored in both."""
    rows, base = [], None
    for role in NAMES:
        gaps = [
            deployed - trained
            for run in evidence.side(role)
            if (deployed := run.mode("autoregressive")) is not None and (trained := run.mode("coarse_fine")) is not None
        ]
        if gaps:
            difference = paired(gaps)
            rows.append((NAMES[role], str(len(gaps)), interval(difference)))
            if role == BASELINE:
                base = (len(gaps), difference)
    if not rows:
        return None
    rule = (
        f"A gap is there when the {LEVEL:.0%} interval of the mean difference within {SEEDS} or more seeds of "
        f"{BASELINE} (Student, paired) does not hold 0."
    )
    verdict = _gap(base, confounds(evidence, (BASELINE,), ()))
    return Answer("Mode gap", "Is the model worse frame by frame, as it is deployed, than as it was trained?", rule,
                  verdict, ("side", "seeds", "autoregressive less coarse_fine (nats)"), rows)  # fmt: skip


def _gap(base: tuple[int, Difference] | None, unlike: str) -> Verdict:
    if base is None:
        return Verdict(None, f"not decided: no run of {BASELINE} was scored in both modes", {})
    seeds, difference = base
    if unlike:
        return Verdict(None, f"not decided: {unlike}", {})
    if seeds < SEEDS:
        return Verdict(None, f"not decided ({seeds} of {SEEDS} seeds of {BASELINE}): {interval(difference)} nats", {})
    if not difference.excludes_zero:
        return Verdict(None, f"not decided: the interval holds 0, {interval(difference)} nats", {})
    worse = "worse" if difference.value > 0 else "better"
    return Verdict("gap", f"{BASELINE} is {worse} frame by frame: {interval(difference)} nats", {})


def _in_deployment(evidence: Evidence) -> list[str]:
    """The same comparison with LR1 as it is deployed: a static query has no other mode."""
    deployed = [v for run in evidence.side("LR1") if (v := run.mode("autoregressive")) is not None]
    static = [run.loss for run in evidence.side("A6")]
    if not deployed or not static:
        return []
    told = interval(welch(deployed, static))
    return [f"LR1 frame by frame, as deployed, less A6: {told} nats ({len(deployed)} and {len(static)} seeds)."]


def _for_less(evidence: Evidence, dear: str, cheap: str) -> list[str]:
    """The dearer side read at the FLOPs that the cheaper one ends with. A note: its schedule has not ended there."""
    ends = [run.samples * run.flops_per_sample for run in evidence.side(cheap)]
    there = [v for run in evidence.side(dear) if (v := loss_at(run, min(ends))) is not None]
    if not there:
        return []
    told = interval(welch(there, [run.loss for run in evidence.side(cheap)]))
    return [
        f"{dear} after as many FLOPs as {cheap} had in all, its learning rate not yet down, less {cheap}: {told} nats."
    ]


def _more(verdict: Verdict) -> str:
    """The head of the column of differences, with the level that each interval is at."""
    return f"more than the best [{100 * verdict.level:.3g} % interval]"


def _row(evidence: Evidence, role: str, one: Side, verdict: Verdict) -> tuple[str, ...]:
    runs = evidence.side(role)
    samples = sum(run.samples for run in runs) / len(runs)
    flops = sum(run.samples * run.flops_per_sample for run in runs) / len(runs)
    more = interval(verdict.differences[role]) if role in verdict.differences else "lowest"
    spread = f"{one.spread:.4f}" if one.spread is not None else "-"
    return (NAMES[role], str(len(one.losses)), f"{one.mean:.4f}", spread, more, f"{samples:,.0f}", f"{flops:.3g}")
