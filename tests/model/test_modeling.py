"""A sample's nll is its own: whatever shares the pack, whatever the padding. And the faults that must not return."""

import itertools

import pytest
import torch
from torch import nn

from fovlm.data.packing import PackSize, collate
from fovlm.model import attention, scoring
from fovlm.model import modeling as model_module
from fovlm.model.autoregressive import autoregressive
from fovlm.model.modeling import Connector, FoveatedVLM
from helpers.models import BUDGET, ENCODERS, FRAME, dense_varlen, nll_of, outcomes, pack, sample, tiny_model

SAMPLES = [
    sample("video", frames=3, text=7, prompt=4),
    sample("text", text=5),
    sample("image", frames=1, looks=4, text=6, prompt=3),
]
AFTER = [sample("video", frames=3, text=7), sample("text", text=5), sample("image", frames=1, looks=4, text=6)]


@pytest.mark.parametrize("visual", ["foveated", "coarse", "multi_token"])
@pytest.mark.parametrize("deep_query", [True, False])
@pytest.mark.parametrize("samples", [SAMPLES, AFTER], ids=["before_frames", "after_frames"])
def test_a_sample_alone_equals_itself_in_any_pack(visual, deep_query, samples):
    model = tiny_model(visual=visual, deep_query=deep_query, pooled=2)
    T = model.config.tokens_per_look
    assert (visual == "multi_token") == (T == 4)
    for number, s in enumerate(samples):
        tight = PackSize(max(s.size.frames, 1), s.looks + 1, len(s.tokens), s.prompt)
        alone = nll_of(model, pack([s], tight, tokens_per_look=T), 0)
        for order in itertools.permutations(range(3)):
            batch = pack([samples[i] for i in order], tokens_per_look=T)
            torch.testing.assert_close(nll_of(model, batch, order.index(number)), alone, rtol=1e-5, atol=2e-6)


def test_no_gradient_crosses_samples():
    model = tiny_model()
    batch = pack(SAMPLES)
    embedded = []

    def keep(module, inputs, out):
        out.retain_grad()
        embedded.append(out)

    model.llm.get_input_embeddings().register_forward_hook(keep)
    model(batch)[batch.text_segment == 0].sum().backward()
    others = batch.text_segment != 0
    for words in embedded:
        assert words.grad[others].abs().max() == 0
        assert words.grad[~others].abs().max() > 0


def test_padding_frames_do_not_matter():
    model = tiny_model()
    batch = pack(SAMPLES)
    before = model(batch)
    batch.frames[4:] = 255
    assert torch.equal(model(batch), before)


def test_a_pack_without_frames_runs_the_vision_path_with_weight_zero():
    model = tiny_model()
    batch = pack([sample("text", text=5)])
    (model(batch) * batch.weight).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
    assert all(p.grad.abs().max() == 0 for p in model.groups()["encoder"])


def test_every_visual_mode_trains_exactly_what_it_uses():
    for visual in ("foveated", "coarse", "multi_token"):
        model = tiny_model(visual=visual)
        model(pack(SAMPLES, tokens_per_look=model.config.tokens_per_look)).sum().backward()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_text_after_the_frames_cannot_steer_them_and_the_question_ahead_does():
    model = tiny_model()
    for s, steers in ((SAMPLES[0], True), (AFTER[0], False)):
        batch = pack([s])
        before = model.looks(batch).tokens[:3]
        batch.tokens[0] = (batch.tokens[0] + 1) % 64
        assert torch.equal(model.looks(batch).tokens[:3], before) != steers


def test_a_look_depends_on_earlier_frames_and_its_own_only():
    model = tiny_model()
    batch = pack([AFTER[0]])
    before = model.looks(batch).tokens[:3]
    batch.frames[1] = 255 - batch.frames[1]
    changed = (model.looks(batch).tokens[:3] - before).abs().amax(-1) > 0
    assert changed.tolist() == [False, True, True]


