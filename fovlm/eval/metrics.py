"""From sample lines to numbers: accuracy with its interval, losses, by category, source and modality."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from fovlm.eval.results import Line
from fovlm.eval.wilson import wilson

MULTIPLE = ("right", "right_normalised")


def line_of(nll: list[float], tokens: list[int], answer: int | None) -> Line:
    """What is kept of a scored sample: nll in nats and the number of tokens of each option; `answer` None: loss alone.

    `chosen` has the highest likelihood, `chosen_normalised` the highest per token; equal ones go to the first.
    """
    line: Line = {"nll": nll, "tokens": tokens}
    if answer is None:
        return line
    each = [value / count for value, count in zip(nll, tokens, strict=True)]
    chosen, normalised = nll.index(min(nll)), each.index(min(each))
    return line | {
        "answer": answer,
        "chosen": chosen,
        "chosen_normalised": normalised,
        "right": chosen == answer,
        "right_normalised": normalised == answer,
    }


def compute_metrics(lines: Iterable[Line]) -> dict[str, Any]:
    """What the lines of a set come to. Losses are means over tokens, in nats, of the right answer."""
    scored = [line for line in lines if "nll" in line]
    left: dict[str, int] = {}
    for line in lines:
        if "left_out" in line:
            left[line["left_out"]] = left.get(line["left_out"], 0) + 1
    found: dict[str, Any] = {"n": len(scored), "left_out": left}
    if not scored:
        return found
    found |= {
        "loss": _loss(scored),
        "loss_by_source": _by(scored, lambda line: line["source"], _loss),
        "loss_by_modality": _by(scored, lambda line: line["modality"], _loss),
        "samples_by_source": _by(scored, lambda line: line["source"], len),
        "samples_by_modality": _by(scored, lambda line: line["modality"], len),
    }
    if all("answer" in line for line in scored):
        found |= _accuracy(scored)
        found["by_category"] = _by(scored, lambda line: line["category"], _accuracy)
        found["by_modality"] = _by(scored, lambda line: line["modality"], _accuracy)
        for key in sorted({key for line in scored for key in line.get("extra", {})}):
            found[f"by_{key}"] = _by(scored, partial(_extra, key=key), _accuracy)
    return found


def _extra(line: Line, key: str) -> str:
    return str(line.get("extra", {}).get(key, "-"))


def _accuracy(lines: list[Line]) -> dict[str, Any]:
    """Shares of right answers with 95 % intervals, and what guessing gives."""
    n, (right, normalised) = len(lines), (sum(line[key] for line in lines) for key in MULTIPLE)
    return {
        "n": n,
        "accuracy": right / n,
        "interval": list(wilson(right, n)),
        "accuracy_normalised": normalised / n,
        "interval_normalised": list(wilson(normalised, n)),
        "chance": sum(1 / len(line["nll"]) for line in lines) / n,
    }


def _loss(lines: list[Line]) -> float:
    at = [line.get("answer", 0) for line in lines]
    tokens = sum(line["tokens"][i] for line, i in zip(lines, at, strict=True))
    return math.fsum(line["nll"][i] for line, i in zip(lines, at, strict=True)) / max(tokens, 1)


def _by(lines: list[Line], key: Callable[[Line], str], number: Callable[[list[Line]], Any]) -> dict[str, Any]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(str(key(line)), []).append(line)
    return {name: number(groups[name]) for name in sorted(groups)}
