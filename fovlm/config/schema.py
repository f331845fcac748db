"""All settings of an experiment, typed and checked: what is trained on what, how, and for how long. No torch here.

`load(name, overrides)` reads the YAML files (`experiments.py`), checks every key and value, and returns an
`Experiment`. A mistake is a `UserError` of one line: the file, the key path, and the closest valid name. Units are
beside the fields; letters (F frames, S text tokens) as in `fovlm/data/packing.py`.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fovlm.config import experiments
from fovlm.config.fields import Fields
from fovlm.config.messages import INSTEAD, NULL, explain, key_types, path_of
from fovlm.errors import UserError, did_you_mean
from fovlm.paths import run_root
from fovlm.redact import URL_SECRETS

Count = Annotated[int, Field(ge=1, le=1 << 48)]
Whole = Annotated[int, Field(ge=0, le=1 << 48)]  # 0: never, or none
Minutes = Annotated[int, Field(ge=1, le=1_000_000)]
Rounds = Annotated[int, Field(ge=1, le=16)]
Size = Annotated[int, Field(ge=1, le=1 << 14)]  # of a tensor
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Backbone = Literal["encoder", "llm"]
TINY_TOKENIZERS = ("words", "bytes")  # `fovlm/data/tokenizers.py`
Metric = Literal["val_loss", "val_loss_at_equal_flops"]


class Strict(BaseModel):
    """No unknown keys, no silent conversions, immutable (use `model_copy(update=...)`)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


class LoraSettings(Strict):
    """Adapters in place of training the language model (`fovlm/model/lora.py`); `optim.lr_llm` is their rate."""

    rank: Count = 16  # width of an adapter
    alpha: Rate = 32.0  # an adapter counts alpha / rank
    targets: Annotated[list[str], Field(min_length=1)] = ["q_proj", "k_proj", "v_proj", "o_proj"]  # linear layers


class ModelSettings(Strict):
    """The network. `llm` and `encoder` are a folder (as given, or below FOVLM_MODELS), a Hugging Face id, or the
    keyword arguments of an HF configuration (`model_type`: llama / dinov2 by default) for random weights."""

    visual: Literal["foveated", "coarse", "multi_token"] = "foveated"  # coarse: static query only
    pooled: Size = 4  # multi_token: patches are pooled to so many rows and columns of tokens a frame
    deep_query: bool = True  # false: one cross-attention over the encoder's last features
    question: Literal["before_frames", "after_frames"] = "after_frames"  # before_frames: the question steers the gaze
    query_rounds: Rounds = 1  # the first round's queries come from coarse tokens, later ones from the round before
    llm: str | dict[str, Any] = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the language model
    encoder: str | dict[str, Any] = "facebook/dinov2-small"  # the vision encoder
    tokenizer: str | None = None  # folder or id, words (of the data), bytes; null: the language model's own
    query_dim: Size = 384  # Q, the width of a query
    query_scale: Rate = 1.0  # std with which a (deep) query enters the encoder when training starts
    visual_scale: Rate | None = 0.14  # std of a visual token, that of SmolLM2's embeddings; null: measure the model's
    frame_size: Size = 224  # pixels, height and width
    grad_checkpoint: list[Backbone] = []  # recompute activations in the backward pass: less memory, a third more time
    compile: bool | None = None  # torch.compile of the layers and the loss; null: on a GPU, except with ZeRO-3
    lora: LoraSettings | None = None  # train adapters of the language model, and freeze the rest of it
    init_from: str | None = None  # a run's name or folder: start from its weights with a fresh optimizer


class DataSource(Strict):
    """Where one kind of data comes from."""

    shards: str  # tar files: braces and ${FOVLM_DATA} are expanded; a relative pattern is below FOVLM_DATA; or URLs
    kind: Literal["text", "image", "video", "mixed", "preference"]  # mixed: any of the first three
    prompt: str | None = None  # the question for samples without one of their own
    fields: Fields = {}  # of shards made by others: where a record's parts are (`docs/data.md`), or `nanosmol`
    loss_weight: Rate = 1.0  # of each of its tokens in the training loss

    @property
    def reading(self) -> list[Any]:
        """What decides which records its shards have, to be hashed."""
        return [self.kind, self.prompt, *([self.fields] if self.fields else [])]


