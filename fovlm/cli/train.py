"""Commands for training: train, sweep."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fovlm.errors import UserError


class Verbatim(TyperCommand):
    """A command that gets its arguments as they are, `--` among them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args in (["-h"], ["--help"]):
            return super().parse_args(ctx, args)
        ctx.args = args
        return args


def train(context: typer.Context) -> None:
    """Train one run: NAME [section.key=value ...] [--resume auto|none|PATH] [--dry-run] [-- LAUNCHER OPTIONS].

    `fovlm train --list` shows all runs, `fovlm train quickstart` is a good first. Files `experiments/*.yaml` in the
    current folder add runs. NUM_GPUS, CPU_RANKS and HOSTFILE say where to train; FOVLM_DATA, FOVLM_MODELS, FOVLM_RUNS
    and FOVLM_CACHE are the folders of shards, models, runs and caches.
    """
    from fovlm.launch.main import COMMAND, main
    from fovlm.paths import INSTALLED

    if not INSTALLED:
        os.environ.setdefault("FOVLM_PYTHON", sys.executable)
        os.execv(COMMAND[0], [*COMMAND, *context.args])
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # deepspeed and ninja
    raise typer.Exit(main(context.args))


def sweep(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATTERN... [section.key=value ...]", help="`ablations/*`, `LR1 A1`, `135M-*`"),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Repeats of each run: NAME, NAME-s1 ...  [default: as its file says]")
    ] = None,
    gpus: Annotated[
        str, typer.Option(help="GPUs to share among the runs, like 0,1,2,3.  [default: all GPUs for each run]")
    ] = "",
    per_run: Annotated[int, typer.Option(min=1, help="GPUs per run.")] = 1,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time on the CPU.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes per run on the CPU.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Retrain runs that were made with other settings.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be trained, and how long.")] = False,
    price: Annotated[float | None, typer.Option(help="With --dry-run: price of a GPU hour.")] = None,
    flops_per_second: Annotated[
        float | None, typer.Option(help="With --dry-run: FLOP/s of one GPU.  [default: measured, from runs.csv]")
    ] = None,
) -> None:
    """Train many experiments.

    Finished runs are skipped, interrupted runs resume, a failed run prints the tail of its log, and the sweep
    continues.

        fovlm sweep 'ablations/*' --dry-run
        fovlm sweep LR1 A1 --gpus 0,1,2,3 --per-run 2 optim.lr_llm=2e-5
    """
    from fovlm.sweep.progress import SweepProgress
    from fovlm.sweep.runner import Slot, SweepRunner, cpu_slots, exit_status, gpu_slots
    from fovlm.sweep.select import plan, select
    from fovlm.train.process import keep_running_without_output

    words = what or []
    patterns, overrides = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    if (flops_per_second is not None and flops_per_second <= 0) or (price is not None and price < 0):
        raise UserError("--flops-per-second must be above 0, and --price at least 0")
    if per_run > 1 and not gpus:
        raise UserError("--per-run divides the GPUs of --gpus: give both")
    if gpus and (jobs or ranks):
        raise UserError("--gpus excludes --jobs and --ranks, which are for the CPU")
    planned = plan(select(patterns), overrides, seeds)
    if gpus:
        slots = gpu_slots(gpus.split(","), per_run)
    elif jobs or ranks:
        slots = cpu_slots(jobs or 1, ranks or (1 if jobs and jobs > 1 else 2))
    else:
        slots = [Slot()]
    if dry_run:
        from fovlm.launch.resources import find_resources
        from fovlm.paths import run_root
        from fovlm.sweep import cost, table

        where = find_resources()
        on_gpu = bool(gpus) or (where.device == "cuda" and not jobs and not ranks)
        each = per_run if gpus else int(slots[0].env.get("CPU_RANKS", where.world))
        found = cost.estimates(planned, table.read(run_root()), each, on_gpu, flops_per_second)
        print(cost.describe(found, len(slots), price, on_gpu))
        return
    keep_running_without_output()
    with SweepProgress(len(planned)) as progress:
        results = SweepRunner(planned, slots, progress).work(again)
    raise typer.Exit(exit_status(results, planned, progress.say))
