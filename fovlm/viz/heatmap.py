"""Attention as light on a frame: dark without attention, then violet, orange and pale yellow.

The frame is darkened and the light added in proportion to the weight, which is visible on any frame. The page, the
video, the contact sheet and the maps of training all draw this way; the page gets the same `STOPS`.
"""

import math

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

STOPS = ((46, 8, 120), (170, 32, 128), (250, 90, 60), (255, 185, 40), (255, 255, 170))  # evenly spaced, red green blue
DARKEN = 0.45  # share of the frame's light that is removed
ALPHA = 0.75  # share of the frame that the brightest light hides


def maps(weights: Tensor | np.ndarray, layer: int | None = None, head: int | None = None) -> Tensor:
    """Attention weights [layers, K, H, N] -> f32 [K, side, side] over the patches, of a layer and head or their means.

    CLS and registers, which come before the patches, have no place in the frame and are left out.
    """
    weights = torch.as_tensor(weights)
    weights = weights.mean(0) if layer is None else weights[layer]
    weights = weights.mean(1) if head is None else weights[:, head]
    side = math.isqrt(weights.shape[1])
    return weights[:, -side * side :].float().unflatten(1, (side, side))


def smooth(grid: Tensor, size: int) -> Tensor:
    """Maps [K, side, side] -> f32 [K, size, size] >= 0, interpolated between the centers of the patches."""
    return nnf.interpolate(grid[:, None].float(), (size, size), mode="bicubic", align_corners=False)[:, 0].clamp(min=0)


def draw_heatmap(frames: Tensor, grid: Tensor, size: int | None = None) -> np.ndarray:
    """Frames u8 [K, 3, s, s] and their maps [K, side, side] -> u8 [K, size, size, 3], `size` is s by default.

    The largest weight of each map has full brightness.
    """
    size = size or frames.shape[-1]
    pixels = nnf.interpolate(frames.float(), (size, size), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    maps = smooth(grid, size)
    light = (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)).numpy()
    at = np.linspace(0, 1, len(STOPS))
    color = np.stack([np.interp(light, at, [stop[c] for stop in STOPS]) for c in range(3)], axis=-1)
    alpha = ALPHA * light[..., None]
    drawn = pixels.numpy() * (1 - DARKEN) * (1 - alpha) + color * alpha
    return drawn.round().clip(0, 255).astype(np.uint8)


def tile(pictures: np.ndarray, gap: int, color: int) -> np.ndarray:
    """Pictures u8 [rows, columns, s, s, 3] -> one, u8 [h, w, 3], with `gap` pixels of a gray between them."""
    rows, columns, s = pictures.shape[:3]
    padded = np.pad(pictures, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=color)
    return padded.swapaxes(1, 2).reshape(rows * (s + gap), columns * (s + gap), 3)[:-gap, :-gap]


def entropy(weights: Tensor | np.ndarray) -> Tensor:
    """The entropy of attention weights [..., N] relative to its maximum ln N -> f32 [...]; 1 is uniform."""
    weights = torch.as_tensor(weights).float()
    nats = -(weights * weights.clamp(min=1e-12).log()).sum(-1)
    return nats / math.log(weights.shape[-1])
