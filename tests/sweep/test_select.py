"""Which runs are asked for, what they are made of, and what they would cost."""

import math
import subprocess
import sys

import pytest

from fovlm.checkpoint.run_folder import append_metrics
from fovlm.cli.main import main
from fovlm.config import schema
from fovlm.data.dataset import open_dataset
from fovlm.data.shards import write_shards
from fovlm.errors import UserError
from fovlm.sweep import cost
from fovlm.sweep.progress import duration
from fovlm.sweep.select import plan, select
from helpers import tiny

ABLATIONS = ["F1", "F2", "LR1", "LR2", "LR3", "LR4", "A1", "A6", "B1", "A8a", "A8b", "D1"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["ablations/*"], ABLATIONS),  # in the documented order
        (["ablations"], ABLATIONS),
        (["A1", "LR1"], ["A1", "LR1"]),
        (["ablations/LR*"], ["LR1", "LR2", "LR3", "LR4"]),
        (["LR1", "ablations/LR[12]"], ["LR1", "LR2"]),
        (["135M-C1-*"], ["135M-C1-F", "135M-C1-B"]),
        (["scaling/*-C4-F"], ["135M-C4-F", "360M-C4-F", "1.7B-C4-F"]),
        (["quickstart"], ["quickstart"]),  # a run of that name wins over the group
    ],
)
def test_patterns_name_runs_in_the_order_of_their_file(patterns, expected):
    assert [name for _, name in select(patterns)] == expected


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["ablation/*"], "did you mean 'ablations'?"),
        (["ablations/LR9"], "did you mean 'LR"),
        (["quickstrat"], "did you mean 'quickstart'?"),
        ([], "which runs?"),
    ],
)
def test_what_is_not_there_is_reported_with_the_nearest(patterns, expected):
    with pytest.raises(UserError) as error:
        select(patterns)
    assert expected in str(error.value)


def test_seeds_repeat_the_list_with_other_weights_and_the_same_data():
    runs = plan(select(["LR1", "A1"]), ["train.samples=100"], seeds=3)
    assert [run.name for run in runs] == ["LR1", "A1", "LR1-s1", "A1-s1", "LR1-s2", "A1-s2"]
    assert [run.experiment.train.seed for run in runs] == [0, 0, 1, 1, 2, 2]
    assert {run.experiment.data.seed for run in runs} == {0}
    assert runs[2].words == ("LR1", "train.samples=100", "name=LR1-s1", "train.seed=1")
    assert len({run.experiment.hash for run in runs}) == 6


def test_a_file_says_how_often_its_runs_are_repeated():
    runs = plan(select(["nano-A6", "nano-D1"]), ["train.steps=9"])
    assert [run.name for run in runs] == ["nano-A6", "nano-D1", "nano-A6-s1", "nano-A6-s2"]
    assert [run.name for run in plan(select(["nano-A6"]), [], seeds=1)] == ["nano-A6"]
    assert runs[0].experiment.hash == plan(select(["nano-A6"]), ["train.steps=9", "seeds=1"])[0].experiment.hash


