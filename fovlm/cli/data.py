"""Making and checking data: prepare, check."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    app.command(name="prepare", rich_help_panel="Data")(prepare)
    app.command(name="check", rich_help_panel="Data")(check)


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="openvid, webvid, videos, cauldron, smoltalk, rlaif-v; mvbench, videomme, scienceqa, pope; "
            "or val: draw an evaluation set."
        ),
    ],
    raw: Annotated[
        str, typer.Argument(metavar="IN", help="The raw data: a folder or its table. For val: shards, as a pattern.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards.")],
    name: Annotated[
        str, typer.Option(help="Shards are called NAME-00000.tar ...  [default: train; for val: val]")
    ] = "",
    seed: Annotated[int, typer.Option(help="Decides the order. The same seed gives the same bytes.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core unless told.")] = None,
    per_shard: Annotated[int, typer.Option(min=1, help="Rows of the raw data that make a shard.")] = 1000,
    videos: Annotated[Path | None, typer.Option(help="Folder with the videos, when not beside the table.")] = None,
    turns: Annotated[
        str,
        typer.Option(
            help="Of a conversation: the `first` exchange, or `each` as a sample.  [default: each for cauldron]"
        ),
    ] = "",
    stage: Annotated[int, typer.Option(min=0, max=3, help="smoltalk: the third for stage 1, 2 or 3; 0 takes all.")] = 0,
    tokenize: Annotated[
        str, typer.Option(help="Store token ids ahead of time: `stage1` (all text) or `sft` (answers).")
    ] = "",
    tokenizer: Annotated[str, typer.Option(help="For --tokenize: folder or Hugging Face id.")] = "",
    prompt: Annotated[str, typer.Option(help="For --tokenize: what is asked where a row has no question.")] = "",
    exclude: Annotated[
        Path | None, typer.Option(help="taken.jsonl of an evaluation set: leave out what is in it.")
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Benchmarks: leave out questions whose files are not there.")
    ] = False,
    size: Annotated[int, typer.Option(min=14, help="Pixels of a frame's sides.")] = 224,
    most: Annotated[
        int, typer.Option(min=1, max=999, help="Frames of a video; longer ones are thinned out evenly.")
    ] = 64,
    samples: Annotated[int | None, typer.Option(min=1, help="For val: how many to draw; 10,000 unless told.")] = None,
) -> None:
    """Turn raw data into shards.

    One frame a second, short side 224, the middle square, JPEG. A killed run goes on where it was when the same command
    is given again. OUT gets NAME-*.tar, manifest.json (what is in them) and rejected.jsonl (what is not, and why).

        fovlm prepare openvid raw/openvid pool/openvid
        fovlm prepare cauldron raw/the_cauldron pool/cauldron --workers 16
        fovlm prepare smoltalk raw/smoltalk pool/smoltalk --stage 2
        fovlm prepare val 'pool/*/train-*.tar' data/val --samples 10000
    """
    import os

    from rich.console import Console

    from fovlm.errors import EXIT_STOPPED, UserError, did_you_mean
    from fovlm.prepare.job import Job
    from fovlm.prepare.pipeline import prepare as make
    from fovlm.prepare.registry import source_of
    from fovlm.prepare.summary import print_holdout, print_manifest

    console = Console(highlight=False, soft_wrap=True)
    workers = workers or os.cpu_count() or 1
    if Path(name).name != name:
        raise UserError(f"--name {name}: the start of the shards' names, without a folder")
    try:
        if source == "val":
            from fovlm.prepare.holdout import draw

            print_holdout(console, out, draw(raw, out, name or "val", samples or 10_000, seed, workers, console))
            return
        kind = source_of(source)
        if samples is not None:
            raise UserError(f"--samples is for val; of {source} all is made")
        for option, value, allowed in (
            ("--tokenize", tokenize, ("stage1", "sft")),
            ("--turns", turns, ("first", "each")),
        ):
            if value and value not in allowed:
                raise UserError(f"{option} {value}: it is {' or '.join(allowed)}{did_you_mean(value, allowed)}")
        job = Job(
            source, Path(raw), out, name or "train", seed, per_shard, size, most, videos=videos, stage=stage,
            turns=turns or kind.turns, tokenize=tokenize, tokenizer=tokenizer, prompt=prompt, exclude=exclude,
            skip_missing=skip_missing,
        )  # fmt: skip
        print_manifest(console, out, make(job, workers, console), kind)
    except OSError as error:  # a full disk, a folder that may not be written to
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; when that is mended, the same command goes on"
        ) from error
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        os._exit(EXIT_STOPPED)  # at once: workers end with this process, and only whole shards have their names


def check(
    patterns: Annotated[
        list[str], typer.Argument(metavar="PATTERN...", help="Shards: 'data/openvid/train-*.tar' (quote it).")
    ],
    against: Annotated[
        list[str] | None, typer.Option(help="Shards that must share no sample and no picture with these.")
    ] = None,
    repair: Annotated[
        Path | None, typer.Option(help="Write the shards without the bad samples into this new folder.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core unless told.")] = None,
    pictures: Annotated[bool, typer.Option(help="Decode every picture and video.")] = True,
) -> None:
    """Look through shards for what training would stumble over.

    Structure, checksums of the manifest, pictures and videos that do not decode, empty answers, duplicates, and, with
    --against, samples or pictures that an evaluation set also has. Nothing is changed; --repair writes copies.

    Exit status: 0 nothing found (or repaired), 1 problems found, 2 a mistake in the command.

        fovlm check 'pool/openvid/train-*.tar' --against 'data/val/*.tar' --repair data/openvid
    """
    import os

    from rich.console import Console

    from fovlm.errors import UserError
    from fovlm.prepare.check import audit
    from fovlm.prepare.repair import repair as write
    from fovlm.prepare.summary import print_check

    console = Console(highlight=False)
    workers = workers or os.cpu_count() or 1
    if repair is not None and repair.exists() and (not repair.is_dir() or any(repair.iterdir())):
        raise UserError(f"--repair {repair}: it is there and not an empty folder; give a new one")
    found = audit(patterns, against or [], workers, pictures, console)
    print_check(console, found)
    if repair is not None:
        try:
            left = write(found, repair, console)
        except OSError as error:  # a full disk, a folder that may not be written to
            raise UserError(f"--repair {repair}: {error.strerror or error}") from error
        console.print(f"{left} samples in {repair}")
    elif found.problems:
        raise typer.Exit(1)
