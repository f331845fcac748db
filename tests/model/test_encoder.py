"""Encoded once, in every family: equal to Hugging Face's forward, keys and values computed once, looks that see and are
not seen."""

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from benchmarks.memory import Live
from fovlm.model.encoder import Cache, Encoder, heads, rotate, weights_of
from helpers.models import ENCODERS, pixels, tiny_model

FORMS = ["none", "last", "all"]  # which layers keep rows
SEVERAL = torch.tensor([2, 2, 0, 3, 2])  # the frame of each look


@pytest.fixture(params=list(ENCODERS))
def encoder(request) -> Encoder:
    return tiny_model(encoder=request.param).encoder


def hugging_face(encoder: Encoder, frames: torch.Tensor) -> torch.Tensor:
    """The final features by the model's own forward."""
    kind = encoder.backbone.config.model_type
    seen = pixels(frames, kind).to(next(encoder.parameters()).dtype)
    if kind == "siglip2_vision_model":  # takes patches, with a mask and the grid of each frame
        patches = seen.reshape(-1, 3, 4, 7, 4, 7).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        mask, grid = torch.ones(patches.shape[:2], dtype=torch.int64), torch.tensor([[4, 4]] * len(frames))
        return encoder.backbone(patches, mask, grid).last_hidden_state
    return encoder.backbone(seen).last_hidden_state


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_features_equal_the_forward_of_hugging_face(encoder, frames):
    encoder.eval()  # DINOv3 moves its positions at random in training mode, and our walk does not
    expected = hugging_face(encoder, frames)
    torch.testing.assert_close(encoder.train().features(frames), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("attention", FORMS)
def test_the_cache_is_that_of_hugging_face(encoder, frames, attention):
    encoder.attention = attention
    inputs: list[torch.Tensor] = []
    blocks = [encoder.family.block(layer) for layer in encoder.layers]
    hooks = [block.norm1.register_forward_hook(lambda m, i, out: inputs.append(out)) for block in blocks]
    hugging_face(encoder.eval(), frames)
    for hook in hooks:
        hook.remove()
    layers = encoder.encode_only(frames).layers
    _, rotary = encoder.embed(frames)
    forms = {"none": [2, 2, 2], "last": [2, 2, 1], "all": [1, 1, 1]}["none" if rotary else attention]
    assert [len(kept) for kept in layers] == forms
    for p, normed, kept in zip(blocks, inputs, layers, strict=True):
        d = encoder.head_width
        key = rotate(heads(p.key(normed), d), rotary, normed.shape[1])
        expected = (key, heads(p.value(normed), d)) if len(kept) == 2 else (normed,)
        for got, want in zip(kept, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("attention", FORMS)
def test_keys_and_values_are_computed_once(encoder, frames, trainable, attention):
    """And in the last layer, where looks alone would want them, not at all unless asked for."""
    encoder.requires_grad_(trainable).attention = attention
    calls: dict[nn.Module, int] = {}
    layers = encoder.layers
    plain = attention == "none" or encoder.embed(frames)[1] is not None
    for layer in layers:
        for module in (encoder.family.block(layer).key, encoder.family.block(layer).value):
            module.register_forward_hook(lambda m, i, o: calls.update({m: calls.get(m, 0) + 1}))
    cache, _ = encoder.encode(frames, torch.randn(encoder.width))
    for _ in range(3):
        encoder.look(torch.randn(4, encoder.width), cache)
    assert len(calls) == 2 * len(layers) - (0 if plain else 2)
    assert set(calls.values()) == {1}


@pytest.mark.parametrize(("state", "form"), [("trainable", "last"), ("checkpointed", "all"), ("frozen", "all")])
def test_the_rule_keeps_rows_where_keys_and_values_would_be_kept_for_looks_alone(encoder, state, form):
    encoder.requires_grad_(state != "frozen")
    encoder.recompute = state == "checkpointed"
    assert encoder.form == ("none" if encoder.family.is_rotary else form)


@pytest.mark.parametrize("frame_of_look", [None, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("state", ["trainable", "checkpointed", "frozen"])
def test_both_forms_give_the_same_values_and_gradients(encoder, frames, state, frame_of_look):
    encoder.double().requires_grad_(state != "frozen")
    encoder.recompute = state == "checkpointed"
    row, query = torch.randn(32).double(), torch.randn(4 if frame_of_look is None else 5, 32).double()
    found = {}
    for encoder.attention in FORMS:
        leaves = [row.clone().requires_grad_(), query.clone().requires_grad_(), *encoder.parameters()]
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        cache, coarse = encoder.encode(frames, leaves[0])
        seen = encoder.look(leaves[1], cache, frame_of_look)
        gradients = torch.autograd.grad(seen.square().sum() + coarse.sin().sum(), leaves, allow_unused=True)
        if state == "frozen":
            assert len(gradients) == 2
        found[encoder.attention] = [coarse, seen, *(g for g in gradients if g is not None)]
    for attention in ("last", "all"):
        for got, want in zip(found[attention], found["none"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", FORMS)
def test_the_row_that_rides_along_equals_a_look(encoder, frames, attention):
    encoder.attention = attention
    row = torch.randn(encoder.width)
    cache, riding = encoder.encode(frames, row)
    torch.testing.assert_close(riding, encoder.look(row.expand(4, -1), cache), rtol=1e-5, atol=1e-6)


def test_patches_never_see_the_query(encoder, frames):
    with_row, _ = encoder.encode(frames, 100 * torch.randn(encoder.width))
    for seen, alone in zip(with_row.layers, encoder.encode_only(frames).layers, strict=True):
        for got, want in zip(seen, alone, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def keys_and_values(encoder: Encoder, cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every layer, whatever it kept."""
    pairs = []
    for layer, kept in zip(encoder.layers, cache.layers, strict=True):
        p, d = encoder.family.block(layer), encoder.head_width
        pairs.append(kept if len(kept) == 2 else (heads(p.key(kept[0]), d), heads(p.value(kept[0]), d)))
    return pairs


@pytest.mark.parametrize("attention", FORMS)
def test_a_look_is_one_query_through_all_layers(encoder, frames, attention):
    """Against the maths written out: softmax attention of one row in fp64, layer by layer; and its weights."""
    encoder.double().attention = attention
    cache, query = encoder.encode_only(frames), torch.randn(4, encoder.width).double()
    x, seen = query, []
    for layer, (key, value) in zip(encoder.layers, keys_and_values(encoder, cache), strict=True):
        p = encoder.family.block(layer)
        q = heads(p.query(p.norm1(x)), encoder.head_width)
        weights = (torch.einsum("khd,knhd->khn", q, key) * encoder.head_width**-0.5).softmax(-1)
        seen.append(weights)
        x = x + p.scale1(p.out(torch.einsum("khn,knhd->khd", weights, value).flatten(1)))
        x = x + p.scale2(p.mlp(p.norm2(x)))
    torch.testing.assert_close(
        encoder.look(query, cache), encoder.family.norm(encoder.backbone)(x), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(encoder.look_weights(query, cache).double(), torch.stack(seen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", FORMS)
def test_several_looks_at_one_frame(encoder, frames, attention):
    encoder.attention = attention
    cache, query = encoder.encode_only(frames), torch.randn(5, encoder.width)
    together = encoder.look(query, cache, SEVERAL)
    for k, frame in enumerate(SEVERAL.tolist()):
        alone = encoder.look(query[k : k + 1], cache.frames(slice(frame, frame + 1)))
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-5, atol=1e-6)


def test_a_frozen_encoder_keeps_no_graph_but_passes_gradients_to_the_query(encoder, frames):
    encoder.requires_grad_(False)
    row = torch.randn(encoder.width, requires_grad=True)
    cache, coarse = encoder.encode(frames, row)
    assert not any(t.requires_grad for kept in cache.layers for t in kept)
    coarse[:, 0].sum().backward()  # not all of it: the sum of a normed row is the same whatever it was
    assert row.grad.abs().sum() > 0


def test_recomputing_gives_the_same_gradients(encoder, frames):
    encoder.double()
    gradients = []
    for recompute in (False, True):
        encoder.recompute = recompute
        encoder.zero_grad()
        cache, coarse = encoder.encode(frames, torch.ones(encoder.width).double())
        seen = encoder.look(torch.ones(5, encoder.width).double(), cache, SEVERAL)
        (coarse.sin().sum() + seen.sin().sum()).backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("per_frame", [1, 8])
@pytest.mark.parametrize(("state", "rows"), [("trainable", 16), ("checkpointed", 2), ("frozen", 2)])
def test_what_a_frame_keeps_for_the_backward_pass(state, rows, per_frame):
    """In rows of N x D, per layer: one in a frozen or checkpointed encoder, whatever the number of looks."""
    config = Dinov2Config(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=112, patch_size=7)
    encoder = Encoder(Dinov2Model(config), recompute=state == "checkpointed").requires_grad_(state != "frozen")
    kept = []
    for F in (1, 3):
        frames = torch.zeros(F, 3, 112, 112, dtype=torch.uint8)
        where = None if per_frame == 1 else torch.arange(F * per_frame) // per_frame
        row, query = (torch.ones(n, 64, requires_grad=True) for n in (1, F * per_frame))
        with Live() as live:
            cache, coarse = encoder.encode(frames, row[0])
            out = encoder.look(query, cache, where).sum() + coarse.sum()  # noqa: F841 (it holds the graph)
            del cache, coarse
            kept.append(live.now)
    per_frame_rows = (kept[1] - kept[0]) / 2 / (4 * 257 * 64) / 4
    assert per_frame_rows < rows


def test_attention_weights_are_those_of_the_look(encoder, frames):
    query = torch.randn(4, encoder.width)
    weights = encoder.look_weights(query, encoder.encode_only(frames))
    assert weights.shape == (3, 4, 2, encoder.prefix + 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 2))


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_a_frame_of_another_size_has_another_grid(kind):
    """Positions are interpolated, or rotary: a model trained at one size sees frames of another."""
    encoder = tiny_model(encoder=kind).encoder
    frames = torch.randint(0, 256, (2, 3, 42, 42), dtype=torch.uint8)
    assert encoder.features(frames).shape == (2, encoder.prefix + 36, 32)


def test_an_unknown_family_is_refused():
    llm = tiny_model().llm
    with pytest.raises(ValueError, match="type 'llama' is not supported, only dinov2"):
        Encoder(llm)


def test_weights_of_survives_large_logits():
    weights = weights_of(1e4 * torch.ones(1, 1, 4), torch.eye(4)[None, :, None], None, 1.0)
    assert torch.isfinite(weights).all()


def test_dropout_is_refused():
    model = tiny_model()
    model.encoder.backbone.config.drop_path_rate = 0.1
    with pytest.raises(ValueError, match="drop_path_rate"):
        Encoder(model.encoder.backbone)
