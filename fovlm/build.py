"""From an experiment's settings to its model: backbones from folders, hub ids or sizes, and the words that fit them."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fovlm.config import Model as ModelSettings
from fovlm.encoder import load_dino
from fovlm.errors import UserError
from fovlm.geometry import local_folder
from fovlm.model import FoveatedConfig, FoveatedVLM


def build(settings: ModelSettings, image_frames: int = 1) -> FoveatedVLM:
    """The model of an experiment, in fp32 on the CPU: pretrained backbones by folder or hub id, tiny ones from a dict.

    Raises UserError for a folder without weights.
    """
    dino = _load("dino", settings.dino, load_dino)
    llm = _load("llm", settings.llm, _load_llm)
    config = FoveatedConfig(
        llm_config=llm.config,
        dino_config=dino.config,
        visual=settings.visual,
        deep_query=settings.deep_query,
        prompt=settings.prompt,
        rounds=settings.rounds,
        query_dim=settings.query_dim,
        visual_scale=settings.visual_scale,
        frame_size=settings.frame_size,
        image_frames=image_frames,
    )
    model = FoveatedVLM(config, llm=llm, dino=dino)
    model.recompute(dino=settings.checkpoint_dino, llm=settings.checkpoint_llm)
    return model


def _load(key: str, source: str | dict[str, Any], load: Callable[[str | dict[str, Any]], Any]) -> Any:
    """A backbone by `load`, from where `source` is found; what cannot be read or fetched is a UserError."""
    try:
        return load(find_weights(source) if isinstance(source, str) else source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"model.{key}={source}: no folder here (nor below FOVLM_MODELS), and not to be fetched: {reason}"
        ) from error


def _load_llm(source: str | dict[str, Any]) -> PreTrainedModel:
    if isinstance(source, dict):
        return AutoModelForCausalLM.from_config(LlamaConfig(**source))
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


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