def test_the_coarse_pass_over_the_prefix_equals_the_whole_sequence():
    model = tiny_model()
    batch = pack(SAMPLES)
    tokens = model.looks(batch).coarse
    whole = model.read(batch.sequence, tokens, batch.tokens)
    position_of_slot = torch.empty_like(batch.sequence.slot)
    position_of_slot[batch.sequence.slot] = torch.arange(len(batch.sequence.slot))
    before = position_of_slot[: BUDGET.looks] - 1
    for k in range(7):
        if batch.query_from[k] >= 0:
            expected = model.connector.to_query(whole[before[k]])
            torch.testing.assert_close(model.queries(batch, tokens)[k], expected, rtol=1e-5, atol=1e-6)
    assert batch.query_from[0] >= 0  # the question stands ahead, so even the first look is asked for


def test_the_first_look_without_a_question_uses_q_first():
    model = tiny_model()
    batch = pack([AFTER[0]])
    tokens = model.looks(batch).coarse
    assert torch.equal(model.queries(batch, tokens)[0], model.connector.q_first)


@pytest.mark.parametrize("samples", [SAMPLES, AFTER], ids=["before_frames", "after_frames"])
@pytest.mark.parametrize("deep_query", [True, False])
def test_autoregressive_with_the_cache_equals_without(samples, deep_query):
    """Without a cache: refine all queries from the fine tokens, again and again; after K rounds all K are right."""
    model = tiny_model(deep_query=deep_query)
    batch = pack(samples)
    once = model(batch)
    model.config.query_rounds = 4
    torch.testing.assert_close(autoregressive(model, batch), model(batch), rtol=1e-5, atol=2e-6)
    assert (once - model(batch)).abs().max() > 1e-3, "or the test could not tell the modes apart"


FAMILIES = [
    *((kind, "llama") for kind in ENCODERS),
    ("dinov2", "qwen3"),
    ("dinov2", "smollm3"),
    ("dinov3_vit", "qwen3"),
]


@pytest.mark.parametrize(("encoder", "llm"), FAMILIES)
def test_every_family_packs_streams_learns_and_saves(encoder, llm, tmp_path):
    """Alone equals packed; with a cache equals without; every trainable weight gets a gradient; saved equals loaded."""
    model = tiny_model(encoder=encoder, llm=llm)
    batch = pack(SAMPLES)
    together = model(batch)
    for number, s in enumerate(SAMPLES):
        alone = nll_of(model, pack([s], PackSize(max(s.size.frames, 1), s.looks + 1, len(s.tokens), s.prompt)), 0)
        torch.testing.assert_close(together[batch.text_segment == number], alone, rtol=1e-5, atol=2e-6)
    together.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = FoveatedVLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
    torch.testing.assert_close(again(batch), together)
    model.config.query_rounds = 4
    torch.testing.assert_close(autoregressive(model, batch), model(batch), rtol=1e-5, atol=3e-6)
    assert torch.isfinite(
        tiny_model(encoder=encoder, llm=llm, visual="multi_token")(pack(SAMPLES, tokens_per_look=16))
    ).all()


def test_nll_in_chunks_equals_nll_at_once(monkeypatch):
    model, batch = tiny_model(), pack(SAMPLES)
    at_once = model(batch)
    monkeypatch.setattr(model_module, "NLL_CHUNK", 7)
    torch.testing.assert_close(model(batch), at_once)


def test_saved_and_loaded_gives_the_same_nll(tmp_path):
    model = tiny_model(seed=3)
    model.save_pretrained(tmp_path)
    again = FoveatedVLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    # Loaded weights lie at other addresses, which changes how a batched product sums them.
    torch.testing.assert_close(again(pack(SAMPLES)), model(pack(SAMPLES)), rtol=0, atol=1e-6)
    assert again.config.query_dim == 24


