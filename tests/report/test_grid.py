"""What a grid of runs says, and that it says nothing when its cells are not what their names say."""

import json
import re

import pytest

from fovlm.config.schema import Experiment
from fovlm.errors import UserError
from fovlm.report import grid
from fovlm.report.build import BLIND, seeing_loss, write_report
from fovlm.report.collect import collect
from helpers.run_folders import write_grid, write_run, write_seeds


def found_in(root, draws=4):
    return grid.grid(collect([str(root)]), draws=draws)


def change(root, pattern, **sections):
    """Other settings in the runs that match, under the same names."""
    for file in root.glob(f"{pattern}/experiment.yaml"):
        values = Experiment.parse(file.read_text()).model_dump()
        for section, new in sections.items():
            values[section] |= new
        file.write_text(Experiment.model_validate(values).dump())


def record(root, pattern, **facts):
    for file in root.glob(f"{pattern}/run_summary.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def test_grid_finds_the_best_sizes_and_the_trend(tmp_path):
    write_grid(tmp_path, 0.002)
    write_seeds(tmp_path, "LR1", [0.500, 0.501, 0.502])
    found = found_in(tmp_path)
    assert found.budgets == ["C1", "C2", "C3"]
    assert len(found.pairs()) == 9
    assert found.noise_from == "the seeds of nano-LR1"
    sizes = [found.optima["F", budget].size for budget in found.budgets]
    assert sizes == sorted(sizes), "the best size grows with the budget"
    assert re.match(r"N = \S+ \[\S+, \S+\]", grid.optimum_text(found, "F", "C2"))
    assert found.trend.low > 0, "made so that 16 tokens gain with scale"
    assert grid.trend_text(found).startswith("B gains on F")
    assert "9 of 9" in grid.trend_text(found)


def test_a_grid_without_seeds_or_with_few_cells_decides_nothing(tmp_path):
    write_grid(tmp_path)
    for folder in tmp_path.glob("*-M-*"):
        (folder / "run_summary.json").unlink()
    found = found_in(tmp_path)
    assert found.noise is None
    assert grid.optimum_text(found, "F", "C1").startswith("not decided (2 of 3 sizes)")
    assert grid.law_text(found, "F").startswith("not decided: 6 cells of 2 sizes")
    assert found.fits == {}


@pytest.mark.parametrize(
    ("pattern", "sections", "said"),
    [
        ("*-S-C1-F", {"train": {"flops": 1e15}}, r"the cells of C1 are not of one train.flops \("),
        ("*-C1-?", {"train": {"flops": 1.6e12}}, "C1 and C2 have the same train.flops"),
        ("*-B", {"optim": {"lr_connector": 7e-3}}, "the cells also differ in optim.lr_connector"),
        ("*-S-C2-B", {"data": {"pack_cost": 4000}}, "the cells also differ in data.pack_cost"),
        ("*-S-C2-B", {"model": {"query_dim": 96}}, "the cells of S are not of one model"),
    ],
)
def test_cells_are_checked_against_their_names(tmp_path, pattern, sections, said):
    write_grid(tmp_path, 0.002)
    write_seeds(tmp_path, "LR1", [0.500, 0.501, 0.502])
    change(tmp_path, pattern, **sections)
    found = found_in(tmp_path)
    texts = [grid.optimum_text(found, "F", "C1"), grid.law_text(found, "B"), grid.trend_text(found)]
    assert all(re.match(f"not decided: .*{said}", text) for text in texts), texts


def test_sizes_that_are_one_model_are_named_and_the_report_is_written(tmp_path):
    write_grid(tmp_path / "runs")
    model = Experiment.parse((tmp_path / "runs" / "nano-S-C1-F" / "experiment.yaml").read_text()).model.llm
    change(tmp_path / "runs", "*-M-C?-?", model={"llm": model})
    html = write_report([str(tmp_path / "runs")], tmp_path / "out")
    assert "are of one size" in html.read_text()
    assert (tmp_path / "out" / "fits.csv").read_text().count("\n") == 1


def test_cells_trained_on_other_data_decide_nothing(tmp_path):
    write_grid(tmp_path)
    record(tmp_path, "*-M-C2-F", data_hash="other")
    assert "trained on different data" in grid.trend_text(found_in(tmp_path))


def test_cells_are_scored_on_the_set_of_the_ablations(tmp_path):
    """Their noise may be that of LR1, which is in no other comparison with them."""
    write_grid(tmp_path)
    write_seeds(tmp_path, "LR1", [0.5], val_hash="another")
    with pytest.raises(UserError, match=r"different validation sets.*\[val another\] nano-LR1; \[val v\] nano-"):
        collect([str(tmp_path)])


def test_noise_needs_three_seeds_and_is_widened_for_so_few(tmp_path):
    write_grid(tmp_path)
    write_seeds(tmp_path, "LR1", [0.500, 0.501])
    assert found_in(tmp_path).noise is None
    assert "no three seeds" in grid.optimum_text(found_in(tmp_path), "F", "C2")
    write_run(tmp_path, "nano-LR1-s2", 0.502, 2)
    found = found_in(tmp_path)
    assert found.noise == pytest.approx(0.002, rel=0.01)
    assert found.wide_noise == pytest.approx(found.noise * 4.303 / 1.96, rel=1e-3), (
        "Student's for two degrees of freedom"
    )
    change(tmp_path, "nano-LR1*", optim={"lr_connector": 1e-4})
    assert found_in(tmp_path).noise is None, "the spread of other runs than these"


def test_no_growth_is_given_where_flops_are_no_line_over_size(tmp_path):
    """The cost of a sample goes with the width here, the parameters with its square and more."""
    write_grid(tmp_path)
    found = found_in(tmp_path)
    assert found.misfit["F"] > grid.MAX_MISFIT
    assert re.match(r"not decided: FLOPs a sample are not c0 \+ c1 N here", grid.law_text(found, "F"))
    assert "exponent" not in found.fits["F"].intervals


def test_what_has_learned_to_see_is_compared_with_the_blind_loss_of_the_cells(tmp_path):
    """That of picture runs is another: one frame has fewer marks to guess."""
    write_grid(tmp_path)
    write_seeds(tmp_path, "A8a", [0.4], **{BLIND: 1.04})
    record(tmp_path, "*-C?-F", **{BLIND: 1.66})
    assert seeing_loss(collect([str(tmp_path)])) == pytest.approx(0.98 * 1.66)
