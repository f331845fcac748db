"""The report decides what the runs support and nothing else, and refuses runs that can't be compared."""

import csv
import json
import re

import pytest

from fovlm.errors import UserError
from fovlm.report.build import BLIND, limits, write_report
from fovlm.report.collect import collect
from fovlm.report.questions import answers, loss_at
from fovlm.report.statistics import Side, decide, paired, welch
from helpers.run_folders import experiment_of, write_run, write_seeds


def verdicts(root):
    """Answers by what comes before the colon of their question."""
    found, _ = answers(collect([str(root)]))
    return {answer.title.split(":")[0] + ", at equal FLOPs" * answer.at_equal_flops: answer for answer in found}


def test_welch_interval_is_that_of_a_worked_example():
    """By hand: means 2 and 5, both variances 1, n = 3: se 0.8165, 4 degrees of freedom, t 2.776."""
    difference = welch([4, 5, 6], [1, 2, 3])
    assert difference.value == 3
    assert difference.low == pytest.approx(3 - 2.776 * 0.8165, abs=2e-3)
    assert difference.high == pytest.approx(3 + 2.776 * 0.8165, abs=2e-3)
    assert welch([1], [2, 3]).low is None
    assert paired([1, 2, 3]).low == pytest.approx(2 - 4.303 / 3**0.5, abs=1e-3)


def test_a_winner_needs_three_seeds_and_an_interval_without_zero():
    good, bad = Side("good", (0.50, 0.51, 0.52)), Side("bad", (0.90, 0.95, 0.99))
    verdict = decide([bad, good])
    assert verdict.winner == "good"
    assert verdict.differences["bad"].low > 0
    near = decide([Side("near", (0.50, 0.53, 0.55)), good])
    assert near.winner is None
    assert "contains 0" in near.text
    for few in ((0.90,), (0.90, 0.95)):
        verdict = decide([Side("bad", few), good], noise=0.01)
        assert verdict.winner is None
        assert verdict.text.startswith("not decided")
        assert "bad" in verdict.text
    assert decide([good, bad], confounded="the runs also differ in train.steps").winner is None


def test_seeds_that_find_the_task_or_not_decide_nothing():
    assert decide([Side("a", (0.01, 0.02, 1.6)), Side("b", (1.6, 1.61, 1.6))]).winner is None


def test_among_several_sides_the_best_must_beat_each_at_a_stricter_level():
    """A difference that a pair of sides would decide is not enough against two rivals together."""
    best, rival = Side("best", (1.0, 1.1, 1.2)), Side("rival", (1.24, 1.34, 1.45))
    assert decide([best, rival]).winner == "best"
    assert decide([best, rival, Side("far", (9.0, 9.1, 9.2))]).winner is None


def test_ablations_with_seeds_are_decided_and_those_without_are_not(tmp_path):
    write_seeds(tmp_path, "LR1", [0.50, 0.52, 0.51])
    write_seeds(tmp_path, "A1", [0.90, 0.95, 0.99])
    write_seeds(tmp_path, "A6", [0.49, 0.55, 0.52])
    write_seeds(tmp_path, "F1", [1.5])
    write_seeds(tmp_path, "F2", [1.4], status="stopped")
    write_seeds(tmp_path, "A8a", [0.4])
    write_seeds(tmp_path, "A8b", [0.3])
    found = verdicts(tmp_path)
    assert found["Deep query"].verdict.winner == "nano-LR1"
    assert found["Foveation"].verdict.winner is None
    assert "one seed of nano-F1" in found["Freeze strategy"].verdict.text
    assert any("F2" in note for note in found["Freeze strategy"].notes)
    assert "one seed of nano-A8a and nano-A8b" in found["Pictures as 1 or 16 frames"].verdict.text
    assert found["Mode gap of nano-LR1"].decided, "every seed is 1 % worse frame by frame"
    assert "Data mix" not in found


