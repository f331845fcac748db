"""The model card: README.md of a converted run, as the Hugging Face hub shows it, from the files of the run alone."""

from pathlib import Path
from typing import Any

import yaml

from fovlm.checkpoint.store import State
from fovlm.config.experiments import Dumper
from fovlm.config.schema import Experiment, ModelSettings
from fovlm.model.modes import MODE_NOTES
from fovlm.redact import redact
from fovlm.tables import Rows, markdown_table

USE = """```bash
pip install transformers torch av simplejpeg pillow
```

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

# The code that this runs is in `code/`; where fovlm is installed, `import fovlm` in its place.
model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
video = {{"type": "video", "video": "clip.mp4"}}
question = {{"type": "text", "text": "What happens?"}}
inputs = processor(messages=[{{"role": "user", "content": [video, question]}}])
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64))[0])
```

With fovlm: `fovlm ask clip.mp4 "What happens?" --model {name}`; `fovlm look` shows where the model looks."""


def card(
    name: str, experiment: Experiment, state: State, summary: dict[str, Any], dtype: str, checked: str, gaze: str = ""
) -> str:
    """The card's text: `name` of the folder, `summary` of the run (or empty), `checked` the result of the check, `gaze`
    a picture beside the card."""
    model, optim = experiment.model, experiment.optim
    objective = {"text": "next token", "dpo": "preferences (DPO)"}[experiment.train.objective]
    facts = [
        ("experiment", f"`{experiment.name}`{': ' + experiment.note if experiment.note else ''}"),
        ("language model", _backbone(model.llm, None if "llm" in optim.freeze else optim.lr_llm)),
        ("encoder", _backbone(model.encoder, None if "encoder" in optim.freeze else optim.lr_encoder)),
        ("visual tokens", f"{model.visual}, frames of {model.frame_size} pixels, question {model.question}"),
        ("trained", f"{state.step} steps, {state.samples:,} samples, {state.tokens:,} weighted tokens, {objective}"),
        ("weights", f"{dtype}, from a ZeRO-{state.zero_stage} checkpoint of {state.world_size} rank(s)"),
        ("commit", f"`{summary['commit'][:12]}`" if summary.get("commit") else "unknown"),
        ("data hash", f"`{state.data_hash or 'unknown'}`"),
    ]
    settings = yaml.dump(redact(experiment.model_dump()), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    text = _join(
        _metadata(model),
        f"# {name}",
        "A fovlm model: a video language model that spends one token on each frame and decides where to look.",
        _table([("", ""), *facts]),
        "## How to load it",
        USE.format(name=name),
        *(["## Where it looks", f"![Validation clips; coarse looks above fine ones]({gaze})"] if gaze else []),
        "## Data",
        _data(experiment),
        "## Scores",
        _scores(state, summary, experiment.train.best),
        "## Check of the conversion",
        checked,
        f"<details><summary>All settings</summary>\n\n```yaml\n{settings}```\n\n</details>",
    )
    return redact(text)


def imported_card(name: str, origin: str, facts: list[tuple[str, str]]) -> str:
    """The card of a model imported from the file `origin`, with what is known about it."""
    return _join(
        _metadata(None),
        f"# {name}",
        f"A foveated video language model converted from `{origin}` to the parameter names of fovlm. That file does "
        "not say what it was trained on or how well it does.",
        _table([("", ""), *facts]),
        "## How to load it",
        USE.format(name=name),
    )


def _join(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


def _table(rows: Rows) -> str:
    return markdown_table(rows, left=range(len(rows[0])))


def _metadata(model: ModelSettings | None) -> str:
    """The hub's metadata block."""
    tags: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    tags["tags"] = ["fovlm", "video-text-to-text", "custom_code"]
    sources = (model.llm, model.encoder) if model else ("",)
    if any(isinstance(source, str) for source in sources):  # weights from elsewhere
        tags |= {"license": "other", "license_name": "that-of-the-base-models"}
    else:
        tags["license"] = "apache-2.0"
    bases = [name for name in sources if isinstance(name, str) and name.count("/") == 1]
    if bases := [name for name in bases if not name.startswith((".", "/", "~"))]:
        tags["base_model"] = bases
    return f"---\n{yaml.dump(tags, sort_keys=False)}---"


def _backbone(source: str | dict[str, Any], rate: float | None) -> str:
    name = "small, from random weights" if isinstance(source, dict) else f"`{Path(source).name}`"
    return f"{name}, {'frozen' if rate is None else f'learning rate {rate:g}'}"


def _data(experiment: Experiment) -> str:
    data = experiment.data
    whole = sum(data.mixture.values())
    rows = [
        (f"`{name}`", data.sources[name].kind, f"{weight / whole:.1%}", f"`{Path(data.sources[name].shards).name}`")
        for name, weight in data.mixture.items()
    ]
    rows += [(f"`{name}`", data.sources[name].kind, "validation", "") for name in data.val if name not in data.mixture]
    loss = {"all_text": "every text token", "answer": "the answers"}[data.loss_on]
    return _table([("source", "kind", "share of the samples", "shards"), *rows]) + f"\n\nThe loss is on {loss}."


def _scores(state: State, summary: dict[str, Any], best: str) -> str:
    parts = []
    if state.metric is not None:
        parts.append(f"At this checkpoint (step {state.step}): {best} {state.metric:.4f}.")
    if scores := summary.get("scores"):
        sources = sorted({source for score in scores.values() for source in score["by_source"]})
        rows = [("mode", "all", *sources)]
        for mode, score in scores.items():
            every = f"{score['loss']:.4f}" + (f" ± {1.96 * score['error']:.4f}" if score.get("error") else "")
            by_source = (f"{score['by_source'][source]:.4f}" for source in sources)
            rows.append((f"`{mode}`: {MODE_NOTES[mode]}", every, *by_source))
        about = "nats per token, ± for a 95 % interval over samples"
        parts += [f"Validation loss ({about}) at step {summary['step']}:", _table(rows)]
    return "\n\n".join(parts) or "Not measured yet: the run was converted before it ended."
