"""From the name of an experiment to a trained model: data -> model -> engine -> steps -> scores, maps, summary.

Every rank runs this file, started by `launch.sh`. What one rank decides is shared before any rank acts on it.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch

from fovlm import distributed
from fovlm.checkpoint import store
from fovlm.checkpoint.locate import load_weights
from fovlm.checkpoint.reference import choose_reference_batch
from fovlm.checkpoint.universal import universal_done, universal_for
from fovlm.config import deepspeed, schema
from fovlm.config.schema import Experiment
from fovlm.data import synthetic
from fovlm.data.dataloader import PackLoader, plan_steps
from fovlm.data.dataset import open_dataset, pack_budget
from fovlm.data.packing import Batch, PackBudget, PackSize
from fovlm.data.tokenizers import open_tokenizer
from fovlm.distributed import SharedError
from fovlm.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR, UserError, format_error, say
from fovlm.estimate.flops import mean_cost, samples_of, total
from fovlm.estimate.shapes import geometry
from fovlm.fileio import write_atomically
from fovlm.model.build import build, check_vocabulary
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.precision import settle
from fovlm.paths import TRAIN
from fovlm.train import process, resume, schedule
from fovlm.train.bad_samples import BadSamples
from fovlm.train.compiled import compile_on_trial, wants_compiled
from fovlm.train.engine import Engine, StepResult, start
from fovlm.train.logger import Logger
from fovlm.train.run_lock import run_lock
from fovlm.train.saving import CheckpointSaver
from fovlm.train.synthetic_score import score_looks
from fovlm.train.throughput import Throughput, device_name
from fovlm.train.validation import Validator, score_tables
from fovlm.train.watchdog import Watchdog
from fovlm.viz.heatmap import entropy

SIZED = 5000  # samples whose mean size converts a budget of FLOPs into samples


class Trainer:
    """A run on one rank. Everything is built here, and restored from a checkpoint where the run resumes. Raises
    UserError (SharedError where every rank knows of it)."""

    def __init__(self, experiment: Experiment, device: torch.device):
        experiment = distributed.broadcast(settle(asked := experiment, device.type))
        data, train = experiment.data, experiment.train
        self.experiment, self.device, self.folder = experiment, device, experiment.run_folder
        self.stop_requested = False
        if task := data.generate:
            distributed.rank_zero_first(lambda: synthetic.make(task))
        tokenizer = distributed.rank_zero_first(lambda: open_tokenizer(experiment))
        self.tokenizer, shapes = tokenizer, None
        with contextlib.suppress(UserError):  # shapes that only the hub knows
            shapes = geometry(experiment.model)
        if shapes:  # before shards are counted
            distributed.collective_call(lambda: check_vocabulary(shapes.llm.V, len(tokenizer)))
        self.train_set = distributed.rank_zero_first(lambda: open_dataset(experiment, tokenizer, data.mixture, True))
        distributed.check_same(self.train_set.hash, "other shards than on the first node (FOVLM_DATA)")
        weights = dict.fromkeys(data.val, 1.0)
        val_set = distributed.rank_zero_first(lambda: open_dataset(experiment, tokenizer, weights)) if weights else None
        sizes = [PackSize(*row) for row in self.train_set.sizes(0, SIZED).tolist()]
        self.total_samples = samples_of(experiment, sizes) or 0
        self.flops_per_sample = total(mean_cost(experiment, shapes, sizes)).total if shapes else None

        torch.manual_seed(train.seed)
        model = build_model(experiment, len(tokenizer))
        budget, tokens_per_look = pack_budget(experiment), model.config.tokens_per_look
        checkpoint = resume.find(experiment, self.train_set.hash)
        universal = universal_for(checkpoint, self.folder / "universal") if checkpoint else None
        self.engine_settings = deepspeed.resolve(experiment, distributed.world(), device.type)
        if universal:
            self.engine_settings["checkpoint"] = {"load_universal": True}
        frozen = build(experiment.model, data.image_frames) if train.objective == "dpo" else None
        if frozen:
            frozen.load_state_dict(model.state_dict())
        self.engine = Engine(model, experiment.optim, self.engine_settings, device, frozen, train.dpo_beta)
        if wants_compiled(experiment.model, device, self.engine.stage):
            compile_on_trial(self.engine.model, device)
        if checkpoint:
            self.engine.load(checkpoint, universal)
            universal_done(self.folder / "universal")
        self.state = replace(
            store.read_state(checkpoint) if checkpoint else store.State(),
            experiment_hash=experiment.hash,
            data_hash=self.train_set.hash,
            world_size=distributed.world(),
            zero_stage=self.engine.stage,
        )
        self.start_samples = self.state.samples
        self.unread: list[tuple[int, Callable[[], StepResult]]] = []  # steps launched whose results are not read yet
        self.skipped_in_a_row = 0

        self.loader = PackLoader(
            self.train_set,
            budget,
            train.packs_per_step,
            rank=distributed.rank(),
            world=distributed.world(),
            cursor=self.state.cursor,
            workers=data.workers,
            tokens_per_look=tokens_per_look,
            pin=device.type == "cuda",
        )
        self.bad_samples = BadSamples(data.max_bad_fraction)
        self.validator = (
            Validator(val_set, budget, train.eval_packs, self.engine, tokenizer, self.folder / "maps")
            if val_set
            else None
        )
        reference = distributed.collective_call(
            lambda: choose_reference_batch(val_set or self.train_set, budget, tokens_per_look)
        )
        checkpoints, saved_step = store.Checkpoints(self.folder), self.state.step if checkpoint else -1
        self.saver = CheckpointSaver(checkpoints, train, self.engine, experiment.dump(), reference, saved_step)
        steps = train.steps or self._estimate_steps(budget)
        self.logger = Logger(experiment, steps, self.state.step, distributed.rank(), self.train_set.hash)
        if asked.train.precision != train.precision:
            self.logger.info(f"train.precision: auto is {train.precision} here")
        if checkpoint:
            self.logger.info(f"resuming from {checkpoint.name}, sample {self.state.samples}")

    def train(self) -> int:
        """Train to the end, or until SIGTERM, SIGHUP or SIGUSR1; returns the exit status."""
        train, state = self.experiment.train, self.state
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._request_stop)
        with self.logger:
            self._write_settings()
            throughput = Throughput(state, self.device, self.flops_per_sample)
            steps, watchdog = iter(self.loader), Watchdog(train.hang_minutes * 60)
            while self.progress < 1.0:
                watchdog.restart()
                step = throughput.next_of(steps)
                state.step += 1
                state.samples += step.samples
                state.cursor = step.cursor
                logs = state.step % train.log_every == 0 or self.progress >= 1.0
                before = self._metrics_before_step(step.batches[0]) if logs else {}
                rates = schedule.rates(self.experiment.optim, self.progress)  # of its end: the first is above 0
                self.engine.set_rates(rates)
                self.unread.append((state.step, self.engine.step(step.batches)))
                self.bad_samples.add(step.batches)
                evaluates = train.eval_every > 0 and state.step % train.eval_every == 0
                saves = self.saver.due(state.step) and self.progress < 1.0
                stops = distributed.any_rank(self.stop_requested)
                # A result is read one step late, so that the host never waits for the GPU, unless it is needed now.
                result = self._read_results(late=0 if logs or evaluates or saves or stops else 1)
                if logs and result:
                    row = step_metrics(result, before) | {f"lr_{group}": rate for group, rate in rates.items()}
                    progress = {"samples": state.samples, "progress": self.progress, "skipped_steps": state.skipped}
                    self.logger.log(state.step, row | progress | throughput.metrics(state))
                    self.bad_samples.report(state.samples - self.start_samples, self.logger, state.step)
                self.logger.set_step(state.step)
                if evaluates:
                    self._validate()
                if saves:
                    self.logger.info(self.saver.save(state, self._validate))
                if stops:
                    return self._stop()
            watchdog.stop()
            self._finish()
        return 0

    def _request_stop(self, number: int, frame: object) -> None:
        self.stop_requested = True

    def _write_settings(self) -> None:
        if distributed.rank() == 0:
            write_atomically(self.folder / "experiment.yaml", self.experiment.dump())
            write_atomically(self.folder / "deepspeed.json", json.dumps(self.engine_settings, indent=2))
            self.tokenizer.save_pretrained(self.folder / "tokenizer")

    def _metrics_before_step(self, batch: Batch) -> dict[str, float]:
        """The loss of a step's first pack with coarse tokens alone, and how spread out its looks attend."""
        if self.experiment.model.visual != "foveated" or self.experiment.train.objective != "text":
            return {}
        metrics = {"loss_coarse": self.engine.coarse_loss(batch)}
        if self.engine.stage < 3:  # ZeRO-3 has the weights only inside the engine's own forward
            weights = self.engine.model.gaze(batch.to(self.device))["fine"]
            metrics["attention_entropy"] = float(entropy(weights).mean())
        return metrics

    def _read_results(self, late: int) -> StepResult | None:
        """Add the results of all steps but the last `late` to the state -> the last one read. Raises SharedError when
        `train.max_nonfinite` steps in a row were skipped."""
        result = None
        while len(self.unread) > late:
            step, read = self.unread.pop(0)
            result = read()
            self.state.tokens += int(result.weight)
            self.saver.losses.append(result.loss)
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
            if result.skipped:
                self.state.skipped += 1
                self.logger.info(f"step {step} is skipped: loss {result.loss}, gradient norm {result.grad_norm}")
                for rank, lines in enumerate(distributed.gather(result.nonfinite)):
                    for line in lines:
                        self.logger.info(f"rank {rank}: {line}")
            if self.skipped_in_a_row >= self.experiment.train.max_nonfinite:
                raise SharedError(
                    f"{self.skipped_in_a_row} steps in a row were not finite: lower the learning rates, or check the "
                    "samples named above"
                )
        return result

    @property
    def progress(self) -> float:
        """How much of the run is done, in [0, 1]."""
        steps = self.experiment.train.steps
        return min(self.state.step / steps if steps else self.state.samples / self.total_samples, 1.0)

    def _estimate_steps(self, budget: PackBudget) -> int:
        """The length in steps of a run whose length is given in samples, from its first steps."""
        packs = self.experiment.train.packs_per_step
        first = list(islice(plan_steps(self.train_set, budget, packs, 0, self.total_samples), 20))
        return max(1, round(len(first) * self.total_samples / max(first[-1].cursor, 1)))

    def _validate(self, every_mode: bool = False) -> float | None:
        """Validate and log; returns the loss as trained, None without a validation set."""
        if self.validator is None:
            return None
        if row := self.validator.run(self.state.step, every_mode):
            self.logger.log(self.state.step, row)
        return self.validator.loss

    def _stop(self) -> int:
        """Save without a validation, which the sender of a signal may not wait for; returns the exit status."""
        self.logger.info(self.saver.save(self.state, lambda: None))
        self.logger.info(f"stopped by a signal; saved at step {self.state.step}")
        self.logger.close("stopped", **self._facts())
        return EXIT_STOPPED

    def _finish(self) -> None:
        """The last checkpoint, the scores in every mode, and what to do next."""
        self._validate(every_mode=True)
        if self.saver.saved_step != self.state.step:
            self.logger.info(self.saver.save(self.state, self._validate))
        task, validator, looks = self.experiment.data.generate, self.validator, {}
        if task and validator and self.experiment.model.visual != "multi_token":
            looks = score_looks(task, self.engine.model, validator.batches(), self.device)
        scores = validator.scores if validator else {}
        self.logger.info(score_tables(scores, looks))
        self.logger.info(f"run folder: {self.folder}")
        if (self.folder / "maps").is_dir():
            self.logger.info(f"attention maps: {self.folder / 'maps' / 'index.html'}")
        self.logger.info(f"to use the model: fovlm convert {self.folder} OUT")
        if task:
            self.logger.info(f"next: {TRAIN} --list shows every run, docs/own-data.md how to train on your data")
        by_mode = {mode: asdict(score) for mode, score in scores.items()}
        self.logger.close("finished", scores=by_mode, tokens=self.state.tokens, **self._facts(), **looks)

    def _facts(self) -> dict[str, Any]:
        """What the summary says besides losses: how much was computed on what device, and on what it was scored.

        `flops` are the model's own, forward and backward; None where shapes are not known ahead (`estimate/shapes.py`).
        """
        facts: dict[str, Any] = {"samples": self.state.samples, "ranks": distributed.world()}
        facts["device"] = device_name(self.device)
        facts["flops"] = self.state.samples * self.flops_per_sample if self.flops_per_sample else None
        if validator := self.validator:
            facts["val_samples"] = validator.samples
            facts["val_hash"] = validator.dataset.scored_hash(validator.samples)
        return facts


