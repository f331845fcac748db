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
TIMES, RATE = 2, 4  # frames of the file that show a look, and frames per second


def write_video(gaze: Gaze, path: str | Path, layer: int | None = None, head: int | None = None) -> Path:
    """Write an MP4 with two looks per second, of a layer and head, by default their means, and return its path. Raises
    UserError for a layer or head that does not exist."""
    check_choice(gaze.weights["coarse"].shape, layer, head)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode.encode_video(_frames(gaze, layer, head), RATE))
    return path


def _frames(gaze: Gaze, layer: int | None, head: int | None) -> Iterator[np.ndarray]:
    """Each look u8 [h, w, 3], TIMES times."""
    grids = {name: maps(w, layer, head) for name, w in gaze.weights.items()}
    width = len(grids) * (SIDE + GAP) - GAP
    texts = [gaze.question, gaze.answer] if gaze.question else [gaze.clip]
    below = encode.lettering([text[:LONGEST] for text in texts], width)
    for k, second in enumerate(gaze.seconds):
        above = np.hstack([encode.lettering([f"{name}  {clock(second)}"], SIDE + GAP) for name in grids])[:, :width]
        drawn = [draw_heatmap(gaze.frames[k : k + 1], grid[k : k + 1], SIDE) for grid in grids.values()]
        frame = np.vstack([above, tile(np.stack(drawn, axis=1), GAP, 20), below])
        yield from [frame] * TIMES
