"""Convert checkpoints of the nanoSmol fVLM release (deep query, Q = 384, visual_scale 0.14).

Names in its state dict, and where their weights go:

    encoder.dino.*               encoder.backbone.*     DINOv2, as transformers names it, now or in older releases
    encoder.query_input_proj.*   connector.query_in     Q -> D
    encoder.output_proj.*        folded                 D -> D, after the encoder's final norm
    dino_to_llm.*                connector.to_llm       D -> E
    llm_to_query.*               connector.to_query     E -> Q
    q_static, q_init             connector.q_static, connector.q_first
    llm.*                        llm.*

Two linear maps in a row are one: W (W_out x + b_out) + b = (W W_out) x + (W b_out + b), with W and b of to_llm.
Our query_in has no bias. A bias b that is not zero moves into the queries: with W d = b, W q + b = W (q + d), and every
query is q_static, q_first or an output of to_query, so d is added to those three. Without such a d it is refused.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from fovlm.checkpoint.convert import DTYPES, OnProgress, write_settings, write_weights
from fovlm.checkpoint.model_card import imported_card
from fovlm.checkpoint.safetensors_writer import byte_size
from fovlm.checkpoint.zero_reader import Weights, load_pickled
from fovlm.data.chat import load_tokenizer
from fovlm.errors import UserError, did_you_mean, did_you_mean_path
from fovlm.fileio import refuse_occupied, staged_dir
from fovlm.model.build import check_vocabulary
from fovlm.model.configuration import FoveatedConfig
from fovlm.model.encoders.dinov2 import Dinov2Config, config_of, released_name
from fovlm.model.modes import QUESTIONS
from fovlm.model.processing import load_model
from fovlm.paths import local_folder

DINO, ENCODER, LLM = "encoder.dino.", "encoder.backbone.", "llm."
EMBEDDINGS, HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
NESTS = ("model", "state_dict", "model_state_dict", "module")  # keys under which training scripts store weights
PICKLED = ("pt", "pth", "bin")
WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DataParallel and torch.compile add to every name
# By width and layers. What shapes do not say (the rotary base, for one) comes from the model's own folder.
SMOLLM2 = {
    (576, 30): "HuggingFaceTB/SmolLM2-135M-Instruct",
    (960, 32): "HuggingFaceTB/SmolLM2-360M-Instruct",
    (2048, 24): "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}
VISUAL_SCALE = 0.14  # of the release
EXACT = 1e-5  # the largest remainder of the bias, relative to it, after the queries were changed


class Published(Weights):
    """The weights of a published state dict under our names. Raises UserError for other names than those above, and for
    shapes that do not fit together."""

    def __init__(self, state: dict[str, Tensor], origin: str):
        super().__init__(origin)
        rest = dict(state)
        weights: dict[str, Tensor] = {}
        for name in state:
            if name.startswith(DINO):
                weights[ENCODER + released_name(name.removeprefix(DINO))] = rest.pop(name)
            elif name.startswith(LLM):
                below = name.removeprefix(LLM)
                if below.startswith(("layers.", "embed_tokens.", "norm.")):  # a Llama without its head
                    below = f"model.{below}"
                weights[LLM + below] = rest.pop(name)
        weights |= {f"connector.{name}": weight.float() for name, weight in self._connector(rest).items()}
        if rest:
            raise UserError(f"{origin}: unknown weight '{min(rest)}': not a checkpoint of the nanoSmol fVLM release")
        head = weights.get(HEAD)
        if head is None or torch.equal(head, weights.get(EMBEDDINGS, head.new_zeros(0))):
            weights.pop(HEAD, None)
            self.ties[HEAD] = EMBEDDINGS
        for name, weight in weights.items():
            self.add(name, tuple(weight.shape), [weight.flatten()])
        self.shape(EMBEDDINGS)

    def _connector(self, rest: dict[str, Tensor]) -> dict[str, Tensor]:
        """The connector's weights f64, folded as above, moved out of `rest`."""
        names = list(rest)

        def take(name: str, default: Tensor | None = None) -> Tensor:
            if name not in rest and default is None:
                raise UserError(f"{self.origin}: '{name}' is missing{did_you_mean(name, names)}")
            value = rest.pop(name, default)
            assert value is not None
            return value.double()

        query_in, to_query, to_llm = (
            take(f"{n}.weight") for n in ("encoder.query_input_proj", "llm_to_query", "dino_to_llm")
        )
        (D, Q), E = query_in.shape, len(to_llm)
        queries = {"q_static": take("q_static").flatten(), "q_first": take("q_init").flatten()}
        queries["to_query.bias"] = take("llm_to_query.bias", torch.zeros(len(to_query)))
        out = take("encoder.output_proj.weight", torch.eye(D))
        out_bias = take("encoder.output_proj.bias", torch.zeros(D))
        for name, query in zip(("q_static", "q_init", "llm_to_query"), queries.values(), strict=True):
            if len(query) != Q:
                raise UserError(f"{self.origin}: {name} has {len(query)} numbers, queries have {Q}")
        if to_llm.shape[1] != D or tuple(out.shape) != (D, D):
            raise UserError(f"{self.origin}: output_proj and dino_to_llm do not take an encoder of width {D}")
        shift = self._shift(query_in, take("encoder.query_input_proj.bias", torch.zeros(D)))
        return {
            "query_in.weight": query_in,
            "to_query.weight": to_query,
            **{name: query + shift for name, query in queries.items()},
            "to_llm.weight": to_llm @ out,
            "to_llm.bias": to_llm @ out_bias + take("dino_to_llm.bias", torch.zeros(E)),
        }

    def _shift(self, query_in: Tensor, bias: Tensor) -> Tensor:
        """d f64 [Q] with query_in d = bias. Raises UserError when there is none."""
        if not bias.any():
            return torch.zeros(query_in.shape[1], dtype=torch.float64)
        shift = torch.linalg.lstsq(query_in, bias[:, None], driver="gelsd").solution[:, 0]
        if (query_in @ shift.float().double() - bias).norm() > EXACT * bias.norm():
            raise UserError(
                f"{self.origin}: encoder.query_input_proj has a bias, which fovlm does not have, and no change of the "
                "queries replaces it: it cannot be imported exactly"
            )
        return shift

    @property
    def dino(self) -> Dinov2Config:
        """Its DINOv2's configuration, from the shapes."""
        shapes = {n.removeprefix(ENCODER): shape for n, shape in self.shapes.items() if n.startswith(ENCODER)}
        try:
            return config_of(shapes)
        except (KeyError, ValueError) as error:
            raise UserError(f"{self.origin}: the shapes of encoder.dino.* are no DINOv2's ({error})") from error

    @property
    def size(self) -> tuple[int, int]:
        """Width and layers of its language model."""
        layers = {name.split(".")[3] for name in self.shapes if name.startswith("llm.model.layers.")}
        return self.shape(EMBEDDINGS)[1], len(layers)