def build_model(experiment: Experiment, vocabulary: int) -> FoveatedVLM:
    """The model with its first weights, with what is frozen. `vocabulary`: entries of the tokenizer."""
    settings = experiment.model
    model = distributed.collective_call(lambda: build(settings, experiment.data.image_frames))
    distributed.collective_call(lambda: check_vocabulary(model.config.llm_config.vocab_size, vocabulary))
    if source := settings.init_from:
        distributed.collective_call(lambda: load_weights(model, source))
    model.freeze(experiment.optim.freeze)
    return model


def step_metrics(result: StepResult, before: dict[str, float]) -> dict[str, float]:
    """The losses and the gradient norm of a step; `before` is from `_metrics_before_step`."""
    row = {"loss": result.loss, **result.parts, **before, "grad_norm": result.grad_norm}
    if coarse := before.get("loss_coarse"):
        row |= {"loss_fine": result.first, "fine_over_coarse": result.first / coarse}
    return row


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status: 0 finished, 2 a user error (one line says what), 75 saved and stopped."""
    parser = argparse.ArgumentParser(prog=TRAIN, description="Train a named experiment.")
    parser.add_argument("name")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and exit")
    options = parser.parse_args(arguments)
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING if first else logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    try:
        experiment = schema.load(options.name, options.overrides)
        if options.dry_run:
            from fovlm.estimate.dry_run import describe

            resume.check_named(experiment)
            print(describe(experiment, int(os.environ.get("WORLD_SIZE", "1"))))
            return 0
        device = start(experiment.train.hang_minutes)
        with run_lock(experiment.run_folder):
            return Trainer(experiment, device).train()
    except (UserError, OSError) as error:
        if not (problem := format_error(error)):
            raise
        if isinstance(error, OSError):
            problem += "; when that is fixed, the same command resumes from the last checkpoint"
        if first or not isinstance(error, SharedError):  # all ranks know a shared one
            say(problem)
        return EXIT_USER_ERROR
    except RuntimeError as error:
        if not distributed.is_lost_peer(error):
            raise
        say(f"rank {distributed.rank()} lost its connection to another rank")
        process.wait_to_be_ended()
        return EXIT_FAILED
