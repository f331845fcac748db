"""`python -m fovlm.train NAME [section.key=value ...]`: from the name of an experiment to a trained model.

    experiment -> data set -> model -> engine (-> resume) -> steps -> scores, maps, summary

Every rank runs this file; what one rank decides is shared before anyone acts on it. `launch.sh` starts the ranks.
"""

import argparse
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch

from fovlm import distributed
from fovlm.checkpoint import store
from fovlm.checkpoint.locate import load_weights
from fovlm.checkpoint.reference import choose_reference_batch
from fovlm.config import deepspeed, schema
from fovlm.config.schema import Experiment
from fovlm.data import synthetic_shards
from fovlm.data.chat import load_tokenizer
from fovlm.data.dataloader import PackLoader, StepBatches, plan_steps, samples_that_fill
from fovlm.data.dataset import Dataset, open_dataset, pack_budget, tokenizer_path
from fovlm.data.packing import Batch, SampleIssue
from fovlm.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from fovlm.estimate.flops import mean_cost, samples_of, total
from fovlm.estimate.shapes import geometry
from fovlm.model.build import build, check_vocabulary
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.modes import AS_TRAINED, MODES
from fovlm.train import resume, schedule
from fovlm.train.attention_maps import save_maps, watched
from fovlm.train.engine import Engine, start, universal_for
from fovlm.train.engine import StepResult as Done
from fovlm.train.logger import Logger, write_json
from fovlm.train.throughput import Throughput, device_name, memory_gb, peak_flops
from fovlm.train.validation import Score, attention_entropy, evaluate, score_table

SIZED = 5000  # samples whose sizes stand for those of all when a budget of FLOPs is turned into samples
FEW = 1000  # samples: among fewer, a single broken one would pass any reasonable fraction
log = logging.getLogger("fovlm")


class Stopped(Exception):
    """A signal asked the run to save and stop."""


