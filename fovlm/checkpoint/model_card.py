"""The model card of a converted run: README.md, as the Hugging Face hub shows it.

What was trained, on what, for how long, how well, and how to load it; from the files of the run alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fovlm.checkpoint.store import State
from fovlm.config.experiments import Dumper
from fovlm.config.schema import Experiment
from fovlm.redact import redact

USE = """```python
from fovlm import FoveatedProcessor, FoveatedVLM

model = FoveatedVLM.from_pretrained("{name}")
processor = FoveatedProcessor.from_pretrained("{name}")
video = {{"type": "video", "video": "clip.mp4"}}
question = {{"type": "text", "text": "What happens?"}}
inputs = processor(messages=[{{"role": "user", "content": [video, question]}}], return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64))[0])
```

or `fovlm ask clip.mp4 "What happens?" --model {name}`, `fovlm look` to see where it looked."""
MODES = {
    "coarse_only": "the static query alone",
    "coarse_fine": "coarse pass, then fine looks, as trained",
    "autoregressive": "frame by frame, as deployed",
    "multi_token": "sixteen pooled tokens a frame, as trained",
}


def card(name: str, experiment: Experiment, state: State, summary: dict[str, Any], dtype: str, checked: str) -> str:
    """The card's text. `name` is the folder's, `summary` that of the run or empty, `checked` how it was verified."""
    model, train = experiment.model, experiment.train
    objective = {"text": "next token", "dpo": "preferences (DPO)"}[train.objective]
    facts = [
        ("experiment", f"`{experiment.name}`{': ' + experiment.note if experiment.note else ''}"),
        ("language model", _backbone(model.llm, None if "llm" in experiment.optim.freeze else experiment.optim.lr_llm)),
        (
            "encoder",
            _backbone(model.encoder, None if "encoder" in experiment.optim.freeze else experiment.optim.lr_encoder),
        ),
        (
            "visual tokens",
            f"{model.visual}, frames of {model.frame_size} pixels, question {model.question.replace('_', ' ')}",
        ),
        ("trained", f"{state.step} steps, {state.samples:,} samples, {state.tokens:,} weighted tokens, {objective}"),
        ("weights", f"{dtype}, from a ZeRO-{state.zero_stage} checkpoint of {state.world_size} rank(s)"),
        ("commit", f"`{summary['commit']}`" if summary.get("commit") else "unknown"),
        ("data hash", f"`{state.data_hash or 'unknown'}`"),
    ]
    parts = [
        _head(model),
        f"# {name}",
        "A fovlm model: a video language model that spends one token on each frame and decides where to look.",
        _table(("", ""), facts),
        "## How to load it\n\n" + USE.format(name=name),
        "## Data\n\n" + _data(experiment),
        "## How well it does\n\n" + _scores(state, summary, train.best),
        "## Was it converted right?\n\n" + checked,
        f"<details><summary>All settings</summary>\n\n```yaml\n{_settings(experiment)}```\n\n</details>",
    ]
    return "\n\n".join(parts) + "\n"


def imported_card(name: str, origin: str, facts: list[tuple[str, str]]) -> str:
    """The card of a published model that was brought in: `origin` is its file, `facts` what is known of it."""
    parts = [
        _head(None),
        f"# {name}",
        f"A foveated video language model from `{origin}`, with its weights under the names of fovlm. What it was "
        "trained on, and how well it does, is not in that file.",
        _table(("", ""), facts),
        "## How to load it\n\n" + USE.format(name=name),
    ]
    return "\n\n".join(parts) + "\n"


def _head(model: Any) -> str:
    """The hub's metadata; `model` are the experiment's settings, if there is one."""
    tags: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "video-text-to-text", "tags": ["fovlm"]}
    sources = (model.llm, model.encoder) if model else ()
    bases = [name for name in sources if isinstance(name, str) and name.count("/") == 1]
    if bases := [name for name in bases if not name.startswith((".", "/", "~"))]:
        tags["base_model"] = bases
    return f"---\n{yaml.dump(tags, sort_keys=False)}---"


def _backbone(source: str | dict[str, Any], rate: float | None) -> str:
    name = "small, from random weights" if isinstance(source, dict) else f"`{Path(source).name}`"
    return f"{name}, {'frozen' if rate is None else f'trained at a rate of {rate:g}'}"


def _data(experiment: Experiment) -> str:
    data = experiment.data
    whole = sum(data.mixture.values())
    rows: list[tuple[str, ...]] = [
        (f"`{name}`", data.sources[name].kind, f"{weight / whole:.1%}", f"`{Path(data.sources[name].shards).name}`")
        for name, weight in data.mixture.items()
    ]
    rows += [(f"`{name}`", data.sources[name].kind, "validation", "") for name in data.val if name not in data.mixture]
    loss = {"all_text": "every text token", "answer": "the answers"}[data.loss_on]
    return _table(("source", "kind", "share of the samples", "shards"), rows) + f"\n\nThe loss is on {loss}."


def _scores(state: State, summary: dict[str, Any], best: str) -> str:
    lines = []
    if state.metric is not None:
        lines.append(f"At this checkpoint (step {state.step}): {best} {state.metric:.4f}.")
    scores = summary.get("scores") or {}
    if scores:
        sources = sorted({source for score in scores.values() for source in score["by_source"]})
        rows = [
            (
                f"`{mode}`: {MODES.get(mode, mode)}",
                f"{score['loss']:.4f}",
                *(f"{score['by_source'][source]:.4f}" for source in sources),
            )
            for mode, score in scores.items()
        ]
        lines += [f"Validation loss (nats a token) at step {summary['step']}:", _table(("mode", "all", *sources), rows)]
    return "\n\n".join(lines) or "Not measured yet: the run was converted before it ended."


def _settings(experiment: Experiment) -> str:
    return yaml.dump(redact(experiment.model_dump()), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
