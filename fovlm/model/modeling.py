"""FoveatedVLM: a language model that sees each frame as one token; its last hidden state decides where to look next.

The forward pass over a pack (letters as in `data/packing.py`; E language-model width, Q query width, D encoder width):

    encode      frames -> cache                                     the encoder, once
    coarse      q_static looks at every frame -> K coarse tokens
    queries     language model over the prefixes with the coarse tokens -> the state before each look -> K queries
    fine        the queries look -> K fine tokens
    nll         language model over the whole pack with the fine tokens -> nll [S]

It returns the negative log-likelihood of every text token: every loss and every score is a sum of these numbers. With
`weight` it returns such a sum; over padded rows, for other trainers, a loss and logits (`supervised.py`). `looks` is
the first four lines: training, attention maps, gaze and evaluation all read it.

With `query_rounds` R, the fine tokens of one round give the queries of the next. No round is the coarse pass, one is
the default, and after K rounds every query comes from the fine tokens of all frames before it, which is what
frame-by-frame deployment does (`autoregressive.py`). Training with two rounds narrows that gap.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from fovlm.data.packing import Batch, Layout
from fovlm.errors import UserError
from fovlm.model.attention import segments
from fovlm.model.configuration import FoveatedConfig
from fovlm.model.encoder import Cache, Encoder
from fovlm.model.encoders.families import side_of
from fovlm.model.generation import FoveatedGenerationMixin
from fovlm.model.kv_cache import ATTENTION
from fovlm.model.lora import add_adapters
from fovlm.model.modes import NLL_CHUNK
from fovlm.model.scoring import WeightedNll, nll_and_slope
from fovlm.model.supervised import supervised


@dataclass
class Looks:
    """What the looks of a pack are made of and bring back. A multi_token model has `tokens` alone."""

    cache: Cache | None  # of the F frames
    coarse: Tensor | None  # [K, E]: the static query's tokens
    queries: Tensor | None  # [K, Q]: those that `tokens` come from
    tokens: Tensor  # [K * T, E]: what the language model reads


class Connector(nn.Module):
    """The projections between the two backbones: the only part that starts from random weights.

    Queries have std 1.0 and reach the encoder without a bias: at std 0.02, or with a bias that all queries share,
    attention over the patches becomes uniform and stays so.
    """

    def __init__(self, query_dim: int, encoder_width: int, llm_width: int, visual_scale: float):
        super().__init__()
        self.query_in = nn.Linear(query_dim, encoder_width, bias=False)  # Q -> D
        self.to_llm = nn.Linear(encoder_width, llm_width)  # D -> E
        self.to_query = nn.Linear(llm_width, query_dim)  # E -> Q
        self.q_static = nn.Parameter(torch.empty(query_dim))
        self.q_first = nn.Parameter(torch.empty(query_dim))
        self.visual_scale = visual_scale
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the weights so that every projection keeps the std of its input."""
        for linear in (self.query_in, self.to_llm, self.to_query):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.normal_(self.q_static, std=1.0)
        nn.init.normal_(self.q_first, std=1.0)

    def token(self, seen: Tensor) -> Tensor:
        """The result of a look [..., D] -> the visual token [..., E], at the scale of the word embeddings."""
        return self.to_llm(seen) * self.visual_scale