class Trainer:
    """One rank's side of a run: what is made before the first step, and the loop."""

    def __init__(self, experiment: Experiment, device: torch.device):
        self.experiment, self.device = experiment, device
        self.checkpoints = store.Checkpoints(experiment.run_folder)
        self.stop_asked = False
        self.unsaid: list[SampleIssue] = []  # broken samples that the log does not name yet
        self.validated: tuple[int, dict[str, Score]] = (-1, {})  # the step of the last validation, and its scores

        data, settings = experiment.data, experiment.model
        if task := data.generate:
            distributed.rank_zero_first(lambda: synthetic_shards.make(task))
        tokenizer = self.tokenizer = distributed.collective_call(lambda: load_tokenizer(tokenizer_path(experiment)))
        self.train_set = distributed.rank_zero_first(lambda: open_dataset(experiment, tokenizer, data.mixture))
        self.val_set: Dataset | None = None
        if data.val:
            every = dict.fromkeys(data.val, 1.0)
            self.val_set = distributed.rank_zero_first(lambda: open_dataset(experiment, tokenizer, every))
            self.val_samples = samples_that_fill(experiment.train.eval_packs, self.val_set, pack_budget(experiment))

        torch.manual_seed(experiment.train.seed)
        model = distributed.collective_call(lambda: build(settings, data.image_frames))
        distributed.collective_call(lambda: check_vocabulary(model, len(tokenizer)))
        if source := settings.init_from:
            distributed.collective_call(lambda: load_weights(model, source))
        model.freeze(experiment.optim.freeze)
        if settings.compile:
            model.compile_backbones()
        self._start_engine(model)
        some = [self.train_set.size(position) for position in range(SIZED)]
        self.samples_wanted = samples_of(experiment, some) or 0
        self.peak, self.flops = peak_flops(device), 0.0  # FLOP/s of the GPU, and FLOPs of the mean sample
        with contextlib.suppress(UserError):  # shapes that only the hub knows: the run goes on without its MFU
            self.flops = total(mean_cost(experiment, geometry(settings), some)).total
        self.budget, probed = pack_budget(experiment), self.val_set or self.train_set
        self.probe = distributed.collective_call(
            lambda: choose_reference_batch(probed, self.budget, model.config.tokens_per_look)
        )

    def _start_engine(self, model: FoveatedVLM) -> None:
        """Make the engine, and put it where the checkpoint left it when there is one to go on from."""
        experiment = self.experiment
        settings = deepspeed.resolve(experiment, distributed.world(), self.device.type)
        reference = None
        if experiment.train.objective == "dpo":
            reference = build(experiment.model, experiment.data.image_frames)
            reference.load_state_dict(model.state_dict())

        found = self.found = resume.find(experiment, self.train_set.hash)
        self.state = store.read_state(found) if found else store.State()
        universal = universal_for(found, experiment.run_folder / "universal") if found else None
        if universal:
            settings["checkpoint"] = {"load_universal": True}
        self.engine_settings = settings
        self.engine = Engine(model, experiment.optim, settings, self.device, reference, experiment.train.dpo_beta)
        if found:
            self.engine.load(found, universal)
        self.state = replace(
            self.state,
            experiment_hash=experiment.hash,
            data_hash=self.train_set.hash,
            world_size=distributed.world(),
            zero_stage=self.engine.stage,
        )
        self.started_at = self.state.samples
        self.saved = self.state.step if found else -1  # the step of the newest checkpoint known to be whole
        self.losses: list[float] = []  # of the steps since then
        distributed.collective_call(lambda: self.checkpoints.need_room(self.engine.checkpoint_bytes()))

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> int:
        """Train to the end, or until a signal; returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask_to_stop)
        self.logger = Logger(
            self.experiment, self._steps_in_all(), self.state.step, distributed.rank(), self.train_set.hash
        )
        with self.logger:
            if distributed.rank() == 0:
                (self.experiment.run_folder / "experiment.yaml").write_text(self.experiment.dump())
                write_json(self.experiment.run_folder / "deepspeed.json", self.engine_settings)
                self.tokenizer.save_pretrained(self.experiment.run_folder / "tokenizer")
            if self.found:
                self.logger.info(f"going on from {self.found.name}, sample {self.state.samples}")
            try:
                self._steps()
            except Stopped:
                self._save(validate=False)  # whoever sent the signal may not wait for a validation
                self.logger.info(f"stopped by a signal; all is saved at step {self.state.step}")
                self.logger.close("stopped", **self._facts())
                return EXIT_STOPPED
            self._finish()
        return 0

    def _steps(self) -> None:
        train, loader = self.experiment.train, self._loader()
        steps, meter, skipped = iter(loader), Throughput(self.state), 0
        while self.progress < 1.0:
            # A rank that waits in vain, for a dead peer or a stuck disk, says where and ends the run.
            faulthandler.dump_traceback_later(train.hang_minutes * 60, exit=True)
            with meter.waiting():
                step = next(steps)
            after = self._progress(self.state.step + 1, self.state.samples + step.samples)
            logs = (self.state.step + 1) % train.log_every == 0 or after >= 1.0
            before = self._look_ahead(step.batches[0]) if logs else {}
            rates = schedule.rates(self.experiment.optim, after)  # of its end: the first step has a rate above 0
            self.engine.set_rates(rates)
            done = self.engine.step(step.batches)
            self._count(step, done)
            self.losses.append(done.loss)
            skipped = skipped + 1 if done.skipped else 0
            if done.skipped:
                self.logger.info(f"step {self.state.step} is skipped: loss {done.loss}, gradient {done.grad_norm}")
            if skipped >= train.max_nonfinite:
                raise distributed.SharedError(
                    f"{skipped} steps in a row were not finite: lower the rates, or look at the samples named above"
                )
            if logs:
                self.logger.log(self.state.step, self._row(done, before, rates, meter))
                self._hold_against_limit(loader.bad)
                meter = Throughput(self.state)
            self.logger.set_step(self.state.step)
            if train.eval_every and self.state.step % train.eval_every == 0:
                self._validate()
            if train.save_every and self.state.step % train.save_every == 0 and self.progress < 1.0:
                self._save()
            if float(distributed.sum_over_ranks([float(self.stop_asked)], self.device)):
                raise Stopped
        faulthandler.cancel_dump_traceback_later()

    @property
    def progress(self) -> float:
        """How much of the run is done, in [0, 1]."""
        return self._progress(self.state.step, self.state.samples)

    def _progress(self, step: int, samples: int) -> float:
        wanted = self.experiment.train.steps
        return min(step / wanted if wanted else samples / self.samples_wanted, 1.0)

    def _steps_in_all(self) -> int:
        """The length of the run in steps; from its first steps when it is given in samples."""
        train = self.experiment.train
        if train.steps:
            return train.steps
        some = list(islice(plan_steps(self.train_set, self.budget, train.packs_per_step, 0, self.samples_wanted), 20))
        return max(1, round(len(some) * self.samples_wanted / max(some[-1].cursor, 1)))

    def _loader(self) -> PackLoader:
        data = self.experiment.data
        return PackLoader(
            self.train_set,
            self.budget,
            self.experiment.train.packs_per_step,
            rank=distributed.rank(),
            world=distributed.world(),
            cursor=self.state.cursor,
            workers=data.workers,
            tokens_per_look=self.engine.model.config.tokens_per_look,
            pin=self.device.type == "cuda",
        )

    def _count(self, step: StepBatches, done: Done) -> None:
        self.state.step += 1
        self.state.cursor = step.cursor
        self.state.samples += step.samples
        self.state.tokens += int(done.weight)
        self.state.skipped += done.skipped
        self.unsaid += [bad for batch in step.batches for bad in batch.bad]

    def _look_ahead(self, batch: Batch) -> dict[str, float]:
        """On the pack a step starts with: the loss with coarse tokens alone, and how spread out the looks attend."""
        if self.experiment.model.visual != "foveated" or self.experiment.train.objective != "text":
            return {}
        found = {"loss_coarse": self.engine.coarse_loss(batch)}
        if self.engine.stage < 3:  # under ZeRO-3 the weights are there only inside the engine's own forward
            found["attention_entropy"] = attention_entropy(self.engine.model.gaze(batch.to(self.device))["fine"])
        return found

    def _row(
        self, done: Done, before: dict[str, float], rates: dict[str, float], meter: Throughput
    ) -> dict[str, float]:
        row = {
            "loss": done.loss,
            **done.parts,
            **before,
            "grad_norm": done.grad_norm,
            **{f"lr_{group}": rate for group, rate in rates.items()},
            **meter.speeds(self.state),
            "samples": self.state.samples,
            "progress": self.progress,
            "skipped_steps": self.state.skipped,
            "memory_gb": memory_gb(self.device),
        }
        if (
            self.peak and self.flops
        ):  # the model's own FLOPs, without padding and recomputation, over what the GPUs could do
            row["mfu"] = row["samples_per_second"] * self.flops / (self.peak * distributed.world())
        if "loss_coarse" in before:
            row |= {"loss_fine": done.first, "fine_over_coarse": done.first / max(before["loss_coarse"], 1e-9)}
        return row

    def _hold_against_limit(self, mine: Counter[tuple[str, str]]) -> None:
        """Name the broken samples of all ranks in the log, and end the run when there are too many since its start."""
        for bad in (bad for part in distributed.gather(self.unsaid) for bad in part):
            self.logger.info(f"{bad.source}: sample {bad.key} in {bad.shard} is replaced: {bad.cause}")
        self.unsaid = []
        counts: Counter[tuple[str, str]] = sum(distributed.gather(mine), start=Counter())
        self.logger.log(self.state.step, {f"bad/{source}/{cause}": n for (source, cause), n in counts.items()})
        limit, seen = self.experiment.data.max_bad_fraction, self.state.samples - self.started_at
        if counts.total() > limit * max(seen, FEW):
            causes = ", ".join(f"{n} x {source}: {cause}" for (source, cause), n in counts.most_common(5))
            raise distributed.SharedError(
                f"{counts.total()} of {seen} samples were broken ({causes}), more than data.max_bad_fraction={limit} "
                "allows; log.txt names shard and key of each"
            )

    # -- validation, checkpoints, the end -----------------------------------------------------------------------------

    def _validate(self, every_mode: bool = False) -> dict[str, Score]:
        """Score the validation packs as trained (or in every mode), draw the maps, and remember the loss."""
        if self.val_set is None:
            return {}
        step, scores = self.validated
        visual = self.experiment.model.visual
        scores = scores if step == self.state.step else {}
        modes = [m for m in (MODES[visual] if every_mode else (AS_TRAINED[visual],)) if m not in scores]
        if self.engine.stage == 3:  # ranks differ in how often they would call on the weights of the others
            modes = [m for m in modes if m != "autoregressive"]
        if not modes:
            return scores
        found = evaluate(self.engine.model, self._val_batches(), modes, self.device, self.engine.nll)
        scores = {mode: (scores | found)[mode] for mode in MODES[visual] if mode in scores or mode in found}
        self.validated = (self.state.step, scores)
        row = {"val_loss": found[AS_TRAINED[visual]].loss} if AS_TRAINED[visual] in found else {}
        for mode, score in found.items():
            row |= {f"val_loss_{mode}": score.loss} | {f"val_loss_{mode}/{s}": v for s, v in score.by_source.items()}
        self.logger.log(self.state.step, row)
        if distributed.rank() == 0 and self.engine.stage < 3 and visual != "multi_token":
            folder, step = self.experiment.run_folder / "maps", self.state.step
            save_maps(self.engine.model, watched(self.val_set), self.budget, self.tokenizer, folder, step, self.device)
        return scores

    def _val_batches(self) -> Iterator[Batch]:
        """This rank's share of the validation samples: the first `val_samples`, the same for any ranks."""
        assert self.val_set is not None
        loader = PackLoader(
            self.val_set,
            self.budget,
            distributed.world(),
            rank=distributed.rank(),
            world=distributed.world(),
            stop=self.val_samples,
            tokens_per_look=self.engine.model.config.tokens_per_look,
        )
        return (batch for step in loader for batch in step.batches)

    def _save(self, validate: bool = True) -> None:
        """Write a checkpoint; it is the best when its metric, `train.best`, is the lowest so far.

        The metric is the validation loss of now, or the mean training loss since the last checkpoint.
        """
        train, state = self.experiment.train, self.state
        state.metric = None
        if train.best == "train_loss" and self.losses:
            state.metric = sum(self.losses) / len(self.losses)
        elif train.best == "val_loss" and validate:
            state.metric = self._validate()[AS_TRAINED[self.experiment.model.visual]].loss
        self.losses, self.saved = [], state.step
        best = state.metric is not None and (state.best is None or state.metric < state.best)
        state.best = state.metric if best else state.best
        path = self.engine.save(self.checkpoints, state, self.experiment.dump(), best, self.probe)
        if distributed.rank() == 0:
            self.checkpoints.prune(train.keep_last, train.keep_best)
        self.logger.info(
            f"saved {path.name}" + (f", the best so far ({train.best} {state.metric:.4f})" if best else "")
        )

    def _finish(self) -> None:
        """The last checkpoint, the scores in every mode, and what to do next."""
        scores = self._validate(every_mode=True)
        if self.saved != self.state.step:
            self._save()
        task, facts = self.experiment.data.generate, {}
        if task and self.val_set is not None and self.experiment.model.visual != "multi_token":
            facts = synthetic_shards.judge(task, self.engine.model, self._val_batches(), self.device)
        for line in score_table(scores, facts):
            self.logger.info(line)
        folder = self.experiment.run_folder
        self.logger.info(f"run folder: {folder}")
        if (folder / "maps").is_dir():
            self.logger.info(f"where it looked: {folder / 'maps' / 'index.html'}")
        self.logger.info(f"a model to use: fovlm convert {folder} OUT")
        if task:
            self.logger.info("next: ./launch.sh --list shows every run, README.md how to train on shards of your own")
        told = {mode: asdict(score) for mode, score in scores.items()}
        self.logger.close("finished", scores=told, tokens=self.state.tokens, **self._facts(), **facts)

    def _facts(self) -> dict[str, Any]:
        """What the summary says of the run beside its losses: how much was computed on what, and what it was scored on.

        `flops` are the model's own, forward and backward; None where the shapes are not known ahead (`geometry.py`).
        """
        facts = {"samples": self.state.samples, "ranks": distributed.world(), "device": device_name(self.device)}
        facts["flops"] = self.state.samples * self.flops or None
        if self.val_set is not None:
            facts |= {"val_samples": self.val_samples, "val_hash": self.val_set.scored_hash(self.val_samples)}
        return facts

    def _ask_to_stop(self, number: int, frame: object) -> None:
        self.stop_asked = True


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status: 0 finished, 2 a mistake that one line explains, 75 saved and stopped."""
    parser = argparse.ArgumentParser(prog="./launch.sh", description="Train a named experiment.")
    parser.add_argument("name")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    options = parser.parse_args(arguments)
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING if first else logging.ERROR)
    logging.getLogger("fovlm.data.dataloader").setLevel(
        logging.ERROR
    )  # the journal names broken samples, those of all ranks
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # deepspeed's calls, not ours
    try:
        experiment = schema.load(options.name, options.overrides)
        if options.dry_run:
            from fovlm.estimate.dry_run import describe

            print(describe(experiment, int(os.environ.get("WORLD_SIZE", "1"))))
            return 0
        return Trainer(experiment, start()).train()
    except distributed.SharedError as error:
        if first:
            print(f"fovlm: {error}", file=sys.stderr, flush=True)
    except UserError as error:
        print(f"fovlm: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
