"""A gaze as a video: coarse beside fine, with the question and the answer."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fovlm.media import encode
from fovlm.viz.contact_sheet import check_choice
from fovlm.viz.gaze import Gaze
from fovlm.viz.heatmap import draw_heatmap, maps, tile
from fovlm.viz.html import clock

SIDE = 336  # pixels of a frame
GAP = 8  # pixels between two
LONGEST = 400  # characters of a caption
RATE = 4  # frames per second of the file; each look is shown for several


def write_video(
    gaze: Gaze, path: str | Path, layer: int | None = None, head: int | None = None, fps: float = 2
) -> Path:
    """Write an MP4 with `fps` looks per second, of a layer and head, by default their means, and return its path.

    Raises UserError for a layer or head that does not exist.
    """
    check_choice(gaze.weights["coarse"].shape, layer, head)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode.encode_video(_frames(gaze, layer, head, max(1, round(RATE / fps))), max(RATE, fps)))
    return path


def _frames(gaze: Gaze, layer: int | None, head: int | None, times: int) -> Iterator[np.ndarray]:
    """Each look u8 [h, w, 3], `times` times."""
    grids = {name: maps(w, layer, head) for name, w in gaze.weights.items()}
    width = len(grids) * (SIDE + GAP) - GAP
    texts = [gaze.question, gaze.answer] if gaze.question else [gaze.clip]
    below = encode.lettering([text[:LONGEST] for text in texts], width)
    for k, second in enumerate(gaze.seconds):
        above = np.hstack([encode.lettering([f"{name}  {clock(second)}"], SIDE + GAP) for name in grids])[:, :width]
        drawn = [draw_heatmap(gaze.frames[k : k + 1], grid[k : k + 1], SIDE) for grid in grids.values()]
        frame = np.vstack([above, tile(np.stack(drawn, axis=1), GAP, 20), below])
        for _ in range(times):
            yield frame
