"""Evaluation sets: their hashes, skipped items, and sets that are shared among ranks."""

import json

import pytest
import torch

from fovlm.checkpoint.reference import collate_tight
from fovlm.data.chat import ChatTokenizer
from fovlm.data.packing import Sample
from fovlm.data.shards import write_shards
from fovlm.errors import UserError
from fovlm.eval import benchmarks, eval_sets, runner
from fovlm.eval.metrics import compute_metrics, score_options
from fovlm.eval.questions import EvalQuestion, hash_questions
from fovlm.eval.runner import EvalSettings, run_eval
from fovlm.eval.tables import main_tables
from fovlm.eval.target import Target
from fovlm.train.validation import nll_in_mode
from helpers.models import tiny_model
from helpers.tiny import clip, clips, picture, ready_made, tokenizer, video

OPTIONS = ("red", "it is blue")


def target(context: int = 2048, words: list[str] | None = None, **model_settings) -> Target:
    model = tiny_model(**model_settings).eval()
    model.config.llm_config.max_position_embeddings = context
    return Target(model, tokenizer(words), "tiny", "weights", {})


def settings(tmp_path, *names: str, **more) -> EvalSettings:
    return EvalSettings(list(names), **{"data": tmp_path, "out": tmp_path / "out", "modes": ["coarse_only"]} | more)


def question(n: int, *media, words: str = "what is this ?") -> EvalQuestion:
    return EvalQuestion(f"q{n}", "a", media, words, OPTIONS, n % 2)


def quiz(monkeypatch, name: str, made: list[EvalQuestion]) -> None:
    monkeypatch.setitem(benchmarks.READERS, name, lambda where: iter(made))


def folder(path, count: int):
    path.mkdir(parents=True)
    for n in range(count):
        (path / f"{n}.jpg").write_bytes(picture(9 * n, 28))
    return path


def test_the_last_rank_to_end_has_the_results_of_all_sets(tmp_path, monkeypatch):
    """The other rank ends its share of the first set while this one is at the second."""
    names, plain, nested = ("pope", "mvbench"), runner.score_chunk, []
    for name in names:
        quiz(monkeypatch, name, [question(n, picture(n)) for n in range(4)])

    def share(number: int) -> EvalSettings:
        return settings(tmp_path, *names, batch=2, part=(number, 2))

    def score_chunk(model, which, *rest):
        if which.name == "mvbench" and not nested:
            nested.append(None)
            nested.append(run_eval(model, share(1)))
        plain(model, which, *rest)

    monkeypatch.setattr(runner, "score_chunk", score_chunk)
    assert [result["set"] for result in run_eval(target(), share(0))] == [*names]
    assert nested == [None, []]


def test_a_short_context_is_shared_by_frames_and_text_and_nothing_is_cut(tmp_path, monkeypatch):
    one = target(256, visual="multi_token")
    assert one.model.config.tokens_per_look == 16
    long = folder(tmp_path / "long", 20)
    quiz(monkeypatch, "pope", [question(0, long), question(1, long, words="red " * 200), question(2)])
    clips(tmp_path, "val", [3, 20])
    write_shards(tmp_path / "val-1%d.tar", [clip("talk", 20, assistant="red " * 200)])
    said: list[str] = []
    form = runner.format_of(one, EvalSettings([]))
    todo = settings(tmp_path, "pope", f"val={tmp_path}/val-*.tar", modes=["multi_token"])
    many, shards = run_eval(one, todo, said.append)
    assert "at most 8 frames at 16 tokens each: half of the model's context of 256" in said[0]
    assert (many["max_frames"], many["n"], many["skipped"]) == (8, 2, {eval_sets.TOO_LONG: 1})
    assert (shards["n"], shards["skipped"]) == (2, {eval_sets.TOO_LONG: 1})
    (line,) = [json.loads(t) for t in (tmp_path / "out/pope/multi_token.jsonl").read_text().splitlines()[:1]]
    frames = eval_sets.frames_of(question(0, long), 28, 8)
    text = form.chat.text({"user": "what is this ?", "assistant": "red"}, None, True)
    alone = collate_tight([Sample("", "", frames, 8, text.tokens, text.weight, text.prompt)], 16)
    with torch.no_grad():
        nll = nll_in_mode(one.model, alone, "multi_token")
    assert line["nll"][0] == pytest.approx(float((nll * alone.weight).sum()), abs=1e-4)


