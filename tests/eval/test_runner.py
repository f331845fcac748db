"""Evaluation: options scored as if alone, frames encoded once, controls, intervals, resume, several ranks, losses."""

import json
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch

from fovlm.checkpoint.reference import collate_tight
from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer
from fovlm.data.packing import Sample
from fovlm.data.shards import write_shards
from fovlm.errors import UserError
from fovlm.eval import controls, eval_sets, runner
from fovlm.eval.likelihood import View, encode, score, visual_tokens
from fovlm.eval.metrics import compute_metrics, score_options, wilson
from fovlm.eval.questions import EvalQuestion
from fovlm.eval.results import ResultFile
from fovlm.eval.runner import EvalSettings, chunks_of, run_eval
from fovlm.eval.tables import group_tables, main_tables, markdown
from fovlm.eval.target import Target
from fovlm.model.modes import MODES
from fovlm.train.validation import nll_in_mode
from helpers.models import VOCABULARY, tiny_model
from helpers.tiny import clip, clips, picture, tokenizer

TOKENIZER = tokenizer()
assert len(TOKENIZER) <= VOCABULARY
OPTIONS = ("red", "it is blue", "red picture here")
CASES = [
    (v, p, r) for v, p, r in product(("foveated", "coarse", "multi_token"), ("after_frames", "before_frames"), (1, 2))
]
CASES = [case for case in CASES if case[0] == "foveated" or case[2] == 1]


def target(seed: int = 0, **model_settings) -> Target:
    return Target(tiny_model(seed, **model_settings).eval(), TOKENIZER, "tiny", f"seed {seed}", {})


def questions(folder, count: int = 7) -> list[EvalQuestion]:
    """Questions about folders of pictures, single pictures and nothing."""
    found = []
    for n in range(count):
        media: tuple = ()
        if n % 3 == 0:
            (folder / f"clip{n}").mkdir(parents=True, exist_ok=True)
            for frame in range(2 + n % 2):
                (folder / f"clip{n}" / f"{frame}.jpg").write_bytes(picture(40 * frame + 7 * n, 28))
            media = (folder / f"clip{n}",)
        elif n % 3 == 1:
            media = (picture(30 * n, 28),)
        extra = {"grade": str(n % 2)}
        found.append(EvalQuestion(f"q{n}", "ab"[n % 2], media, "what is this ?", OPTIONS, n % 3, extra=extra))
    return found


@pytest.fixture
def quiz(tmp_path, monkeypatch):
    """A benchmark called pope with our questions."""
    made = questions(tmp_path / "media")
    monkeypatch.setitem(eval_sets.READERS, "pope", lambda where: iter(made))
    return made


def settings(tmp_path, **more) -> EvalSettings:
    return EvalSettings(["pope"], **{"data": tmp_path, "out": tmp_path / "out", "batch": 3} | more)


def lines(folder, mode: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{mode}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("visual", "prompt", "rounds"), CASES)
def test_an_option_has_the_likelihood_that_it_has_alone(visual, prompt, rounds, tmp_path, quiz):
    one = target(visual=visual, question=prompt, query_rounds=rounds, image_frames=2)
    run_eval(one, settings(tmp_path))
    chat = ChatTokenizer(TOKENIZER, prompt, "answer", 999)
    form = eval_sets.InputFormat(chat, 28, 2, 999)
    for mode in MODES[visual]:
        for line, question in zip(lines(tmp_path / "out/pope", mode), quiz, strict=True):
            frames = eval_sets.frames_of(question, 28, 64)
            looks = form.image_frames if isinstance((*question.media, None)[0], bytes) else len(frames)
            for i, option in enumerate(OPTIONS):
                text = chat.text({"user": question.question, "assistant": option}, None, bool(len(frames)))
                single = Sample("", "", frames, looks, text.tokens, text.weight, text.prompt)
                alone = collate_tight([single], one.model.config.tokens_per_look)
                with torch.no_grad():
                    nll = nll_in_mode(one.model, alone, mode)
                case = (mode, question.id, option)
                assert line["nll"][i] == pytest.approx(float((nll * alone.weight).sum()), abs=1e-4), case
                assert line["tokens"][i] == int(text.weight.sum())


