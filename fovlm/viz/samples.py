"""Data as the model gets it: a page of the first samples of a run, and the numbers of its sources and packs."""

import base64
from html import escape
from itertools import islice
from pathlib import Path

import numpy as np

from fovlm.data.dataloader import plan_steps
from fovlm.data.dataset import Dataset
from fovlm.data.packing import PackBudget, Sample
from fovlm.estimate.dry_run import real_shares
from fovlm.fileio import write_atomically
from fovlm.media.encode import encode_jpeg
from fovlm.tables import text_table

SHOWN = 16  # frames of a sample
STEPS = 20  # that are planned for the share of the packs
SAMPLED = 20_000  # positions that are looked at for the mix
HEAD = """<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="default-src 'none';
img-src data:; style-src 'unsafe-inline'"><title>samples</title><style>body{font:15px sans-serif;max-width:70em;
margin:2em auto}img{height:7em;margin:1px}article{border-top:1px solid #bbb;padding:.6em 0}small{color:#666}
p{line-height:1.7}b{font-weight:normal;border-radius:2px;white-space:pre-wrap}.bad{color:#b00}</style>
<p>Frames as they are encoded, then the tokens: the greener, the more one counts in the loss. The frames are at the
<mark>|</mark>.</p>"""


def write_page(dataset: Dataset, budget: PackBudget, packs: int, samples: int, out: Path) -> int:
    """Write an HTML file of about so many samples from the start of a run, pack by pack -> how many.

    Frames as they are encoded, tokens coloured by their weight in the loss, `|` where the frames are, what was cut.
    """
    parts, count = [HEAD], 0
    for step, plan in enumerate(plan_steps(dataset, budget, packs, 0), start=1):
        for number, positions in enumerate(plan.packs):
            parts.append(f"<h2>step {step}, pack {number}</h2>")
            for position in positions:
                found, issue = dataset.read(position)
                if issue:
                    where = escape(f"{issue.source}: {issue.key} in {issue.shard}: {issue.cause}")
                    parts.append(f'<p class="bad">{where}; another one is read in its place</p>')
                parts += [_article(sample, position, dataset) for sample in found]
                count += len(found)
            if count >= samples:
                write_atomically(out, "\n".join(parts))
                return count
    return count


def stats(dataset: Dataset, budget: PackBudget, packs: int) -> str:
    """Tables of the sources, of what is broken in them, and of how they are read and packed.

    `same frames` counts samples whose pictures or video an earlier one has, `and texts` groups that repeat one.
    """
    most = min(SAMPLED, sum(dataset.samples.values()) * 2)
    sizes, (chosen, _) = dataset.sizes(0, most), dataset.mix.window(0, most)
    head = ["source", "groups", "conversations", "frames", "tokens", "most tokens", "of samples", "of tokens"]
    head += ["same frames", "and texts"]
    rows, broken = [head], [["broken", "source", "count"]]
    for which, source in enumerate(dataset.sources):
        held, mine = source.table.rows, sizes[chosen == which]
        good = held[held["cause"] == 0]
        frames, tokens = (good[name].mean() if len(good) else 0.0 for name in ("frames", "text"))
        share, of_tokens = len(mine) / most, mine[:, 2].sum() / max(sizes[:, 2].sum(), 1)
        longest = int(good["text"].max()) if len(good) else 0
        numbers = [len(held), int(held["texts"].sum()), f"{frames:.1f}", f"{tokens:.1f}", longest]
        shown = good[(good["frames"] > 0) & (good["conversation"] == 0)]["media_id"]
        repeated = [len(ids) - len(np.unique(ids)) for ids in (shown, good[["media_id", "tokens_crc32"]])]
        rows.append([source.name, *map(str, numbers), f"{share:.1%}", f"{of_tokens:.1%}", *map(str, repeated)])
        broken += [[cause, source.name, str(count)] for cause, count in source.table.broken.most_common()]
    plans = list(islice(plan_steps(dataset, budget, packs, 0), STEPS))
    real = real_shares([dataset.size(position) for position in pack] for plan in plans for pack in plan.packs)
    taken = f"{plans[-1].cursor / STEPS:.1f} groups a step of {packs} packs"
    ending = f"{taken}, whose frames are {real['frames']:.1%} and tokens {real['text']:.1%} real"
    return "\n".join([text_table(rows), *([text_table(broken)] if len(broken) > 1 else []), ending])


def _article(sample: Sample, position: int, dataset: Dataset) -> str:
    pictures = sample.frames[: 0 if sample.shares else SHOWN].permute(0, 2, 3, 1).numpy()
    jpegs = (base64.b64encode(encode_jpeg(frame)).decode() for frame in pictures)
    images = "".join(f'<img alt="" src="data:image/jpeg;base64,{jpeg}">' for jpeg in jpegs)
    most, tokenizer = max(float(sample.weight.max()), 1e-9), dataset.chat.tokenizer
    words = []
    for n, (token, weight) in enumerate(zip(sample.tokens.tolist(), sample.weight.tolist(), strict=True)):
        words += [" <mark>|</mark> "] if n == sample.prompt and len(sample.frames) else []
        colour = f"background:rgba(80,180,80,{weight / most:.2f})"
        words.append(f'<b style="{colour}" title="{weight:g}">{escape(tokenizer.decode([token]))}</b>')
    facts = [f"position {position}", sample.source, escape(sample.key), f"{len(sample.frames)} frames"]
    facts += [f"{sample.looks} looks", f"{len(sample.tokens)} tokens"]
    facts += ["the same frames"] if sample.shares else []
    facts += ["the limit, so perhaps cut"] if len(sample.tokens) == dataset.chat.most else []
    return f"<article><small>{' &middot; '.join(facts)}</small><br>{images}<p>{' '.join(words)}</p></article>"
