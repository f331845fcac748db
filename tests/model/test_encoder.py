"""DINOv2 encoded once: equal to Hugging Face's forward, keys and values made once, looks that see and are not seen."""

import pytest
import torch
from torch import nn

from fovlm.model.encoder import Cache, Encoder, absorbs, heads, parts, weights_of
from helpers.models import pixels, tiny_model

FORMS = ["plain", "auto", "absorbed"]
SEVERAL = torch.tensor([2, 2, 0, 3, 2])  # the frame of each look


@pytest.fixture
def encoder() -> Encoder:
    return tiny_model().encoder


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_features_equal_the_forward_of_hugging_face(encoder, frames):
    expected = encoder.dino(pixels(frames)).last_hidden_state
    torch.testing.assert_close(encoder.features(frames), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", FORMS)
def test_what_is_kept_is_that_of_hugging_face(encoder, frames, attention):
    encoder.attention = attention
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.norm1.register_forward_hook(lambda m, i, out: inputs.append(out)) for layer in encoder.dino.encoder.layer
    ]
    encoder.dino(pixels(frames))
    for hook in hooks:
        hook.remove()
    layers = encoder.encode_only(frames).layers
    assert [len(kept) for kept in layers] == {"plain": [2, 2, 2], "auto": [2, 2, 1], "absorbed": [1, 1, 1]}[attention]
    for layer, normed, kept in zip(encoder.dino.encoder.layer, inputs, layers, strict=True):
        p, d = parts(layer), encoder.head_width
        expected = (heads(p.key(normed), d), heads(p.value(normed), d)) if len(kept) == 2 else (normed,)
        for got, want in zip(kept, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("attention", FORMS)
def test_keys_and_values_are_computed_once(encoder, frames, trainable, attention):
    """And in the last layer, where looks alone would want them, not at all unless told so."""
    encoder.requires_grad_(trainable).attention = attention
    calls: dict[nn.Module, int] = {}
    layers = encoder.dino.encoder.layer
    for layer in layers:
        for module in (parts(layer).key, parts(layer).value):
            module.register_forward_hook(lambda m, i, o: calls.update({m: calls.get(m, 0) + 1}))
    cache, _ = encoder.encode(frames, torch.randn(encoder.width))
    for _ in range(3):
        encoder.look(torch.randn(4, encoder.width), cache)
    assert len(calls) == 2 * len(layers) - (0 if attention == "plain" else 2)
    assert set(calls.values()) == {1}


def test_the_rule_absorbs_in_the_last_layer():
    x = torch.zeros(2, 5, 8)
    assert absorbs(x, last=True)
    assert not absorbs(x, last=False)


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
    for attention in ("auto", "absorbed"):
        for got, want in zip(found[attention], found["plain"], strict=True):
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
    for layer, kept in zip(encoder.dino.encoder.layer, cache.layers, strict=True):
        p, d = parts(layer), encoder.head_width
        pairs.append(kept if len(kept) == 2 else (heads(p.key(kept[0]), d), heads(p.value(kept[0]), d)))
    return pairs


@pytest.mark.parametrize("attention", FORMS)
def test_a_look_is_one_query_through_all_layers(encoder, frames, attention):
    """Against the maths written out: softmax attention of one row in fp64, layer by layer; and its weights."""
    encoder.double().attention = attention
    cache, query = encoder.encode_only(frames), torch.randn(4, encoder.width).double()
    x, seen = query, []
    for layer, (key, value) in zip(encoder.dino.encoder.layer, keys_and_values(encoder, cache), strict=True):
        p = parts(layer)
        q = heads(p.query(p.norm1(x)), encoder.head_width)
        weights = (torch.einsum("khd,knhd->khn", q, key) * encoder.head_width**-0.5).softmax(-1)
        seen.append(weights)
        x = x + p.scale1(p.out(torch.einsum("khn,knhd->khd", weights, value).flatten(1)))
        x = x + p.scale2(p.mlp(p.norm2(x)))
    torch.testing.assert_close(encoder.look(query, cache), encoder.dino.layernorm(x), rtol=1e-9, atol=1e-9)
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
    coarse.sum().backward()
    assert row.grad.abs().sum() > 0


def test_recomputing_gives_the_same_gradients(encoder, frames):
    gradients = []
    for recompute in (False, True):
        encoder.recompute = recompute
        encoder.zero_grad()
        cache, coarse = encoder.encode(frames, torch.ones(encoder.width))
        (coarse.sum() + encoder.look(torch.ones(4, encoder.width), cache).square().sum()).backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_attention_weights_are_those_of_the_look(encoder, frames):
    query = torch.randn(4, encoder.width)
    weights = encoder.look_weights(query, encoder.encode_only(frames))
    assert weights.shape == (3, 4, 2, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 2))


def test_weights_of_survives_large_logits():
    weights = weights_of(1e4 * torch.ones(1, 1, 4), torch.eye(4)[None, :, None], None, 1.0)
    assert torch.isfinite(weights).all()


def test_dropout_is_refused():
    model = tiny_model()
    model.encoder.dino.config.drop_path_rate = 0.1
    with pytest.raises(ValueError, match="drop_path_rate"):
        Encoder(model.encoder.dino)
