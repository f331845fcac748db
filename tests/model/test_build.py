"""Backbones from folders: what loads whole, and what is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma3Config,
    Gemma3TextConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    SmolLM3Config,
    ViTConfig,
    ViTModel,
)

from fovlm import FoveatedVLM, open_model
from fovlm.checkpoint.locate import load_weights
from fovlm.config.experiments import parse
from fovlm.config.schema import ModelSettings
from fovlm.data.chat import load_tokenizer
from fovlm.errors import UserError
from fovlm.estimate.shapes import geometry
from fovlm.model.build import build, random_config
from fovlm.model.processing import FoveatedProcessor
from helpers.models import ENCODERS

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
LLM = SIZES | {"vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
FULL, MIXED = ["full_attention"] * 2, ["full_attention", "sliding_attention"]


def settings(llm: Path | dict = LLM, dino: Path | dict = DINO) -> ModelSettings:
    llm, dino = (given if isinstance(given, dict) else str(given) for given in (llm, dino))
    return ModelSettings(llm=llm, encoder=dino, tokenizer="none", query_dim=20, frame_size=28)


def refused(**backbone: Path | str) -> str:
    with pytest.raises(UserError) as error:
        build(settings(**backbone))
    assert "\n" not in str(error.value)
    return str(error.value)


def llm_folder(folder: Path, config: PreTrainedConfig) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config", [LlamaConfig, Qwen3Config, SmolLM3Config, lambda **sizes: MistralConfig(**sizes, sliding_window=None)]
)
def test_what_is_in_the_folders_is_what_trains(tmp_path, config, tied):
    llm_folder(tmp_path / "llm", config(**LLM, tie_word_embeddings=tied))
    Dinov2Model(Dinov2Config(**DINO)).save_pretrained(tmp_path / "dino")
    model = build(settings(tmp_path / "llm", tmp_path / "dino"))
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").state_dict()
    assert all(torch.equal(stored[name], weight) for name, weight in model.llm.state_dict().items())
    stored = Dinov2Model.from_pretrained(tmp_path / "dino").state_dict()
    assert all(torch.equal(stored[name], weight) for name, weight in model.encoder.backbone.state_dict().items())


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_encoders_of_every_family_load_from_folders(tmp_path, kind):
    config = AutoConfig.for_model(kind, **ENCODERS[kind])
    AutoModel.from_config(config).save_pretrained(tmp_path)
    stored = AutoModel.from_pretrained(tmp_path).state_dict()
    loaded = build(settings(dino=tmp_path)).encoder.backbone.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in loaded.items())


@pytest.mark.parametrize(("config", "model"), [(SiglipConfig, SiglipModel), (Siglip2Config, Siglip2Model)])
def test_of_a_folder_with_a_text_tower_the_vision_tower_is_the_encoder(tmp_path, config, model):
    vision = ENCODERS["siglip_vision_model" if config is SiglipConfig else "siglip2_vision_model"]
    text = {"vocab_size": 64, "max_position_embeddings": 8, "projection_size": 32, **SIZES}
    both = model(config(text_config=text, vision_config=vision))
    both.save_pretrained(tmp_path)
    loaded = build(settings(dino=tmp_path)).encoder.backbone.state_dict()
    assert all(torch.equal(both.vision_model.state_dict()[name], weight) for name, weight in loaded.items())


def test_another_encoder_is_refused(tmp_path):
    ViTModel(ViTConfig(**SIZES, image_size=28, patch_size=7)).save_pretrained(tmp_path / "vit")
    assert "type 'vit' is not supported, only dinov2, dinov2_with_registers" in refused(dino=tmp_path / "vit")
    assert "type 'llama' is not supported" in refused(dino={"model_type": "llama"})
    assert "no model_type 'dinov4' in transformers (did you mean" in refused(dino={"model_type": "dinov4"})
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO)).save_pretrained(tmp_path / "registers")
    config = json.loads((tmp_path / "registers" / "config.json").read_text()) | {"model_type": "dinov2"}
    (tmp_path / "registers" / "config.json").write_text(json.dumps(config))
    assert "1 unexpected weights, like embeddings.register_tokens" in refused(dino=tmp_path / "registers")


@pytest.mark.parametrize("key", ["llm", "encoder"])
def test_a_name_that_a_configuration_does_not_have_is_refused(key):
    given = {"llm": LLM, "encoder": DINO}[key] | {"hidden_sizes": 64}
    expected = rf"model\.{key}\.hidden_sizes: no setting of '\w+' in transformers \(did you mean 'hidden_size'\?\)"
    for check in (build, geometry):
        with pytest.raises(UserError, match=expected):
            check(settings().model_copy(update={key: given}))
    build(settings(llm=LLM | {"rope_theta": 1e5}))  # no attribute of the configuration, but it reads it


def test_a_frame_that_is_no_whole_number_of_patches_is_refused():
    with pytest.raises(UserError, match=r"model\.frame_size=30: not a multiple of the encoder's patches of 7 pixels"):
        build(settings().model_copy(update={"frame_size": 30}))


def test_the_scale_of_visual_tokens_can_be_that_of_the_embeddings(tmp_path):
    model = build(settings().model_copy(update={"visual_scale": None}))
    assert model.config.visual_scale == pytest.approx(model.llm.get_input_embeddings().weight.detach().std().item())
    assert model.connector.visual_scale == model.config.visual_scale
    model.save_pretrained(tmp_path)
    assert FoveatedVLM.from_pretrained(tmp_path).connector.visual_scale == model.config.visual_scale


def test_a_deep_query_enters_the_encoder_at_its_scale_and_a_shallow_one_at_std_1():
    def entering(**changed) -> float:
        torch.manual_seed(0)
        model = build(settings().model_copy(update=changed))
        return model.connector.query_in.weight.std().item()

    assert entering(query_scale=0.1) == pytest.approx(0.1 * entering(), rel=1e-5)
    assert entering(query_scale=0.1, deep_query=False) == entering()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**LLM), "sliding window of 4096"),
        (Qwen3Config(**LLM, use_sliding_window=True, sliding_window=4, max_window_layers=1), "sliding_attention"),
        (Gemma3TextConfig(**LLM, head_dim=8, layer_types=MIXED), "sliding_attention"),
        (Lfm2Config(**LLM, layer_types=["conv", "full_attention"]), "conv"),
        (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "linear_attention"),
        (GraniteConfig(**LLM, logits_scaling=8.0), "'granite' with logits_scaling is not supported, only plain logits"),
        (MixtralConfig(**LLM, sliding_window=None), "'mixtral' with experts is not supported"),
        (Gemma3Config(), "'gemma3' is not a causal language model on its own"),
        (Dinov2Config(**DINO), "'dinov2' is not a causal language model"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_language_model_without_full_attention_in_every_layer_is_refused(tmp_path, config, reason):
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # the configuration is refused before the weights are read
    assert reason in refused(llm=tmp_path)


def test_weights_that_are_missing_or_left_over_are_refused(tmp_path):
    llm_folder(tmp_path, Qwen3Config(**LLM))
    whole = load_file(tmp_path / "model.safetensors")

    def with_weights(weights: dict[str, torch.Tensor]) -> str:
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        return refused(llm=tmp_path)

    cut = {name: weight for name, weight in whole.items() if ".layers.1." not in name}
    assert "11 missing weights, like model.layers.1.input_layernorm.weight" in with_weights(cut)
    assert "1 unexpected weights, like model.extra" in with_weights(whole | {"model.extra": torch.zeros(2)})
    assert "1 mismatched weights, like model.norm.weight" in with_weights(whole | {"model.norm.weight": torch.zeros(5)})
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    assert "does not load" in refused(llm=tmp_path)


def test_a_saved_model_with_a_weight_missing_is_refused(saved_model, tmp_path):
    folder = Path(shutil.copytree(saved_model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights.pop("connector.q_static")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing weights, like connector\.q_static"):
        open_model(folder)
    with pytest.raises(UserError, match=r"init_from=.*: 1 missing weights"):
        load_weights(build(settings()), str(folder))


@pytest.fixture
def hostile(saved_model, tmp_path, monkeypatch) -> Path:
    """A model folder with code of its own, that leaves a file when it runs; a terminal that would say yes."""
    folder = Path(shutil.copytree(saved_model, tmp_path / "hostile"))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\n")
    code = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C", "AutoModel": "code.C"}
    config = {"model_type": "hostile", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    words = {"tokenizer_class": "C", "auto_map": {"AutoTokenizer": ["code.C", "code.C"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    yield folder
    assert not (tmp_path / "ran").exists()


def test_code_in_a_model_folder_never_runs(hostile):
    assert "contains custom code" in refused(llm=hostile)
    assert "contains custom code" in refused(dino=hostile)
    with pytest.raises(UserError, match="contains custom code"):
        load_tokenizer(str(hostile))
    with pytest.raises(ValueError, match="contains custom code"):
        FoveatedProcessor.from_pretrained(hostile)


def test_code_beside_a_known_model_is_passed_over(hostile):
    llm_folder(hostile, LlamaConfig(**LLM))
    config = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "code.C"}}))
    build(settings(llm=hostile))


SENSELESS = {
    "llm": ["hidden_size=wide", "hidden_size=33", "hidden_size=1000000000", "num_attention_heads=0", "vocab_size=0",
            "num_attention_heads=-1", "num_key_value_heads=3", "num_hidden_layers=1000000", "hidden_act=nope",
            "rope_parameters={rope_type: nope}", "head_dim=7", "pad_token_id=1000", "dtype=x", "model_type=[]",
            "_attn_implementation=flash_attention_9"],
    "encoder": ["patch_size=0", "patch_size=null", "num_attention_heads=3", "num_hidden_layers=0", "num_channels=1",
                "hidden_size={}", "hidden_act=nope", "mlp_ratio=-1", "drop_path_rate=0.5"],
}  # fmt: skip


@pytest.mark.parametrize(("key", "setting"), [(key, setting) for key in SENSELESS for setting in SENSELESS[key]])
def test_settings_of_a_backbone_that_make_no_sense_are_one_line(key, setting):
    """The dry run and the training both ask `random_config`."""
    name, _, value = setting.partition("=")
    with pytest.raises(UserError, match=f"model.{key}") as error:
        random_config(key, {"llm": LLM, "encoder": DINO}[key] | {name: parse(value)})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("key", ["llm", "encoder"])
def test_a_backbone_without_sizes_is_not_made_up(key):
    """transformers would make a model of 7 billion weights of it."""
    with pytest.raises(UserError, match=f"model.{key}: no hidden_size"):
        random_config(key, {})
