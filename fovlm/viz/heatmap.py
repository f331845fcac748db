"""Attention as light on a picture: smooth, dark where nobody looks, from violet over orange to pale yellow.

The picture is darkened, and light is laid over it in proportion to the weight, so that it reads on any picture. Page,
film and sheet paint alike; the page gets the same `STOPS`.
"""

import math

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

STOPS = ((46, 8, 120), (170, 32, 128), (250, 90, 60), (255, 185, 40), (255, 255, 170))  # evenly spaced, red green blue
DARKEN = 0.45  # of the picture's light that is taken away
ALPHA = 0.75  # how much of the picture the brightest light hides


def maps(weights: Tensor, layer: int | None = None, head: int | None = None) -> Tensor:
    """Attention weights [layers, K, H, N] -> f32 [K, side, side] over the patches: one layer and head, or their means.

    CLS and registers, which come before the patches, have no place in the picture and are left out.
    """
    chosen = weights.mean(0) if layer is None else weights[layer]
    rows = chosen.mean(1) if head is None else chosen[:, head]
    side = side_of(rows.shape[1])
    return rows[:, -side * side :].float().unflatten(1, (side, side))


def side_of(rows: int) -> int:
    """Patches on a side of a frame whose N rows are a square of patches and a few other tokens."""
    return math.isqrt(rows)


def smooth(grid: Tensor, size: int) -> Tensor:
    """Maps [K, side, side] -> f32 [K, size, size] >= 0, interpolated between the middles of the patches."""
    return nnf.interpolate(grid[:, None].float(), (size, size), mode="bicubic", align_corners=False)[:, 0].clamp(min=0)


def draw_heatmap(frames: Tensor, grid: Tensor, size: int | None = None) -> np.ndarray:
    """Frames u8 [K, 3, s, s] and their maps [K, side, side] -> u8 [K, size, size, 3]; each map's most is the brightest.

    `size` is s unless told.
    """
    size = size or frames.shape[-1]
    pictures = nnf.interpolate(frames.float(), (size, size), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    maps = smooth(grid, size)
    light = (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)).numpy()
    at = np.linspace(0, 1, len(STOPS))
    colour = np.stack([np.interp(light, at, [stop[c] for stop in STOPS]) for c in range(3)], axis=-1)
    alpha = ALPHA * light[..., None]
    painted = pictures.numpy() * (1 - DARKEN) * (1 - alpha) + colour * alpha
    return painted.round().clip(0, 255).astype(np.uint8)


def entropy(weights: Tensor) -> Tensor:
    """How spread out attention is: the entropy of weights [..., N] over its most, ln N -> f32 [...]; 1 is uniform."""
    weights = weights.float()
    spread = -(weights * weights.clamp(min=1e-12).log()).sum(-1)
    return spread / torch.log(torch.tensor(float(weights.shape[-1])))
