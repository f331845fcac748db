"""The small tokenizers of models with random weights: `model.tokenizer: words` and `bytes`."""

import pytest
from transformers import AutoTokenizer

from fovlm.config.schema import Experiment
from fovlm.data.chat import ChatTokenizer, load_tokenizer
from fovlm.data.tokenizers import SPECIAL, open_tokenizer
from fovlm.errors import UserError
from helpers import tiny
from helpers.experiments import small


def experiment(tokenizer: str, llm: object = None, **data) -> Experiment:
    sources = {"clips": {"shards": "clips-00.tar", "kind": "video", "prompt": "what is shown ?"}}
    values = {"sources": sources, "mixture": {"clips": 1.0}, "val": ["clips"], **data}
    return small(data=values, model={"tokenizer": tokenizer, "llm": llm or {"hidden_size": 8, "vocab_size": 300}})


@pytest.fixture(autouse=True)
def shards(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path))
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))
    tiny.clips(tmp_path, "clips", [1, 2, 1])  # "what is this ?" -> "it is red", "it is red red" ...


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_texts_come_back_and_a_saved_one_is_the_same(kind, tmp_path):
    tokenizer = open_tokenizer(experiment(kind))
    text = ChatTokenizer(tokenizer, "before_frames", "answer", 200).text(tiny.conversation("it is red"), None, True)
    assert tokenizer.decode(text.tokens[text.weight > 0], skip_special_tokens=True).split() == ["it", "is", "red"]
    tokenizer.save_pretrained(tmp_path / kind)
    for other in (load_tokenizer(str(tmp_path / kind)), AutoTokenizer.from_pretrained(tmp_path / kind)):
        assert other("what is this ?").input_ids == tokenizer("what is this ?").input_ids


def test_words_are_those_of_the_data_and_bytes_know_every_text():
    words = open_tokenizer(experiment("words")).get_vocab()
    assert set(words) - set(open_tokenizer(experiment("words", {"hidden_size": 8, "vocab_size": 18})).get_vocab())
    assert {"what", "this", "?", "shown", "red", "user"} <= set(words)
    assert "test" not in words  # the name of the source
    assert words["is"] < words["red"] < words["this"]  # by how often they occur
    tokenizer = open_tokenizer(experiment("bytes"))
    assert len(tokenizer) == 256 + len(SPECIAL)
    assert tokenizer.decode(tokenizer(said := "Größe: 5 µm, 日本\n").input_ids) == said


def test_a_vocabulary_that_is_too_small_and_a_model_with_its_own_tokenizer_are_reported(caplog):
    vocabulary = open_tokenizer(experiment("words", {"hidden_size": 8, "vocab_size": 16})).get_vocab()
    assert len(vocabulary) == 16
    assert "words are unknown to a model with llm.vocab_size=16" in caplog.text
    with pytest.raises((UserError, ValueError), match=r"words is for models made from a config; a/b has its own"):
        experiment("words", "a/b")