def test_recomputing_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = tiny_model().train()
        model.recompute(["encoder", "llm"] if recompute else [])
        model(pack(SAMPLES)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("frozen", [[], ["llm"]])
@pytest.mark.parametrize("tied", [True, False])
def test_the_weighted_loss_has_the_gradients_of_the_weighted_nll(frozen, tied, monkeypatch):
    """With a chunk of 4 tokens there are several, the last one shorter, and one without weight."""
    monkeypatch.setattr(scoring, "NLL_CHUNK", 4)
    batch = pack(SAMPLES)
    weight = torch.rand(len(batch.weight), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[4:8] = 0
    outcomes = []
    for once in (True, False):
        model = tiny_model().double()
        if not tied:
            head = model.llm.lm_head
            head.weight = nn.Parameter(head.weight.detach() * 1.5)
        model.freeze(frozen)
        loss = model(batch, weight=weight) if once else (model(batch) * weight).sum()
        (loss * 0.3).backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, plain)
    assert bool(frozen) == (model.llm.lm_head.weight.grad is None)


def test_the_weighted_loss_has_one_backward_pass():
    loss = tiny_model()(pack(SAMPLES), weight=torch.ones(len(pack(SAMPLES).weight)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_the_layers_compile_without_breaks_and_a_few_times_only(monkeypatch):
    """fullgraph raises at a graph break, and a frame that reaches the limit of graphs raises too.

    As on CUDA, where one call takes all samples: one by one, their number and lengths change the graph.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(attention, "varlen_runs", lambda device, dtype: True)
    monkeypatch.setattr(attention, "varlen_attn", dense_varlen)
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def passes(batch):
        """What a run does with a pack: a step, the coarse loss of a logged one, validation."""
        loss = model.train()(batch, weight=batch.weight)
        loss.backward()
        with torch.no_grad():
            model(batch, visual="coarse")
            return loss.detach(), model.eval()(batch)

    plain = tiny_model()(pack(SAMPLES)).detach()
    model = tiny_model()
    model.compile_layers(backend=count, fullgraph=True)
    torch.testing.assert_close(passes(pack(SAMPLES)), (plain.sum(), plain))
    for samples in (SAMPLES[::-1], SAMPLES[:2], [SAMPLES[2], *SAMPLES]):  # packs of other shapes: all looks, or some
        passes(collate(samples, FRAME))
    assert 0 < graphs <= 30, graphs
    before = graphs
    for n in range(3, 9):
        passes(collate([SAMPLES[i % 3] for i in range(n)], FRAME))
    assert graphs == before, "a pack of another shape was compiled anew"


def test_different_queries_bring_back_different_things_and_a_shallow_look_mixes_them():
    deep, _ = outcomes(tiny_model(deep_query=True))
    shallow, _ = outcomes(tiny_model(deep_query=False))
    assert deep < 0.3 < shallow


def test_narrow_queries_attend_uniformly_and_ours_do_not():
    model = tiny_model(deep_query=False)
    assert outcomes(model)[1] < 0.95 < 0.999 < outcomes(model, std=0.02)[1]


def test_queries_are_drawn_wide_and_reach_the_encoder_without_a_bias():
    connector = tiny_model(query_dim=384).connector
    assert connector.query_in.bias is None
    for query in (connector.q_static, connector.q_first):
        assert 0.9 < float(query.detach().std()) < 1.1
    reached = connector.query_in(torch.randn(100, 384))
    assert 0.8 < float(reached.detach().std()) < 1.25, "the projection keeps the deviation"


def test_visual_tokens_have_the_scale_of_word_embeddings():
    tokens = Connector(384, 384, 576, 0.14).token(torch.randn(100, 384))
    assert 0.1 < float(tokens.detach().std()) < 0.2


def test_a_missing_pack_layout_is_refused():
    with pytest.raises(ValueError, match="visual is one of"):
        tiny_model(visual="fovated")
