"""A tiny run of `fovlm.train` on the CPU: its settings, its data, and the command that starts it."""

import csv
import math
from pathlib import Path

from fovlm.checkpoint.run_folder import Row, read_metrics
from fovlm.data.shards import write_shards
from helpers import ROOT, tiny

STEPS = 20
SETTINGS = [
    "data.sources={video: {kind: video, shards: 'video-{00..07}.tar'}, "
    "words: {kind: text, shards: 'words-{00..01}.tar'}, broken: {kind: image, shards: 'broken-00.tar'}, "
    "pictures: {kind: image, shards: 'pictures-00.tar'}, pairs: {kind: preference, shards: 'pairs-00.tar'}}",
    "data.mixture={video: 80, words: 14, broken: 6}",
    *(
        "data.val=[video]",
        "data.pack_cost=300",
        "data.frame_cost=16",
        "data.max_frames=4",
        "data.max_tokens=48",
        "data.workers=1",
    ),
    "model.llm={vocab_size: 64, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, tie_word_embeddings: true}",
    "model.encoder={hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 2, image_size: 28, patch_size: 7}",
    *("model.frame_size=28", "model.query_dim=24"),
    *("optim.lr_connector=2e-3", "optim.lr_encoder=1e-3", "optim.lr_llm=4e-3"),
    *(f"train.steps={STEPS}", "train.packs_per_step=4", "train.log_every=1"),
    *("train.eval_every=10", "train.eval_packs=4", "train.save_every=5", "logger.wandb=disabled"),
]


def write_data(folder: Path) -> Path:
    """A tokenizer, and the shards of the sources in SETTINGS."""
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    tiny.clips(folder, "video", [3, 4, 2, 4, 3] * 8)
    tiny.clips(folder, "words", [0] * 10)
    broken = [picture(f"p{i}", 0) for i in range(4)]
    broken[2]["jpg"] = b"\xff\xd8 no picture"
    write_shards(folder / "broken-%02d.tar", broken)
    colours = ("red", "blue")
    write_shards(
        folder / "pictures-%02d.tar",
        [picture(f"q{i}", 200 * (i % 2) + i, assistant=f"it is {colours[i % 2]}") for i in range(24)],
    )
    write_shards(
        folder / "pairs-%02d.tar",
        [
            picture(f"r{i}", 200 * (i % 2) + i, chosen=f"it is {colours[i % 2]}", rejected=colours[1 - i % 2])
            for i in range(24)
        ],
    )
    return folder


def picture(key: str, grey: int, **record: str) -> dict:
    """A sample of one JPEG."""
    return {"__key__": key, "json": tiny.conversation() | record, "jpg": tiny.picture(grey)}


def arguments(home: Path, name: str, *more: str) -> list[str]:
    """The name and the overrides of a run on the data that `write_data` put into `home`."""
    return ["LR1", *SETTINGS, f"model.tokenizer={home / 'tokenizer'}", f"name={name}", *more]


def environment(home: Path) -> dict[str, str]:
    return {"FOVLM_DATA": str(home), "FOVLM_RUNS": str(home / "runs"), "FOVLM_CACHE": str(home / "cache")}


def rows(home: Path, name: str) -> list[Row]:
    """What a run has logged so far."""
    return read_metrics(home / "runs" / name)


def golden_file(name: str) -> Path:
    return ROOT / "tests" / "golden" / f"{name}.csv"


def write_golden(name: str, losses: list[float]) -> None:
    golden_file(name).write_text("step,loss\n" + "".join(f"{n},{loss!r}\n" for n, loss in enumerate(losses, 1)))


def assert_golden(name: str, losses: list[float]) -> None:
    """Every step's loss is the one in tests/golden/NAME.csv, to 1e-5 of it."""
    with golden_file(name).open() as file:
        golden = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == len(golden) == STEPS
    for step, (loss, wanted) in enumerate(zip(losses, golden, strict=True), 1):
        assert math.isclose(loss, wanted, rel_tol=1e-5), f"step {step} of {name}: {loss!r}, not {wanted!r}"
