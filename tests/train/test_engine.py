"""Ranks, accumulation and ZeRO stages do not change the gradient, a resume is exact, and non-finite steps are
skipped by all. One start for each number of ranks."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fovlm.checkpoint import store
from fovlm.checkpoint.convert import convert
from fovlm.checkpoint.locate import find_checkpoint
from fovlm.checkpoint.reference import ReferenceOutputs
from fovlm.checkpoint.verify import reference_nll
from fovlm.checkpoint.zero_reader import ZeroWeights
from fovlm.model.modeling import FoveatedVLM
from fovlm.train.losses import preference_loss, text_loss, text_weight
from helpers import tiny
from helpers.devices import needs_gpus
from helpers.engine_ranks import BETA, OPTIM, packs, pairs
from helpers.launch import run_ranks
from helpers.models import tiny_model


@pytest.fixture(scope="module")
def folders(forked, tmp_path_factory) -> dict[int, Path]:
    folders = {world: tmp_path_factory.mktemp(f"ranks{world}") for world in (1, 2)}
    forked.run(1, [str(folders[1])], {}, main="helpers.engine_ranks:main")
    forked.run(2, [str(folders[2]), str(folders[1])], {}, main="helpers.engine_ranks:main")
    return folders


@pytest.fixture(scope="module")
def found(folders) -> dict[int, dict]:
    return {world: json.loads((folder / "found.json").read_text()) for world, folder in folders.items()}


@pytest.fixture(scope="module", params=[pytest.param(count, marks=needs_gpus(count)) for count in (1, 2)])
def found_on_gpus(request, tmp_path_factory) -> dict:
    """The same on so many GPUs, over nccl."""
    folder = tmp_path_factory.mktemp(f"gpus{request.param}")
    gpus = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")}
    run_ranks(request.param, ["-m", "helpers.engine_ranks", str(folder)], gpus)
    return json.loads((folder / "found.json").read_text())


def adamw(model: FoveatedVLM) -> torch.optim.AdamW:
    groups = model.groups()
    rates = {"connector": OPTIM.lr_connector, "encoder": OPTIM.lr_encoder, "llm": OPTIM.lr_llm}
    parameters = [{"params": groups[g], "lr": rates[g]} for g in groups]
    return torch.optim.AdamW(parameters, betas=tuple(OPTIM.betas), eps=OPTIM.eps, weight_decay=0.0)


def plain_step(model: FoveatedVLM, optimizer: torch.optim.AdamW, loss: torch.Tensor) -> tuple[float, float]:
    """One step of plain PyTorch with one clip -> (loss, gradient norm)."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach()), float(norm)


@pytest.fixture(scope="module")
def plain() -> list[tuple[float, float]]:
    """(loss, gradient norm) of the same steps in one process of plain PyTorch: mean over all tokens, one clip."""
    model = tiny_model()
    optimizer = adamw(model)
    rows = []
    for step in range(8):
        total = sum(text_weight(batch) for batch in packs(step))
        loss = sum(text_loss(model(batch), batch).total for batch in packs(step)) / total
        rows.append(plain_step(model, optimizer, loss))
    return rows


def assert_follows(plain, found, loss_limit=2e-6, norm_limit=2e-5) -> None:
    for step, (loss, norm) in zip(found["first"] + found["on"], plain, strict=True):
        assert not step["skipped"]
        assert math.isclose(step["loss"], loss, rel_tol=loss_limit)
        assert math.isclose(step["grad_norm"], norm, rel_tol=norm_limit)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_ranks_and_stages_follow_plain_pytorch(found, plain, world, stage):
    assert_follows(plain, found[world][stage])


@pytest.mark.parametrize("world", [1, 2])
def test_more_micro_steps_follow_plain_pytorch(found, plain, world):
    """The packs of each step twice: the same mean."""
    assert_follows(plain[:5], {"first": found[world]["accumulated"], "on": []})