class SyntheticTask(Strict):
    """The synthetic task (`fovlm/data/synthetic.py`): objects change places and marks from frame to frame, the question
    names one object, the answer lists its marks. Its shards are written into `folder` before training starts."""

    folder: str = "hunt"  # of its shards, below FOVLM_DATA
    train_clips: Count = 4000  # clips to train on
    val_clips: Count = 256  # for validation, all with the most objects
    frames: Count = 4  # of a clip
    objects: Annotated[list[Count], Field(min_length=1)] = [3]  # in a clip: one of these counts
    names: Annotated[int, Field(ge=1, le=24)] = 12  # distinct objects: colour and shape
    marks: Annotated[int, Field(ge=2, le=10)] = 6  # distinct marks: chance is 1 / marks
    grid: Count = 6  # cells on each side of the picture
    patch: Count = 14  # pixels on each side of a cell
    text_fraction: Share = 0.1  # of all samples: text only
    image_fraction: Share = 0.1  # of all samples: single pictures
    seed: Whole = 0  # of the clips


class DataSettings(Strict):
    """Sources, their mixture, and the budget of a pack."""

    sources: dict[str, DataSource] = {}  # name -> where the data is
    mixture: dict[str, Rate] = {}  # source -> weight: its share of the samples, relative to the others
    first: dict[str, Count] = {}  # samples of these sources ahead of the mixture: easy ones, until they are learnt
    val: list[str] = []  # validation sources, each read from its start
    pack_cost: Count = 4096  # budget of a pack in text tokens: the memory and the work of one micro step
    frame_cost: Count = 32  # text tokens that one frame counts as: about the ratio of their FLOPs
    max_frames: Count = 64  # of one sample; longer videos are subsampled evenly
    max_tokens: Count = 512  # of one conversation; longer texts are truncated
    image_frames: Count = 1  # looks at the single frame of an image
    questions_per_encoding: Count = 8  # conversations over the same frames that share their encoding, at most
    loss_on: Literal["all_text", "answer"] = "answer"  # text tokens that carry loss
    length_weight: Literal["none", "sqrt"] = "none"  # sqrt: each of n such tokens weighs 1 / sqrt(n) in training
    cache_gb: Rate = 100.0  # of remote shards on a node's disk; more only while they are in use at once
    cache_dir: str | None = None  # folder for them; null: FOVLM_CACHE/shards
    workers: Whole = 2  # data loader processes per rank; affects speed only
    seed: Whole = 0  # of the sample order
    max_bad_fraction: Share = 0.01  # of the samples seen; with more broken ones the run fails
    generate: SyntheticTask | None = None  # make the shards of the synthetic task first


class OptimSettings(Strict):
    """AdamW over three groups; learning rates are the peak of the schedule (`fovlm/train/schedule.py`)."""

    lr_connector: Rate = 1e-4  # of the queries and the projections to and from the language model
    lr_encoder: Rate = 1e-5  # of the vision encoder
    lr_llm: Rate = 1e-5  # of the language model, or of its adapters
    freeze: list[Backbone] = []  # backbones that are not trained
    schedule: Literal["cosine", "constant", "converging"] = "cosine"  # converging: all groups end at lr_common
    warmup: BelowOne = 0.03  # fraction of the run
    final: Share = 0.1  # cosine: last learning rate / peak
    lr_common: Rate | None = None  # converging: the learning rate where all groups end
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)] = [0.9, 0.95]  # of AdamW
    eps: Rate = 1e-8  # of AdamW
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # of AdamW, for every weight
    clip: Annotated[float, Field(ge=0)] = 1.0  # global gradient norm; 0: no clipping


class TrainSettings(Strict):
    """Length, batch size, and how often to log, validate and save. Exactly one of samples, steps and flops is given."""

    samples: Count | None = None  # length of the run
    steps: Count | None = None  # length of the run in optimizer steps
    flops: Rate | None = None  # length of the run: its budget, forward and backward
    packs_per_step: Count = 8  # global batch: samples that fill so many packs, on any number of ranks
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware has it, else fp32
    seed: Whole = 0  # of the initial weights
    objective: Literal["text", "dpo"] = "text"  # dpo: prefer one answer to another, against the first weights
    dpo_beta: Rate = 0.1  # how strongly the model is kept near its first weights
    log_every: Count = 10  # steps between two rows of the log
    eval_every: Whole = 500  # steps between two validations; 0: none
    eval_packs: Count = 32  # packs of a validation, over all ranks
    save_every: Whole = 500  # steps between two checkpoints; 0: at the end only
    keep_last: Count = 2  # newest checkpoints that are kept
    keep_best: Whole = 1  # best checkpoints that are kept
    best: Literal["val_loss", "train_loss"] = "val_loss"  # what makes a checkpoint the best
    resume: str = "auto"  # auto: the newest intact checkpoint of the run, if any; none; or a folder
    hang_minutes: Minutes = 30  # a step or validation that takes longer counts as hung and ends the run
    max_nonfinite: Count = 3  # consecutive steps with a non-finite loss or gradient; then the run fails


