"""Data sets of the hub: fetched from a server on this machine that speaks as much of its API as that needs."""

import pytest

from fovlm.cli.main import main
from fovlm.errors import UserError
from fovlm.prepare.hub import fetch_dataset
from helpers import tiny
from helpers.raw_data import parquet, samples_of
from helpers.servers import file_server


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The data set me/set: two tables in the folder `a`, one in `b`."""
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))
    for file in ("a/train-0.parquet", "a/train-1.parquet", "b/train-0.parquet"):
        (tmp_path / "served" / file).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"image": {"bytes": tiny.picture(n), "path": None}, "q": "color ?", "a": file} for n in (50, 90)]
        parquet(tmp_path / "served" / file, rows)
    with file_server(tmp_path / "served") as server:
        constants = "huggingface_hub.constants"  # made from HF_ENDPOINT when they are imported
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
        monkeypatch.setattr(
            f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server


def test_a_folder_of_a_data_set_is_fetched_once_and_prepared(hub, tmp_path):
    words = ["prepare", "table", "hf://datasets/me/set/a", str(tmp_path / "out"), "--workers", "1", "--size", "28"]
    words += ["--image", "image", "--question", "q", "--answer", "a"]
    hub.faults = {"/datasets/me/set/resolve/" + "0" * 40 + "/a/train-1.parquet": ["drop"]}
    assert main(words) == 0
    answers = [record["assistant"] for _, record, _ in samples_of(tmp_path / "out")]
    assert sorted(answers) == ["a/train-0.parquet"] * 2 + ["a/train-1.parquet"] * 2
    asked = len(hub.gets(".parquet"))
    assert not hub.gets("b/train-0.parquet")
    fetch_dataset("hf://datasets/me/set/a")
    assert len(hub.gets(".parquet")) == asked


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hf://datasets/me/other", r"hf://datasets/me/other cannot be fetched \(.*the same command resumes"),
        ("hf://datasets/me/set/c", "the data set me/set has no 'c'"),
        ("hf://datasets/me", "write hf://datasets/OWNER/NAME"),
        ("hf://me/set", "write hf://datasets/OWNER/NAME"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(hub, url, words):
    with pytest.raises(UserError, match=words) as error:
        fetch_dataset(url)
    assert "\n" not in str(error.value)
