"""FLOPs: the closed formulas against torch's own counter, part by part of what a run can be."""

import itertools

import pytest
import torch
import torch.nn.functional as nnf
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fovlm.model.encoder
import kernels.absorbed_attention
from fovlm.config.schema import DataSettings, DataSource, Experiment, ModelSettings, OptimSettings, TrainSettings
from fovlm.data.packing import PackSize, collate
from fovlm.errors import UserError
from fovlm.estimate.flops import largest, mean_cost, sample_cost, samples_for, samples_of, total
from fovlm.estimate.shapes import geometry
from fovlm.model.configuration import FoveatedConfig
from fovlm.model.modeling import FoveatedVLM
from helpers.models import ENCODERS, FRAME, SPECIAL, VOCABULARY, sample

LLM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
DINO = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": FRAME,
    "patch_size": 7,
}
VISUALS = [("foveated", True), ("foveated", False), ("coarse", True), ("coarse", False), ("multi_token", True)]
FROZEN = list(itertools.product([False, True], repeat=2))


def experiment(dino=DINO, frozen=(False, False), train=None, llm=LLM, **model) -> Experiment:
    model = {"query_dim": 24, "frame_size": FRAME, "tokenizer": "none", **model}
    return Experiment(
        name="tiny",
        model=ModelSettings(llm=llm, encoder=dino, **model),
        data=DataSettings(
            sources={"a": DataSource(shards="a.tar", kind="video")}, mixture={"a": 1.0}, max_frames=5, max_tokens=14
        ),
        optim=OptimSettings(freeze=[name for name, off in zip(("encoder", "llm"), frozen) if off]),
        train=TrainSettings(**(train or {"steps": 1}), best="train_loss"),
    )


def model_of(e: Experiment) -> FoveatedVLM:
    torch.manual_seed(0)
    given = {
        key: getattr(e.model, key)
        for key in ("visual", "deep_query", "question", "query_rounds", "query_dim", "frame_size")
    }
    config = FoveatedConfig(llm_config=e.model.llm, encoder_config=e.model.encoder, **given)
    model = FoveatedVLM(config).train()
    model.freeze(e.optim.freeze)
    model.recompute(e.model.grad_checkpoint)
    return model


def attention(query, key, value, frame_of_look, scale):
    """A look's attention through torch's own operator, which its counter knows."""
    if frame_of_look is not None:
        key, value = key[frame_of_look], value[frame_of_look]
    out = nnf.scaled_dot_product_attention(query[:, :, None], key.transpose(1, 2), value.transpose(1, 2), scale=scale)
    return out[:, :, 0]


def pooling(folded, hidden, frame_of_look, scale):
    """The same for looks over rows; torch's formula counts gradients of frozen rows too, so those go by products."""
    hidden = hidden if frame_of_look is None else hidden[frame_of_look]
    if not hidden.requires_grad:
        weights = checkpoint(lambda u: (scale * u @ hidden.mT).softmax(-1), folded, use_reentrant=False)
        return weights @ hidden
    hidden = hidden[:, None]
    return nnf.scaled_dot_product_attention(folded[:, None], hidden, hidden, scale=scale)[:, 0]


def counted(e: Experiment, size: PackSize, monkeypatch) -> int:
    """FLOPs of a forward and a backward pass over a pack that holds one sample and no padding."""
    monkeypatch.setattr(fovlm.model.encoder, "query_attention", attention)
    monkeypatch.setattr(kernels.absorbed_attention, "absorbed_pooling", lambda *a, implementation: pooling(*a))
    model = model_of(e)
    one = sample("one", frames=size.frames, looks=size.looks, text=size.text, prompt=size.prompt)
    batch = collate([one], FRAME, model.config.tokens_per_look)
    aten = torch.ops.aten  # the counter leaves out attention on the CPU: it gets torch's own formulas for it
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(batch).sum().backward()
    return counter.get_total_flops()


def check(e: Experiment, size: PackSize, monkeypatch) -> None:
    cost = total(sample_cost(e, geometry(e.model), size))
    assert cost.total + cost.recompute == pytest.approx(counted(e, size, monkeypatch), rel=0.01)


VIDEO = {"after_frames": PackSize(5, 5, 14, 0), "before_frames": PackSize(5, 5, 14, 6)}


