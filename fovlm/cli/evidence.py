"""From a trained model to numbers: eval."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fovlm.errors import UserError


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    app.command(name="eval", rich_help_panel="Training and evidence")(eval_)


def eval_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A converted model's folder, or a run's.")],
    sets: Annotated[
        str,
        typer.Option(help="Comma-separated NAMEs or NAME=PATHs: val, mvbench, videomme, scienceqa, pope, any shards."),
    ] = "val",
    modes: Annotated[
        str, typer.Option(help="coarse_only, coarse_fine, autoregressive; unless told, all that the model has.")
    ] = "",
    controls: Annotated[str, typer.Option(help="Beside each set: blind, shuffled, repeated, foreign.")] = "",
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the sets are; unless told, FOVLM_DATA.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Results; unless told, eval/NAME-OF-MODEL.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only N samples of each set, drawn by hash.")
    ] = None,
    batch: Annotated[int, typer.Option(min=2, metavar="N", help="Samples whose frames are encoded together.")] = 4,
    frames: Annotated[int, typer.Option(min=1, metavar="N", help="Most frames of a video.")] = 64,
    letters: Annotated[
        bool,
        typer.Option("--letters", help="List the options in the question and score their letters, not their texts."),
    ] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Go on without questions whose videos cannot be had.")
    ] = False,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Do part I (from 0) of N; the last part merges them all.")
    ] = "",
) -> None:
    """Score a model on prepared shards and on benchmarks.

    Shards give the loss of the answers, by source and by modality. Benchmarks are multiple choice: the option with the
    highest likelihood counts, as it is and per token. Nothing is generated; for generated answers there is lmms-eval,
    `docs/evaluation.md`, and the two never belong in one table.

    A killed run goes on when the same command is given again. Several GPUs: `torchrun --nproc-per-node 8 -m fovlm eval
    ...`, or --shard.

        fovlm eval converted/LR1 --sets val,mvbench --data data --controls blind,shuffled
        fovlm eval runs/quickstart
        fovlm eval converted/LR1 --sets scienceqa=downloads/ScienceQA --modes autoregressive --limit 500

    OUT/SET/MODE.json has the numbers, OUT/SET/MODE.jsonl a line for each sample, OUT/tables.md all tables. A control is
    a set of its own, like mvbench/blind: what a model still gets right there, it did not see.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("loading the model"):
        import torch
        from transformers.utils.logging import disable_progress_bar

        from fovlm.eval import tables
        from fovlm.eval.runner import Asked, run_eval
        from fovlm.eval.target import open_target
        from fovlm.fileio import write_atomically
        from fovlm.paths import data_root

        disable_progress_bar()  # ours is on already
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        part = part_of(shard)
        subject = open_target(model, device)
    asked = Asked(
        sets=words(sets), modes=words(modes), controls=words(controls), data=data or data_root(),
        out=out or Path("eval") / subject.name, limit=limit, batch=batch, most=frames, letters=letters,
        skip_missing=skip_missing, part=part,
    )  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=part[0] > 0) as bar:
        results = run_eval(subject, asked, lambda line: console.print(f"fovlm: {line}"), bar)
    if not results:
        console.print(f"part {part[0]} of {part[1]} is done; the last one to end tells the results")
        return
    shown = tables.main_tables(results)
    write_atomically(asked.out / "tables.md", tables.markdown([*shown, *tables.parts_tables(results)]))
    for title, table in shown:
        print(f"{title}\n  " + "\n  ".join(tables.text(table)) + "\n")
    for result in results:
        for reason, count in result["left_out"].items():
            name = "/".join(filter(None, (result["set"], result["control"], result["mode"])))
            console.print(f"fovlm: {name}: {count} left out: {reason}")
    print(f"more in {asked.out / 'tables.md'}")
    sys.stdout.flush()


def words(text: str) -> list[str]:
    """What stands between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def part_of(shard: str) -> tuple[int, int]:
    """(number, of how many) from I/N, or from torchrun's environment. Raises UserError."""
    if not shard:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    number, _, of = shard.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise UserError(f"--shard is I/N with I from 0 to N - 1, like 0/4, not '{shard}'")
    return int(number), int(of)
