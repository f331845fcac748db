"""Several turns and several conversations over the same frames: tokens, groups, and one encoding for all of them."""

from collections import Counter

import pytest
import torch

from fovlm.config.schema import DataSource
from fovlm.data.chat import SYSTEM, ChatTokenizer
from fovlm.data.dataset import Dataset
from fovlm.data.packing import EMPTY, PackBudget, Sample, collate
from fovlm.data.sample_table import Grouping
from fovlm.data.shards import write_shards
from fovlm.errors import SampleError
from fovlm.model.autoregressive import autoregressive
from helpers import tiny
from helpers.models import FRAME, nll_of, sample, tiny_model

TOKENIZER = tiny.tokenizer()
PACK = PackBudget(4096, 32)
TURNS = [("what is this ?", "it is red"), ("is it blue ?", "no"), ("yes ?", "yes")]


def chat(question="before_frames", loss_on="answer", most=200) -> ChatTokenizer:
    return ChatTokenizer(TOKENIZER, question, loss_on, most)


def messages(turns, system: str | None = None) -> list[dict]:
    listed = [{"role": "system", "content": system}] if system else []
    return listed + [m for u, a in turns for m in ({"role": "user", "content": u}, {"role": "assistant", "content": a})]


@pytest.mark.parametrize("system", [None, "it is yes ."])
def test_several_turns_are_the_template_of_all_of_them_with_a_loss_on_each_answer(system):
    expected = messages(TURNS, system or SYSTEM)
    whole = TOKENIZER(TOKENIZER.apply_chat_template(expected, tokenize=False), add_special_tokens=False)["input_ids"]
    text = chat().text({"messages": messages(TURNS, system)}, None, frames=True)
    assert text.tokens.tolist() == whole[:-1]  # without the newline behind the last turn
    learnt = TOKENIZER.decode(text.tokens[text.weight == 1]).replace(" ", "")
    assert learnt == "itisred<|im_end|>no<|im_end|>yes<|im_end|>"
    assert TOKENIZER.decode(text.tokens[: text.prompt]).replace(" ", "").endswith("user\nwhatisthis?")


def test_turns_are_expectedwithout_roles_and_one_turn_is_a_question_and_an_answer():
    turns = [{"user": user, "assistant": answer} for user, answer in TURNS]
    for record, other in (
        ({"turns": turns}, {"messages": messages(TURNS)}),
        ({"turns": turns[:1]}, turns[0]),
        ({"messages": [*messages(TURNS), {"role": "user", "content": "and ?"}]}, {"turns": turns}),
        (tiny.ready_made({"turns": turns}, TOKENIZER), {"turns": turns}),
        ({"turns": [{"assistant": "it is red"}, *turns[1:]]}, {"turns": turns}),  # the source's prompt asks
    ):
        a, b = (chat().text(one, "what is this ?", frames=True) for one in (record, other))
        assert a.tokens.equal(b.tokens)
        assert a.weight.equal(b.weight)
        assert a.prompt == b.prompt


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"turns": []}, "no turns"),
        ({"turns": ["what ?"]}, "no turns"),
        ({"turns": [{"user": "?", "assistant": "red"}, {"user": "", "assistant": "red"}]}, "turn without a question"),
        ({"turns": [{"user": "?", "assistant": "red"}, {"user": "?", "assistant": " "}]}, "empty answer"),
        ({"messages": "red"}, "messages are not a list"),
        ({"messages": messages(TURNS)[::-1]}, "do not alternate"),
        ({"messages": [{"role": "user", "content": "?"}]}, "no turns"),
        ({"messages": [messages(TURNS)[0], *messages(TURNS)]}, "do not alternate"),
    ],
)
def test_unusable_turns(record, cause):
    with pytest.raises(SampleError, match=cause):
        chat().text(record, None, frames=True)


def asked(key: str, questions: int, frames: int = 2, **more) -> dict:
    """A sample with so many conversations over its frames, the n-th with n % 3 + 1 words to say."""
    several = [{"user": "what is this ?", "assistant": "red " * (n % 3 + 1)} for n in range(questions)]
    return tiny.clip(key, frames) | {"json": {"conversations": several, "source": "test"} | more}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path))
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))

    def open_(samples, kind="video", most=4, budget=PACK, **options) -> Dataset:
        write_shards(tmp_path / "a-%d.tar", samples, 3)
        source = DataSource(shards="a-*.tar", kind=kind, **options.pop("source", {}))
        return Dataset({"a": source}, {"a": 1.0}, chat(), frame_size=16, grouping=Grouping(most, budget, 64), **options)

    return open_


