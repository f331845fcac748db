"""`versus:` of an experiment: with what the report compares a run, and what the two are meant to differ in."""

import pytest

from fovlm.config import schema
from fovlm.errors import UserError

FILE = """
data: {sources: {clips: {shards: clips.tar, kind: video}}, mixture: {clips: 1}, val: [clips]}
train: {steps: 10}
runs:
  plain: {note: the baseline}
  clipped: {note: a smaller norm, versus: {baseline: plain, question: "Does it help?"}, optim: {clip: 0.5}}
"""


def test_changes_are_those_of_the_files_and_not_of_the_command_line(tmp_path):
    """What a comparison asks is fixed before the run; whatever else differs is a confound."""
    (tmp_path / "a.yaml").write_text(FILE)
    run = schema.load("clipped", ["optim.eps=1e-6", "name=clipped-s1", "train.seed=1"], tmp_path)
    assert run.versus.changes == ["optim.clip"]
    assert schema.Experiment.parse(run.dump()) == run
    assert run.differs_from(schema.load("plain", [], tmp_path)) == ["optim.clip", "optim.eps"]


def test_versus_is_not_in_the_hash(tmp_path):
    (tmp_path / "a.yaml").write_text(FILE)
    run = schema.load("clipped", folder=tmp_path)
    assert run.hash == run.model_copy(update={"versus": None}).hash


def test_a_baseline_that_is_no_run_is_one_line(tmp_path):
    (tmp_path / "a.yaml").write_text(FILE.replace("baseline: plain", "baseline: plane"))
    with pytest.raises(UserError, match=r"clipped: versus.baseline: no run is called 'plane'.*did you mean 'plain'"):
        schema.load("clipped", folder=tmp_path)


@pytest.mark.parametrize("name", [n for n in schema.experiments.names() if schema.load(n).versus])
def test_every_comparison_of_the_repository_asks_about_one_setting(name):
    assert len(schema.load(name).versus.changes) == 1
