"""The scorecard of faults: every test here is a row, in a short form by default.

`make faults` runs the full form and writes docs/faults.md, `SCALE=0.25 make faults` a quarter of its trials; a part of
the rows (`ARGS=-k...`) is printed. A row's name is the first line of its test's docstring, the rest says what "held"
means.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fovlm.tables import markdown_table
from helpers import ROOT
from helpers.faults import Reference, Row
from helpers.forked import Forked
from helpers.training import write_data

SCALE = float(os.environ.get("FOVLM_FAULTS", 0))  # of the full form; 0: the short one
BEGAN = time.time()
ROWS: list[Row] = []
LEFT_OUT: list[pytest.Item] = []
HEAD = """# Faults

What goes wrong with a run or with its files, tried on purpose. `make faults` repeats it in full and writes this page;
the default tests have a short form of each row. A trial "held" if the second column is true after it.
`SCALE=0.25 make faults` tries a quarter; the scale of this run is below the table. A lost node needs two hosts:
`make cluster` tries it, and [Clusters](cluster.md#what-was-tried) says what was seen.

"""


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """The row of this test. It fails when a trial did not hold."""
    name, _, meaning = request.node.function.__doc__.partition("\n")
    row = Row(name.strip(" ."), " ".join(meaning.split()), SCALE)
    ROWS.append(row)
    yield row
    row.seconds = time.time() - row.began
    assert not row.failed, f"{len(row.failed)} of {row.tried} did not hold:\n" + "\n".join(row.failed[:10])


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def whole(home: Path, forked: Forked) -> Reference:
    """A run on two ranks that nothing disturbed, to compare with."""
    return Reference(home, forked)


def pytest_deselected(items: list[pytest.Item]) -> None:
    LEFT_OUT.extend(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not SCALE or not ROWS:
        return
    lines = [("fault", "held means", "tried", "held", "seconds")]
    for row in ROWS:
        held = str(row.tried - len(row.failed))
        lines.append((row.name, row.meaning, str(row.tried), held, f"{row.seconds:.0f}"))
    tried, failed = sum(row.tried for row in ROWS), sum(len(row.failed) for row in ROWS)
    lines.append(("**all**", "", f"**{tried}**", f"**{tried - failed}**", f"**{time.time() - BEGAN:.0f}**"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    when = f"Commit {commit.strip()}, {time.strftime('%Y-%m-%d %H:%M %Z')}, {os.cpu_count()} cores, scale {SCALE:g}.\n"
    page = markdown_table(lines, left=(0, 1)) + "\n\n" + when
    if LEFT_OUT or len(ROWS) < session.testscollected:  # a part, or it was interrupted
        print("\n" + page)
    else:
        (ROOT / "docs" / "faults.md").write_text(HEAD + page)
