"""Commands for evaluation: eval, report."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fovlm.errors import UserError, say


def eval_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a converted model or of a run.")],
    sets: Annotated[
        str,
        typer.Option(help="Comma-separated NAMEs or NAME=PATHs: val, mvbench, videomme, scienceqa, pope, any shards."),
    ] = "val",
    modes: Annotated[
        str, typer.Option(help="coarse_only, coarse_fine, autoregressive.  [default: all that the model has]")
    ] = "",
    controls: Annotated[str, typer.Option(help="Also score each set under blind, shuffled, repeated, foreign.")] = "",
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the sets.  [default: FOVLM_DATA]")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the results.  [default: eval/NAME-OF-MODEL]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Score N samples of each set, chosen by hash.")
    ] = None,
    batch: Annotated[int, typer.Option(min=2, metavar="N", help="Samples whose frames are encoded together.")] = 4,
    frames: Annotated[int, typer.Option(min=1, metavar="N", help="Maximum frames of a video.")] = 64,
    letters: Annotated[
        bool,
        typer.Option("--letters", help="List the options in the question and score their letters, not their texts."),
    ] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Skip questions whose videos are missing or unreadable.")
    ] = False,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Score part I (from 0) of N; the last part to finish merges them.")
    ] = "",
) -> None:
    """Score a model on prepared shards and on benchmarks.

    Shards give the loss of the answers, by source and by modality. Benchmarks are multiple choice: the option with the
    highest likelihood counts, in total and per token. Nothing is generated; for generated answers use lmms-eval
    (`docs/evaluation.md`), and never put the two in one table.

    Run the same command again to resume a killed run. Several GPUs: `torchrun --nproc-per-node 8 -m fovlm eval ...`, or
    --shard.

        fovlm eval converted/LR1 --sets val,mvbench --data data --controls blind,shuffled
        fovlm eval runs/quickstart
        fovlm eval converted/LR1 --sets scienceqa=downloads/ScienceQA --modes autoregressive --limit 500

    OUT/SET/MODE.json has the metrics, OUT/SET/MODE.jsonl a line for each sample, OUT/tables.md all tables. A control is
    a set of its own, like mvbench/blind: what a model still gets right there, it did not see.
    """
    from fovlm.cli.progress import progress

    with progress("loading the model"):
        import torch
        from transformers.utils.logging import disable_progress_bar

        from fovlm.eval import tables
        from fovlm.eval.runner import EvalSettings, run_eval
        from fovlm.eval.target import open_target
        from fovlm.fileio import write_atomically
        from fovlm.paths import data_root
        from fovlm.tables import text_table

        disable_progress_bar()  # of transformers
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        part = _part(shard)
        target = open_target(model, device)
    settings = EvalSettings(
        sets=_names(sets), modes=_names(modes), controls=_names(controls), data=data or data_root(),
        out=out or Path("eval") / target.name, limit=limit, batch=batch, max_frames=frames, letters=letters,
        skip_missing=skip_missing, part=part,
    )  # fmt: skip
    results = run_eval(target, settings, say)
    if not results:
        say(f"part {part[0]} of {part[1]} is done; the last part to finish prints the results")
        return
    shown = tables.main_tables(results)
    write_atomically(settings.out / "tables.md", tables.markdown([*shown, *tables.group_tables(results)]))
    for title, table in shown:
        print(f"{title}\n{text_table(table)}\n")
    for result in results:
        name = "/".join(filter(None, (result["set"], result["control"], result["mode"])))
        for reason, count in result["skipped"].items():
            say(f"{name}: {count} skipped: {reason}")
    print(f"all tables: {settings.out / 'tables.md'}", flush=True)


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUNS...", help="Run folders, folders of them, globs, or patterns of names: 'nano/*'"),
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md, figures and CSV files.")],
    title: Annotated[str, typer.Option(help="Title of the page.")] = "What the runs say",
) -> None:
    """Write a report of runs: figures, and conclusions with their rules, numbers and uncertainty."""
    from fovlm.report.build import write_report

    print(f"written: {write_report(runs, out, title)}")


def _names(text: str) -> list[str]:
    """Comma-separated names, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _part(shard: str) -> tuple[int, int]:
    """(number, of how many) from I/N, or from torchrun's environment. Raises UserError."""
    if not shard:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    number, _, of = shard.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise UserError(f"--shard is I/N with I from 0 to N - 1, like 0/4, not '{shard}'")
    return int(number), int(of)