def test_the_hash_of_a_set_is_that_of_its_samples_whatever_the_model(tmp_path):
    pattern = clips(tmp_path, "val", [3, 2, 0, 3])

    def named(one: Target, **more) -> str:
        form = runner.format_of(one, settings(tmp_path, **more))
        return eval_sets.open_eval_set(f"val={pattern}", tmp_path, form, {}, more.get("limit")).hash

    first = named(target())
    alike = (
        target(question="before_frames"),
        target(256, visual="multi_token"),
        target(image_frames=4, query_rounds=2),
    )
    assert {named(one) for one in alike} | {named(target(), max_frames=2)} == {first}
    assert named(target(words=["other"])) != first  # losses are per token
    assert named(target(), limit=2) != first
    clips(tmp_path, "val", [3, 2, 0, 4])
    assert named(target()) != first


def test_unreadable_media_end_the_command_or_are_skipped_and_counted(tmp_path, monkeypatch):
    whole = video(9, format="matroska", size=28)
    files = {"damaged.mp4": b"\0\0\0\x20ftyp" + b"\0" * 99, "cut.mkv": whole[: len(whole) // 2], "whole.mkv": whole}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    made = [question(n, tmp_path / name) for n, name in enumerate(files)]
    beyond = EvalQuestion("q3", "a", (tmp_path / "whole.mkv",), "what ?", OPTIONS, 0, segment=(20.0, 24.0))
    cases = ((made[0], "q0: .*damaged.mp4"), (made[1], "q1: .*cut.mkv: .*cut short"), (beyond, "q3: .*ends"))
    for one, message in cases:
        quiz(monkeypatch, "pope", [one, made[2]])
        with pytest.raises(UserError, match=f"pope, question {message}.*; --skip-missing skips"):
            run_eval(target(), settings(tmp_path, "pope", out=tmp_path / one.id))
    quiz(monkeypatch, "pope", [*made, beyond])
    (result,) = run_eval(target(), settings(tmp_path, "pope", skip_missing=True, out=tmp_path / "skipped"))
    assert (result["n"], result["skipped"]) == (1, {eval_sets.UNREADABLE: 3})
    assert result["set_hash"] == hash_questions(made[2:])  # as if the others were missing


def test_samples_whose_every_token_counts_are_no_answers(tmp_path):
    record = {"user": "what is this ?", "assistant": "red"}
    for kind in ("stage1", "sft"):
        (tmp_path / kind).mkdir()
        write_shards(tmp_path / kind / "%02d.tar", [clip(kind, 1, **ready_made(record, tokenizer(), kind == "stage1"))])
    (result,) = run_eval(target(), settings(tmp_path, "sft"))
    assert result["n"] == 1
    with pytest.raises(UserError, match=r"stage1: its samples are tokenized for a loss on every token"):
        run_eval(target(), settings(tmp_path, "stage1"))
    mixed = [clip("a", 1), clip("b", 1, **ready_made(record, tokenizer(), True))]
    write_shards(tmp_path / "mixed-%02d.tar", mixed[::-1])  # the first that is looked at is a good one
    found = eval_sets.open_eval_set("mixed", tmp_path, runner.format_of(target(), EvalSettings([])), {})
    assert [item for item in map(found.item, range(2)) if isinstance(item, str)] == [
        "tokenized for a loss on every token"
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip", r"no set 'clip' \(did you mean 'clips'\?\)"),
        ("mvbnch={}/clips", r"mvbnch: .*/clips holds no shards \(\*\.tar\) \(did you mean 'mvbench'\?\)"),
    ],
)
def test_a_set_that_is_not_there(tmp_path, spec, message):
    (tmp_path / "clips").mkdir()
    with pytest.raises(UserError, match=message):
        eval_sets.open_eval_set(spec.format(tmp_path), tmp_path, runner.format_of(target(), EvalSettings([])), {})


def test_a_set_of_which_nothing_could_be_scored_hides_no_table():
    facts = {"protocol": "likelihood of the option's text", "control": "", "mode": "coarse_only"}
    line = {"n": 0, "category": "a", "source": "s", "modality": "text"} | score_options([1.0, 2.0], [1, 1], 0)
    empty = facts | {"set": "none"} | compute_metrics([{"n": 0, "skipped": "gone"}])
    tables = dict(main_tables([empty, facts | {"set": "some"} | compute_metrics([line])]))
    assert [len(table) for table in tables.values()] == [3, 3]
    assert any("per token" in title for title in tables)


def test_texts_are_never_cut(tmp_path):
    form = runner.format_of(target(64), EvalSettings([]))
    assert form.chat.hash == ChatTokenizer(form.chat.tokenizer, "after_frames", "answer", eval_sets.UNCUT).hash
    text = form.chat.text({"user": "what ?", "assistant": "red " * 99}, None, False)
    assert len(text.tokens) > 99
    assert not form.fits([text], 0)
