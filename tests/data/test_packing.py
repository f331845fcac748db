"""Packs by cost: a short list of shapes, little padding, equal costs; and what shares a pack changes no number."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.packing import FRAME_COST, MIXES, PACK_COST, measured, sizes_of
from fovlm.data.packing import EMPTY, PackBudget, PackSize, collate, pack_samples, pack_shape, round_up
from helpers.models import FRAME, nll_of, sample, tiny_model

BUDGET = PackBudget(PACK_COST, FRAME_COST)


def test_sizes_are_rounded_up_by_one_part_in_32_at_most_to_32_values_an_octave():
    assert [round_up(n) for n in (0, 1, 63, 64, 65, 129, 2049)] == [0, 1, 63, 64, 66, 132, 2112]
    assert all(n <= round_up(n) <= n * 33 / 32 for n in range(1, 10_000))
    assert len({round_up(n) for n in range(1025, 2049)}) == 32


def test_a_step_is_a_run_of_samples_whose_packs_are_full_and_equal():
    sizes = sizes_of(MIXES["mean 5.7"], 3000)
    contents, taken = pack_samples(sizes, 8, BUDGET)
    assert sorted(i for pack in contents for i in pack) == list(range(taken))
    assert all(pack == sorted(pack) for pack in contents)
    costs = [BUDGET.of(sizes[pack]).sum() for pack in contents]
    assert min(costs) > 0.96 * PACK_COST
    assert max(costs) <= PACK_COST
    assert max(costs) < 1.03 * np.mean(costs)


def test_a_step_ends_before_a_sample_that_makes_a_pack_too_large():
    """Three samples of two thirds of a pack would fit two packs by their sum, and do not by their parts."""
    sizes = np.array([[0, 0, 60, 0, 0]] * 3 + [[0, 0, 1, 0, 0]])
    assert pack_samples(sizes, 2, PackBudget(90, 1)) == ([[0], [1]], 2)
    assert pack_samples(sizes[:0], 2, PackBudget(90, 1)) == ([[], []], 0)


@pytest.mark.parametrize("name", MIXES)
def test_packs_are_nearly_all_real_in_every_mix(name):
    assert min(measured(name, steps=25).real.values()) >= 0.97


def test_a_run_has_a_short_list_of_shapes():
    """Each module sees its own dimension alone: the encoder frames, the looks frames and looks, and so on."""
    sizes, taken = sizes_of(MIXES["D1, pictures x8"], 40_000), 0
    shapes: list[PackSize] = []
    while len(shapes) < 1000:
        contents, n = pack_samples(sizes[taken:], 8, BUDGET)
        for pack in contents:
            rows = sizes[taken:][pack]
            used = sum((PackSize(*row) for row in rows.tolist()), EMPTY)
            shapes.append(pack_shape(used, bool((rows[:, 0] == rows[:, 1]).all())))
        taken += n
    for part in ("frames", "looks", "text"):
        values = sorted({getattr(shape, part) for shape in shapes})
        assert len(values) <= 100, part
        assert all(b - a >= a / 64 for a, b in pairwise(v for v in values if v >= 64))


def test_the_nll_of_a_sample_is_the_same_in_a_pack_that_is_rounded_up():
    model = tiny_model()
    samples = [sample(f"clip {i}", frames=2 + i % 3, text=5 + i % 7, prompt=4) for i in range(30)]
    samples += [sample("picture", frames=1, looks=4, text=6, prompt=3), sample("text", text=9)]
    batch = collate(samples, FRAME)
    used = batch.used
    assert (len(batch.frames), used.frames) == (92, 91)
    assert (len(batch.look_segment), used.looks) == (94, 94)
    assert (len(batch.tokens), len(batch.sequence.slot)) == (round_up(used.text), round_up(used.text + used.looks))
    assert len(batch.prefix.slot) == round_up(used.prompt + used.looks)
    for number in (0, 7, 29, 30, 31):
        alone = nll_of(model, collate([samples[number]], FRAME), 0)
        torch.testing.assert_close(nll_of(model, batch, number), alone, rtol=1e-5, atol=2e-6)


def test_an_empty_pack_has_a_frame_and_no_weight():
    batch = collate([], FRAME)
    model = tiny_model()
    (model(batch) * batch.weight).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert batch.used == EMPTY
