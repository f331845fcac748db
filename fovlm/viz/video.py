"""A gaze as a film: coarse beside fine, the question and the answer below. For talks and chats."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fovlm.media import encode
from fovlm.viz.contact_sheet import check
from fovlm.viz.gaze import Gaze
from fovlm.viz.heatmap import draw_heatmap, maps
from fovlm.viz.html import clock

SIDE = 336  # pixels of a frame
GAP = 8  # pixels between two
LONGEST = 400  # letters of a caption
RATE = 4  # frames a second of the file; each look stays for several


def write_video(
    gaze: Gaze, path: str | Path, layer: int | None = None, head: int | None = None, fps: float = 2
) -> Path:
    """Write an MP4 of `fps` looks a second and return its path; of one layer and head, else their means.

    Raises UserError for a layer or head that is not there.
    """
    check(gaze, layer, head)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode.encode_video(_pictures(gaze, layer, head, max(1, round(RATE / fps))), max(RATE, fps)))
    return path


def _pictures(gaze: Gaze, layer: int | None, head: int | None, times: int) -> Iterator[np.ndarray]:
    """Each look u8 [h, w, 3], `times` times."""
    grids = {name: maps(torch.from_numpy(w), layer, head) for name, w in gaze.weights.items()}
    width = len(grids) * (SIDE + GAP) + GAP
    said = [gaze.question, gaze.answer] if gaze.question else [gaze.clip]
    below = encode.lettering([text[:LONGEST] for text in said], width)
    for k, second in enumerate(gaze.seconds):
        above = encode.lettering([f"{' | '.join(grids)}   {clock(second)}"], width)
        row = np.full((SIDE, width, 3), 20, np.uint8)
        for n, grid in enumerate(grids.values()):
            left = GAP + n * (SIDE + GAP)
            row[:, left : left + SIDE] = draw_heatmap(gaze.frames[k : k + 1], grid[k : k + 1], SIDE)[0]
        picture = np.vstack([above, row, below])
        for _ in range(times):
            yield picture
