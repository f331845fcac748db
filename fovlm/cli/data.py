"""Commands for data: prepare, check, data view, data stats."""

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fovlm.errors import EXIT_STOPPED, UserError, did_you_mean
from fovlm.fileio import refuse_occupied

QUESTIONS = ("name", "place", "left", "kind")  # of scenes
Workers = Annotated[int | None, typer.Option(min=1, help="Processes.  [default: one per core]")]
group = typer.Typer(help="Look at the data of a run as the model gets it.", no_args_is_help=True)


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="table, llava, messages: your own data; openvid, videos, cauldron, finevision, smoltalk, "
            "rlaif-v, scenes; mvbench, videomme, scienceqa, pope; or val: draw an evaluation set."
        ),
    ],
    raw: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="The raw data: a folder, its table, or hf://datasets/OWNER/NAME[/FOLDER]. For val: a pattern of "
            "shards.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards.")],
    name: Annotated[str, typer.Option(help="Shards are named NAME-00000.tar ...  [default: train; for val: val]")] = "",
    seed: Annotated[int, typer.Option(help="Of the order. The same seed gives the same bytes.")] = 0,
    workers: Workers = None,
    per_shard: Annotated[int, typer.Option(min=1, help="Rows of the raw data per shard.")] = 1000,
    media: Annotated[
        Path | None, typer.Option(help="Folder of the videos and pictures, when not beside the table.")
    ] = None,
    video: Annotated[str, typer.Option(metavar="COLUMN", help="table: the column of videos.")] = "",
    image: Annotated[str, typer.Option(metavar="COLUMN", help="table: the column of pictures.")] = "",
    question: Annotated[str, typer.Option(metavar="COLUMN", help="table: the column of questions.")] = "",
    answer: Annotated[str, typer.Option(metavar="COLUMN", help="table: the column of answers.")] = "",
    max_bad: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of the rows that may be rejected.  [default: 0.1 of your own data, all of others]"
        ),
    ] = None,
    rating: Annotated[
        list[str] | None, typer.Option(metavar="NAME=LEAST", help="finevision: keep exchanges rated so, `relevance=4`.")
    ] = None,
    stage: Annotated[
        int, typer.Option(min=0, max=3, help="messages, smoltalk: the third for stage 1, 2 or 3; 0: all.")
    ] = 0,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Benchmarks: skip questions whose files are missing.")
    ] = False,
    size: Annotated[int, typer.Option(min=14, help="Pixels of a frame's sides.")] = 224,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1, max=999, help="Maximum frames of a video, evenly spaced in longer ones.  [default: 64; scenes: 1]"
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="For val and scenes: how many to draw.  [default: 10000]")
    ] = None,
    objects: Annotated[
        str, typer.Option(metavar="N,N...", help="scenes: pictures in a scene, one of these numbers.")
    ] = "1,3,9",
    grid: Annotated[int, typer.Option(min=1, max=9, help="scenes: cells on a side.")] = 3,
    ask: Annotated[str, typer.Option(help="scenes: the question: `name`, `place`, `left` or `kind`.")] = "name",
    held_out: Annotated[
        bool, typer.Option("--held-out", help="scenes: only films, and names of `kind`, that no other scenes have.")
    ] = False,
    pictures: Annotated[
        int | None,
        typer.Option(
            min=1, help="scenes: pictures of each name; --held-out shows the next one in place of them.  [default: one]"
        ),
    ] = None,
) -> None:
    """Turn raw data into shards.

    One frame a second, short side 224, center crop, JPEG. Run the same command again to resume a killed run. OUT gets
    NAME-*.tar, manifest.json (their contents) and rejected.jsonl (the rejected rows and why).

        fovlm prepare table clips.csv data/mine --media clips --video file --question q --answer a
        fovlm prepare llava llava.json data/llava --media images
        fovlm prepare openvid raw/openvid pool/openvid
        fovlm prepare cauldron raw/the_cauldron pool/cauldron --workers 16
        fovlm prepare finevision hf://datasets/HuggingFaceM4/FineVision/ai2d pool/ai2d
        fovlm prepare smoltalk raw/smoltalk pool/smoltalk --stage 2
        fovlm prepare scenes raw data/scenes --samples 6000 --objects 1,3,9
        fovlm prepare val 'pool/*/train-*.tar' data/val --samples 10000
    """
    from fovlm.prepare.job import Job, SceneSettings
    from fovlm.prepare.pipeline import prepare as make
    from fovlm.prepare.sources import source_of
    from fovlm.prepare.summary import summarize_holdout, summarize_job

    workers = workers or os.cpu_count() or 1
    if Path(name).name != name:
        raise UserError(f"--name {name}: the start of the shards' names, without a folder")
    try:
        if source == "val":
            from fovlm.prepare.holdout import draw

            drawn_set = draw(raw, out, name or "val", samples or 10_000, seed, workers)
            print("\n".join(summarize_holdout(out, drawn_set)))
            return
        drawn = (
            SceneSettings(samples or 10_000, objects, grid, frames or 1, ask, held_out, pictures)
            if source == "scenes"
            else None
        )
        if samples is not None and not drawn:
            raise UserError(f"--samples is for val and scenes; all of {source} is prepared")
        if ask not in QUESTIONS:
            raise UserError(f"--ask {ask}: it is {' or '.join(QUESTIONS)}{did_you_mean(ask, QUESTIONS)}")
        if raw.startswith("hf:"):
            from fovlm.prepare.hub import fetch_dataset

            raw = str(fetch_dataset(raw))
        job = Job(
            source, Path(raw), out, name or "train", seed, per_shard, size, frames or 64, media=media, stage=stage,
            columns=_columns(source, video, image, question, answer), ratings=_ratings(rating or []),
            skip_missing=skip_missing, scenes=drawn,
        )  # fmt: skip
        kind = source_of(job)
        job = replace(job, max_bad=kind.max_bad if max_bad is None else max_bad)
        print("\n".join(summarize_job(out, make(job, workers), kind)))
    except OSError as error:  # a full disk, a folder without write permission
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; when that is fixed, the same command resumes"
        ) from error
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one would interrupt the clean-up
        print("stopped; the same command resumes", flush=True)
        for worker in multiprocessing.active_children():
            worker.kill()  # at once: only complete shards have names
        raise SystemExit(EXIT_STOPPED) from None


