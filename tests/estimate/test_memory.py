"""Bytes: what is estimated against the live tensors of a forward and a backward pass, and the claims made from it."""

import pytest
import torch

from benchmarks.memory import Live, pack
from fovlm.config.deepspeed import resolve
from fovlm.config.schema import DataSettings, DataSource, Experiment, ModelSettings, OptimSettings, TrainSettings, load
from fovlm.estimate.memory import activations, estimate
from fovlm.estimate.shapes import geometry, parameters
from fovlm.model.build import build

GB = 10**9
LLM = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
DINO = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
CHECKPOINT = {"grad_checkpoint": ["encoder", "llm"]}


def experiment(frames=32, text=64, frozen=(), **model) -> Experiment:
    return Experiment(
        name="small",
        model=ModelSettings(llm=LLM, encoder=DINO, frame_size=56, tokenizer="none", **model),
        data=DataSettings(
            sources={"a": DataSource(shards="a.tar", kind="video")},
            mixture={"a": 1.0},
            pack_cost=frames + text,
            frame_cost=1,
            max_frames=frames,
            max_tokens=text,
        ),
        optim=OptimSettings(freeze=list(frozen)),
        train=TrainSettings(steps=1, best="train_loss"),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        CHECKPOINT,
        {"frozen": ("encoder",)},
        {"frozen": ("encoder",), "grad_checkpoint": ["encoder"]},
        {"frozen": ("encoder", "llm")},
        {"visual": "multi_token"},
        {"deep_query": False},
        {"frames": 2, "text": 256, "grad_checkpoint": ["llm"]},
    ],
)
def test_activations_are_near_what_is_measured(settings):
    e = experiment(**settings)
    shapes = geometry(e.model)
    torch.manual_seed(0)
    model = build(e.model).train()
    model.freeze(e.optim.freeze)
    batch = pack(e, shapes.llm.V, shapes.T)
    live = Live()
    for p in model.parameters():  # weights and gradients have lines of their own in the estimate
        p.grad = torch.zeros_like(p) if p.requires_grad else None
        live.leave_out(p, p.grad)
    with live:
        model(batch).sum().backward()
    said = sum(activations(e, shapes, 4, (e.data.max_frames, e.data.max_tokens)).values())
    assert 0.95 * live.peak < said < 1.4 * live.peak


@pytest.mark.parametrize("world", [1, 2, 8])
def test_what_zero_2_in_bf16_keeps(world):
    e = load("LR1", ["train.packs_per_step=8"])
    shapes = geometry(e.model)
    n = sum(c.trainable for c in parameters(e, shapes).values())
    said = estimate(e, shapes, resolve(e, world, "cuda"), world)
    assert said.weights == pytest.approx(2 * n, rel=0.001)
    assert said.gradients == pytest.approx(4 * n / world + 2 * n, rel=0.001)  # the share, and those of a micro-step
    assert said.optimizer == pytest.approx(12 * n / world, abs=12)
    assert said.host == 0
    assert said.device == said.weights + said.gradients + said.optimizer + said.buckets + said.activations


def test_offloading_moves_the_optimizer_and_not_the_accumulated_gradients():
    stays, moves = (load("LR1", [f"deepspeed={engine}"]) for engine in ("zero2", "zero2_offload"))
    shapes = geometry(stays.model)
    on, off = (estimate(e, shapes, resolve(e, 2, "cuda"), 2) for e in (stays, moves))
    assert off.optimizer == 0
    micro_step = on.weights  # its gradients, in bf16 as many bytes; with offload they are freed as they are reduced
    assert off.gradients == pytest.approx(on.gradients - micro_step, rel=1e-4)
    assert off.host > on.optimizer


def test_frozen_parts_need_no_gradients_and_no_optimizer():
    every, f1 = load("LR1"), load("F1")
    shapes = geometry(every.model)
    some = estimate(f1, shapes, resolve(f1, 1, "cuda"), 1)
    assert some.gradients + some.optimizer < 0.01 * estimate(every, shapes, resolve(every, 1, "cuda"), 1).optimizer
    assert some.activations < estimate(every, shapes, resolve(every, 1, "cuda"), 1).activations


def test_the_largest_model_fits_a_24_gb_gpu_with_offload():
    """All of SmolLM2-1.7B and DINOv2-base trained, in packs of the default cost: 128 frames, or 4096 text tokens."""
    e = load("1.7B-C1-F", ["deepspeed=zero2_offload"])
    assert (e.data.pack_cost // e.data.frame_cost, e.data.pack_cost) == (128, 4096)
    assert e.model.grad_checkpoint == ["encoder", "llm"]
    said = estimate(e, geometry(e.model), resolve(e, 1, "cuda"), 1)
    assert said.device < 21 * GB  # leaves room for the context, the allocator and the formula's error
    without = load("1.7B-C1-F")
    assert estimate(without, geometry(without.model), resolve(without, 1, "cuda"), 1).device > 24 * GB


def test_gradients_of_weights_used_twice_wait_for_each_other():
    """Checkpointed, with few tokens: then they are most of what moves."""
    e = experiment(frames=2, text=8, **CHECKPOINT)
    shapes = geometry(e.model)
    parts = activations(e, shapes, 4, (2, 8))
    assert parts["waiting gradients"] > 0.5 * sum(parts.values())
