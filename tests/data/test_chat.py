"""Chat text: the template is the tokenizer's own, pieces are found in the whole, weights and cuts are right."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fovlm.data.chat import SYSTEM, ChatTokenizer, conversation, load_tokenizer, template
from fovlm.errors import SampleError, UserError
from fovlm.paths import model_root
from helpers import tiny

TINY = tiny.tokenizer()
REAL = model_root() / "SmolLM2-135M-Instruct"


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.real)])
def tokenizer(request):
    return TINY if request.param == "tiny" else AutoTokenizer.from_pretrained(REAL)


def chat(tokenizer=TINY, question="after_frames", loss_on="all_text", most=512) -> ChatTokenizer:
    return ChatTokenizer(tokenizer, question, loss_on, most)


def rendered(tokenizer, user: str, answer: str) -> str:
    turns = [("system", SYSTEM), ("user", user), ("assistant", answer)]
    return tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)


RECORDS = [
    ("what is this ?", "it is red"),
    ("A dög 🐶?", "Drei 🐶🐶 Hünde.\nAnd 42."),
    (" spaces  ", "\n\n  here"),
    ("a", "a"),
]


@pytest.mark.parametrize(("user", "answer"), RECORDS)
def test_the_text_is_the_tokenizers_own_template_tokenized_whole(tokenizer, user, answer):
    whole = tokenizer(rendered(tokenizer, user.strip(), answer.strip()), add_special_tokens=False)["input_ids"]
    for prompt in ("after_frames", "before_frames"):
        text = chat(tokenizer, prompt).text({"user": user, "assistant": answer}, None, frames=True)
        assert text.tokens.tolist() == whole[: len(text.tokens)]
        assert len(whole) - len(text.tokens) == 1  # the newline behind the last turn
        assert text.tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(("user", "answer"), RECORDS)
def test_pieces_tokenized_apart_give_the_whole(tokenizer, user, answer):
    """What generation sees (question, then tokens one by one) is what was trained on."""
    text = chat(tokenizer, "before_frames").text({"user": user, "assistant": answer}, None, frames=True)
    head, middle, _ = template(tokenizer)
    pieces = [head + user.strip(), middle, answer.strip() + "<|im_end|>"]
    ids = [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    assert text.tokens.tolist() == ids
    asked = conversation([("user", user)], tokenizer, 0, True)
    assert text.tokens.tolist()[: len(asked.tokens)] == asked.tokens.tolist()
    assert asked.prompt == text.prompt == len(tokenizer(pieces[0], add_special_tokens=False)["input_ids"])


def test_weights_of_the_answer_include_the_token_that_ends_it(tokenizer):
    text = chat(tokenizer, loss_on="answer").text(tiny.conversation("it is red"), None, frames=True)
    learnt = tokenizer.decode(text.tokens[text.weight == 1])
    assert learnt.replace(" ", "") == "itisred<|im_end|>"
    assert chat(tokenizer).text(tiny.conversation("it is red"), None, frames=True).weight.min() == 1


def test_the_first_token_has_no_weight_when_nothing_is_ahead_of_it():
    record = tiny.conversation()
    for prompt, frames, first in (
        ("after_frames", True, 1),
        ("before_frames", True, 0),
        ("after_frames", False, 0),
        ("before_frames", False, 0),
    ):
        text = chat(question=prompt).text(record, None, frames)
        assert text.weight[0] == first
        assert text.weight[1:].min() == 1


def test_prompt_orders():
    record = tiny.conversation("red", "what is this ?")
    after, before = (chat(question=p).text(record, None, frames=True) for p in ("after_frames", "before_frames"))
    assert after.tokens.tolist() == before.tokens.tolist()
    assert after.prompt == 0
    assert TINY.decode(before.tokens[: before.prompt]).replace(" ", "").endswith("user\nwhatisthis?")
    assert TINY.decode(before.tokens[before.prompt]) == "<|im_end|>"
    alone = chat(question="before_frames").text(record, None, frames=False)
    assert (alone.prompt, alone.tokens.tolist()) == (0, before.tokens.tolist())


def test_long_text_is_cut():
    record = tiny.conversation("red " * 100)
    text = chat(most=60, loss_on="answer").text(record, None, frames=True)
    assert len(text.tokens) == len(text.weight) == 60
    with pytest.raises(SampleError, match="nothing to learn within max_tokens"):
        chat(most=20, loss_on="answer").text(record, None, frames=True)
    assert chat(most=20, question="before_frames").text(record, None, frames=True).prompt == 20


@pytest.mark.parametrize("words", ["it is red ", "red\n\nblue ? ", "unknownandlong" * 40 + " ", "🐶" * 30])
@pytest.mark.parametrize("where", ["user", "assistant", "turns"])
def test_a_text_far_beyond_the_limit_is_cut_before_it_is_tokenized(tokenizer, words, where, monkeypatch):
    long = words * (30_000 // len(words))
    record = {"user": "what ?", "assistant": "red"} | {where: long}
    if where == "turns":
        record = {"turns": [{"user": f"what is {n} ?", "assistant": words} for n in range(2000)]}
    limited, whole = chat(tokenizer, most=50), chat(tokenizer, most=50)
    whole.characters = 10**9
    expected = whole.text(record, None, True)
    seen = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda t, text, **o: seen.append(len(text)) or call(t, text, **o))
    text = limited.text(record, None, True)
    assert (text.tokens.tolist(), text.weight.tolist()) == (expected.tokens.tolist(), expected.weight.tolist())
    assert seen[0] <= limited.characters < 20_000
    assert len(seen) == 1 or "unknown" in words, "only where tokens hold more than any of the vocabulary"


@settings(deadline=None, max_examples=50)
@given(
    st.text(min_size=1).filter(str.strip),
    st.text(min_size=1).filter(str.strip),
    st.sampled_from(["after_frames", "before_frames"]),
)
def test_ready_made_tokens_equal_those_made_on_the_fly(user, answer, prompt):
    sample = {"user": user, "assistant": answer}
    for loss in ("all_text", "answer"):
        for frames in (True, False):
            fly = chat(question=prompt, loss_on=loss).text(sample, None, frames)
            made = sample | tiny.ready_made(sample, TINY, loss == "all_text")
            ready = chat(question=prompt, loss_on="answer").text(made, None, frames)
            assert fly.tokens.equal(ready.tokens)
            assert fly.weight.equal(ready.weight)
            assert fly.prompt == ready.prompt


def test_the_sources_prompt_asks_where_the_record_does_not():
    own = chat().text({"user": "what is this ?", "assistant": "red"}, "is it red ?", frames=True)
    sources = chat().text({"assistant": "red"}, "what is this ?", frames=True)
    assert own.tokens.equal(sources.tokens)


def test_preference_pairs_share_the_question():
    record = {"user": "what is this ?", "chosen": "red", "rejected": "it is blue"}
    chosen, rejected = chat(question="before_frames", loss_on="answer").texts(record, None, frames=True, pair=True)
    assert chosen.prompt == rejected.prompt
    assert (len(rejected.tokens) - len(chosen.tokens)) == 4  # words and the spaces between them
    with pytest.raises(SampleError, match="no chosen or no rejected"):
        chat().texts({"user": "?", "chosen": "red"}, None, frames=True, pair=True)


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"user": "?"}, "empty answer"),
        ({"user": "?", "assistant": " \n"}, "empty answer"),
        ({"user": "?", "assistant": ["red"]}, "empty answer"),
        ({"assistant": "red"}, "no question"),
        ({"user": "?", "assistant": "\ud83d"}, "not Unicode"),
        ({"token_ids": [1, 2], "loss_mask": [1]}, "loss_mask"),
        ({"token_ids": [1, 2], "loss_mask": [1, 2]}, "loss_mask"),
        ({"token_ids": [1, 2]}, "loss_mask"),
        ({"token_ids": [], "loss_mask": []}, "token_ids"),
        ({"token_ids": [1, 10**6], "loss_mask": [1, 1]}, "token_ids"),
        ({"token_ids": [1, True], "loss_mask": [1, 1]}, "token_ids"),
        ({"token_ids": "ab", "loss_mask": [1, 1]}, "token_ids"),
        ({"token_ids": [1, 2], "loss_mask": [0, 1]}, "frames_at"),
        ({"token_ids": [1, 2], "loss_mask": [0, 1], "frames_at": 3}, "frames_at"),
        ({"token_ids": [1, 2], "loss_mask": [0, 0], "frames_at": 1}, "nothing to learn"),
    ],
)
def test_unusable_records(record, cause):
    with pytest.raises(SampleError, match=cause):
        chat(question="before_frames").text(record, None, frames=True)


def test_unusable_tokenizers(tmp_path):
    plain = tiny.tokenizer()
    plain.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        chat(plain)
    plain.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(UserError, match="changes the messages"):
        chat(plain)
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(str(tmp_path))


def test_the_hash_follows_what_counts_depend_on():
    assert chat().hash == chat(tiny.tokenizer()).hash
    others = [chat(question="before_frames"), chat(most=9), chat(loss_on="answer"), chat(tiny.tokenizer(["more"]))]
    assert len({chat().hash, *(other.hash for other in others)}) == 5
