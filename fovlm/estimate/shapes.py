"""The shapes of an experiment's model, known without its weights: what scaling and the dry run count with. No torch.

They come from the keyword arguments of a tiny model, from the `config.json` of a local folder, or from a small table of
released models. Nothing is downloaded.

Letters: D encoder width, H its heads, N patches + CLS of a frame, E language-model width, V vocabulary, Q query width,
T visual tokens of one look.
"""

import json
from dataclasses import dataclass
from typing import Any

from fovlm.config.schema import Experiment
from fovlm.config.schema import ModelSettings as ModelSettings
from fovlm.errors import UserError, did_you_mean
from fovlm.paths import local_folder

# What transformers 5.23 assumes for settings that a LlamaConfig or a Dinov2Config is not given.
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as attention heads
    "head_dim": None,  # hidden_size / heads
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
DINOV2 = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "use_mask_token": True,
}


def _smollm2(width: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 49152,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": True,
    }


# Released models, as the config.json of each says (https://huggingface.co/ID/blob/main/config.json).
RELEASED: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _smollm2(576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _smollm2(960, 2560, 32, 15, 5),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _smollm2(2048, 8192, 24, 32, 32),
    "facebook/dinov2-small": {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518},
    "facebook/dinov2-base": {"hidden_size": 768, "num_attention_heads": 12, "image_size": 518},
}
POOLED = 16  # multi_token: tokens of a frame


@dataclass(frozen=True)
class Dino:
    """DINOv2: width D, heads H, N patches + CLS at the experiment's frame size."""

    D: int
    H: int
    N: int
    layers: int
    mlp: int  # width inside the MLP
    matrices: int  # of the MLP: 2, or 3 with SwiGLU
    patch: int  # numbers in a patch: channels * height * width
    positions: int  # rows of the table of position embeddings
    qkv_bias: bool
    mask_token: bool

    @property
    def parameters(self) -> int:
        """All of DINOv2, the mask token included."""
        D, inner = self.D, self.mlp
        embeddings = D + self.patch * D + D + self.positions * D + D * self.mask_token
        attention = 4 * D * D + D + 3 * D * self.qkv_bias
        mlp = self.matrices * D * inner + (self.matrices - 1) * inner + D
        return embeddings + self.layers * (attention + mlp + 4 * D + 2 * D) + 2 * D  # two norms, two layer scales


@dataclass(frozen=True)
class Llama:
    """A language model of Llama's make: width E, vocabulary V."""

    E: int
    V: int
    layers: int
    heads: int
    kv_heads: int
    head: int  # width of a head
    inner: int  # width inside the MLP
    tied: bool  # input and output embeddings are one matrix
    attention_bias: bool
    mlp_bias: bool

    @property
    def asked(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head

    @property
    def kept(self) -> int:
        """Width of all keys (or values) together."""
        return self.kv_heads * self.head

    @property
    def parameters(self) -> int:
        E, inner = self.E, self.inner
        attention = 2 * E * (self.asked + self.kept) + self.attention_bias * (self.asked + 2 * self.kept + E)
        mlp = 3 * E * inner + self.mlp_bias * (2 * inner + E)
        return self.V * E * (1 if self.tied else 2) + self.layers * (attention + mlp + 2 * E) + E


@dataclass(frozen=True)
class Geometry:
    """An experiment's model: the backbones' shapes, query width Q, T visual tokens of a look, rounds of fine looks."""

    dino: Dino
    llm: Llama
    Q: int
    T: int
    rounds: int


@dataclass(frozen=True)
class Count:
    """Parameters of a group."""

    trainable: int
    frozen: int


def geometry(model: ModelSettings) -> Geometry:
    """The shapes of an experiment's model. Raises UserError for a model that is neither local nor in the table."""
    T = POOLED if model.visual == "multi_token" else 1
    rounds = model.query_rounds if model.visual == "foveated" else 0
    return Geometry(_dino(model.encoder, model.frame_size), _llama(model.llm), model.query_dim, T, rounds)


def vocabulary(model: ModelSettings) -> int:
    """V: how many token ids the language model knows. Raises UserError as `geometry` does."""
    return _llama(model.llm).V


def parameters(experiment: Experiment, shapes: Geometry) -> dict[str, Count]:
    """Parameters of connector, dino and llm: those that the optimizer gets, and the others.

    A frozen backbone, DINOv2's mask token and what the visual mode never touches are frozen.
    """
    Q, D, E = shapes.Q, shapes.dino.D, shapes.llm.E
    asking = Q + (E * Q + Q)  # q_first, to_query
    connector = Q * D + (D * E + E) + asking + Q
    unused = {"foveated": 0, "coarse": asking, "multi_token": asking + Q + Q * D}[experiment.model.visual]
    dino, llm, mask = shapes.dino.parameters, shapes.llm.parameters, shapes.dino.mask_token * D
    return {
        "connector": Count(connector - unused, unused),
        "encoder": Count(0, dino) if "encoder" in experiment.optim.freeze else Count(dino - mask, mask),
        "llm": Count(0, llm) if "llm" in experiment.optim.freeze else Count(llm, 0),
    }


def _settings(source: str | dict[str, Any], key: str, kind: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """A model's settings over the defaults of its kind."""
    if isinstance(source, dict):
        return defaults | source
    folder = local_folder(source)
    if folder is None:
        if source not in RELEASED:
            raise UserError(
                f"model.{key}: the shapes of '{source}' are not known: it is no local folder (see FOVLM_MODELS) "
                f"and none of the released models in fovlm/estimate/shapes.py{did_you_mean(source, RELEASED)}"
            )
        return defaults | RELEASED[source]
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.{key}: {file} cannot be read ({error}): is {folder} a model's folder?") from None
    if not isinstance(settings, dict) or settings.get("model_type") != kind:
        raise UserError(f"model.{key}: {file} is not the configuration of a {kind} model")
    return defaults | settings


def _llama(source: str | dict[str, Any]) -> Llama:
    s = _settings(source, "llm", "llama", LLAMA)
    return Llama(
        E=s["hidden_size"],
        V=s["vocab_size"],
        layers=s["num_hidden_layers"],
        heads=s["num_attention_heads"],
        kv_heads=s["num_key_value_heads"] or s["num_attention_heads"],
        head=s["head_dim"] or s["hidden_size"] // s["num_attention_heads"],
        inner=s["intermediate_size"],
        tied=s["tie_word_embeddings"],
        attention_bias=s["attention_bias"],
        mlp_bias=s["mlp_bias"],
    )


def _dino(source: str | dict[str, Any], frame_size: int) -> Dino:
    s = _settings(source, "encoder", "dinov2", DINOV2)
    high, wide = _sides(s["patch_size"])
    image_high, image_wide = _sides(s["image_size"])
    inner = int(s["hidden_size"] * s["mlp_ratio"])
    if s["use_swiglu_ffn"]:  # two thirds of it, rounded up to a multiple of 8
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
    return Dino(
        D=s["hidden_size"],
        H=s["num_attention_heads"],
        N=(frame_size // high) * (frame_size // wide) + 1,
        layers=s["num_hidden_layers"],
        mlp=inner,
        matrices=3 if s["use_swiglu_ffn"] else 2,
        patch=s["num_channels"] * high * wide,
        positions=(image_high // high) * (image_wide // wide) + 1,
        qkv_bias=s["qkv_bias"],
        mask_token=s["use_mask_token"],
    )


def _sides(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
