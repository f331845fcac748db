"""The order of a run: exact mixing, whole epochs, random access."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fovlm.data.sampling import MixtureSampler, ShardShuffle, permutation, spread_evenly
from fovlm.errors import UserError


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7))
def test_every_prefix_is_within_one_sample_of_the_exact_share(counts):
    order, period = spread_evenly(counts), sum(counts)
    taken = Counter()
    for n, source in enumerate(order, start=1):
        taken[source] += 1
        assert all(abs(taken[i] - Fraction(n * count, period)) < 1 for i, count in enumerate(counts))
    assert [taken[i] for i in range(len(counts))] == counts


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0.05, 0.14, 0.3, 0.55, 1.0, 2.5, 7.0]), min_size=1, max_size=5), st.integers(0, 3000))
def test_a_position_is_looked_up_as_if_counted_from_the_start(weights, position):
    mix = MixtureSampler({str(i): weight for i, weight in enumerate(weights)})
    seen = Counter()
    for p in range(position):
        source, number = mix(p)
        assert number == seen[source]
        seen[source] += 1
    assert mix(position)[1] == seen[mix(position)[0]]


def test_fourteen_percent_of_text_is_exact():
    mix = MixtureSampler({"video": 0.56, "image": 0.30, "text": 0.14})
    assert len(mix.pattern) == 50
    assert Counter(mix.names[mix(p)[0]] for p in range(5000)) == {"video": 2800, "image": 1500, "text": 700}


def test_weights_need_not_add_up_to_one():
    assert [MixtureSampler({"a": 3, "b": 1})(p) for p in range(8)] == [
        MixtureSampler({"a": 0.75, "b": 0.25})(p) for p in range(8)
    ]


def test_weights_without_a_short_period_are_refused():
    with pytest.raises(UserError, match="no common period below 100,000 samples: use at most four decimals"):
        MixtureSampler({"a": 0.3333333333, "b": 0.7654321})


def place(order: ShardShuffle, number: int) -> tuple[int, int]:
    """(shard, row) of one sample."""
    (shard,), (row,) = order.window(number, number + 1)
    return int(shard), int(row)


def places(order: ShardShuffle, count: int) -> list[tuple[int, int]]:
    return [place(order, number) for number in range(count)]


def shuffles():
    return st.builds(
        ShardShuffle,
        st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
        st.integers(0, 5),
        st.sampled_from(["a", "b"]),
        st.integers(1, 4),
    )


@settings(deadline=None, max_examples=60)
@given(shuffles(), st.integers(0, 3))
def test_an_epoch_reads_every_sample_once(order, epoch):
    places = [place(order, epoch * order.total + i) for i in range(order.total)]
    assert sorted(places) == [(shard, row) for shard, n in enumerate(order.rows) for row in range(n)]


@settings(deadline=None, max_examples=60)
@given(shuffles(), st.lists(st.integers(0, 200), min_size=1, max_size=20))
def test_places_do_not_depend_on_what_was_asked_before(order, numbers):
    fresh = [ShardShuffle(order.rows.tolist(), order.seed, order.source, order.block) for n in numbers]
    assert [place(order, n) for n in numbers] == [place(one, n) for one, n in zip(fresh, numbers, strict=True)]


def test_order_differs_between_epochs_seeds_and_sources():
    rows = [50, 50, 50]
    first, *others = (places(ShardShuffle(rows, seed, name), 150) for seed, name in ((0, "a"), (1, "a"), (0, "b")))
    assert first not in others
    assert places(ShardShuffle(rows, 0, "a"), 300)[150:] != first


def test_reads_stay_within_a_few_shards_at_a_time():
    order = ShardShuffle([10] * 40, 0, "a", block=4)
    for start in range(0, 400, 40):
        assert len({place(order, start + i)[0] for i in range(40)}) == 4


def test_the_order_is_the_same_in_every_release():
    """A checkpoint's cursor means the same samples for as long as these numbers stay."""
    assert permutation(8, 0, "a", 0).tolist() == [6, 1, 5, 0, 4, 2, 7, 3]
    assert places(ShardShuffle([3, 2], 0, "a"), 5) == [(1, 1), (0, 2), (0, 0), (1, 0), (0, 1)]
    assert MixtureSampler({"a": 0.5, "b": 0.3, "c": 0.2}).pattern.tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 1, 0]


def test_samples_of_some_sources_come_ahead_of_the_mixture_and_are_not_read_again():
    mix = MixtureSampler({"a": 1, "b": 3, "c": 1}, {"c": 5, "b": 2})
    found = [mix(position) for position in range(500)]
    assert found[:7] == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)]
    plain = MixtureSampler({"a": 1, "b": 3, "c": 1})
    assert [source for source, _ in found[7:]] == [plain(position)[0] for position in range(493)]
    for source in range(3):
        numbers = [number for which, number in found if which == source]
        assert numbers == list(range(len(numbers)))
    source, number = mix.window(3, 40)
    assert list(zip(source.tolist(), number.tolist(), strict=True)) == found[3:40]
