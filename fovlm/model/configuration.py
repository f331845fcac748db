"""FoveatedConfig: the configuration of a FoveatedVLM, in the Hugging Face way."""

from pathlib import Path
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from fovlm.data.chat import TRANSFORMERS_ERRORS
from fovlm.errors import UserError, did_you_mean
from fovlm.model.folder import MODEL_TYPE
from fovlm.model.modes import QUESTIONS, VISUALS
from fovlm.model.shipped_code import AUTO_MAP, write_code

# The type of a backbone that is given as keyword arguments without `model_type`.
DEFAULT_TYPES = {"llm": "llama", "encoder": "dinov2"}


def backbone_config(key: str, given: dict[str, Any]) -> PreTrainedConfig:
    """The HF configuration of `model.{key}` ("llm" or "encoder") from keyword arguments, `model_type` among them.
    Raises UserError for a type that transformers does not know, and for arguments that it refuses."""
    settings = {"model_type": DEFAULT_TYPES[key], **given}
    kind = settings.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"model.{key}: no model_type '{kind}' in transformers{did_you_mean(kind, CONFIG_MAPPING)}")
    try:
        return AutoConfig.for_model(kind, **settings)
    except TRANSFORMERS_ERRORS as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"model.{key}: not a configuration of '{kind}': {reason}") from error


class FoveatedConfig(PreTrainedConfig):
    """What a FoveatedVLM is made of. `llm_config` and `encoder_config` are HF configurations or their dicts.
    `example` is a question of its validation set, with which demos begin.

    Raises ValueError for a `visual` or `question` that does not exist.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar = ["last_hidden_state"]
    sub_configs: ClassVar = {"llm_config": AutoConfig, "encoder_config": AutoConfig}

    def __init__(
        self,
        llm_config: PreTrainedConfig | dict | None = None,
        encoder_config: PreTrainedConfig | dict | None = None,
        visual: str = "foveated",
        pooled: int = 4,
        deep_query: bool = True,
        question: str = "after_frames",
        query_rounds: int = 1,
        query_dim: int = 384,
        visual_scale: float = 0.14,
        frame_size: int = 224,
        image_frames: int = 1,
        lora: dict[str, Any] | None = None,
        example: str = "",
        **kwargs,
    ):
        if visual not in VISUALS:
            raise ValueError(f"visual is one of {VISUALS}, not {visual!r}")
        if question not in QUESTIONS:
            raise ValueError(f"question is one of {QUESTIONS}, not {question!r}")
        self.llm_config = _config("llm", llm_config)
        self.encoder_config = _config("encoder", encoder_config)
        self.visual = visual
        self.pooled = pooled
        self.deep_query = deep_query
        self.question = question
        self.query_rounds = query_rounds
        self.query_dim = query_dim
        self.visual_scale = visual_scale
        self.frame_size = frame_size
        self.image_frames = image_frames
        self.lora = lora
        self.example = example
        kwargs.setdefault("tie_word_embeddings", False)  # a tie inside the language model is its own affair
        super().__init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and the code that loads the model where fovlm is not installed."""
        write_code(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args: Any) -> None:
        """Nothing: `auto_map` and `code/` are always written, so transformers need not add a second copy."""

    @property
    def tokens_per_look(self) -> int:
        """T: visual tokens of one look."""
        return self.pooled**2 if self.visual == "multi_token" else 1

    @property
    def context(self) -> int:
        """Positions that the language model supports."""
        return int(self.llm_config.max_position_embeddings)


def _config(key: str, given: PreTrainedConfig | dict | None) -> PreTrainedConfig:
    return given if isinstance(given, PreTrainedConfig) else backbone_config(key, given or {})


AutoConfig.register(FoveatedConfig.model_type, FoveatedConfig, exist_ok=True)
