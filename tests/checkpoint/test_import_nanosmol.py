"""Checkpoints of the nanoSmol fVLM release: the folded model gives the same NLL; other models are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from fovlm.checkpoint.import_nanosmol import import_published
from fovlm.config.schema import ModelSettings
from fovlm.errors import UserError
from fovlm.model.configuration import FoveatedConfig
from fovlm.model.encoders.dinov2 import Dinov2Config
from fovlm.model.modeling import FoveatedVLM
from helpers import tiny
from helpers.models import ENCODERS, FRAME, LLM, pack, sample

SAMPLES = [sample("video", 3), sample("text", text=8), sample("image", 1, 4, prompt=3)]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    tiny.tokenizer().save_pretrained(folder)
    LlamaConfig(**LLM).save_pretrained(folder)
    return folder


def tiny_model(seed: int = 0) -> FoveatedVLM:
    """With heads of 64 numbers or one, which follows from the shapes of its weights."""
    torch.manual_seed(seed)
    encoder = ENCODERS["dinov2"] | {"num_attention_heads": 1}
    return FoveatedVLM(FoveatedConfig(LLM, encoder, query_dim=24, frame_size=FRAME))


class Unfolded(nn.Module):
    """D -> D -> E as the published models have it."""

    def __init__(self, out: nn.Linear, to_llm: nn.Linear):
        super().__init__()
        self.out, self.to_llm = out, to_llm

    def forward(self, seen: Tensor) -> Tensor:
        return self.to_llm(self.out(seen))


def published(model: FoveatedVLM, bias: bool = False) -> tuple[dict[str, Tensor], FoveatedVLM]:
    """A published state dict with a random output_proj, and the model that computes with it unfolded."""
    c, D = model.connector, model.encoder.width
    out, query_in = nn.Linear(D, D), c.query_in
    if bias:  # of a kind that some change of the queries can stand for
        query_in = nn.Linear(*reversed(c.query_in.weight.shape))
        query_in.weight.data = c.query_in.weight.data
        query_in.bias.data = c.query_in.weight.data @ torch.randn(c.query_in.in_features)
    state = {
        **{f"encoder.dino.{name}": value for name, value in model.encoder.backbone.state_dict().items()},
        **{f"encoder.output_proj.{name}": value for name, value in out.state_dict().items()},
        **{f"encoder.query_input_proj.{name}": value for name, value in query_in.state_dict().items()},
        **{f"dino_to_llm.{name}": value for name, value in c.to_llm.state_dict().items()},
        **{f"llm_to_query.{name}": value for name, value in c.to_query.state_dict().items()},
        **{f"llm.{name}": value for name, value in model.llm.state_dict().items()},
        "q_static": c.q_static[None],
        "q_init": c.q_first[None],
    }
    state = {name: value.detach().clone() for name, value in state.items()}
    c.to_llm, c.query_in = Unfolded(out, c.to_llm), query_in
    return state, model


def like(words: Path) -> dict:
    """What the shapes do not say about the tiny model, and fp32."""
    return {"llm": str(words), "frame_size": FRAME, "dtype": "fp32"}


def nll(model: FoveatedVLM) -> Tensor:
    with torch.no_grad():
        return model(pack(SAMPLES))


@pytest.mark.parametrize("bias", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("form", ["safetensors", "pt", "nested", "wrapped"])
def test_the_folded_model_gives_the_nll_of_the_unfolded_one(tmp_path, words, form, bias):
    state, unfolded = published(tiny_model(seed=5), bias)
    file = tmp_path / f"model.{'safetensors' if form == 'safetensors' else 'pt'}"
    if form == "safetensors":
        state = {name: value for name, value in state.items() if name != "llm.lm_head.weight"}
        save_file(state, file)
    elif form == "wrapped":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    else:
        torch.save(state if form == "pt" else {"step": 3, "model": state}, file)
    out = import_published(file, tmp_path / "out", **like(words))
    again = FoveatedVLM.from_pretrained(out)
    torch.testing.assert_close(nll(again), nll(unfolded), rtol=1e-5, atol=2e-5)
    plain = tiny_model(seed=5)
    assert (nll(plain) - nll(unfolded)).abs().max() > 1e-3, "or folding could not be told from leaving it out"
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight
    assert "model.pt" in (out / "README.md").read_text() or form == "safetensors"


def test_names_of_older_transformers_are_read(tmp_path, words):
    state, unfolded = published(tiny_model(seed=5))
    swaps = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    swaps |= {"o_proj": "output.dense"}
    old = {}
    for name, value in state.items():
        if name.startswith("encoder.dino."):
            for new, before in swaps.items():
                name = name.replace(f".attention.{new}.", f".attention.{before}.")
        old[name] = value
    torch.save(old, tmp_path / "old.pth")
    out = import_published(tmp_path / "old.pth", tmp_path / "out", **like(words))
    torch.testing.assert_close(nll(FoveatedVLM.from_pretrained(out)), nll(unfolded), rtol=1e-5, atol=2e-5)


def test_an_untied_head_is_imported(tmp_path, words):
    state, unfolded = published(tiny_model(seed=5))
    state["llm.lm_head.weight"] = torch.randn(state["llm.lm_head.weight"].shape)
    unfolded.llm.lm_head.weight = nn.Parameter(state["llm.lm_head.weight"].clone())
    torch.save(state, tmp_path / "model.pt")
    out = import_published(tmp_path / "model.pt", tmp_path / "out", **like(words))
    torch.testing.assert_close(nll(FoveatedVLM.from_pretrained(out)), nll(unfolded), rtol=1e-5, atol=2e-5)


def without(name: str):
    return lambda state: {k: v for k, v in state.items() if k != name}


def changed(name: str, value: Tensor):
    return lambda state: {**state, name: value}


REFUSED = {
    "a name that nobody knows": (changed("resampler.weight", torch.ones(2)), "unknown weight 'resampler.weight'"),
    "a connector's weight is missing": (without("dino_to_llm.weight"), "'dino_to_llm.weight' is missing"),
    "a layer's weight is missing": (without("llm.model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj"),
    "no embeddings": (without("llm.model.embed_tokens.weight"), "embed_tokens.weight' is missing"),
    "queries of another width": (changed("q_init", torch.ones(1, 7)), "q_init has 7 numbers"),
    "another encoder's output_proj": (changed("encoder.output_proj.weight", torch.ones(5, 5)), "output_proj"),
    "a bias out of reach": (changed("encoder.query_input_proj.bias", torch.randn(32)), "cannot be imported exactly"),
    "no tensors": (lambda state: {"epoch": 3}, "not a state dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_models_are_refused_and_nothing_is_written(tmp_path, words, case):
    change, said = REFUSED[case]
    state, _ = published(tiny_model(seed=5))  # D 32 over Q 24: not every bias can be moved into the queries
    torch.save(change(state), tmp_path / "model.pt")
    with pytest.raises(UserError, match=said):
        import_published(tmp_path / "model.pt", tmp_path / "out", **like(words))
    assert [f.name for f in tmp_path.iterdir()] == ["model.pt"]


def test_a_file_that_torch_did_not_write_is_refused(tmp_path, words):
    for data in (b"", b"epoch,loss\n"):
        (tmp_path / "model.pt").write_bytes(data)
        with pytest.raises(UserError, match=r"not a file that torch\.save"):
            import_published(tmp_path / "model.pt", tmp_path / "out", tokenizer=str(words))


def test_an_unknown_question_position_is_refused(tmp_path, words):
    state, _ = published(tiny_model())
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match="did you mean 'before_frames'"):
        import_published(tmp_path / "model.pt", tmp_path / "out", **like(words) | {"question": "befor"})


def test_frames_must_divide_into_patches(tmp_path, words):
    state, _ = published(tiny_model())
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match="--frame-size 30 is no multiple of the encoder's patches of 7 pixels"):
        import_published(tmp_path / "model.pt", tmp_path / "out", **like(words) | {"frame_size": 30})


def test_a_pickle_with_code_in_it_is_not_run(tmp_path, words):
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            return Path.touch, (mark,)

    torch.save({"model": {"q_static": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="could run code: refused"):
        import_published(tmp_path / "evil.pt", tmp_path / "out", tokenizer=str(words))
    assert not mark.exists()


def test_an_unknown_language_model_or_file_is_refused(tmp_path, words):
    state, _ = published(tiny_model(seed=5))
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"width 32 and 2 layers.*--llm"):
        import_published(tmp_path / "model.pt", tmp_path / "out")
    with pytest.raises(UserError, match=r"no such file: .*model\.pth \(did you mean"):
        import_published(tmp_path / "model.pth", tmp_path / "out")


@pytest.mark.slow
def test_the_configuration_follows_from_the_shapes(tmp_path, words, monkeypatch):
    """A random state dict at the real shapes; of the language model only its folder with a config.json exists."""
    llm = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    llm.save_pretrained(tmp_path / "SmolLM2-135M-Instruct")
    monkeypatch.setenv("FOVLM_MODELS", str(tmp_path))
    torch.manual_seed(0)
    dino = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    state, unfolded = published(FoveatedVLM(FoveatedConfig(llm, dino)))
    save_file({n: v for n, v in state.items() if n != "llm.lm_head.weight"}, tmp_path / "published.safetensors")
    out = import_published(tmp_path / "published.safetensors", tmp_path / "out", tokenizer=str(words), dtype="fp32")
    again = FoveatedVLM.from_pretrained(out)
    assert again.config.encoder_config.image_size == 518
    assert again.config.query_dim == ModelSettings().query_dim
    batch = pack([sample("text", text=8)])
    frames = torch.randint(0, 256, (len(batch.frames), 3, 224, 224), dtype=torch.uint8)
    batch.frames = frames
    with torch.no_grad():
        tokens = again.looks(batch).tokens, unfolded.looks(batch).tokens
    torch.testing.assert_close(*tokens, rtol=1e-3, atol=1e-4)