def test_gpus_follow_plain_pytorch_on_a_cpu(found_on_gpus, plain):
    """In fp32; sums of another order, and AdamW, make more of the last bits."""
    for stage in ("zero1", "zero2", "zero3"):
        assert_follows(plain, found_on_gpus[stage], 1e-4, 1e-3)
    for kind in ("not finite", "not finite, zero1", "not finite, offload"):
        assert all(found_on_gpus[kind]["skipped"] + found_on_gpus[kind]["same"])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_resumed_run_resumes_bit_for_bit(found, world, stage):
    """Two ranks may add up a gradient's halves in either order, so there the last bit of an fp32 sum is free."""
    for on, resumed in zip(found[world][stage]["on"], found[world][stage]["resumed"], strict=True):
        assert math.isclose(on["loss"], resumed["loss"], rel_tol=0 if world == 1 else 2e-7)


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_a_resume_on_another_number_of_ranks_is_exact(found, stage):
    for on, moved in zip(found[1][stage]["on"], found[2][stage]["moved"], strict=True):
        assert math.isclose(on["loss"], moved["loss"], rel_tol=2e-7)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_converted_checkpoint_answers_as_the_engine_recorded(folders, world, stage, tmp_path):
    """What DeepSpeed itself wrote; tests/checkpoint/test_convert.py has the rest on files of our own making."""
    tiny.tokenizer().save_pretrained(folders[world] / stage / "tokenizer")
    out = convert(folders[world] / stage, tmp_path / "out", dtype="fp32")
    probe = ReferenceOutputs.load(find_checkpoint(folders[world] / stage))
    assert probe is not None
    model = FoveatedVLM.from_pretrained(out)
    torch.testing.assert_close(torch.cat(reference_nll(model, probe)), torch.cat(probe.nll))
    untrained = torch.cat(reference_nll(tiny_model(), probe))
    assert (untrained - torch.cat(probe.nll)).abs().mean() > 1e-2, "or an untrained model would pass"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_tied_and_buffers_come_out_of_deepspeeds_own_files(folders, world, stage):
    """A frozen backbone and a buffer, trained in bf16 with fp32 masters and an offloaded optimizer."""
    truth = load_file(folders[world] / f"unusual{stage}" / "truth.safetensors")
    path = store.Checkpoints(folders[world] / f"unusual{stage}").folder / "step-00000002"
    weights = ZeroWeights(path / store.ENGINE)
    names = {*weights.shapes, *weights.ties}
    assert names == set(truth)
    for name, value in truth.items():
        read = weights.read(name)
        trained = name.startswith(("connector.", "encoder.")) and value.is_floating_point() and "mask" not in name
        assert read.dtype == (torch.float32 if trained else value.dtype), name
        assert torch.equal(read.to(value.dtype), value), name


def test_zero3_on_another_number_of_ranks_is_refused(found):
    assert "ZeRO-3" in found[2]["zero3"]["refused"]
    assert "moved" not in found[2]["zero3"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", ["bf16", "bf16, zero1"])
def test_bf16_stays_near_fp32(found, plain, world, stage):
    for step, (loss, _) in zip(found[world][stage]["first"], plain, strict=False):
        assert math.isclose(step["loss"], loss, rel_tol=1e-2)


@pytest.mark.parametrize("world", [1, 2])
def test_preferences_follow_plain_pytorch(found, world):
    """The mean over the pairs of all packs, against a reference that stays what the model was at the start."""
    model, reference = tiny_model(), tiny_model().requires_grad_(False)
    optimizer = adamw(model)
    for step, row in enumerate(found[world]["dpo"]):
        losses = [preference_loss(model(batch), reference(batch), batch, BETA) for batch in pairs(step)]
        count = sum(batch.roles.count("chosen") for batch in pairs(step))
        loss, norm = plain_step(model, optimizer, sum(loss.total for loss in losses) / count)
        assert (row["weight"], row["skipped"]) == (count, False)
        assert math.isclose(row["loss"], loss, rel_tol=2e-6), step
        assert math.isclose(row["grad_norm"], norm, rel_tol=2e-5), step
        assert math.isclose(row["parts"]["preferred"], sum(float(x.parts["preferred"]) for x in losses) / count), step
    assert math.isclose(found[world]["dpo"][0]["loss"], math.log(2), rel_tol=1e-6)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["not finite", "not finite, zero1"])
def test_a_step_that_is_not_finite_is_skipped_by_every_rank(found, plain, world, kind):
    result = found[world][kind]
    assert result["skipped"] == [True] * world
    assert result["same"] == [True] * world
    assert math.isclose(result["after_frames"]["loss"], plain[0][0], rel_tol=2e-6), (
        "the weights are still those of the start"
    )


@pytest.mark.parametrize("world", [1, 2])
def test_a_skipped_step_leaves_nothing_behind_with_offload_in_bf16(found, world):
    result = found[world]["not finite, offload"]
    assert (result["skipped"], result["same"]) == ([True] * world, [True] * world)
    assert not result["after_frames"]["skipped"], "the gradients of the skipped step were kept"


def test_another_run_can_start_from_the_weights(found):
    assert math.isclose(found[1]["warm"], found[2]["warm"], rel_tol=1e-5)
    assert not math.isclose(found[1]["warm"], float(tiny_model(seed=4)(packs(0)[0]).sum().detach()), rel_tol=1e-3)


def test_without_gpus_asked_for_a_gpu_is_left_alone(monkeypatch):
    """NUM_GPUS=0 on a machine that has one: launch.sh then sets DS_ACCELERATOR."""
    joined = {}
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from fovlm.train import engine  # imports deepspeed, which takes seconds

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine.deepspeed, "init_distributed", lambda **given: joined.update(given))
    assert engine.start().type == "cpu"
    assert joined["dist_backend"] == "gloo"
