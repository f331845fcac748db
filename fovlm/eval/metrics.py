"""Metrics from sample results: accuracy with its interval and losses, by category, source and modality."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from scipy.stats import binomtest

from fovlm.eval.results import SampleResult

Samples = list[SampleResult]


def score_options(nll: list[float], tokens: list[int], answer: int | None) -> SampleResult:
    """The scores of a sample: nll (nats) and the number of tokens of each option; `answer` None: the loss alone.

    `predicted` has the highest likelihood, `predicted_per_token` the highest per token; the first of equal ones.
    """
    result: SampleResult = {"nll": nll, "tokens": tokens}
    if answer is None:
        return result
    each = [value / count for value, count in zip(nll, tokens, strict=True)]
    predicted, per_token = nll.index(min(nll)), each.index(min(each))
    return result | {
        "answer": answer,
        "predicted": predicted,
        "predicted_per_token": per_token,
        "correct": predicted == answer,
        "correct_per_token": per_token == answer,
    }


def compute_metrics(samples: Iterable[SampleResult]) -> dict[str, Any]:
    """The metrics of a set. Losses are means over the tokens of the right answers, in nats."""
    samples = list(samples)
    scored = [sample for sample in samples if "nll" in sample]
    skipped = Counter(sample["skipped"] for sample in samples if "skipped" in sample)
    found: dict[str, Any] = {"n": len(scored), "skipped": dict(skipped)}
    if not scored:
        return found
    found["loss"] = _loss(scored)
    for key in ("source", "modality"):
        found[f"loss_by_{key}"] = _by(scored, key, _loss)
        found[f"samples_by_{key}"] = _by(scored, key, len)
    if all("answer" in sample for sample in scored):
        found |= _accuracy(scored)
        found["by_category"] = _by(scored, "category", _accuracy)
        found["by_modality"] = _by(scored, "modality", _accuracy)
        for key in sorted({key for sample in scored for key in sample.get("extra", {})}):
            found[f"by_{key}"] = _by(scored, key, _accuracy)
    return found


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share of `correct` in `n`; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _accuracy(samples: Samples) -> dict[str, Any]:
    """Accuracies with 95 % intervals, and the accuracy of guessing."""
    n = len(samples)
    correct, per_token = (sum(sample[key] for sample in samples) for key in ("correct", "correct_per_token"))
    return {
        "n": n,
        "accuracy": correct / n,
        "interval": list(wilson(correct, n)),
        "accuracy_per_token": per_token / n,
        "interval_per_token": list(wilson(per_token, n)),
        "chance": sum(1 / len(sample["nll"]) for sample in samples) / n,
    }


def _loss(samples: Samples) -> float:
    pairs = [(sample, sample.get("answer", 0)) for sample in samples]
    tokens = sum(sample["tokens"][i] for sample, i in pairs)
    return math.fsum(sample["nll"][i] for sample, i in pairs) / max(tokens, 1)


def _by(samples: Samples, key: str, metric: Callable[[Samples], Any]) -> dict[str, Any]:
    groups: dict[str, Samples] = {}
    for sample in samples:
        groups.setdefault(str(sample.get(key, sample.get("extra", {}).get(key, "-"))), []).append(sample)
    return {name: metric(groups[name]) for name in sorted(groups)}