class LoggerSettings(Strict):
    """Where progress is written besides the run folder and the terminal."""

    wandb: Literal["disabled", "offline", "online"] = "offline"  # Weights & Biases
    project: str = "fovlm"  # of Weights & Biases
    entity: str | None = None  # wandb's team
    folder: str | None = None  # run folder; null: FOVLM_RUNS/NAME, by default `runs/NAME`


class Versus(Strict):
    """What the report compares a run with. Runs with the same baseline and question are the sides of one comparison."""

    baseline: str  # name of a run
    question: str  # in one line; the heading in the report
    metrics: Annotated[list[Metric], Field(min_length=1)] = ["val_loss"]  # what is compared
    caution: str = ""  # what to know beside the numbers
    changes: list[str] = []  # the settings that the comparison is about; `load` fills it in from the two runs' YAML


# Settings that do not change what is computed: a checkpoint resumes under other values of these.
NOT_HASHED = {
    "model": {"grad_checkpoint", "compile"},
    "data": {"workers", "max_bad_fraction", "cache_gb", "cache_dir"},
    "train": {"log_every", "eval_every", "eval_packs", "save_every", "keep_last", "keep_best", "resume"}
    | {"hang_minutes", "max_nonfinite"},
}
LABELS = ("name", "note", "seeds", "versus")  # what a run is called and compared with


