"""From an experiment's settings to its model: backbones from folders, hub ids or configurations.

A backbone that would train with random weights, or compute something else when packed or streamed, is refused.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from fovlm.config.schema import ModelSettings
from fovlm.data.chat import TRANSFORMERS_ERRORS
from fovlm.errors import UserError, did_you_mean
from fovlm.model.configuration import FoveatedConfig, backbone_config
from fovlm.model.encoders.families import FAMILIES, patch_of, unsupported, vision_config
from fovlm.model.modeling import FoveatedVLM, check_report
from fovlm.paths import local_folder

SIZE = re.compile(r"(size|heads|layers|dim|channels|embeddings)$")  # names of what must be above 0


def build(settings: ModelSettings, image_frames: int = 1) -> FoveatedVLM:
    """The model of an experiment, in fp32 on the CPU: backbones pretrained, or random from a dict. Raises UserError for
    a folder without weights, and for a backbone that is not supported."""
    encoder, llm = (
        _random(key, given) if isinstance(given, dict) else _pretrained(key, given)
        for key, given in (("encoder", settings.encoder), ("llm", settings.llm))
    )
    scale = settings.visual_scale or llm.get_input_embeddings().weight.detach().std().item()
    model = FoveatedVLM(configuration(settings, llm.config, encoder.config, scale, image_frames), llm, encoder)
    if settings.deep_query:  # nothing normalises the query of a shallow look: a weak one would attend uniformly
        with torch.no_grad():
            model.connector.query_in.weight.mul_(settings.query_scale)
    model.recompute(settings.grad_checkpoint)
    return model


def configuration(
    settings: ModelSettings, llm: PreTrainedConfig, encoder: PreTrainedConfig, visual_scale: float, image_frames: int
) -> FoveatedConfig:
    """The configuration of an experiment's model with these backbones. Raises UserError for a frame size that is not a
    whole number of patches."""
    size, patch = settings.frame_size, patch_of(encoder)
    if size % patch:
        raise UserError(f"model.frame_size={size}: not a multiple of the encoder's patches of {patch} pixels")
    same = settings.model_dump(include=set(signature(FoveatedConfig).parameters) - {"visual_scale"})
    return FoveatedConfig(llm, encoder, visual_scale=visual_scale, image_frames=image_frames, **same)


def _random(key: str, given: dict) -> PreTrainedModel:
    config = random_config(key, given)
    with _mistakes(key):
        return (AutoModel if key == "encoder" else AutoModelForCausalLM).from_config(config)


def random_config(key: str, given: dict) -> PreTrainedConfig:
    """The configuration `model.{key}` of a backbone with random weights. Raises UserError for one that is not
    supported, or of which transformers cannot make a model."""
    for name, value in given.items():
        most = 1000 if str(name).endswith("layers") else 1 << 24
        if SIZE.search(str(name)) and type(value) is int and not 1 <= value <= most:
            raise UserError(f"model.{key}.{name}: must be between 1 and {most:,}, not {str(value)[:40]}")
    with _mistakes(key):
        config = backbone_config(key, given)
        check_supported(key, config, config.model_type)
        check_names(key, config, given)
        if "hidden_size" not in given:
            raise UserError(f"model.{key}: no hidden_size: a model of random weights needs its sizes, or name a folder")
        heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", 1)
        if heads % groups:
            raise UserError(f"model.{key}: {heads} num_attention_heads are no multiple of {groups} num_key_value_heads")
        if key == "encoder" and (config.hidden_size % heads or config.num_channels != 3):
            raise UserError(f"model.{key}: hidden_size must be a multiple of {heads} heads, and num_channels 3")
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        if key == "llm" and head % 2:
            raise UserError(f"model.{key}: heads of {head} channels (head_dim): rotary positions need an even number")
        with torch.device("meta"):
            (AutoModel if key == "encoder" else AutoModelForCausalLM).from_config(config)
    return config


@contextmanager
def _mistakes(key: str) -> Iterator[None]:
    """Raise UserError for what transformers raises when settings make no sense, or no model that fits in memory."""
    try:
        yield
    except TRANSFORMERS_ERRORS as error:
        reason = " ".join(str(error).split()).split("Error: ")[-1][:200]
        raise UserError(f"model.{key}: transformers cannot make this model: {reason}") from error


def _pretrained(key: str, source: str) -> PreTrainedModel:
    """The backbone `model.{key}` of a folder or hub id, in fp32, each of its weights read from there.

    Raises UserError when it cannot be read or downloaded, is of a type that is not supported, or when `check_report`
    does. Code in the folder never runs.
    """
    where = find_weights(source)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        config = vision_config(config) if key == "encoder" else config
        check_supported(key, config, source)
        model, report = (AutoModel if key == "encoder" else AutoModelForCausalLM).from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the report has their names, an error would not
            output_loading_info=True,
        )
    except TRANSFORMERS_ERRORS as error:
        reason = " ".join(str(error).split())[:160]
        missing = "no folder here (nor below FOVLM_MODELS), and it cannot be downloaded"
        problem = "does not load" if local_folder(source) else missing
        raise UserError(f"model.{key}={source}: {problem}: {reason}") from error
    check_report(report, f"model.{key}={source}", FAMILIES[config.model_type].skipped if key == "encoder" else ())
    return model


def check_supported(key: str, config: PreTrainedConfig, source: str) -> None:
    """Refuse a backbone `model.{key}` that cannot be used. Raises UserError with the reason."""
    if reason := unsupported(config) if key == "encoder" else unsupported_llm(config):
        raise UserError(f"model.{key}={source}: {reason}")


def check_names(key: str, config: PreTrainedConfig, given: dict) -> None:
    """Refuse names in `given` that a configuration of this type has no use for: transformers would only store them.
    Raises UserError with the closest name."""
    default = type(config)()
    for name in given:
        if hasattr(config, name) and not hasattr(default, name):
            close = did_you_mean(name, vars(default))
            raise UserError(f"model.{key}.{name}: no setting of '{config.model_type}' in transformers{close}")


def unsupported_llm(config: PreTrainedConfig) -> str:
    """Why a language model of this configuration cannot be used; empty when it can.

    Every layer must be full attention: what a window, a convolution or a recurrent state sees of a pack, or of a stream
    with a cache, is not what it saw in training. The loss takes logits as the output embeddings give them, and FLOPs
    and memory are counted for dense layers.
    """
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None or config.get_text_config() is not config:
        return f"'{config.model_type}' is not a causal language model on its own"
    only = "is not supported, only full attention in every layer"
    if kinds := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"}):
        return f"'{config.model_type}' with {' and '.join(kinds)} {only}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"'{config.model_type}' with a sliding window of {config.sliding_window} tokens {only}"
    if model._is_stateful or not model._supports_attention_backend:
        return f"'{config.model_type}' {only}"
    if scaled := [name for name in ("logits_scaling", "logit_scale", "final_logit_softcapping") if _set(config, name)]:
        return f"'{config.model_type}' with {scaled[0]} is not supported, only plain logits"
    if any(_set(config, name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return f"'{config.model_type}' with experts is not supported, only dense layers"
    if not hasattr(config, "num_key_value_heads"):
        return f"'{config.model_type}' is not supported: its layers are not laid out like those of Llama"
    return ""


def _set(config: PreTrainedConfig, name: str) -> bool:
    return getattr(config, name, None) not in (None, 0, 1)


def check_vocabulary(rows: int, words: int) -> None:
    """Refuse a tokenizer with more `words` than the language model has embeddings, `rows`. Raises UserError."""
    if words > rows:
        raise UserError(
            f"the tokenizer has {words} words and the language model's vocabulary {rows}: set model.tokenizer to the "
            "model's own, or llm.vocab_size for a model made from a config"
        )


def find_weights(name: str) -> str:
    """The folder of a model: as given, or below FOVLM_MODELS; any other name is returned as a Hugging Face id."""
    folder = local_folder(name)
    if folder is None:
        return name
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: a model folder without weights (no *.safetensors in it)")
    return str(folder)