def test_sides_that_differ_in_something_else_are_not_decided(tmp_path):
    write_seeds(tmp_path, "LR1", [0.50, 0.52, 0.51])
    write_seeds(tmp_path, "A1", [0.90, 0.95, 0.99], settings={"optim": {"clip": 0.5}})
    write_seeds(tmp_path, "A6", [0.90, 0.95, 0.99], data_hash="other")
    found = verdicts(tmp_path)
    assert "optim.clip" in found["Deep query"].verdict.text
    assert "different data" in found["Foveation"].verdict.text
    assert not found["Deep query"].decided
    assert not found["Foveation"].decided


def test_how_a_run_is_carried_out_is_no_difference():
    one = experiment_of("a", 0)
    assert one.differs_from(experiment_of("b", 3, {"train": {"log_every": 7}, "data": {"workers": 0}})) == []
    assert one.differs_from(experiment_of("b", 0, {"train": {"packs_per_step": 2}})) == ["train.packs_per_step"]


def test_equal_flops_reads_the_dearer_run_where_the_cheaper_one_ends(tmp_path):
    """Three times as dear: at equal FLOPs the dear run has seen a third, and its loss is not yet that of the end."""
    write_seeds(tmp_path, "LR1", [0.30, 0.30, 0.31])
    write_seeds(tmp_path, "B1", [0.50, 0.51, 0.50], flops_per_sample=3e8)
    equal = verdicts(tmp_path)["One token against sixteen, at equal FLOPs"].verdict
    assert equal.winner == "nano-LR1", "it is below what B1 comes to with three times the FLOPs"
    assert equal.differences["nano-B1"].value == pytest.approx(0.5 * 3**0.5 - 0.3, rel=0.15)
    run = collect([str(tmp_path)]).side("nano-B1")[0]
    assert loss_at(run, run.samples * 3e8) == pytest.approx(run.loss)
    assert loss_at(run, 1.0) is None
    assert loss_at(run, run.samples * 6e8) is None


@pytest.mark.parametrize("dear", [[0.50, 0.51, 0.50], [0.10, 0.11, 0.12]], ids=["no better in the end", "better"])
def test_a_schedule_cut_short_decides_nothing_against_its_side(tmp_path, dear):
    """The same loss over samples, three times as dear: what it lacks at a third may be its learning rate alone."""
    write_seeds(tmp_path, "LR1", [0.50, 0.50, 0.51])
    write_seeds(tmp_path, "B1", dear, flops_per_sample=3e8)
    found = verdicts(tmp_path)["One token against sixteen, at equal FLOPs"].verdict
    if dear[0] < 0.2:
        assert found.winner == "nano-B1", "read to its disadvantage, and the lower one all the same"
    else:
        assert found.winner is None
        assert found.text.startswith("not decided: nano-B1 was read before its learning rate had decayed")


def test_seeds_of_a_side_that_are_not_alike_decide_nothing(tmp_path):
    """Not even when they differ in what the question asks about: then a side is two."""
    write_seeds(tmp_path, "LR1", [0.50, 0.52, 0.51])
    write_run(tmp_path, "nano-LR2", 0.90, 0, "LR2")
    write_run(tmp_path, "nano-LR2-s1", 0.95, 1, "LR2", {"optim": {"lr_connector": 4e-2}})
    write_run(tmp_path, "nano-LR2-s2", 0.99, 2, "LR2")
    write_seeds(tmp_path, "D1", [0.90, 0.95])
    write_run(tmp_path, "nano-D1-s2", 0.99, 2, "D1", data_hash="other")
    found = verdicts(tmp_path)
    rates, mix = found["Learning-rate ratio"].verdict, found["Data mix"].verdict
    assert rates.text == "not decided: the seeds of nano-LR2 differ in optim.lr_connector"
    assert mix.text == "not decided: the seeds of nano-D1 were trained on different data"


def test_intervals_are_given_with_their_level(tmp_path):
    for role in ("LR1", "F1", "F2", "A1"):
        write_seeds(tmp_path / "runs", role, [0.50, 0.52, 0.51] if role == "LR1" else [0.90, 0.95, 0.99])
    heads = {title: " ".join(answer.head) for title, answer in verdicts(tmp_path / "runs").items()}
    assert "[97.5 % interval]" in heads["Freeze strategy"], "two rivals"
    assert "[95 % interval]" in heads["Deep query"], "one"
    write_report([str(tmp_path / "runs")], tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "decisions.csv").open()))
    assert {row["level"] for row in rows if row["question"].startswith("Freeze strategy")} == {"0.975"}


