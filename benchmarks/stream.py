"""An hour of video through one stream: python -m benchmarks.stream MODEL [--pictures FOLDER] [--frames N | --turns N]

MODEL is a converted model's folder, or ENCODER,LLM: two folders of backbones and a random connector. Every
frame is another one, cut and mirrored from the pictures of a folder (noise without one). Times are those of the
processor (one thread): on a shared machine wall time says who else is there. Encoding is separated from the look and
the language model, which alone could grow with the stream. Writes benchmarks/results/stream_cpu.csv.

`--turns N` asks whether a frame costs the same late as early, where others use the machine too: streams of LENGTHS
frames take turns, a frame each, N times, so that what disturbs one disturbs all. Writes stream_turns_cpu.csv there.
"""

import argparse
import csv
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fovlm.config.schema import ModelSettings
from fovlm.media import decode
from fovlm.model.build import build
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.processing import open_model
from fovlm.model.streaming import FrameStream

RESULTS = Path(__file__).parent / "results"
LENGTHS = (100, 1000, 2000, 3000, 4000)
WINDOW = 100  # frames in a row of the table
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(source: str, dtype: torch.dtype, size: int) -> FoveatedVLM:
    """A converted model, or two backbones."""
    if "," not in source:
        return open_model(source, dtype)[0]
    dino, llm = source.split(",")
    return build(ModelSettings(encoder=dino, llm=llm, frame_size=size)).to(dtype).eval()


def frames(folder: str | None, size: int, random: np.random.Generator):
    """Frames without end, no two alike."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix[1:] in decode.PICTURES) if folder else []
    pictures = [decode.decode_pictures([(p.suffix[1:], p.read_bytes())], size)[0] for p in files[:200]]
    while True:
        if not pictures:
            yield torch.from_numpy(random.integers(0, 256, (3, size, size), dtype=np.uint8))
            continue
        left, right = (pictures[i] for i in random.integers(0, len(pictures), 2))
        at = int(random.integers(1, size))
        yield torch.cat([left[:, :, :at], right[:, :, at:].flip(2)], dim=2)


@torch.no_grad()
def turns(model: FoveatedVLM, source: Any, number: int, out: Path) -> None:
    """Time a frame of streams of different lengths, in turns, and write a row for each."""
    streams = {n: model.stream() for n in LENGTHS}
    E = model.config.llm_config.hidden_size
    for n, stream in streams.items():  # what came before is noise of a visual token's size: only its length matters
        stream.see(next(source))
        stream._stream.read(torch.randn(1, n - 2, E).to(model.llm.dtype) * model.config.visual_scale)
        _back_to(stream, n - 1)
    times: dict[int, list[float]] = {n: [] for n in LENGTHS}
    for turn in range(number + 1):
        for n, stream in streams.items():
            shown, start = next(source), time.process_time()
            stream.see(shown)
            if turn:  # the first one warms up
                times[n].append(time.process_time() - start)
            _back_to(stream, n - 1)
    first = statistics.median(times[LENGTHS[0]])
    with out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["frames", "frame_ms", "least_ms", "to_first", "turns"])
        for n, taken in times.items():
            median = statistics.median(taken)
            row = [n, f"{median * 1000:.1f}", f"{min(taken) * 1000:.1f}", f"{median / first:.3f}", number]
            table.writerow(row)
            print("frame {}: median {} ms, least {} ms, {} of the first".format(*row[:4]))


def _back_to(stream: FrameStream, n: int) -> None:
    stream._stream.memory.forget(n)
    stream.seen = n


def main() -> None:
    """Run the stream and write a row for every WINDOW frames."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--frames", type=int, default=3600)
    parser.add_argument("--pictures")
    parser.add_argument("--dtype", default="bf16", choices=TYPES)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--encode-every", type=int, default=1, help="encode only every so many-th frame (faster)")
    parser.add_argument("--turns", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = load(given.model, TYPES[given.dtype], given.size)
    source = frames(given.pictures, model.config.frame_size, np.random.default_rng(0))
    if given.turns:
        turns(model, source, given.turns, given.out or RESULTS / "stream_turns_cpu.csv")
        return
    stream = model.stream()
    spent = {"encode": 0.0}
    encode_only, kept = model.encoder.encode_only, []

    def timed(shown):
        start = time.process_time()
        if stream.seen % given.encode_every == 0:
            kept[:] = [encode_only(shown)]
        spent["encode"] = time.process_time() - start
        return kept[0]

    model.encoder.encode_only = timed
    rows, encode, rest = [], [], []
    wall, busy = time.time(), time.process_time()
    with (given.out or RESULTS / "stream_cpu.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["frames", "encode_ms", "look_and_read_ms", "stream_mb", "peak_rss_mb", "cpu_s", "wall_s"])
        for _ in range(given.frames):
            shown = next(source)
            start = time.process_time()
            stream.see(shown)
            rest.append(time.process_time() - start - spent["encode"])
            encode.append(spent["encode"])
            if stream.seen % WINDOW == 0:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                part = [statistics.median(times[-WINDOW:]) * 1000 for times in (encode, rest)]
                total = (time.process_time() - busy, time.time() - wall)
                row = [stream.seen, *part, stream.nbytes / 1e6, peak, *total]
                table.writerow([row[0], *(f"{value:.2f}" for value in row[1:])])
                file.flush()
                rows.append(row)
    print(f"{stream.nbytes / stream.tokens:.0f} bytes a frame")
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        print("frame {}: encode {:.1f} ms, look and read {:.1f} ms, peak {:.0f} MB".format(*row[:3], row[4]))
    print(f"total {rows[-1][5]:.0f} s of the processor, {rows[-1][6]:.0f} s")


if __name__ == "__main__":
    main()