class FoveatedVLM(PreTrainedModel, FoveatedGenerationMixin):
    """`forward(batch)` -> nll f32 [S]; `generate` and `stream` answer questions (`generation.py`)."""

    config_class = FoveatedConfig
    base_model_prefix = "fovlm"
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(
        self, config: FoveatedConfig, llm: PreTrainedModel | None = None, backbone: PreTrainedModel | None = None
    ):
        super().__init__(config)
        self.llm = llm if llm is not None else AutoModelForCausalLM.from_config(config.llm_config)
        backbone = backbone if backbone is not None else AutoModel.from_config(config.encoder_config)
        self.encoder = Encoder(backbone, deep=config.deep_query)
        self.llm.set_attn_implementation(ATTENTION)  # super().__init__ resets it
        self.encoder.backbone.set_attn_implementation("sdpa")
        self.connector = Connector(
            config.query_dim, self.encoder.width, config.llm_config.hidden_size, config.visual_scale
        )
        if config.lora:
            add_adapters(self.llm, **config.lora)
        # What the visual mode never uses stays out of the optimizer.
        asking = [self.connector.q_first, *self.connector.to_query.parameters()]
        seeing = [self.connector.q_static, *self.connector.query_in.parameters()]
        unused = {"foveated": [], "coarse": asking, "multi_token": asking + seeing}[config.visual]
        for parameter in unused:
            parameter.requires_grad_(False)
        self._nll_and_slope = nll_and_slope
        self.post_init()
        self.generation_config = self.llm.generation_config

    def _init_weights(self, module: nn.Module) -> None:
        """transformers calls this for weights that a checkpoint lacks; the backbones initialise themselves."""
        if isinstance(module, Connector):
            module.reset()

    def get_input_embeddings(self) -> nn.Module:
        """Those of the language model."""
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Those of the language model."""
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.llm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.llm.base_model

    def forward(
        self,
        batch: Batch | None = None,
        visual: str | None = None,
        weight: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        frames: Tensor | None = None,
        looks: Tensor | None = None,
        prompt: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        pixel_values: Tensor | None = None,
        **ignored: Any,
    ) -> Any:
        """Negative log-likelihood f32 [S] of every text token of the pack; 0 at padding and at a sample's first token.

        `visual` overrides the configured mode: "coarse" on a foveated model gives its `coarse_only` evaluation.
        With `weight` f32 [S] it is the sum of weight * nll instead (0-d), whose backward pass costs less.
        With `input_ids` in place of a pack: loss and logits of padded rows, as `supervised` says; `pixel_values` is
        another name of `frames`.
        """
        if batch is None:
            assert input_ids is not None, "give a pack, or input_ids"
            frames = pixel_values if frames is None else frames
            return supervised(self, input_ids, attention_mask, frames, looks, prompt, labels, num_items_in_batch)
        hidden = self.read(batch.sequence, self.looks(batch, visual).tokens, batch.tokens)
        return self.nll(batch, hidden) if weight is None else self.weighted_nll(batch, hidden, weight)

    def looks(self, batch: Batch, visual: str | None = None, encoded: tuple[Cache, Tensor] | None = None) -> Looks:
        """The looks of a pack: coarse tokens, then `query_rounds` rounds of queries and fine tokens.

        `visual` overrides the configured mode; `encoded` is what `encode` gave for the pack's frames.
        """
        visual = visual or self.config.visual
        if visual == "multi_token":
            pooled = self.pooled(batch.frames)
            return Looks(None, None, None, _of_looks(pooled, batch).flatten(0, 1))
        cache, seen = encoded or self.encode(batch.frames)
        coarse = tokens = _of_looks(self.connector.token(seen), batch)
        queries = self.connector.q_static.expand(len(coarse), -1)
        for _ in range(self.config.query_rounds if visual == "foveated" else 0):
            queries = self.queries(batch, tokens)
            tokens = self.connector.token(self.look(queries, cache, batch.frame_of_look))
        return Looks(cache, coarse, queries, tokens)

    def encode(self, frames: Tensor) -> tuple[Cache, Tensor]:
        """Encode frames u8 [F, 3, s, s] -> cache, and what the static query sees in each [F, D]."""
        return self.encoder.encode(frames, self.connector.query_in(self.connector.q_static))

    def queries(self, batch: Batch, tokens: Tensor) -> Tensor:
        """The query [K, Q] of each look, from the language model's state at the position before it.

        `tokens` [K, E] are the coarse tokens, or the fine tokens of the round before. Only the prefixes are read:
        attention is causal, so what comes after the last look cannot matter.
        """
        hidden = self.read(batch.prefix, tokens, batch.tokens)
        first = (batch.query_from < 0)[:, None]
        asked = self.connector.to_query(hidden[batch.query_from.clamp(min=0)])
        return torch.where(first, self.connector.q_first.to(asked.dtype), asked)

    def look(self, query: Tensor, cache: Cache, frame_of_look: Tensor | None = None) -> Tensor:
        """Queries [K, Q] look at their frames -> [K, D]."""
        return self.encoder.look(self.connector.query_in(query), cache, frame_of_look)

    def look_weights(self, query: Tensor, cache: Cache, frame_of_look: Tensor | None = None) -> Tensor:
        """The attention weights f32 [layers, K, H, N] of queries [K, Q] at their frames."""
        return self.encoder.look_weights(self.connector.query_in(query), cache, frame_of_look).float()

    def read(self, layout: Layout, visual: Tensor, tokens: Tensor) -> Tensor:
        """The language model over a packed sequence of M positions -> final hidden states [M, E]."""
        words = self.llm.get_input_embeddings()(tokens)
        x = torch.cat([visual.to(words.dtype), words])[layout.slot]
        return self.llm.base_model(
            inputs_embeds=x[None],
            attention_mask=x.new_empty(1, 1, 0, 0),  # four dimensions: transformers makes none of its own
            position_ids=layout.position[None],
            use_cache=False,
            segments=segments(layout, x),
        ).last_hidden_state[0]

    def nll(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Score every text token from the hidden state [L, E] at the position before it -> f32 [S]."""
        known = batch.predict_from >= 0
        scores = [
            checkpoint(self.score, hidden[at], target, use_reentrant=False)
            if torch.is_grad_enabled()
            else self.score(hidden[at], target)
            for at, target in zip(
                batch.predict_from.clamp(min=0).split(NLL_CHUNK), batch.tokens.split(NLL_CHUNK), strict=True
            )
        ]
        return torch.cat(scores) * known

    def weighted_nll(self, batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
        """The sum of weight [S] * nll [S] (0-d); its logits are computed once for both passes."""
        head = self.llm.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None:
            return (self.nll(batch, hidden) * weight).sum()
        known = batch.predict_from >= 0
        scored = hidden[batch.predict_from.clamp(min=0)]
        return WeightedNll.apply(scored, head.weight, batch.tokens, weight * known, self._nll_and_slope)

    def score(self, hidden: Tensor, target: Tensor) -> Tensor:
        """-log p(target) f32 [s] from hidden states [s, E]; the logits [s, V] live only inside."""
        return nnf.cross_entropy(self.llm.get_output_embeddings()(hidden).float(), target, reduction="none")

    def pooled(self, frames: Tensor) -> Tensor:
        """multi_token: the patches of frames u8 [F, 3, s, s], pooled -> [F, T, E]."""
        features = self.encoder.features(frames)[:, self.encoder.prefix :]
        side = side_of(self.config.encoder_config, frames.shape[-1])
        grid = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        pooled = nnf.adaptive_avg_pool2d(grid, self.config.pooled).flatten(2).transpose(1, 2)
        return self.connector.token(pooled)

    @torch.no_grad()
    def gaze(self, batch: Batch) -> dict[str, Tensor]:
        """Attention weights of the pack's looks f32 [layers, K, H, N]: `coarse` and, of a foveated model, `fine`."""
        looks = self.looks(batch)
        if looks.cache is None or looks.queries is None:
            raise ValueError("a multi_token model has no looks")
        queries = {"coarse": self.connector.q_static.expand(len(looks.queries), -1)}
        if self.config.visual == "foveated":
            queries["fine"] = looks.queries
        return {name: self.look_weights(query, looks.cache, batch.frame_of_look) for name, query in queries.items()}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The three parameter groups: each trainable parameter once (tied weights are one)."""
        modules = {"connector": self.connector, "encoder": self.encoder, "llm": self.llm}
        return {name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()}

    def freeze(self, backbones: Collection[str]) -> None:
        """Take backbones ("encoder", "llm") out of training."""
        for name in backbones:
            {"encoder": self.encoder, "llm": self.llm}[name].requires_grad_(False)

    def recompute(self, backbones: Collection[str]) -> None:
        """Gradient checkpointing of "encoder" or "llm": keep each layer's input only, and compute the rest again in the
        backward pass."""
        self.encoder.recompute = "encoder" in backbones
        if "llm" in backbones:
            self.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def compile_layers(self, **options: Any) -> None:
        """torch.compile for the layers of both backbones and for the scoring: one graph serves all layers of a kind.

        Dimensions are dynamic, so that packs of other shapes compile nothing again.
        """
        self.encoder.compile(**options)
        self._nll_and_slope = torch.compile(nll_and_slope, dynamic=True, **options)
        for layer in self.llm.base_model.layers:
            layer.compile(dynamic=True, **options)

    def run_eagerly(self) -> None:
        """Undo `compile_layers`."""
        self.encoder.run_eagerly()
        self._nll_and_slope = nll_and_slope
        for layer in self.llm.base_model.layers:
            layer._compiled_call_impl = None


def _of_looks(tokens: Tensor, batch: Batch) -> Tensor:
    """What belongs to each frame [F, ...] -> to each look [K, ...]."""
    return tokens if batch.frame_of_look is None else tokens[batch.frame_of_look]


def check_report(report: dict[str, Any], where: str, skipped: tuple[str, ...] = ()) -> None:
    """Raise UserError for transformers' loading report when a weight of the model at `where` was not in its files, has
    another shape there, or was left over: then the model computes with random weights, or is another one. Left-over
    names that start with one of `skipped` are expected.
    """
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(key if isinstance(key, str) else key[0] for key in report[f"{kind}_keys"])
        if names := [name for name in names if kind != "unexpected" or not name.startswith(skipped)]:
            raise UserError(
                f"{where}: {len(names)} {kind} weights, like {names[0]}: the folder is damaged, or holds another model "
                "than its config.json says"
            )


for auto in (AutoModel, AutoModelForImageTextToText):
    auto.register(FoveatedConfig, FoveatedVLM, exist_ok=True)
