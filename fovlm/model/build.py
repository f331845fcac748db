"""From an experiment's settings to its model: backbones from folders, hub ids or sizes, and the words that fit them.

A backbone that would train with random weights, or compute something else when packed or streamed, is refused.
"""

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from fovlm.config.schema import ModelSettings
from fovlm.errors import UserError
from fovlm.model.configuration import FoveatedConfig
from fovlm.model.encoder import Dinov2Config, Dinov2Model
from fovlm.model.modeling import FoveatedVLM, check_report
from fovlm.paths import local_folder


def build(settings: ModelSettings, image_frames: int = 1) -> FoveatedVLM:
    """The model of an experiment, in fp32 on the CPU: pretrained backbones by folder or hub id, tiny ones from a dict.

    Raises UserError for a folder without weights, and for a backbone that `_pretrained` refuses.
    """
    if isinstance(settings.encoder, dict):
        dino = Dinov2Model(Dinov2Config(**settings.encoder))
    else:
        dino = _pretrained("encoder", settings.encoder)
    if isinstance(settings.llm, dict):
        llm = AutoModelForCausalLM.from_config(LlamaConfig(**settings.llm))
    else:
        llm = _pretrained("llm", settings.llm)
    config = FoveatedConfig(
        llm_config=llm.config,
        encoder_config=dino.config,
        visual=settings.visual,
        deep_query=settings.deep_query,
        question=settings.question,
        query_rounds=settings.query_rounds,
        query_dim=settings.query_dim,
        visual_scale=settings.visual_scale,
        frame_size=settings.frame_size,
        image_frames=image_frames,
    )
    model = FoveatedVLM(config, llm=llm, dino=dino)
    model.recompute(settings.grad_checkpoint)
    return model


def _pretrained(key: str, source: str) -> PreTrainedModel:
    """The backbone `model.{key}` of a folder or hub id, in fp32, each of its weights read from there.

    Raises UserError when it cannot be read or fetched, is of a kind that is not supported, or when `check_report` does.
    Code in the folder never runs.
    """
    where = find_weights(source)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        if reason := unsupported_encoder(config) if key == "encoder" else unsupported_llm(config):
            raise UserError(f"model.{key}={source}: {reason}")
        model, report = (Dinov2Model if key == "encoder" else AutoModelForCausalLM).from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the report has their names, an error would not
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        missing = "no folder here (nor below FOVLM_MODELS), and not to be fetched"
        problem = "does not load" if local_folder(source) else missing
        raise UserError(f"model.{key}={source}: {problem}: {reason}") from error
    check_report(report, f"model.{key}={source}")
    return model


def unsupported_encoder(config: PreTrainedConfig) -> str:
    """Why an encoder of this configuration cannot be used; empty when it can."""
    if config.model_type == Dinov2Config.model_type:
        return ""
    return f"an encoder of type '{config.model_type}' is not supported, only 'dinov2' (without register tokens)"


def unsupported_llm(config: PreTrainedConfig) -> str:
    """Why a language model of this configuration cannot be used; empty when it can.

    Every layer must be full attention: what a window, a convolution or a recurrent state sees of a pack, or of a stream
    with a cache, is not what it saw in training.
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
    return ""


def check_vocabulary(model: FoveatedVLM, words: int) -> None:
    """Refuse a tokenizer with more words than the model has embeddings for. Raises UserError."""
    rows = model.config.llm_config.vocab_size
    if words > rows:
        raise UserError(
            f"the tokenizer has {words} words and the language model's vocabulary {rows}: set model.tokenizer to the "
            "model's own, or llm.vocab_size for a model made from a config"
        )


def find_weights(name: str) -> str:
    """The folder of a model: as given, or below FOVLM_MODELS; anything else is passed on as a Hugging Face id."""
    folder = local_folder(name)
    if folder is None:
        return name
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: a model folder without weights (no *.safetensors in it)")
    return str(folder)
