"""The page and the numbers of a run's data: what the model gets, as it gets it."""

import re

import pytest

from fovlm.cli.main import main
from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataset import Dataset
from fovlm.data.packing import PackBudget
from fovlm.data.sample_table import Grouping
from fovlm.data.shards import write_shards
from fovlm.viz.samples import stats, write_page
from helpers import tiny

BUDGET = PackBudget(400, 8)
WHOLE = ChatTokenizer(tiny.tokenizer(), "before_frames", "answer", 99).text(tiny.conversation(), None, frames=True)
MOST = len(WHOLE.tokens) + 2  # the shorter of two answers is whole


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Dataset:
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path))
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))
    asked = [{"user": "what is this ?", "assistant": answer} for answer in ("red", "<b> blue")]
    samples = [tiny.clip(f"c{i}", 2) | {"json": {"conversations": asked}} for i in range(3)]
    samples.append(tiny.clip("bad", 2, assistant=""))
    write_shards(tmp_path / "a-%d.tar", samples)
    source = DataSource(shards="a-0.tar", kind="video")
    chat = ChatTokenizer(tiny.tokenizer(), "before_frames", "answer", MOST)
    return Dataset({"a": source}, {"a": 1.0}, chat, frame_size=16, grouping=Grouping(8, BUDGET, 64))


def test_the_page_shows_frames_tokens_weights_and_what_was_cut_or_broken(dataset, tmp_path):
    assert write_page(dataset, BUDGET, 1, 8, tmp_path / "page.html") >= 8
    page = (tmp_path / "page.html").read_text()
    articles = page.split("<article>")[1:]
    assert [article.count("<img") for article in articles[:2]] == [2, 0]  # the second has the same frames
    assert "the same frames" in articles[1]
    assert len(re.findall(f"{MOST} tokens &middot; .*perhaps cut", page)) >= 3
    assert "bad in a-0.tar: empty answer" in page
    learnt = re.findall(r'rgba\(80,180,80,1.00\)" title="1">([^<]*)</b>', articles[0])
    assert "".join(learnt).replace(" ", "") == "red&lt;|im_end|&gt;"
    assert "<script" not in page


def test_the_numbers_of_sources_and_packs(dataset):
    table = stats(dataset, BUDGET, 1)
    row = next(line for line in table.splitlines() if line.startswith("a ")).split()
    assert row[:4] == ["a", "4", "6", "2.0"]
    assert row[-2:] == ["2", "2"]  # three equal samples
    assert re.search(r"empty answer +a +1", table)
    assert re.search(r"groups a step of 1 packs, whose frames are \d", table)


def test_shards_without_an_experiment(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path / "own")
    assert main(["data", "stats", "a-*.tar", "model.tokenizer=own"]) == 0
    assert re.search(r"empty answer +shards +1", capsys.readouterr().out)
    assert main(["data", "view", "a-0.tar", "model.tokenizer=own", "--samples", "4"]) == 0
    assert "samples in samples.html" in capsys.readouterr().out
    assert main(["data", "stats", "b-*.tar"]) == 2
    assert "matches no file" in capsys.readouterr().err
