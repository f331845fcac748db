"""Shapes and parameter counts without weights, against real modules."""

import itertools
import json

import pytest
from transformers import AutoConfig, LlamaConfig

from fovlm.config.schema import (
    DataSettings,
    DataSource,
    Experiment,
    ModelSettings,
    OptimSettings,
    TrainSettings,
)
from fovlm.errors import UserError
from fovlm.estimate.shapes import RELEASED, geometry, parameters
from fovlm.model.build import build
from fovlm.model.configuration import backbone_config
from fovlm.paths import ROOT, local_folder, model_root

LLM = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DINO = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 3,
    "image_size": 28,
    "patch_size": 7,
}
QWEN = {**LLM, "model_type": "qwen3", "head_dim": 16}
DINOV3 = {"model_type": "dinov3_vit", "num_register_tokens": 4, "use_gated_mlp": True}
SIGLIP = {"model_type": "siglip_vision_model"}
DINOV3, SIGLIP = (
    {k: v for k, v in DINO.items() if k != "mlp_ratio"} | {"intermediate_size": 48} | more for more in (DINOV3, SIGLIP)
)
TIED, MORE = {**LLM, "tie_word_embeddings": True}, {**LLM, "attention_bias": True, "mlp_bias": True, "head_dim": 12}
SWIGLU, BARE = {**DINO, "use_swiglu_ffn": True}, {**DINO, "qkv_bias": False, "use_mask_token": False}


def experiment(model: ModelSettings, freeze=()) -> Experiment:
    return Experiment(
        name="tiny",
        model=model,
        data=DataSettings(sources={"a": DataSource(shards="a.tar", kind="video")}, mixture={"a": 1.0}, max_tokens=64),
        optim=OptimSettings(freeze=list(freeze)),
        train=TrainSettings(steps=1, best="train_loss"),
    )


def tiny(llm=LLM, encoder=DINO, **more) -> ModelSettings:
    return ModelSettings(llm=llm, encoder=encoder, tokenizer="none", query_dim=20, frame_size=28, **more)


@pytest.mark.parametrize("frozen", [[], ["encoder"], ["encoder", "llm"]])
@pytest.mark.parametrize("visual", ["foveated", "coarse", "multi_token"])
@pytest.mark.parametrize(("llm", "dino"), [(LLM, DINO), (TIED, SWIGLU), (MORE, BARE), (QWEN, DINOV3), (TIED, SIGLIP)])
def test_counts_are_those_of_the_modules(llm, dino, visual, frozen):
    settings = tiny(llm, dino, visual=visual)
    model = build(settings)
    model.freeze(frozen)
    counts = parameters(experiment(settings, frozen), geometry(settings))
    assert list(counts) == list(model.groups())
    for (name, count), module in zip(counts.items(), (model.connector, model.encoder, model.llm), strict=True):
        assert count.trainable == sum(p.numel() for p in model.groups()[name])
        assert count.trainable + count.frozen == sum(p.numel() for p in module.parameters())


def test_released_models_have_their_known_sizes(monkeypatch, tmp_path):
    monkeypatch.setenv("FOVLM_MODELS", str(tmp_path))
    names = iter(itertools.product(("135M", "360M", "1.7B"), ("small", "base")))
    sizes = {"135M": 134_515_008, "360M": 361_821_120, "1.7B": 1_711_376_384, "small": 22_056_576, "base": 86_580_480}
    for llm, dino in names:
        shapes = geometry(ModelSettings(llm=f"HuggingFaceTB/SmolLM2-{llm}-Instruct", encoder=f"facebook/dinov2-{dino}"))
        assert (shapes.llm.parameters, shapes.encoder.parameters) == (sizes[llm], sizes[dino])
        assert (shapes.encoder.N, shapes.llm.V, shapes.encoder.D // shapes.encoder.H) == (257, 49152, 64)
    shapes = geometry(ModelSettings(llm="Qwen/Qwen3-0.6B", encoder="google/siglip2-base-patch16-224"))
    assert (shapes.llm.parameters, shapes.encoder.N) == (596_049_920, 196)


def test_a_local_folder_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("FOVLM_MODELS", str(tmp_path))
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert local_folder(name) is None
    folder = tmp_path / "SmolLM2-135M-Instruct"  # below FOVLM_MODELS, and goes ahead of the table
    LlamaConfig(**LLM).save_pretrained(folder)
    assert local_folder(name) == folder
    assert geometry(ModelSettings(llm=name)) == geometry(ModelSettings(llm=str(folder)))
    assert geometry(ModelSettings(llm=name)).llm == geometry(tiny()).llm
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match=r"model\.llm=HuggingFaceTB.*: 'gpt2' is not supported"):
        geometry(ModelSettings(llm=name))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        geometry(ModelSettings(llm=name))


def test_models_are_below_the_project_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("FOVLM_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert model_root() == ROOT / "models"
    (tmp_path / "models" / "other").mkdir(parents=True)
    assert local_folder("other") is None


def test_an_unknown_model_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("FOVLM_MODELS", str(tmp_path))
    with pytest.raises(UserError, match=r"model\.llm: .*did you mean 'HuggingFaceTB/SmolLM2-135M-Instruct'"):
        geometry(ModelSettings(llm="HuggingFaceTB/SmolLM-135M-Instruct"))
    with pytest.raises(UserError, match=r"model\.encoder: the shapes of 'nowhere' are not known"):
        geometry(ModelSettings(encoder="nowhere"))


@pytest.mark.real
@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "facebook/dinov2-small"])
def test_the_table_agrees_with_the_real_folders(name):
    folder = local_folder(name)
    if folder is None:
        pytest.skip("FOVLM_MODELS has no such model")
    said, table = AutoConfig.from_pretrained(folder), backbone_config("llm", RELEASED[name])
    assert {key: getattr(said, key) for key in RELEASED[name]} == {key: getattr(table, key) for key in RELEASED[name]}


@pytest.mark.parametrize(
    ("key", "backbone", "reason"),
    [
        ("llm", {**LLM, "model_type": "gemma3_text"}, "sliding_attention"),
        ("llm", {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "conv"),
        ("encoder", {"model_type": "vit"}, "type 'vit' is not supported"),
    ],
)
def test_what_cannot_train_is_refused_before_it_starts(key, backbone, reason):
    with pytest.raises(UserError, match=reason) as error:
        geometry(tiny(**{key: backbone}))
    assert "\n" not in str(error.value)