def test_frames_are_encoded_once_for_all_options_modes_and_controls(tmp_path, quiz, monkeypatch):
    one, seen = target(), []
    walk = one.model.encoder.encode
    monkeypatch.setattr(one.model.encoder, "encode", lambda frames, row: seen.append(len(frames)) or walk(frames, row))
    monkeypatch.setattr(one.model.encoder, "encode_only", lambda frames: pytest.fail("encoded again"))
    run_eval(one, settings(tmp_path, controls=list(controls.CONTROLS)))
    shown = sum(len(eval_sets.frames_of(q, 28, 64)) for q in quiz)
    assert sum(seen) == shown
    assert len(seen) == len(chunks_of(len(quiz), 3))


def views(model, f: int = 4) -> tuple[View, View]:
    frames = torch.randint(0, 256, (2 * f, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    encoding, none = encode(model, frames), torch.zeros(0, dtype=torch.int64)
    return View(encoding.of(0, f), torch.arange(f), none), View(encoding.of(f, 2 * f), torch.arange(f), none)


@pytest.mark.parametrize("mode", MODES["foveated"])
def test_controls_do_what_they_say(mode):
    model = tiny_model().eval()
    own, other = views(model)
    plain = visual_tokens(model, own, mode)
    assert controls.apply_control("", own, other, "key") is own
    assert controls.apply_control("blind", own, other, "key") is None
    assert len(visual_tokens(model, None, mode)) == 0
    shuffled = controls.apply_control("shuffled", own, other, "key")
    assert sorted(shuffled.looks.tolist()) == own.looks.tolist() != shuffled.looks.tolist()
    assert shuffled.looks.tolist() == controls.apply_control("shuffled", own, other, "key").looks.tolist()
    assert len({tuple(controls.apply_control("shuffled", own, other, str(key)).looks.tolist()) for key in range(9)}) > 1
    repeated = controls.apply_control("repeated", own, other, "key")
    assert len(set(repeated.looks.tolist())) == 1
    assert len(repeated.looks) == len(own.looks)
    foreign = visual_tokens(model, controls.apply_control("foreign", own, other, "key"), mode)
    assert foreign.shape == plain.shape
    if controls.applies("foreign", "foveated", mode):
        assert not torch.allclose(foreign[1:], plain[1:], atol=1e-4)
        same = visual_tokens(model, controls.apply_control("foreign", own, own, "key"), mode)
        assert torch.allclose(same, plain, atol=1e-6)
    with pytest.raises(UserError, match="did you mean 'blind'"):
        controls.check(["blnid"])


def test_a_foreign_gaze_follows_another_question(tmp_path, quiz, monkeypatch):
    """Questions that are all the same are left out, and counted: with one frame their queries are, too."""
    one, read, item = target(question="before_frames"), [], eval_sets.QuestionSet.item
    monkeypatch.setattr(eval_sets.QuestionSet, "item", lambda self, number: read.append(number) or item(self, number))
    how = {"modes": ["coarse_fine"], "controls": ["foreign"]}
    _, foreign = run_eval(one, settings(tmp_path, **how))
    assert max(Counter(read).values()) == 2, "decoded to be scored, and once to look for another question"
    shown = sum(bool(question.media) for question in quiz)
    assert foreign["skipped"] == {"no other clip and question nearby": shown}
    quiz[0] = replace(quiz[0], question="is it red ?")
    plain, foreign = run_eval(one, settings(tmp_path, out=tmp_path / "two", **how))
    assert foreign["skipped"] == {}
    assert foreign["loss"] != pytest.approx(plain["loss"])


def test_blind_shows_the_model_no_frame_at_all(tmp_path, quiz):
    """The same questions over other pictures have the same likelihoods."""
    found = []
    for run in ("one", "two"):
        if run == "two":
            for path in (tmp_path / "media").rglob("*.jpg"):
                path.write_bytes(picture(255, 28))
        run_eval(target(), settings(tmp_path, out=tmp_path / run, controls=["blind"]))
        found.append([lines(tmp_path / run / "pope" / c, "coarse_fine") for c in ("", "blind")])
    (seen, blind), (seen_too, blind_too) = found
    assert [line["nll"] for line in blind] == [line["nll"] for line in blind_too]
    assert [line["nll"] for line in seen] != [line["nll"] for line in seen_too]


def test_the_interval_is_wilsons():
    """Newcombe, Statistics in Medicine 17 (1998), table I: method 3."""
    published = ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718))
    for right, n, low, high in published:
        assert wilson(right, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def tree(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_killed_run_resumes_and_shares_merge_to_the_same_files(tmp_path, quiz, monkeypatch):
    more = {"controls": ["shuffled", "foreign"]}
    run_eval(target(), settings(tmp_path, out=tmp_path / "whole", **more))
    whole = tree(tmp_path / "whole")
    names = {f"{mode}.{end}" for mode in MODES["foveated"] for end in ("json", "jsonl")}
    assert {name.rsplit("/", 1)[-1] for name in whole} == {"eval.json", *names}

    kept, left = ResultFile.add, [9]

    def add(record, line):
        if not (left.__setitem__(0, left[0] - 1) or left[0]):
            raise KeyboardInterrupt
        kept(record, line)

    monkeypatch.setattr(ResultFile, "add", add)
    with pytest.raises(KeyboardInterrupt):
        run_eval(target(), settings(tmp_path, out=tmp_path / "killed", **more))
    monkeypatch.setattr(ResultFile, "add", kept)
    parts = sorted((tmp_path / "killed").rglob("*.part-*"))
    with open(parts[0], "a") as file:
        file.write('{"n": 3, "half a li')
    run_eval(target(), settings(tmp_path, out=tmp_path / "killed", **more))
    assert tree(tmp_path / "killed") == whole

    for number in (1, 0):
        found = run_eval(target(), settings(tmp_path, out=tmp_path / "shared", part=(number, 2), **more))
        assert bool(found) == (number == 0)
    assert tree(tmp_path / "shared") == whole

    monkeypatch.setattr(runner, "score_chunk", lambda *a: pytest.fail("nothing was left to do"))
    again = run_eval(target(), settings(tmp_path, out=tmp_path / "whole", **more))
    assert [r["mode"] for r in again if not r["control"]] == list(MODES["foveated"])


def test_results_of_another_model_or_set_are_not_mixed(tmp_path, quiz):
    run_eval(target(), settings(tmp_path, modes=["coarse_only"]))
    with pytest.raises(UserError, match="give another --out"):
        run_eval(target(1), settings(tmp_path, modes=["coarse_only"]))
    with pytest.raises(UserError, match="of another set or --limit: set_hash"):
        run_eval(target(), settings(tmp_path, modes=["coarse_only"], limit=3))
    other = target()
    other.model.config.image_frames += 1
    with pytest.raises(UserError, match="results with image_frames"):
        run_eval(other, settings(tmp_path, modes=["coarse_only"]))
    with pytest.raises(UserError, match="did you mean 'coarse_fine'"):
        run_eval(target(), settings(tmp_path, modes=["coarse_fin"]))


@pytest.mark.parametrize("name", ["coarse_only.jsonl", "eval.json"])
def test_damaged_results_are_named(tmp_path, quiz, name):
    run_eval(target(), settings(tmp_path, modes=["coarse_only"]))
    (file,) = tmp_path.rglob(name)
    file.write_bytes(file.read_bytes().replace(b'"', b"\xff", 1))
    with pytest.raises(UserError, match=f"{name} is damaged"):
        run_eval(target(), settings(tmp_path, modes=["coarse_only"]))


def test_missing_videos_end_the_command_or_are_skipped(tmp_path, quiz):
    quiz.append(EvalQuestion("gone", "a", (tmp_path / "gone.mp4",), "what is this ?", OPTIONS, 0))
    with pytest.raises(UserError, match=r"1 of 7 videos or pictures are missing, the first is .*gone.mp4; --skip"):
        run_eval(target(), settings(tmp_path))
    said: list[str] = []
    result = run_eval(target(), settings(tmp_path, skip_missing=True), said.append)[0]
    assert "skipping 1 of 8 questions" in said[0]
    assert result["n"] == 7
    assert result["skipped"] == {eval_sets.MISSING: 1}


def test_accuracy_is_by_sum_and_by_token_and_by_category():
    facts = {"source": "s", "modality": "video"}
    made = [
        {"n": 0, "category": "a"} | facts | score_options([4.0, 3.0], [4, 1], 1),  # likelier: 1; per token: 0
        {"n": 1, "category": "a"} | facts | score_options([1.0, 3.0], [1, 2], 0),
        {"n": 2, "category": "b"} | facts | score_options([1.0, 3.0], [1, 1], 1),
        {"n": 3, "skipped": "too long"},
    ]
    found = compute_metrics(made)
    assert (found["n"], found["skipped"]) == (3, {"too long": 1})
    assert (found["accuracy"], found["accuracy_per_token"], found["chance"]) == (2 / 3, 1 / 3, 0.5)
    assert found["by_category"]["a"]["accuracy"] == 1.0
    assert found["by_category"]["b"]["interval"] == list(wilson(0, 1))
    assert found["loss"] == pytest.approx((3.0 + 1.0 + 3.0) / (1 + 1 + 1))


def test_shards_give_losses_by_source_and_modality(tmp_path):
    pattern = clips(tmp_path, "val", [3, 2, 0, 3])
    image = {"__key__": "q", "jpg": picture(9), "json": clip("q", 0, user="is it red ?")["json"]}
    write_shards(tmp_path / "more-%02d.tar", [clip("p", 0, source="books"), image])
    one = target(question="before_frames", image_frames=2)
    more = str(tmp_path / "more-00.tar")
    one.val_sources = {"val": {"shards": pattern, "kind": "video"}, "more": {"shards": more, "kind": "image"}}
    results = run_eval(
        one, EvalSettings(["val"], data=tmp_path / "none", out=tmp_path / "out", controls=["blind", "foreign"])
    )
    by = {(r["control"], r["mode"]): r for r in results}
    whole = by["", "coarse_fine"]
    assert whole["samples_by_modality"] == {"image": 1, "text": 2, "video": 3}
    assert whole["samples_by_source"] == {"books": 1, "test": 5}
    assert "accuracy" not in whole
    assert whole["protocol"] == "loss of the answer"
    assert ("foreign", "coarse_only") not in by
    data = eval_sets.ShardSet(
        "val", {k: DataSource(**v) for k, v in one.val_sources.items()}, runner.format_of(one, EvalSettings([])), None
    )
    for line in lines(tmp_path / "out/val", "coarse_fine"):
        (sample,), _ = data.data.read(data.positions[line["n"]])
        alone = collate_tight([sample], 1)
        with torch.no_grad():
            expected = float((one.model(alone) * alone.weight).sum())
        assert line["nll"] == [pytest.approx(expected, abs=1e-4)]
    blind = by["blind", "autoregressive"]
    assert blind["loss_by_modality"]["text"] == pytest.approx(whole["loss_by_modality"]["text"])
    assert blind["loss_by_modality"]["video"] != pytest.approx(whole["loss_by_modality"]["video"])
    page = markdown([*main_tables(results), *group_tables(results)])
    assert "| val/foreign | 6 | - |" in page
    assert "loss by modality" in page


def test_texts_with_one_beginning_share_it_and_may_be_of_any_length():
    model = tiny_model(question="before_frames").eval()
    chat = ChatTokenizer(TOKENIZER, "before_frames", "answer", 99)
    texts = [chat.text({"user": "what ?", "assistant": a}, None, True) for a in OPTIONS]
    own, _ = views(model)
    tokens = visual_tokens(model, View(own.encoding, own.looks, texts[0].tokens[: texts[0].prompt]), "coarse_fine")
    together = score(model, tokens, texts)
    for text, nll in zip(texts, together, strict=True):
        assert torch.allclose(score(model, tokens, [text])[0], nll, atol=1e-5)
    assert len({len(nll) for nll in together}) > 1