@pytest.mark.parametrize("most", [1, 3, 4, 99])
def test_an_epoch_has_every_conversation_once_in_groups_of_at_most_so_many(opened, most):
    counts = [5, 1, 8, 2, 4, 7, 3]
    data = opened([asked(f"c{i}", n, frames=1 + i % 3) for i, n in enumerate(counts)], most=most)
    assert data.samples == {"a": sum(-(-n // most) for n in counts)}
    seen: Counter[str] = Counter()
    for position in range(data.samples["a"]):
        samples, bad = data.read(position)
        assert bad is None
        assert 1 <= len(samples) <= most
        assert [s.shares for s in samples] == [False] + [True] * (len(samples) - 1)
        assert len({s.key.partition("#")[0] for s in samples}) == 1
        assert sum((s.size for s in samples), EMPTY) == data.size(position)
        seen.update(s.key.partition("/")[2] for s in samples)
    wanted = [f"c{i}" + (f"#{k}" if n > 1 else "") for i, n in enumerate(counts) for k in range(n)]
    assert seen == Counter(wanted)


def test_a_group_is_no_larger_than_a_pack(opened):
    budget = PackBudget(200, 32)
    data = opened([asked("c", 9)], most=99, budget=budget)
    sizes = data.sizes(0, data.samples["a"])
    assert data.samples["a"] > 2
    assert budget.of(sizes).max() <= 200
    assert all(budget.holds(data.size(position)) for position in range(len(sizes)))


def test_texts_share_nothing_and_so_are_read_one_by_one(opened):
    data = opened([asked("c", 3, frames=0)], kind="text")
    assert data.samples == {"a": 3}
    assert [len(data.read(position)[0]) for position in range(3)] == [1, 1, 1]


def test_a_broken_conversation_is_replaced_alone(opened):
    bad = asked("bad", 5)
    bad["json"]["conversations"][2]["assistant"] = ""
    data = opened([asked("good", 4), bad])
    assert data.samples == {"a": 4}  # four; two; the broken one; two
    causes = [issue.cause for _, issue in map(data.read, range(4)) if issue]
    assert causes == ["empty answer"]


@pytest.mark.parametrize("several", [[], "red", ["red"], None])
def test_conversations_that_are_none_break_the_sample(opened, several):
    data = opened([asked("good", 2), asked("bad", 1, conversations=several)])
    issues = [issue for _, issue in map(data.read, range(2)) if issue]
    assert [(issue.cause, issue.key) for issue in issues] == [("conversations are not a list of records", "bad")]


def test_the_hash_of_a_run_follows_the_groups_and_only_where_there_are_any(opened):
    plain = [tiny.clip("a", 2), tiny.clip("b", 1)]
    assert len({opened(plain, most=n).hash for n in (1, 4)} | {opened(plain).hash}) == 1
    several = [asked("a", 5)]
    assert len({opened(several, most=n).hash for n in (1, 4, 8)}) == 3


def test_weights_of_a_source_and_of_long_answers(opened):
    (one, two), _ = opened([asked("a", 2)]).read(0)
    assert (float(one.weight.sum()), float(two.weight.sum())) == (2, 4)  # words, spaces, and the token that ends them
    (one, two), _ = opened([asked("a", 2)], source={"loss_weight": 2.0}, length_weight="sqrt").read(0)
    assert float(one.weight.max()) == pytest.approx(2 / 2**0.5)
    assert float(two.weight.max()) == pytest.approx(2 / 4**0.5)
    (one, _), _ = opened([asked("a", 2)], source={"loss_weight": 2.0}, length_weight="none").read(0)
    assert float(one.weight.sum()) == 4


def over_the_same_frames(prompts: list[int], frames: int = 3, looks: int | None = None) -> list[Sample]:
    samples = [sample(f"s{i}", frames, looks, text=7 + i, prompt=p) for i, p in enumerate(prompts)]
    for number, one in enumerate(samples):
        one.frames, one.shares = samples[0].frames, number > 0
    return samples


MODELS = {
    "foveated": {},
    "two rounds": {"query_rounds": 2},
    "coarse": {"visual": "coarse"},
    "multi_token": {"visual": "multi_token"},
    "shallow": {"deep_query": False},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompts", [[0, 0, 0], [4, 2, 6]])
@pytest.mark.parametrize("looks", [None, 4])
def test_a_conversation_has_the_nll_and_gradient_that_it_has_alone(name, prompts, looks):
    model = tiny_model(**MODELS[name])
    frames = 3 if looks is None else 1
    group = over_the_same_frames(prompts, frames, looks)
    beside = [sample("before", frames=2, text=5, prompt=3), *group, sample("behind", frames=1, looks=2, text=6)]
    pack = collate(beside, FRAME, model.config.tokens_per_look)
    assert pack.used.frames == 3 + frames

    def gradients(nll: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        nll.sum().backward()
        return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]

    alone = []
    for number, one in enumerate(group):
        other = sample(f"s{number}", frames, looks, text=len(one.tokens), prompt=one.prompt)
        other.frames = one.frames
        nll = nll_of(model, collate([other], FRAME, model.config.tokens_per_look), 0)
        torch.testing.assert_close(nll_of(model, pack, 1 + number), nll, rtol=1e-5, atol=2e-6)
        alone.append(gradients(nll))
    nll = model(pack)
    together = gradients(nll[(pack.text_segment >= 1) & (pack.text_segment <= 3)])
    for found, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(found, sum(parts), rtol=1e-4, atol=2e-5)


def test_frame_by_frame_a_conversation_is_what_it_is_alone():
    model = tiny_model()
    group = over_the_same_frames([4, 2, 6])
    with torch.no_grad():
        pack = collate(group, FRAME)
        found = autoregressive(model, pack)
        for number, one in enumerate(group):
            one.shares = False
            alone = autoregressive(model, collate([one], FRAME))[: len(one.tokens)]
            torch.testing.assert_close(found[pack.text_segment == number], alone, rtol=1e-5, atol=2e-6)


def test_no_conversation_sees_another():
    """The gradient of one conversation's nll by another's word embeddings is zero."""
    model = tiny_model()
    words = []
    embed = model.llm.get_input_embeddings()
    embed.register_forward_hook(lambda _, __, out: words.append(out) or out.retain_grad())
    pack = collate(over_the_same_frames([4, 2, 6]), FRAME)
    nll_of(model, pack, 1).sum().backward()
    for grad in (w.grad for w in words if w.grad is not None):
        assert grad[(pack.text_segment != 1) & (pack.text_segment >= 0)].abs().max() == 0
        assert grad[pack.text_segment == 1].abs().max() > 0
