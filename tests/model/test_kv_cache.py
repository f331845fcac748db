"""The cache of a stream: an ordinary one that does not copy, and one token's attention to it."""

import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fovlm.model import kv_cache
from fovlm.model.kv_cache import ContextCache, attend
from helpers.interface import frames, model_of, watch

CHUNK = 16


def test_the_cache_is_an_ordinary_one_that_does_not_copy(monkeypatch):
    monkeypatch.setattr(kv_cache, "CHUNK", CHUNK)
    ours, theirs = ContextCache(1), DynamicCache()
    random = torch.Generator().manual_seed(0)
    for n in (5, 1, CHUNK, 1, 2 * CHUNK, 1):
        new = [torch.randn(2, 3, n, 4, generator=random) for _ in range(2)]
        before = ours.layers[0].buffers[0] if n == 1 else None
        for mine, other in zip(ours.update(*new, 0), theirs.update(*new, 0), strict=True):
            assert torch.equal(mine, other)
        if before is not None:
            assert ours.layers[0].buffers[0] is before, "there was room for it"
        assert len(ours) == theirs.get_seq_length()
    ours.forget(4)
    assert len(ours) == 4
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys[:, :, :4])


def test_one_token_attends_as_transformers_has_it():
    random = torch.Generator().manual_seed(0)
    layer = model_of().llm.base_model.layers[0].self_attn
    query = torch.randn(2, 4, 1, 8, generator=random)
    key, value = (torch.randn(2, 2, 9, 8, generator=random) for _ in range(2))
    with torch.no_grad():
        ours, theirs = (f(layer, query, key, value, None, scaling=0.3) for f in (attend, sdpa_attention_forward))
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[0].shape == (2, 1, 4, 8)


def test_in_bf16_one_token_asks_whole_buffers(monkeypatch):
    """Their length changes once in CHUNK tokens, and what stands behind the last token is not seen."""
    monkeypatch.setattr(kv_cache, "CHUNK", CHUNK)
    model = model_of().to(torch.bfloat16)
    asked: list[tuple[int, int]] = []
    products = kv_cache._two_products

    def noted(rows, key, value, mask, scale):
        n = int(mask.sum())
        assert bool(mask[..., :n].all())
        asked.append((key.shape[2], n))
        spoiled = [x.clone() for x in (key, value)]
        for x in spoiled:
            x[:, :, n:] = 99.0
        seen = products(rows, key, value, mask, scale)
        assert torch.equal(seen, products(rows, *spoiled, mask, scale))
        wide = [x.double() for x in (rows, key[:, :, :n], value[:, :, :n])]
        exact = torch.softmax(wide[0] @ wide[1].mT * scale, dim=-1) @ wide[2]
        assert float((seen - exact).norm() / exact.norm()) < 0.01  # bf16 has 8 bits
        return seen

    monkeypatch.setattr(kv_cache, "_two_products", noted)
    stream = watch(model)
    for i in range(2 * CHUNK + 3):
        stream.see(frames(1, i)[0])
    layers = model.config.llm_config.num_hidden_layers
    lengths = [n for n in range(2, 2 * CHUNK + 4) if n % CHUNK]  # a full buffer needs no mask
    assert asked == [(-(-n // CHUNK) * CHUNK, n) for n in lengths for _ in range(layers)]