def check(
    patterns: Annotated[
        list[str], typer.Argument(metavar="PATTERN...", help="Shards: 'data/openvid/train-*.tar' (in quotes).")
    ],
    against: Annotated[
        list[str] | None, typer.Option(help="Shards that must share no sample and no picture with these.")
    ] = None,
    repair: Annotated[
        Path | None, typer.Option(help="Write the shards without the bad samples into this new folder.")
    ] = None,
    workers: Workers = None,
    pictures: Annotated[bool, typer.Option(help="Decode every picture and video.")] = True,
) -> None:
    """Check shards for everything that training would reject.

    Structure, checksums of the manifest, pictures and videos that do not decode, empty answers, duplicates, and, with
    --against, samples or pictures that are also in an evaluation set. The shards do not change; --repair writes copies.

    Exit status: 0 no problems (or repaired), 1 problems, 2 an error in the command.

        fovlm check 'pool/openvid/train-*.tar' --against 'data/val/*.tar' --repair data/openvid
    """
    from fovlm.prepare.check import check_shards, problems
    from fovlm.prepare.repair import repair as write
    from fovlm.prepare.summary import summarize_check

    if repair is not None:
        refuse_occupied(repair)
    scans = check_shards(patterns, against or [], workers or os.cpu_count() or 1, pictures)
    print("\n".join(summarize_check(scans)))
    if repair is not None:
        try:
            left = write(scans, repair)
        except OSError as error:  # a full disk, a folder without write permission
            raise UserError(f"--repair {repair}: {error.strerror or error}") from error
        print(f"{left} samples in {repair}")
    elif problems(scans):
        raise typer.Exit(1)


Run = Annotated[str, typer.Argument(metavar="RUN|PATTERN", help="A run of experiments/, or shards: 'data/*.tar'.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="Other settings.")]


@group.command()
def view(
    name: Run,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="About so many samples.")] = 50,
    out: Annotated[Path, typer.Option(help="The file.")] = Path("samples.html"),
) -> None:
    """Write one HTML file of the first samples of a run, or of shards as LR1 reads them: frames, tokens by their weight
    in the loss, packs, what was cut.

        fovlm data view quickstart
        fovlm data view 'data/mine/train-*.tar' model.tokenizer=models/words
    """
    from fovlm.viz.samples import write_page

    dataset, budget, packs = _open(name, overrides)
    print(f"{write_page(dataset, budget, packs, samples, out)} samples in {out}")


@group.command()
def stats(name: Run, overrides: Overrides = None) -> None:
    """Print what a run, or LR1 of these shards, reads: samples, frames and tokens of each source, what is repeated or
    broken, the mix, how full packs are.

        fovlm data stats quickstart
        fovlm data stats 'data/mine/train-*.tar' model.tokenizer=models/words
    """
    from fovlm.viz.samples import stats as tables

    print(tables(*_open(name, overrides)))


def _open(name: str, overrides: list[str] | None):
    """(the training data of a run or a pattern of shards, the budget of its packs, how many of them a step has)."""
    from fovlm.config.schema import DataSource, load
    from fovlm.data import synthetic
    from fovlm.data.dataset import open_dataset, pack_budget
    from fovlm.data.index import open_indices
    from fovlm.data.shards import find_shards
    from fovlm.data.tokenizers import open_tokenizer
    from fovlm.paths import cache_root

    shards = name.endswith(".tar") or "*" in name
    experiment = load("LR1" if shards else name, overrides)
    if shards:
        pattern = name if "://" in name else str(Path(name).absolute())
        indices = open_indices(find_shards("shards", pattern), cache_root())
        pairs = any(index.preference.any() for index in indices)
        source = DataSource(shards=pattern, kind="preference" if pairs else "mixed", prompt="Describe this.")
        data = experiment.data.model_copy(
            update={"sources": {"shards": source}, "mixture": {"shards": 1.0}, "first": {}}
        )
        experiment = experiment.model_copy(update={"data": data})
    if task := experiment.data.generate:
        synthetic.make(task)
    tokenizer = open_tokenizer(experiment)
    dataset = open_dataset(experiment, tokenizer, experiment.data.mixture, weigh=True)
    return dataset, pack_budget(experiment), experiment.train.packs_per_step


def _columns(source: str, *named: str) -> tuple[tuple[str, str], ...]:
    columns = [pair for pair in zip(("video", "image", "question", "answer"), named, strict=True) if pair[1]]
    if columns and source != "table":
        raise UserError(f"--{columns[0][0]} names a column for the source table; {source} has columns of its own")
    return tuple(columns)


def _ratings(given: list[str]) -> tuple[tuple[str, float], ...]:
    from fovlm.prepare.sources.cauldron import RATINGS

    found = []
    for one in given:
        name, _, least = one.partition("=")
        if name not in RATINGS or not least.replace(".", "", 1).isdigit():
            raise UserError(f"--rating {one}: NAME=LEAST with one of {', '.join(RATINGS)}{did_you_mean(name, RATINGS)}")
        found.append((name, float(least)))
    return tuple(found)
