"""The shapes and parameter counts of an experiment's model, read off the model itself on the meta device: no weights.

Configurations come from the experiment, from the `config.json` of a local folder, from a small table of released
models, or from what Hugging Face has cached. Nothing is downloaded.

Letters: D encoder width, H its heads, N rows of a frame (CLS and registers, then patches), E language-model width,
V vocabulary, Q query width, T visual tokens of one look.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from fovlm.config.schema import Experiment, ModelSettings
from fovlm.data.chat import TRANSFORMERS_ERRORS
from fovlm.errors import UserError, did_you_mean
from fovlm.model.build import check_supported, configuration, random_config
from fovlm.model.configuration import FoveatedConfig
from fovlm.model.encoders.families import patch_of, side_of, vision_config
from fovlm.model.lora import is_adapter
from fovlm.model.modeling import FoveatedVLM
from fovlm.paths import local_folder

LLM_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip


def _llm(kind: str, *sizes: int, **more: Any) -> dict:
    named = dict(zip(LLM_SIZES, sizes, strict=True))
    return {"model_type": kind, "tie_word_embeddings": True, **named, **more}


def _vit(kind: str, width: int, **more: Any) -> dict:
    return {"model_type": kind, "hidden_size": width, "num_attention_heads": width // 64} | more


# Released models, as the config.json of each says (https://huggingface.co/ID/blob/main/config.json).
RELEASED: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llm("llama", 49152, 576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _llm("llama", 49152, 960, 2560, 32, 15, 5),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llm("llama", 49152, 2048, 8192, 24, 32, 32),
    "Qwen/Qwen3-0.6B": _llm("qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128),
    "facebook/dinov2-small": _vit("dinov2", 384, image_size=518),
    "facebook/dinov2-base": _vit("dinov2", 768, image_size=518),
    "google/siglip2-base-patch16-224": _vit("siglip_vision_model", 768),
}


@dataclass(frozen=True)
class EncoderShape:
    """The encoder at the experiment's frame size."""

    D: int
    H: int
    N: int
    side: int  # patches on a side of a frame
    layers: int
    mlp: int  # width inside the MLP
    matrices: int  # of the MLP: 2, or 3 with a gate
    patch: int  # numbers in a patch: channels * height * width
    rotary: bool  # positions are in the keys: looks cannot absorb their projection
    parameters: int


@dataclass(frozen=True)
class LlmShape:
    """The language model."""

    E: int
    V: int
    layers: int
    linears: tuple[tuple[int, int], ...]  # input and output width of each linear map of a layer, in order
    heads: int
    asked: int  # width of all queries together
    inner: int  # width inside the MLP
    parameters: int


@dataclass(frozen=True)
class Count:
    """Parameters of a group."""

    trainable: int
    frozen: int


@dataclass(frozen=True)
class Geometry:
    """An experiment's model: both backbones, query width Q, T visual tokens of a look, rounds of fine looks, and the
    parameters of each group with nothing frozen but what the visual mode never uses."""

    encoder: EncoderShape
    llm: LlmShape
    Q: int
    T: int
    rounds: int
    counts: dict[str, Count]


def geometry(model: ModelSettings) -> Geometry:
    """The shapes of an experiment's model. Raises UserError for a backbone that is not supported, and for one whose
    configuration is not available without a download."""
    llm, encoder = _config("llm", model.llm), _config("encoder", model.encoder)
    config = configuration(model, llm, encoder, model.visual_scale or 1.0, 1)
    return _measured(config.to_json_string(use_diff=False))


@functools.lru_cache
def _measured(config_json: str) -> Geometry:
    config = FoveatedConfig(**json.loads(config_json))
    with torch.device("meta"):
        model = FoveatedVLM(config)
    counts = {}
    for name, module in (("connector", model.connector), ("encoder", model.encoder), ("llm", model.llm)):
        trainable, every = (sum(p.numel() for p in ps) for ps in (model.groups()[name], module.parameters()))
        counts[name] = Count(trainable, every - trainable)
    rounds = config.query_rounds if config.visual == "foveated" else 0
    encoder, llm = _encoder_shape(model), _llm_shape(model)
    return Geometry(encoder, llm, config.query_dim, config.tokens_per_look, rounds, counts)


def parameters(experiment: Experiment, shapes: Geometry) -> dict[str, Count]:
    """Parameters of connector, encoder and llm: those that the optimizer gets, and the others.

    A frozen backbone, what only pre-training uses of it, and what the visual mode never uses are frozen.
    """
    return {
        name: Count(0, count.trainable + count.frozen) if name in experiment.optim.freeze else count
        for name, count in shapes.counts.items()
    }


def _config(key: str, source: str | dict[str, Any]) -> PreTrainedConfig:
    """The configuration of the backbone `model.{key}`."""
    if isinstance(source, str) and (folder := local_folder(source)) is None and source in RELEASED:
        source = RELEASED[source]
    if isinstance(source, dict):
        return random_config(key, source)
    try:
        where = str(folder or source)
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, local_files_only=True)
        config = vision_config(config) if key == "encoder" else config
    except TRANSFORMERS_ERRORS as error:
        if folder is None:
            raise UserError(
                f"model.{key}: the shapes of '{source}' are not known: it is no local folder (see FOVLM_MODELS) "
                f"and none of the released models in fovlm/estimate/shapes.py{did_you_mean(source, RELEASED)}"
            ) from error
        raise UserError(
            f"model.{key}: {folder / 'config.json'} cannot be read: is {folder} a model's folder? "
            f"({' '.join(str(error).split())[:120]})"
        ) from error
    check_supported(key, config, source)
    return config


def _linears(module: nn.Module) -> tuple[tuple[int, int], ...]:
    linears = ((name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear))
    return tuple((m.in_features, m.out_features) for name, m in linears if not is_adapter(f"{name}."))


def _encoder_shape(model: FoveatedVLM) -> EncoderShape:
    encoder, config = model.encoder, model.encoder.backbone.config
    side = side_of(config, model.config.frame_size)
    mlp = _linears(encoder.family.block(encoder.layers[0]).mlp)
    return EncoderShape(
        D=encoder.width,
        H=config.num_attention_heads,
        N=encoder.prefix + side**2,
        side=side,
        layers=len(encoder.layers),
        mlp=mlp[0][1],
        matrices=len(mlp),
        patch=config.num_channels * patch_of(config) ** 2,
        rotary=encoder.family.is_rotary,
        parameters=sum(p.numel() for p in encoder.parameters()),
    )


def _llm_shape(model: FoveatedVLM) -> LlmShape:
    config, layers = model.llm.config, model.llm.base_model.layers
    linears = _linears(layers[0])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return LlmShape(
        E=config.hidden_size,
        V=config.vocab_size,
        layers=len(layers),
        linears=linears,
        heads=config.num_attention_heads,
        asked=config.num_attention_heads * head,
        inner=linears[-1][0],
        parameters=sum(p.numel() for p in model.llm.parameters()),
    )