def test_runs_scored_on_different_sets_are_refused_with_the_sets_named(tmp_path):
    write_seeds(tmp_path, "LR1", [0.5])
    write_run(tmp_path, "nano-A1", 0.9, 0, "A1", val_hash="another")
    with pytest.raises(
        UserError, match=r"different validation sets.*\[val v\] nano-LR1; \[val another\] nano-A1"
    ) as error:
        collect([str(tmp_path)])
    assert "\n" not in str(error.value)


def test_picture_runs_have_a_set_of_their_own_and_their_own_comparison(tmp_path):
    for role in ("LR1", "A1", "A8a", "A8b"):
        write_seeds(tmp_path, role, [0.5])
    assert len(collect([str(tmp_path)]).runs) == 4
    write_run(tmp_path, "nano-A8b-s1", 0.3, 1, "A8b", val_hash="v")
    with pytest.raises(UserError, match="different validation sets"):
        collect([str(tmp_path)])


def test_groups_are_not_mixed(tmp_path):
    write_seeds(tmp_path, "LR1", [0.5])
    write_seeds(tmp_path, "A1", [0.5], group="")
    evidence = collect([str(tmp_path)])
    assert ("nano-LR1", "has no versus: and is not the baseline of a run given here") in evidence.left_out
    question = "Deep query: does it help that the query goes through all layers of the encoder?"
    assert answers(evidence)[1] == [f"{question} (LR1 missing)"]


def test_what_does_not_count_is_listed_with_the_reason(tmp_path):
    write_seeds(tmp_path, "LR1", [0.5])
    write_run(tmp_path, "nano-A1", 0.9, 0, "A1", status="stopped")
    write_run(tmp_path, "nano-A6", 0.9, 0, "LR1")  # named A6, but foveated
    write_run(tmp_path, "nano-LR1-s1", 0.5, 0)  # the same seed once more
    write_run(tmp_path, "quickstart", 0.1)
    why = dict(collect([str(tmp_path)]).left_out)
    assert "not finished (stopped, last row at step 8)" in why["nano-A1"]
    assert "nano-A6 does not differ from nano-LR1 in model.visual" in verdicts(tmp_path)["Foveation"].verdict.text
    assert "copy" in why["nano-LR1-s1"]
    assert "no versus:" in why["quickstart"]