def test_settings_that_cannot_be_are_reported_before_anything_runs():
    with pytest.raises(UserError, match="lr_llm"):
        plan(select(["LR1"]), ["optim.lr_lm=1"])
    with pytest.raises(UserError, match=r"^model\.init_from goes in a circle: LR1, which starts from LR1; "):
        plan(select(["LR1", "A1"]), ["model.init_from=LR1"])
    with pytest.raises(UserError, match="into one folder"):
        plan(select(["LR1", "A1"]), ["name=x"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A little shard for every source of the ablations: overrides that name them."""
    folder = tmp_path_factory.mktemp("sources")
    found = []
    for name, frames in {"openvid": 3, "cauldron": 1, "smoltalk": 0, "val": 2, "val_cauldron": 1}.items():
        samples = [tiny.clip(f"{name}{i}", frames, assistant="it is " + "red " * (i % 3 + 1)) for i in range(6)]
        if frames == 1:
            samples = [{("jpg" if k == "000.jpg" else k): v for k, v in sample.items()} for sample in samples]
        (shard,) = write_shards(folder / f"{name}-%02d.tar", samples)
        found.append(f"data.sources.{name}.shards={shard}")
    return folder, found


def test_ablations_that_share_their_data_see_the_same_samples_in_the_same_order(shards, monkeypatch):
    folder, overrides = shards
    monkeypatch.setenv("FOVLM_CACHE", str(folder / "cache"))
    tokenizer = tiny.tokenizer()
    seen: dict[tuple[str, ...], dict[str, tuple]] = {}
    for run in [*plan(select(["ablations/*"]), overrides), *plan(select(["LR1", "A8b"]), overrides, seeds=2)[2:]]:
        data = run.experiment.data
        dataset = open_dataset(run.experiment, tokenizer, data.mixture)
        order = tuple(dataset.read(position)[0][0].key for position in range(20))
        val = open_dataset(run.experiment, tokenizer, dict.fromkeys(data.val, 1.0)).scored_hash(5)
        seen.setdefault(tuple(data.mixture), {})[run.name] = (order, val, run.experiment.train.samples)
    assert sorted(len(names) for names in seen.values()) == [1, 3, 10]  # D1; A8 with a repeat; the others with one
    for names in seen.values():
        assert len(set(names.values())) == 1, list(names)


def test_what_a_run_was_scored_on_is_its_questions_and_answers(shards, monkeypatch):
    folder, overrides = shards
    monkeypatch.setenv("FOVLM_CACHE", str(folder / "cache"))

    def val(*more: str, samples: int = 5) -> str:
        experiment = schema.load("LR1", [*overrides, *more])
        return open_dataset(experiment, tiny.tokenizer(), {"val": 1.0}).scored_hash(samples)

    assert val() == val("data.image_frames=16") == val("train.seed=3") == val("data.max_frames=4")
    assert len({val(), val(samples=6), val("data.loss_on=answer"), val("data.seed=1"), val("data.max_tokens=100")}) == 5


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """No data, no models, no runs."""
    for name in ("FOVLM_DATA", "FOVLM_MODELS", "FOVLM_RUNS", "FOVLM_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))


def row(name: str, size: str, visual: str, seconds: float, ranks: int = 1, device: str = "H200") -> dict[str, str]:
    record = {"name": name, "status": "finished", "size": size, "visual": visual, "device": device, "flops": "1e15"}
    return record | {"wall_seconds": str(seconds), "ranks": str(ranks)}


SMALL = "SmolLM2-135M-Instruct+dinov2-small"


def test_time_and_cost_follow_from_what_finished_runs_achieved(bare):
    table = {
        "x": row("x", SMALL, "foveated", seconds=10, ranks=2),  # 5e13 FLOP/s of a rank
        "y": row("y", SMALL, "multi_token", seconds=10),  # 1e14
        "z": row("z", SMALL, "multi_token", seconds=1, device="cpu"),
        "w": row("w", "other", "coarse", seconds=1),
    }
    runs = plan(select(["135M-C1-F", "135M-C1-B", "A6", "360M-C1-F"]), [])
    found = {e.run.name: e for e in cost.estimates(runs, table, ranks=4, on_gpu=True, given=None)}
    assert found["135M-C1-F"].flops == pytest.approx(1.6e16, rel=1e-3)
    assert found["135M-C1-F"].rank_seconds == pytest.approx(1.6e16 / 5e13, rel=1e-3)
    assert found["135M-C1-F"].seconds == pytest.approx(1.6e16 / 5e13 / 4, rel=1e-3)
    assert found["135M-C1-B"].speed.measured == ("y",)
    assert found["A6"].speed.measured == ("x", "y")  # of its size, for want of one that looks as it does
    assert math.isnan(found["360M-C1-F"].seconds)
    text = cost.describe(list(found.values()), 1, 2.5, True)
    assert "AT MOST" in text
    assert "no time for 360M-C1-F" in text
    cells = next(line for line in text.splitlines() if line.startswith("135M-C1-F")).split()
    assert cells[-3:] == ["1:20", "0.09", "0.22"]
    assert text.splitlines()[5].split()[-3:] == ["?", "?", "?"]  # the sum knows no more than its parts


def test_a_speed_can_be_given_and_places_are_filled_in_order(bare):
    runs = plan(select(["135M-C1-*"]), [], seeds=2)
    found = cost.estimates(runs, {}, ranks=1, on_gpu=True, given=1.6e14)  # 100 s each
    for slots, time in ((1, "6:40"), (2, "3:20"), (3, "3:20"), (4, "1:40")):
        lines = cost.describe(found, slots, None, True).splitlines()
        last = next(line for line in lines if line.startswith("all"))
        assert last.split()[-2:] == [time, "0.11"]


def test_only_what_is_left_is_counted(bare):
    (run,) = plan(select(["LR1"]), [])
    (whole,) = cost.estimates([run], {}, 1, False, 1e12)
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "experiment.yaml").write_text(run.experiment.dump())
    append_metrics(run.folder, {"step": 10, "seconds": 1, "progress": 0.75})
    append_metrics(run.folder, {"step": 20, "seconds": 2})
    (rest,) = cost.estimates([run], {}, 1, False, 1e12)
    assert (rest.status, rest.samples, rest.flops) == ("resumable", 50_000, pytest.approx(whole.flops / 4))


def test_sizes_are_those_of_the_shards_where_they_are_indexed(shards, bare, monkeypatch):
    folder, overrides = shards
    monkeypatch.setenv("FOVLM_CACHE", str(folder / "cache"))
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    (run,) = plan(select(["LR1"]), [*overrides, f"model.tokenizer={folder / 'tokenizer'}"])
    open_dataset(run.experiment, tiny.tokenizer(), run.experiment.data.mixture)
    (exact,) = cost.estimates([run], {}, 1, False, None)
    (guess,) = cost.estimates(plan(select(["LR1"]), []), {}, 1, False, None)
    assert exact.upper_bound_since == ""
    assert exact.flops < guess.flops / 10


def test_spans():
    assert [duration(s) for s in (4.6, 75, 3700)] == ["0:05", "1:15", "1:01:40"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--per-run", "2"], "--gpus: give both"),
        (["--gpus", "0", "--jobs", "2"], "excludes --jobs and --ranks"),
        (["--dry-run", "--flops-per-second", "0"], "must be above 0"),
        (["--dry-run", "--price", "-1"], "--price at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_runs(capsys, words, message):
    assert main(["sweep", "LR1", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"\xff\xfejunk", b"a,b\n1,2\n"])
def test_a_damaged_table_is_reported_in_a_line(tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setenv("FOVLM_RUNS", str(tmp_path))
    (tmp_path / "runs.csv").write_bytes(damage)
    for words in (["--dry-run"], []):
        assert main(["sweep", "LR1", *words]) == 2
        assert "runs.csv is damaged" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["runs.csv"]


def test_a_sweep_outlives_the_reader_of_its_output(tmp_path):
    """As in `fovlm sweep quickstart | head -1`; training is replaced by lines of output."""
    code = """
import pathlib, sys
from fovlm.cli.main import main
from fovlm.sweep.runner import SweepRunner

def work(self, again):
    for n in range(2000):
        self.progress.say(f"line {n}")
    pathlib.Path(sys.argv[1]).write_text("done")
    return {}

SweepRunner.work = work
main(["sweep", "quickstart", "--jobs", "1"])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "done")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        process.stderr.read()
    assert (tmp_path / "done").read_text() == "done"