class Experiment(Strict):
    """A named run: everything needed to repeat it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    note: str = ""  # what the run asks, in one line
    seeds: Count = 1  # how often `fovlm sweep` repeats it, each time with other initial weights
    versus: Versus | None = None  # what the report compares it with
    deepspeed: str = "zero2"  # name of a file in ds_configs/
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    logger: LoggerSettings = LoggerSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> "Experiment":
        for path, problem in _problems(self):
            raise PydanticCustomError("fits", "{problem}", {"path": path, "problem": problem})
        return self

    def dump(self) -> str:
        """The resolved experiment as YAML, which `Experiment.parse` reads back."""
        return yaml.dump(self.model_dump(), Dumper=experiments.Dumper, sort_keys=False, allow_unicode=True)

    @classmethod
    def parse(cls, text: str) -> "Experiment":
        """Read what `dump` wrote. Raises ValueError."""
        try:
            return cls.model_validate(experiments.parse(text))
        except yaml.YAMLError as error:
            raise ValueError(experiments.one_line(error)) from error

    @property
    def hash(self) -> str:
        """16 hex digits of all that a checkpoint depends on: not `LABELS`, logger and `NOT_HASHED`."""
        exclude: dict[str, Any] = {**dict.fromkeys(LABELS, True), "logger": True, **NOT_HASHED}
        what = json.dumps(self.model_dump(exclude=exclude), sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def differs_from(self, other: "Experiment") -> list[str]:
        """Key paths of settings that may change a result and differ from `other`; `train.seed` does not count."""
        exclude = {*LABELS, "logger", "deepspeed"}
        a, b = (experiments.flat(e.model_dump(exclude=exclude)) for e in (self, other))
        apart = {"train.seed"} | {f"{section}.{key}" for section, keys in NOT_HASHED.items() for key in keys}
        return sorted(key for key in (a.keys() | b.keys()) - apart if a.get(key) != b.get(key))

    @property
    def run_folder(self) -> Path:
        """Folder of checkpoints, logs and resolved settings."""
        return Path(self.logger.folder) if self.logger.folder else run_root() / self.name


def load(name: str, overrides: list[str] | None = None, folder: Path = experiments.EXPERIMENTS) -> Experiment:
    """The run `name` with `section.key=value` overrides (`name=other` gives it another run folder).

    With `versus`, the settings in which the files of the run and of its baseline differ become `versus.changes`;
    overrides are not part of what a comparison asks. Raises UserError for an unknown name or key, a wrong type, or
    settings that do not fit together.
    """
    experiment = _load(name, overrides or [], folder)
    if experiment.versus is None or experiment.versus.changes:
        return experiment
    written = _load(name, [], folder) if overrides else experiment
    try:
        changes = written.differs_from(_load(experiment.versus.baseline, [], folder))
    except UserError as error:
        raise UserError(f"{name}: versus.baseline: {error}") from None
    return experiment.model_copy(update={"versus": experiment.versus.model_copy(update={"changes": changes})})


def _load(name: str, overrides: list[str], folder: Path) -> Experiment:
    settings = experiments.settings(name, folder)
    settings.values["name"] = name
    experiments.apply_overrides(settings, overrides)
    try:
        return Experiment.model_validate(settings.values)
    except ValidationError as error:
        raise UserError(_one_line(error, settings, name)) from None


def _problems(e: Experiment) -> list[tuple[str, str]]:
    """Checks across fields: (key path, what is wrong and how to fix it)."""
    d, t = e.data, e.train
    found: list[tuple[str, str]] = []
    lengths = [key for key in ("samples", "steps", "flops") if getattr(t, key) is not None]
    if len(lengths) != 1:
        given = " and ".join(lengths) or "none of them"
        found.append(("train", f"exactly one of samples, steps and flops sets the length of the run, not {given}"))
    for source in [*d.mixture, *d.val]:
        if source not in d.sources:
            at = f"data.mixture.{source}" if source in d.mixture else "data.val"
            found.append((at, f"'{source}' is not in data.sources{did_you_mean(source, d.sources)}"))
    for source, settings in d.sources.items():
        if any(form.search(settings.shards) for form in URL_SECRETS):
            secret = "a password or token in a URL would be logged: keep it in the environment, ~/.aws or ~/.netrc"
            found.append((f"data.sources.{source}.shards", secret))
    for source in set(d.first) - set(d.mixture):
        found.append(("data.first", f"'{source}' is not in data.mixture{did_you_mean(source, d.mixture)}"))
    if (task := d.generate) and max(task.objects) > min(task.names, task.grid**2):
        found.append(("data.generate.objects", f"{max(task.objects)} objects need as many names and places: there are "
                      f"{task.names} names and {task.grid**2} places"))  # fmt: skip
    if not d.mixture:
        found.append(("data.mixture", "no source to train on"))
    if t.best == "val_loss" and not (d.val and t.eval_every):
        found.append(("train.best", "val_loss needs data.val and train.eval_every; or set it to train_loss"))
    for source in d.mixture:
        if source in d.sources and (d.sources[source].kind == "preference") != (t.objective == "dpo"):
            found.append(("data.mixture", f"'{source}' is of kind {d.sources[source].kind}, and train.objective is "
                          f"{t.objective}: preference data and dpo belong together"))  # fmt: skip
    answers = 2 if t.objective == "dpo" else 1  # a preference pair shares a pack
    if d.pack_cost < (most := answers * (d.max_frames * d.frame_cost + d.max_tokens)):
        found.append(("data.pack_cost", f"{d.pack_cost} is too small for one sample, which may cost {most} with data."
                      f"max_frames={d.max_frames} of {d.frame_cost} each and data.max_tokens={d.max_tokens}: raise "
                      "data.pack_cost or lower one of the others"))  # fmt: skip
    if e.model.lora and "llm" in e.optim.freeze:
        found.append(("model.lora", "its adapters belong to the language model: take llm out of optim.freeze"))
    if e.optim.schedule == "converging" and e.optim.lr_common is None:
        found.append(("optim.lr_common", "converging needs the learning rate where all groups end"))
    tokenizer, made = e.model.tokenizer, isinstance(e.model.llm, dict)
    if made and tokenizer is None and d.generate is None:
        found.append(("model.tokenizer", "a model made from a config has none: give words, bytes, a folder or id"))
    if not made and tokenizer in TINY_TOKENIZERS:
        found.append(("model.tokenizer", f"{tokenizer} is for models made from a config; {e.model.llm} has its own"))
    return found


def _one_line(error: ValidationError, settings: experiments.Settings, name: str) -> str:
    errors = error.errors(include_url=False)
    first, more = errors[0], len(errors) - 1
    if first["type"] == "fits":
        path, what = tuple(first["ctx"]["path"].split(".")), first["msg"]
    else:
        path = path_of(first, settings.values)
        what = explain(first, path, key_types(Experiment), INSTEAD | NULL)
    place = settings.place(path) or name
    where = place if place.startswith("command line") else f"{place} (run {name})"
    return f"{where}: {what}" + (f" (and {more} more)" if more else "")
