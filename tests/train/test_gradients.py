"""Pieces of a gradient on their way to the ranks; `test_engine.py` has the steps made of them."""

import pytest
import torch

from fovlm.train import gradients


@pytest.mark.parametrize("value", [0.1, 1.7e-5])
def test_the_norm_of_many_equal_numbers_is_exact(value):
    tensors = [torch.full((size,), value) for size in (1 << 22, 300, 255, 0)]
    numbers = sum(map(len, tensors))
    exact = numbers * float(tensors[0][0]) ** 2
    assert float(gradients.square_sum(tensors, "cpu")) == pytest.approx(exact, rel=1e-6)
    assert float(gradients.square_sum([], "cpu")) == 0


@pytest.mark.parametrize("numbers", [1, 3, 4, 100])
def test_pieces_hold_the_same_places_of_every_share(monkeypatch, numbers):
    """Three shares of eight: weights of any size, one over two borders, and two zeros behind them."""
    monkeypatch.setattr(gradients, "PIECE", 4 * 3 * numbers)
    flat = torch.arange(1.0, 23)
    pieces = [torch.cat(parts) for parts in gradients.pieces(list(flat.split([5, 1, 13, 0, 3])), 3, 8)]
    assert len(pieces) == -(-8 // numbers)
    shares = torch.cat([piece.view(3, -1) for piece in pieces], dim=1)
    assert torch.equal(shares.flatten(), torch.cat([flat, torch.zeros(2)]))
