"""The families of vision transformers that can be the encoder."""

from transformers import PreTrainedConfig

from fovlm.model.encoders.base import Family
from fovlm.model.encoders.dinov2 import Dinov2
from fovlm.model.encoders.dinov3 import Dinov3
from fovlm.model.encoders.siglip2 import Siglip

FAMILIES: dict[str, Family] = {kind: family for family in (Dinov2(), Dinov3(), Siglip()) for kind in family.kinds}
DROPOUTS = ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")


def unsupported(config: PreTrainedConfig) -> str:
    """Why an encoder of this configuration cannot be used; empty when it can."""
    if config.model_type not in FAMILIES:
        return f"an encoder of type '{config.model_type}' is not supported, only {', '.join(FAMILIES)}"
    on = [name for name in DROPOUTS if getattr(config, name, 0)]
    return f"the encoder runs without dropout: set {' and '.join(on)} to 0" if on else ""


def side_of(config: PreTrainedConfig, frame_size: int) -> int:
    """How many patches a frame of `frame_size` pixels has on a side."""
    return frame_size // patch_of(config)


def patch_of(config: PreTrainedConfig) -> int:
    """Pixels on a side of a patch."""
    size = config.patch_size
    return size if isinstance(size, int) else size[0]


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision tower's part of a configuration that has a text tower too."""
    return getattr(config, "vision_config", config)
