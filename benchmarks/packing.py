"""How much of the packs is real, and how equal they are, for ten mixes of data. No model, no data, no GPU.

    python -m benchmarks.packing            # the table of docs/performance.md
    python -m benchmarks.packing --check    # exits 1 when a share is below 97 %

Samples are drawn: frames of a clip log-normal (sigma 0.8) with the mean that the row names, between 1 and 64; 40 to 300
text tokens with a clip or a picture, half of them ahead of the frames; text-only samples have 40 to 512.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np

from fovlm.config.schema import load
from fovlm.data.packing import EMPTY, PackBudget, PackSize, pack_samples, pack_shape, round_up
from fovlm.estimate.dry_run import real_shares
from fovlm.estimate.flops import sample_cost, total
from fovlm.estimate.shapes import geometry

AIM = 0.97
PACK_COST, FRAME_COST = 4096, 32  # experiments/defaults.yaml
MOST_FRAMES = 64


@dataclass(frozen=True)
class Mix:
    """Mean frames of a clip, shares of pictures and of text among the samples, looks at a picture."""

    frames: float
    pictures: float = 0.0
    text: float = 0.14
    looks: int = 1


MIXES = {f"mean {mean:g}": Mix(mean) for mean in (5.7, 8, 12, 16, 30)}
MIXES |= {f"D1, pictures x{looks}": Mix(5.7, 0.30, 0.15, looks) for looks in (1, 8)}
MIXES |= {name: Mix(5.7, 0.86, 0.14, looks) for name, looks in (("A8a", 1), ("A8b", 16))}


@dataclass
class Measured:
    """Real share by what is padded, the largest pack over the mean by budget and by FLOPs, shapes, samples a step."""

    real: dict[str, float]
    by_cost: float
    by_flops: float
    shapes: int
    samples: float
    seconds: float  # of planning a step


def sizes_of(mix: Mix, n: int, seed: int = 0) -> np.ndarray:
    """Frames, looks, text, prompt and 0 frames seen again i64 [n, 5] of drawn samples."""
    random = np.random.default_rng(seed)
    kind = random.choice(3, n, p=[1 - mix.pictures - mix.text, mix.pictures, mix.text])  # clip, picture, text
    frames = np.where(kind == 0, _clips(mix.frames, n, random), kind == 1)
    looks = np.where(kind == 1, mix.looks, frames)
    text = np.where(kind == 2, random.integers(40, 513, n), random.integers(40, 301, n))
    ahead = np.where(kind == 2, 0, text // 2)
    return np.stack([frames, looks, text, ahead, 0 * frames], axis=1).astype(np.int64)


def _clips(mean: float, n: int, random: np.random.Generator) -> np.ndarray:
    """Log-normal frame counts whose mean, once clipped, is `mean`."""
    draws = np.exp(0.8 * random.standard_normal(n))
    low, high = 0.1, 200.0
    for _ in range(50):
        middle = (low + high) / 2
        counts = np.clip(np.round(draws * middle), 1, MOST_FRAMES)
        low, high = (middle, high) if counts.mean() < mean else (low, middle)
    return counts


def measured(name: str, steps: int = 100, packs: int = 8) -> Measured:
    """Plan so many steps of a mix."""
    mix, budget = MIXES[name], PackBudget(PACK_COST, FRAME_COST)
    sizes = sizes_of(mix, steps * packs * 60)
    experiment = load("LR1", [f"data.image_frames={mix.looks}"])
    shapes = geometry(experiment.model)
    packed: list[list[PackSize]] = []
    seen, imbalance, taken, seconds = set(), [], 0, 0.0
    for _ in range(steps):
        window = sizes[taken : taken + packs * 60]
        begun = time.process_time()
        contents, n = pack_samples(window, packs, budget)
        seconds += time.process_time() - begun
        assert n < len(window)
        costs, flops = [], []
        for pack in contents:
            rows = [PackSize(*row) for row in window[pack].tolist()]
            used = sum(rows, EMPTY)
            shape = pack_shape(used, all(size.looks == size.frames for size in rows))
            ahead, sequence = used.looks + used.prompt, used.looks + used.text
            packed.append(rows)
            seen.add((shape.frames, shape.looks, round_up(ahead), round_up(sequence), shape.text))
            costs.append(float(budget.of(window[pack]).sum()))
            flops.append(sum(total(sample_cost(experiment, shapes, size)).total for size in rows))
        imbalance.append([max(x) / np.mean(x) for x in (costs, flops)])
        taken += n
    by_cost, by_flops = np.mean(imbalance, axis=0)
    return Measured(real_shares(packed), by_cost, by_flops, len(seen), taken / steps, seconds / steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"exit 1 when a share is below {AIM:.0%}")
    check = parser.parse_args().check
    print("| mix | frames | prefix | sequence | text | largest pack / mean, by cost | by FLOPs | samples a step |")
    print("|---|---|---|---|---|---|---|---|")
    worst = 1.0
    for name in MIXES:
        found = measured(name)
        worst = min(worst, *found.real.values())
        shares = " | ".join(f"{share:.1%}" for share in found.real.values())
        print(f"| {name} | {shares} | {found.by_cost:.3f} | {found.by_flops:.3f} | {found.samples:.0f} |")
    return int(check and worst < AIM)


if __name__ == "__main__":
    sys.exit(main())
