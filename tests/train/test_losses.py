"""The losses, held to their formulas written out sample by sample."""

import math

import pytest
import torch

from fovlm.train.losses import pair_weight, per_sample, preference_loss, text_loss, text_weight
from fovlm.train.validation import evaluate
from helpers.models import pack, sample, tiny_model

BETA = 0.3


@pytest.fixture
def pairs():
    """Two pairs with a sample that belongs to none between them, and padding behind them."""
    roles = ("chosen", "rejected", "", "chosen", "rejected")
    return pack([sample(f"s{i}", frames=i % 2, text=4 + i, role=role) for i, role in enumerate(roles)])


def log_p(nll: torch.Tensor, batch, number: int) -> float:
    """The log-probability of a sample's weighted tokens."""
    return -sum(float(n) for n, at in zip(nll, batch.text_segment, strict=True) if at == number)


def test_the_preference_loss_is_its_formula(pairs):
    """arXiv 2305.18290, equation 7, in logarithms of probabilities."""
    with torch.no_grad():
        nll, reference_nll = tiny_model(seed=1)(pairs), tiny_model(seed=2)(pairs)
    loss = preference_loss(nll, reference_nll, pairs, BETA)
    wanted, preferred = 0.0, 0
    for chosen, rejected in ((0, 1), (3, 4)):
        gains = [log_p(nll, pairs, i) - log_p(reference_nll, pairs, i) for i in (chosen, rejected)]
        margin = BETA * (gains[0] - gains[1])
        wanted -= math.log(1 / (1 + math.exp(-margin)))
        preferred += margin > 0
    assert float(loss.total) == pytest.approx(wanted, rel=1e-5)
    assert float(loss.parts["preferred"]) == preferred
    assert float(pair_weight(pairs)) == 2


def test_a_likelier_chosen_answer_lowers_the_loss_and_a_likelier_rejected_one_raises_it(pairs):
    nll = torch.ones(len(pairs.tokens), requires_grad=True)
    preference_loss(nll, torch.ones_like(nll), pairs, BETA).total.backward()
    for number, sign in enumerate((1, -1, 0, 1, -1)):
        assert nll.grad[pairs.text_segment == number].tolist() == pytest.approx([sign * BETA / 2] * (4 + number))


def test_tokens_without_weight_count_for_nothing(pairs):
    nll, reference_nll = torch.rand(2, len(pairs.tokens), generator=torch.Generator().manual_seed(0))
    before = preference_loss(nll, reference_nll, pairs, BETA).total
    pairs.weight[1] = 0
    changed = preference_loss(nll, reference_nll, pairs, BETA).total
    nll[1] += 5
    assert changed != before
    assert preference_loss(nll, reference_nll, pairs, BETA).total == changed


def test_a_pack_without_a_pair_gives_nothing_but_still_a_gradient():
    """A rank that skips backward makes ZeRO hang."""
    batch = pack([sample("alone", text=5)])
    nll = torch.ones(len(batch.tokens), requires_grad=True)
    loss = preference_loss(nll, torch.ones_like(nll), batch, BETA)
    assert (loss.total.item(), loss.parts["preferred"].item(), pair_weight(batch).item()) == (0, 0, 0)
    loss.total.backward()
    assert nll.grad is not None
    assert not nll.grad.any()


def test_the_text_loss_sums_weighted_tokens(pairs):
    nll = torch.rand(len(pairs.tokens), generator=torch.Generator().manual_seed(0))
    pairs.weight[2] = 0.5
    assert float(text_loss(nll, pairs).total) == pytest.approx(float((nll * pairs.weight).sum()))
    assert float(per_sample(nll, pairs).sum()) == pytest.approx(float(text_loss(nll, pairs).total))
    predicted = pairs.predict_from >= 0
    assert float(text_weight(pairs)) == pytest.approx(float(pairs.weight[predicted].sum()))


def test_the_error_of_a_validation_loss_is_that_of_its_samples():
    model = tiny_model()
    batches = [pack([sample(f"{p}{n}", text=5 + n) for n in range(4)]) for p in "ab"]
    score = evaluate(model, batches, ["coarse_only"])["coarse_only"]
    with torch.no_grad():
        nll = torch.cat([per_sample(model(batch, "coarse"), batch) for batch in batches])
    weight = torch.cat([per_sample((batch.predict_from >= 0).float(), batch) for batch in batches])
    assert score.loss == pytest.approx(float(nll.sum() / weight.sum()), rel=1e-5)
    left = (nll - score.loss * weight).double()
    assert score.error == pytest.approx(float(left.square().sum().sqrt() / weight.sum()), rel=1e-4)
