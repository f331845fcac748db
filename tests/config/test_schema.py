"""Experiments: every named run loads and maps to a legal DeepSpeed dict; every mistake is one line that helps."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from fovlm.config import experiments
from fovlm.config.deepspeed import resolve
from fovlm.config.schema import INSTEAD, NOT_HASHED, Experiment, load
from fovlm.errors import UserError
from fovlm.paths import data_root
from helpers import ROOT
from helpers.experiments import small

GOLDEN = ROOT / "tests" / "golden" / "names.txt"
NAMES = list(experiments.names())

# The smallest legal experiment, as a file.
SMALL = """
data:
  sources: {clips: {shards: "clips-{0..3}.tar", kind: video}, words: {shards: words.tar, kind: text}}
  mixture: {clips: 86, words: 14}
  val: [clips]
train: {steps: 10}
"""


@pytest.fixture
def folder(tmp_path):
    """A folder of experiments that a test fills."""

    def write(**files: str) -> Path:
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path

    return write


def test_the_names_are_the_golden_ones():
    """A name is a promise: after adding a run on purpose, update the list (the test's message shows it)."""
    assert "\n".join(NAMES) + "\n" == GOLDEN.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_every_run_loads_and_maps_to_a_legal_deepspeed_dict(name):
    experiment = load(name)
    assert experiment.note
    for device, world in (("cpu", 1), ("cpu", 2), ("cuda", 2)):
        merged = resolve(experiment, world, device)
        assert merged["train_micro_batch_size_per_gpu"] == 1
        assert merged["gradient_accumulation_steps"] * world == experiment.train.packs_per_step
        assert merged["gradient_clipping"] == experiment.optim.clip
        assert merged["bf16"]["enabled"] == (device == "cuda")
        assert merged["data_types"]["grad_accum_dtype"] == "fp32"


def test_the_twelve_ablations_ask_what_they_say():
    base = load("LR1").optim
    assert (base.lr_connector, base.lr_encoder, base.lr_llm) == (1e-4, 1e-5, 1e-5)
    assert load("F1").optim.freeze == ["encoder", "llm"]
    assert load("F2").optim.freeze == ["llm"]
    for name, ratio in (("LR2", 100), ("LR3", 3), ("LR4", 1)):
        optim = load(name).optim
        assert optim.lr_connector / optim.lr_llm == pytest.approx(ratio)
        assert optim.lr_llm == optim.lr_encoder
    assert not load("A1").model.deep_query
    assert (load("A6").model.visual, load("B1").model.visual) == ("coarse", "multi_token")
    assert (load("A8a").data.image_frames, load("A8b").data.image_frames) == (1, 16)
    assert load("A8a").data.loss_on == load("A8b").data.loss_on == "answer"
    mix, kinds = load("D1").data.mixture, load("D1").data.sources
    shares = {kind: sum(w for s, w in mix.items() if kinds[s].kind == kind) for kind in ("video", "image", "text")}
    assert shares == {"video": 55, "image": 30, "text": 15}
    assert {load(n).model.question for n in ("F1", "LR1", "A1", "D1")} == {"after_frames"}


def test_the_grid_has_every_point():
    grid = [name for name in NAMES if "-C" in name]
    assert len([name for name in grid if not name.startswith("nano-")]) == 24
    assert len([name for name in grid if name.startswith("nano-")]) == 18
    one = load("1.7B-C4-B")
    assert (one.model.llm, one.train.flops, one.model.visual) == (
        "HuggingFaceTB/SmolLM2-1.7B-Instruct", 3.1e17, "multi_token")  # fmt: skip


def test_text_retention_is_14_percent_in_every_stage():
    for name in ("stage1", "stage2", "stage3", "LR1"):
        mix = load(name).data.mixture
        assert mix["smoltalk"] / sum(mix.values()) == pytest.approx(0.14)


def test_a_file_is_parsed_once_and_an_override_stays_with_its_run(folder, monkeypatch):
    parse, parsed = experiments.yaml.load, []
    monkeypatch.setattr(experiments.yaml, "load", lambda text, loader: parsed.append(text) or parse(text, loader))
    place = folder(once=SMALL + "runs: {once: {note: a}, again: {note: b}}")
    changed = load("once", ["data.sources.clips.shards=other.tar", "data.val=[words]"], place)
    assert (changed.data.sources["clips"].shards, changed.data.val) == ("other.tar", ["words"])
    again = load("again", [], place)
    assert (again.data.sources["clips"].shards, again.data.val) == ("clips-{0..3}.tar", ["clips"])
    assert len([text for text in parsed if text.startswith("\ndata:")]) == 1
    folder(once=SMALL.replace("steps: 10", "steps: 20") + "runs: {once: {note: a}}")
    assert load("once", [], place).train.steps == 20


def test_base_runs_and_grid_merge_in_order(folder):
    where = folder(
        base=SMALL + "optim: {lr_llm: 1e-3, clip: 0.5}\n",
        mine="base: base.yaml\noptim: {clip: 0.7}\n"
        "runs: {a: {note: one, optim: {freeze: [llm]}}}\n"
        "grid: {x: {p: {note: P, optim: {clip: 2.0}}, q: {note: Q}}, y: {r: {note: R, data: {mixture: {words: 1}}}}}\n",
    )
    assert experiments.names(where) == {"a": "one", "p-r": "P, R", "q-r": "Q, R"}
    a, p, q = (load(name, folder=where) for name in ("a", "p-r", "q-r"))
    assert (a.optim.freeze, a.optim.clip, a.note) == (["llm"], 0.7, "one")
    assert (p.optim.clip, q.optim.clip, q.optim.lr_llm) == (2.0, 0.7, 1e-3)
    assert p.data.mixture == {"words": 1}, "a mix is replaced, not merged"
    assert set(p.data.sources) == {"clips", "words"}


def test_overrides_are_typed_and_replace_the_other_lengths(folder):
    where = folder(mine=SMALL + "runs: {a: {note: one}}\n")
    e = load("a", ["optim.lr_llm=2e-5", "train.samples=1_000", "data.mixture.words=1", "name=b"], where)
    assert (e.optim.lr_llm, e.train.samples, e.train.steps, e.name) == (2e-5, 1000, None, "b")
    assert e.data.mixture == {"clips": 86, "words": 1}
    assert load("a", ["optim.freeze=[llm]"], where).optim.freeze == ["llm"]
    assert load("a", ["data.mixture={words: 2}"], where).data.mixture == {"words": 2}


def test_yaml_words_stay_words_and_numbers_are_numbers(folder):
    text = 'runs: {a: {note: no, data: {sources: {clips: {prompt: "1e5"}}}, deepspeed: 1:30}}\n'
    e = load("a", ["deepspeed=off"], folder(mine=SMALL + text))
    assert (e.note, e.deepspeed, e.data.sources["clips"].prompt) == ("no", "off", "1e5")
    assert Experiment.parse(e.dump()) == e


MISTAKES = {
    "no run is called 'b'": ("runs: {bb: {note: x}}", "b", [], "did you mean 'bb'"),
    "unknown section": ("rnus: {a: {note: x}}", "a", [], "mine.yaml: rnus: unknown section (did you mean 'runs'?)"),
    "unknown key": (
        "runs: {a: {note: x, optim: {lr_lm: 1}}}",
        "a",
        [],
        "mine.yaml: runs.a.optim.lr_lm (run a): unknown key (did you mean 'lr_llm'?)",
    ),
    "grid key": (
        "grid: {x: {p: {note: x, modl: {}}}}",
        "p",
        [],
        "mine.yaml: grid.x.p.modl (run p): unknown key (did you mean 'model'?)",
    ),
    "key of another section": ("runs: {a: {note: x}}", "a", ["train.lr_llm=1"], "did you mean 'optim.lr_llm'"),
    "wrong type": (
        "runs: {a: {note: x, data: {workers: two}}}",
        "a",
        [],
        "mine.yaml: runs.a.data.workers (run a): input should be a valid integer",
    ),
    "wrong word": (
        "runs: {a: {note: x}}",
        "a",
        ["optim.schedule=cosin"],
        "command line: optim.schedule: input should be",
    ),
    "a flag is no number": ("runs: {a: {note: x}}", "a", ["data.workers=true"], "valid integer, not True"),
    "null that froze": ("runs: {a: {note: x}}", "a", ["optim.lr_llm=null"], "lr_llm: null is now optim.freeze: [llm]"),
    "another null": ("runs: {a: {note: x}}", "a", ["train.seed=null"], "command line: train.seed: input should be"),
    "old section": ("runs: {a: {note: x}}", "a", ["journal.wandb=x"], "command line: journal: renamed to logger"),
    "section of none": ("runs: {a: {note: x}}", "a", ["bogus.x=1"], "command line: bogus: unknown key"),
    "part of a source": (
        "runs: {a: {note: x}}",
        "a",
        ["data.sources.mine.kind=video"],
        "command line: data.sources.mine.shards: is missing",
    ),
    "part of a record": (
        "runs: {a: {note: x}}",
        "a",
        ["data.sources.clips.fields.asistant=txt"],
        "not 'asistant' (did you mean 'assistant'?)",
    ),
    "not an override": ("runs: {a: {note: x}}", "a", ["quick"], "command line: 'quick' is not of the form"),
    "bad YAML override": ("runs: {a: {note: x}}", "a", ["optim.clip=[1"], "command line: optim.clip"),
    "bad YAML": ("runs: {a: {note: x}", "a", [], "mine.yaml: line"),
    "a key twice": ("runs: {a: {note: x}, a: {note: y}}", "a", [], "'a' is given twice"),
    "no note": ("runs: {a: {}}", "a", [], "runs.a: needs a note"),
    "no such base": ("base: bsae.yaml\nruns: {a: {note: x}}", "a", [], "base: no file 'bsae.yaml'"),
    "circle": ("base: mine.yaml\nruns: {a: {note: x}}", "a", [], "mine.yaml: base: these files include each other"),
    "two lengths": (
        "runs: {a: {note: x, train: {steps: 1, samples: 2}}}",
        "a",
        [],
        "exactly one of samples, steps and flops",
    ),
    "too small for a sample": (
        "runs: {a: {note: x}}",
        "a",
        ["data.pack_cost=800"],
        "command line: data.pack_cost: 800 is too small for one sample, which may cost 2560",
    ),
    "the two budgets of before": (
        "runs: {a: {note: x}}",
        "a",
        ["data.pack_tokens=8"],
        "data.pack_tokens: renamed to data.pack_cost (in text tokens; a frame counts as data.frame_cost)",
    ),
    "unknown source": (
        "runs: {a: {note: x, data: {mixture: {clip: 1}}}}",
        "a",
        [],
        "runs.a.data.mixture.clip (run a): 'clip' is not in data.sources (did you mean 'clips'?)",
    ),
    "unknown val source": ("runs: {a: {note: x, data: {val: [word]}}}", "a", [], "did you mean 'words'?"),
    "dpo on text": (
        "runs: {a: {note: x, train: {objective: dpo}}}",
        "a",
        [],
        "preference data and dpo belong together",
    ),
    "converging where": ("runs: {a: {note: x, optim: {schedule: converging}}}", "a", [], "optim.lr_common"),
    "best of nothing": ("runs: {a: {note: x, data: {val: []}}}", "a", [], "train.best"),
    "no tokenizer": ("runs: {a: {note: x, model: {llm: {hidden_size: 8}}}}", "a", [], "model.tokenizer"),
    "a path for a name": ("runs: {a/b: {note: x}}", "a/b", [], "a name is a folder too"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_name_file_key_and_nearest_word(case, folder):
    text, name, overrides, expected = MISTAKES[case]
    with pytest.raises(UserError) as error:
        load(name, overrides, folder(mine=(SMALL + text) if "base:" not in text else text, small=SMALL))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", INSTEAD)
def test_an_old_name_of_a_setting_gives_the_new_one(key, folder):
    """In a run, on a command line, and for sections at the top of a file; the new name exists."""
    inner = "x"
    for part in reversed(key.split(".")):
        inner = f"{{{part}: {inner}}}"
    run = f"runs: {{a: {{note: x, {inner[1:-1]}}}}}"
    expected = f": {INSTEAD[key]}"
    for text, overrides in ((run, []), ("runs: {a: {note: x}}", [f"{key}=x"])):
        with pytest.raises(UserError) as error:
            load("a", overrides, folder(mine=SMALL + text))
        assert expected in str(error.value)
    if "." not in key:
        with pytest.raises(UserError, match=INSTEAD[key]):
            load("a", [], folder(mine=f"{SMALL}{key}: x"))
    new = INSTEAD[key].removeprefix("renamed to ").split()[0].rstrip(":").split(".")
    target = small()
    for part in new:
        target = getattr(target, part)


BOMBS = {
    "aliases": "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
    "brackets": "model: " + "[" * 500 + "]" * 500,
    "mappings": "model: " + "{a: " * 500 + "1" + "}" * 500,
    "itself": "model: &a [*a]",
    "a tag": "seeds: !!timestamp soon",
    "a long number": f"seeds: {'9' * 5000}",
    "a large grid": "grid:\n"
    + "".join(f"  x{n}: {{{', '.join(f'p{m}: {{}}' for m in range(10))}}}\n" for n in range(8)),
}


@pytest.mark.parametrize("case", BOMBS)
def test_yaml_that_would_never_end_is_one_line(case, folder):
    with pytest.raises(UserError, match=r"mine\.yaml: (line|grid: )") as error:
        experiments.names(folder(mine=BOMBS[case]))
    assert len(str(error.value)) < 200
    if case != "a large grid":
        with pytest.raises(ValueError, match="line"):
            Experiment.parse(BOMBS[case])


def test_a_name_belongs_to_one_file(folder):
    with pytest.raises(UserError, match=r"two\.yaml: a: .*one\.yaml has a run of that name"):
        experiments.names(folder(one="runs: {a: {note: x}}", two="runs: {a: {note: y}}"))


def test_sections_are_the_fields_of_an_experiment():
    assert {*experiments.SECTIONS, "name"} == set(Experiment.model_fields)


def test_an_experiment_is_strict_and_does_not_change():
    with pytest.raises(ValidationError):
        small(train={"steps": "10"})
    with pytest.raises(ValidationError):
        small().optim.clip = 2.0


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"note": "x", "logger": {"wandb": "disabled"}}, True),
        ({"train": {"steps": 10, "save_every": 3, "resume": "none"}}, True),
        ({"model": {"grad_checkpoint": ["llm"]}}, True),
        ({"train": {"steps": 11}}, False),
        ({"deepspeed": "zero1"}, False),
        ({"optim": {"freeze": ["llm"]}}, False),
        ({"model": {"question": "before_frames"}}, False),
    ],
)
def test_the_hash_is_of_what_a_checkpoint_depends_on(changes, same):
    assert (small(**changes).hash == small().hash) == same


def test_how_names_existing_fields():
    for section, keys in NOT_HASHED.items():
        assert keys <= set(type(getattr(small(), section)).model_fields)


def test_folders_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("FOVLM_RUNS", "/elsewhere")
    monkeypatch.setenv("FOVLM_DATA", "/shards")
    assert small().run_folder == Path("/elsewhere/small")
    assert small(logger={"folder": "here"}).run_folder == Path("here")
    assert data_root() == Path("/shards")