@pytest.mark.parametrize("prompt", ["after_frames", "before_frames"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize(("visual", "deep"), VISUALS)
def test_the_formulas_agree_with_torchs_counter(visual, deep, frozen, prompt, monkeypatch):
    check(experiment(visual=visual, deep_query=deep, question=prompt, frozen=frozen), VIDEO[prompt], monkeypatch)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("visual", ["foveated", "coarse", "multi_token"])
def test_recomputed_parts_are_counted_apart(visual, frozen, monkeypatch):
    e = experiment(visual=visual, frozen=frozen, grad_checkpoint=["encoder", "llm"])
    check(e, VIDEO["after_frames"], monkeypatch)
    plain = experiment(visual=visual, frozen=frozen)
    size, shapes = VIDEO["after_frames"], geometry(e.model)
    assert total(sample_cost(e, shapes, size)).total == total(sample_cost(plain, shapes, size)).total


@pytest.mark.parametrize("visual", ["foveated", "coarse", "multi_token"])
def test_an_image_is_encoded_once_however_often_it_is_looked_at(visual, monkeypatch):
    e = experiment(visual=visual)
    check(e, PackSize(1, 8, 14, 0), monkeypatch)
    shapes = geometry(e.model)
    one, many = (sample_cost(e, shapes, PackSize(1, k, 14, 0)) for k in (1, 8))
    assert one["encoder"] == many["encoder"]


def test_more_rounds_and_other_encoders(monkeypatch):
    check(experiment(query_rounds=2), VIDEO["before_frames"], monkeypatch)
    check(
        experiment(dino={**DINO, "use_swiglu_ffn": True, "image_size": 2 * FRAME}), VIDEO["after_frames"], monkeypatch
    )


@pytest.mark.parametrize("kind", list(ENCODERS))
@pytest.mark.parametrize("frozen", [(False, False), (True, False)])
def test_every_family_of_encoders(kind, frozen, monkeypatch):
    encoder = {"model_type": kind, **ENCODERS[kind]}
    check(experiment(dino=encoder, frozen=frozen), VIDEO["after_frames"], monkeypatch)
    check(experiment(dino=encoder, visual="multi_token"), VIDEO["after_frames"], monkeypatch)


def test_other_language_models(monkeypatch):
    smollm3 = {**LLM, **SPECIAL, "model_type": "smollm3", "no_rope_layer_interval": 2}
    for llm in ({**LLM, "model_type": "qwen3", "head_dim": 16}, smollm3, {**LLM, "attention_bias": True}):
        check(experiment(llm=llm), VIDEO["after_frames"], monkeypatch)


def test_text_alone_costs_no_vision():
    e = experiment()
    parts = sample_cost(e, geometry(e.model), PackSize(0, 0, 14, 0))
    assert {name for name, cost in parts.items() if cost.total} == {"fine_llm", "head"}


def test_a_preference_pair_costs_two_samples_and_a_reference():
    e = experiment()
    pair = e.model_copy(update={"train": e.train.model_copy(update={"objective": "dpo"})})
    shapes = geometry(e.model)
    one = total(sample_cost(e, shapes, PackSize(5, 5, 14, 0)))
    two = total(sample_cost(pair, shapes, PackSize(10, 10, 28, 0)))
    assert two.total == 2 * one.total + 2 * one.forward


def test_one_real_token_a_frame_is_cheaper_than_sixteen():
    """Sizes as in the grid: LR1 and B1 at 64 frames; the 135M model does 6 N FLOPs per token and a little more."""
    shapes = geometry(ModelSettings(llm="HuggingFaceTB/SmolLM2-135M-Instruct", encoder="facebook/dinov2-small"))
    e = experiment()
    cost = sample_cost(e, shapes, PackSize(0, 0, 200, 0))
    assert total(cost).total == pytest.approx(6 * 134_515_008 * 200, rel=0.1)
    looks = total(sample_cost(e, shapes, PackSize(64, 64, 200, 0))).total
    pooled = geometry(ModelSettings(visual="multi_token", llm="HuggingFaceTB/SmolLM2-135M-Instruct"))
    assert looks < total(sample_cost(experiment(visual="multi_token"), pooled, PackSize(64, 64, 200, 0))).total


def test_a_budget_buys_samples_of_mean_cost():
    e = experiment(train={"flops": 1e9})
    shapes = geometry(e.model)
    sizes = [PackSize(5, 5, 14, 0), PackSize(0, 0, 9, 0), PackSize(3, 3, 6, 0)]
    mean = total(mean_cost(e, shapes, sizes)).total
    assert mean == pytest.approx(sum(total(sample_cost(e, shapes, s)).total for s in sizes) / 3)
    assert samples_of(e, sizes) == int(1e9 / mean) == samples_for(1e9, mean)
    assert samples_of(experiment(train={"samples": 7}), []) == 7
    with pytest.raises(UserError, match=r"train\.flops=1 is less than one sample"):
        samples_for(1, mean)


def test_without_data_the_largest_sample_is_the_bound():
    e = experiment(question="before_frames")
    assert largest(e, "a") == PackSize(5, 5, 14, 14)
    shapes = geometry(e.model)
    bound = total(sample_cost(e, shapes, largest(e, "a"))).total
    assert bound >= total(mean_cost(e, shapes, [PackSize(5, 5, 14, 6)])).total