def import_published(
    path: str | Path,
    out: str | Path,
    llm: str | None = None,
    tokenizer: str | None = None,
    question: str = "after_frames",
    frame_size: int = 224,
    dtype: str = "bf16",
    shard_size: str = "4GB",
    on_progress: OnProgress = lambda done, total, step: None,
) -> Path:
    """Convert a state dict (.safetensors, .pt, .pth, .bin, or a folder with one) to a model folder; returns `out`.

    `llm` is the folder or id of the language model it was made from, by default the SmolLM2 of the same shapes;
    `tokenizer` is by default that of `llm`. Raises UserError, and writes nothing, if it is no such model.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is bf16 or fp32, not '{dtype}'{did_you_mean(dtype, DTYPES)}")
    if question not in QUESTIONS:
        raise UserError(f"--question is {' or '.join(QUESTIONS)}, not '{question}'{did_you_mean(question, QUESTIONS)}")
    largest, path, out = byte_size(shard_size), Path(path), Path(out)
    refuse_occupied(out)
    stored = Published(read_state(path), str(path))
    E, layers = stored.size
    llm = llm or SMOLLM2.get((E, layers))
    if llm is None:
        raise UserError(
            f"{path}: no SmolLM2 has width {E} and {layers} layers: name the language model with --llm FOLDER"
        )
    encoder = stored.dino
    if frame_size % (patch := encoder.patch_size):
        raise UserError(f"--frame-size {frame_size} is no multiple of the encoder's patches of {patch} pixels")
    config = FoveatedConfig(
        _config_of(llm),
        encoder,
        question=question,
        frame_size=frame_size,
        query_dim=stored.shape("connector.q_static")[0],
        visual_scale=VISUAL_SCALE,
    )
    config.llm_config.tie_word_embeddings = bool(stored.ties)
    words = load_tokenizer(str(local_folder(name := tokenizer or llm) or name))
    with staged_dir(out) as staging:
        write_weights(staging, config, stored, DTYPES[dtype], largest, on_progress)
        write_settings(staging, config, words, DTYPES[dtype])
        model = load_model(staging, DTYPES[dtype])
        check_vocabulary(model.config.llm_config.vocab_size, len(words))
        facts = [
            ("language model", f"{Path(llm).name}, width {E}, {layers} layers"),
            ("encoder", f"DINOv2, width {model.encoder.width}, {len(model.encoder.layers)} layers"),
            ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
            ("weights", f"{DTYPES[dtype]}".removeprefix("torch.")),
            ("folded", "`encoder.output_proj` into `connector.to_llm`"),
        ]
        (staging / "README.md").write_text(imported_card(out.resolve().name, path.name, facts), encoding="utf-8")
    return out


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, or of the only one in a folder, mapped into memory. Raises UserError."""
    if not path.exists():
        raise UserError(f"no such file: {path}{did_you_mean_path(path)}")
    files = [path]
    if path.is_dir():
        pickled = (f for kind in PICKLED for f in path.glob(f"*.{kind}"))
        files = sorted(path.glob("*.safetensors")) or sorted(pickled)
        if not files or (len(files) > 1 and files[0].suffix != ".safetensors"):
            raise UserError(f"{path}: {len(files) or 'no'} files with weights in it: give the file to import")
    if files[0].suffix == ".safetensors":
        return _unwrapped({name: tensor for file in files for name, tensor in _safetensors(file).items()}, path)
    state = load_pickled(path if path.is_file() else files[0])
    while isinstance(state, dict) and (nest := next((n for n in NESTS if isinstance(state.get(n), dict)), None)):
        state = state[nest]
    return _unwrapped(state, path)


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); is it damaged?") from error


def _unwrapped(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict (names and tensors, perhaps under 'model' or 'state_dict')")
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state


def _config_of(llm: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(local_folder(llm) or llm, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"--llm {llm}: no configuration there ({reason})") from error