def test_runs_are_found_by_folder_glob_name_and_group(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_RUNS", str(tmp_path))
    write_seeds(tmp_path, "LR1", [0.5, 0.51])
    write_seeds(tmp_path, "A1", [0.9])
    (tmp_path / "runs.csv").write_text("name\n")
    names = lambda *words: sorted(run.name for run in collect(words).runs)  # noqa: E731
    everything = ["nano-A1", "nano-LR1", "nano-LR1-s1"]
    assert names(str(tmp_path)) == names("nano-*") == names("nano/*") == everything
    assert names(*map(str, sorted(tmp_path.iterdir()))) == everything, "as a shell expands runs/*"
    assert names("nano-A1", "nano-LR1") == everything, "a name brings its further seeds"
    assert names("nano-A1") == ["nano-A1"]
    with pytest.raises(UserError, match=r"no run folder 'nano-LR11'.*did you mean 'nano-LR1"):
        collect(["nano-LR11"])
    with pytest.raises(UserError, match="has not been run"):
        collect(["F1"])
    with pytest.raises(UserError, match="no runs to compare"):
        collect([str(tmp_path / "runs.csv")])
    with pytest.raises(UserError, match=r"no folder of runs: .*nowhere"):
        collect([str(tmp_path / "nowhere")])


def test_a_run_whose_validation_set_is_unknown_is_left_out(tmp_path):
    write_seeds(tmp_path, "LR1", [0.5])
    write_seeds(tmp_path, "A1", [0.5], val_hash=None)
    assert "no val_hash" in dict(collect([str(tmp_path)]).left_out)["nano-A1"]


def test_unknown_flops_decide_nothing_at_equal_flops(tmp_path):
    write_seeds(tmp_path, "LR1", [0.30, 0.30, 0.31])
    write_seeds(tmp_path, "B1", [0.50, 0.51, 0.50], flops=None)
    found = verdicts(tmp_path)
    assert found["One token against sixteen"].decided
    assert found["One token against sixteen, at equal FLOPs"].verdict.text.startswith("not decided")
    write_report([str(tmp_path)], tmp_path / "out")


def test_the_page_is_whole_and_its_numbers_are_there_as_csv(tmp_path):
    from fovlm.cli.main import main

    runs, out = tmp_path / "runs", tmp_path / "out"
    write_seeds(runs, "LR1", [0.50, 0.52, 0.51], **{"looks on it by chance": 0.2})
    write_seeds(runs, "A1", [0.90, 0.95, 0.99])
    maps = runs / "nano-LR1" / "maps"
    maps.mkdir()
    (maps / "step-00000008.png").write_bytes(b"\x89PNG picture")
    assert main(["report", str(runs), "--out", str(out), "--title", "A < B"]) == 0
    markdown, html = (out / "report.md").read_text(), (out / "report.html").read_text()
    for name in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (out / name).is_file(), name
    assert "gaze-nano-LR1.png" in markdown
    assert "decides nothing" in markdown, "of the fine/coarse ratio"
    assert "A &lt; B" in html
    assert not re.search(r"src=\"(?!data:)|href=", html), "the page asks for nothing outside itself"
    rows = list(csv.DictReader((out / "decisions.csv").open()))
    deep = next(row for row in rows if row["question"].startswith("Deep query"))
    assert deep["winner"] == "nano-LR1"
    assert float(deep["more_than_best"]) == pytest.approx(0.4367, abs=1e-3)
    losses = [float(row["val_loss"]) for row in csv.DictReader((out / "runs.csv").open())]
    assert losses == [0.50, 0.52, 0.51, 0.90, 0.95, 0.99]
    assert len(list(csv.DictReader((out / "curves.csv").open()))) == 6 * 8


def test_the_same_runs_give_the_same_files(tmp_path):
    write_seeds(tmp_path / "runs", "LR1", [0.5, 0.51])
    write_seeds(tmp_path / "runs", "B1", [0.5])
    for out in ("one", "two"):
        write_report([str(tmp_path / "runs")], tmp_path / out)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one == two


def test_a_damaged_summary_or_table_does_not_end_the_report(tmp_path):
    write_seeds(tmp_path, "LR1", [0.5])
    write_seeds(tmp_path, "A1", [0.5])
    (tmp_path / "nano-A1" / "run_summary.json").write_text('{"status": "fin')
    with (tmp_path / "nano-LR1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a crash in the middle of a line
    evidence = collect([str(tmp_path)])
    assert [run.name for run in evidence.runs] == ["nano-LR1"]
    assert len(evidence.runs[0].rows) == 8
    assert "not finished" in dict(evidence.left_out)["nano-A1"]


def test_a_loss_that_is_no_number_leaves_its_run_out(tmp_path):
    """One NaN among the seeds would make any side the best."""
    write_seeds(tmp_path, "LR1", [0.5, float("nan"), 0.52])
    write_seeds(tmp_path, "A6", [0.9, 0.95, 0.99])
    evidence = collect([str(tmp_path)])
    assert ("nano-LR1-s1", "has no validation loss") in evidence.left_out
    assert not verdicts(tmp_path)["Foveation"].decided


def test_limits_name_the_runs_that_did_not_learn_to_see(tmp_path):
    write_seeds(tmp_path, "LR1", [0.5, 0.51, 0.52])
    write_seeds(tmp_path, "A6", [1.65, 1.2, 1.8])
    for file in tmp_path.glob("*/run_summary.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {BLIND: 1.66}))
    text = " ".join(limits(collect([str(tmp_path)])))
    assert "2 runs end less than 2% below" in text
    assert ": nano-A6, nano-A6-s2." in text
    assert "initial weights alone" in text
    assert "random weights in 6 of 6 runs" in text
