"""A new comparison is one line of YAML: it reaches the report and its figures without a change of code."""

from fovlm.config import schema
from fovlm.report.build import write_report
from fovlm.report.collect import collect
from helpers.run_folders import write_experiment

MORE = """
  fewer: {{note: n, versus: {{baseline: mixed, question: "Fewer sources?"}}}}
  mixed: {{note: n, data: {{sources: {{more: {{kind: text, shards: more.tar}}}}}}}}
"""
FILE = """
base: {base}
train: {{steps: 8}}
runs:
  plain: {{note: n}}
  wider: {{note: n, versus: {{baseline: plain, question: "Does width help?"}}, model: {{query_dim: 96}}}}
"""


def test_a_line_of_yaml_is_a_comparison_in_the_report_and_in_the_figures(tmp_path):
    experiments, runs, out = tmp_path / "experiments", tmp_path / "runs", tmp_path / "out"
    experiments.mkdir()
    (experiments / "mine.yaml").write_text(FILE.format(base=schema.experiments.EXPERIMENTS / "quickstart.yaml"))
    for name, losses in (("plain", (0.90, 0.95, 0.99)), ("wider", (0.50, 0.51, 0.52))):
        for seed, loss in enumerate(losses):
            overrides = [f"train.seed={seed}", f"name={name}-s{seed}"]
            write_experiment(runs, schema.load(name, overrides, experiments), loss)
    html = write_report([str(runs)], out)
    text, figure = (out / "report.md").read_text(), (out / "losses-plain.svg").read_text()
    assert "| Does width help? | wider is better than plain" in text
    assert "| wider (model.query\\_dim: 96) | 3 | 0.5100 |" in text, "what the settings differ in"
    assert "wider (model.query_dim: 96)" in figure
    assert "Does width help?" in html.read_text()


def test_a_side_that_lacks_a_setting_of_its_baseline_is_named_by_it(tmp_path):
    experiments, runs = tmp_path / "experiments", tmp_path / "runs"
    experiments.mkdir()
    base = schema.experiments.EXPERIMENTS / "quickstart.yaml"
    (experiments / "mine.yaml").write_text((FILE + MORE.removeprefix("\n")).format(base=base))
    for name in ("mixed", "fewer"):
        write_experiment(runs, schema.load(name, [], experiments), 0.5)
    title = collect([str(runs)]).title("fewer")
    assert title.startswith("fewer (data.sources.more.kind: none, ")
