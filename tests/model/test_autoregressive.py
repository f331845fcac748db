"""A stream sees what `generate` sees, forgets the questions it was asked, and costs one token a frame."""

import pytest
import torch

from fovlm.errors import UserError
from fovlm.media.clip import Clip
from fovlm.model import kv_cache
from fovlm.model.autoregressive import Stream
from fovlm.model.processing import FoveatedProcessor
from fovlm.viz.gaze import gaze_of
from helpers.interface import QUESTION, frames, model_of, processor_of, says, watch
from helpers.models import FRAME

OTHER = "is it red or blue here ?"
CHUNK = 16


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Buffers grow often."""
    monkeypatch.setattr(kv_cache, "CHUNK", CHUNK)


def small(context: int, **settings):
    """A model with a context of so many tokens."""
    model = model_of(**settings)
    model.config.llm_config.max_position_embeddings = context
    return model


@pytest.mark.parametrize("prompt", ["before_frames", "after_frames"])
@pytest.mark.parametrize("visual", ["foveated", "coarse"])
def test_an_answer_is_that_of_generate(prompt, visual):
    model = model_of(question=prompt, visual=visual)
    processor, shown = processor_of(model), frames(5)
    stream = model.stream(iter(shown), processor, question=QUESTION)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    for count in stream:
        if count in (2, 5):
            inputs = processor(messages=says(QUESTION, video=shown[:count]))
            assert stream.ask(**settings) == processor.batch_decode(model.generate(**inputs, **settings))[0]
            beams = stream.ask(num_beams=3, **settings)
            assert beams == processor.batch_decode(model.generate(**inputs, num_beams=3, **settings))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prompt", ["before_frames", "after_frames"])
@pytest.mark.parametrize("full", ["stop", "slide"])
def test_a_question_leaves_no_trace(prompt, full, dtype):
    """Bit for bit, past the growth of the buffers and, when it slides, past the end of the window."""
    model = small(CHUNK + 90, question=prompt).to(dtype)
    reserve = 40 if full == "stop" else 70
    shown = frames(8)
    quiet, asked = (watch(model, full=full, reserve=reserve) for _ in range(2))
    number = CHUNK + 10 if full == "stop" else 60
    said = set()
    for i in range(number):
        state = quiet.see(shown[i % 8])
        other = asked.see(shown[i % 8])
        assert torch.equal(state, other), i
        if i in (3, CHUNK - 4, number - 2):
            said.add(asked.ask(OTHER, max_new_tokens=12, min_new_tokens=12))
            asked.ask(QUESTION, max_new_tokens=3, do_sample=True, num_beams=2)
        assert asked.tokens == quiet.tokens
    for a, b in zip(quiet._stream.memory.layers, asked._stream.memory.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    assert said


def test_a_question_that_fails_leaves_no_trace():
    model = small(64)
    stream = watch(model, reserve=30)
    stream.see(frames(1)[0])
    with pytest.raises(UserError, match=r"question is too long: its \d+ tokens and the 1 of the stream"):
        stream.ask("red " * 60)

    class Broken:
        def put(self, ids):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stream.ask(QUESTION, streamer=Broken())
    assert stream.tokens == 1


def buffers_of(stream) -> list[torch.Tensor]:
    return [room for layer in stream._stream.memory.layers for room in layer.buffers]


def reached(thing, seen=None) -> list[torch.Tensor]:
    """All memory that a stream holds on to, its model's and its processor's apart: a tensor for each allocation."""
    seen = {} if seen is None else seen
    if isinstance(thing, torch.Tensor):
        seen.setdefault(thing.untyped_storage().data_ptr(), thing if thing._base is None else thing._base)
    elif isinstance(thing, list | tuple | dict):
        for one in thing.values() if isinstance(thing, dict) else thing:
            reached(one, seen)
    elif type(thing).__module__.startswith("fovlm.") and not isinstance(thing, torch.nn.Module | FoveatedProcessor):
        reached(vars(thing), seen)
    return list(seen.values())


def test_memory_grows_by_one_token_a_frame_and_nothing_else():
    model = model_of()
    llm = model.config.llm_config
    head = llm.hidden_size // llm.num_attention_heads
    stream = watch(model)
    sizes = []
    for i in range(6):
        stream.see(frames(1, i)[0])
        sizes.append(stream.nbytes)
    assert sizes[0] == 2 * llm.num_hidden_layers * llm.num_key_value_heads * head * 4
    assert sizes == [sizes[0] * (i + 1) for i in range(6)]
    stream._last = None  # the newest frame and its look, to show where it went
    assert sum(x.numel() for x in reached(stream)) == sum(r.numel() for r in buffers_of(stream)) + llm.hidden_size
    for _ in range(CHUNK):
        stream.see(frames(1)[0])
    for layer in stream._stream.memory.layers:
        assert [room.shape[2] for room in layer.buffers] == [2 * CHUNK] * 2


def test_a_full_context_says_so_with_numbers():
    model = small(50)
    stream = watch(model, reserve=40)
    assert stream.room == stream.window == 10
    for i in range(10):
        stream.see(frames(1, i)[0])
    assert stream.room == 0
    with pytest.raises(UserError, match="context of 50 tokens is full: 10 frames and 0 words, with 40 reserved"):
        stream.see(frames(1)[0])
    assert len(stream.ask(QUESTION, max_new_tokens=4, min_new_tokens=4)) > 0


def test_sliding_is_attention_to_the_last_frames():
    """With the frames first: one pass over all that was ever seen, each frame attending to a window of them."""
    model, W = small(30), 6
    stream = watch(model, full="slide", reserve=30 - W)
    tokens, states = [], []
    model.llm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    for i in range(20):
        states.append(stream.see(frames(1, i)[0]))
        assert stream.tokens == min(i + 1, W)
    x = torch.cat(tokens, dim=1)
    model.llm.base_model._forward_pre_hooks.clear()
    ago = torch.arange(20)[:, None] - torch.arange(20)[None, :]
    mask = ((ago >= 0) & (ago < W))[None, None]
    with torch.no_grad():
        expected = model.llm.base_model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(torch.stack(states), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("llm", ["llama", "qwen3", "smollm3"])
def test_sliding_keeps_the_question_right_before_the_oldest_frame(llm):
    """In a language model of one layer nothing is remembered of dropped frames, so a fresh one sees the same."""
    model, W = small(60, question="before_frames", llm=llm), 5
    model.llm.base_model.layers = model.llm.base_model.layers[:1]
    if llm == "smollm3":  # every few of its layers have no positions; here the only one
        model.llm.base_model.layers[0].self_attn.use_rope = 0
    model.llm.config.num_hidden_layers = 1
    head = watch(model, reserve=9).head
    stream = watch(model, full="slide", reserve=60 - head - W)
    embedded = []
    handle = model.llm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    for i in range(13):
        state = stream.see(frames(1, i)[0])
    handle.remove()
    words = processor_of(model)(messages=says(QUESTION, video=frames(1)))["input_ids"][:, :head]
    with torch.no_grad():
        x = torch.cat([model.llm.get_input_embeddings()(words), *embedded[-W:]], dim=1)
        fresh = model.llm.base_model(inputs_embeds=x, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(state, fresh[-1], rtol=1e-4, atol=1e-5)
        other = Stream(model)
        other._read(x)
    # An answer, too, is what it would be in a fresh context that holds the question and the last frames.
    answer = stream.ask(max_new_tokens=5, min_new_tokens=5)
    tail = stream._rest[None]
    out = model.llm.generate(
        input_ids=tail,
        attention_mask=torch.ones(1, x.shape[1] + tail.shape[1]),
        past_key_values=other.memory,
        max_new_tokens=5,
        min_new_tokens=5,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,
    )
    assert answer == stream.processor.decode(out[0, tail.shape[1] :])


def test_a_small_context_is_shared_by_frames_and_questions():
    assert small(256).stream().window == 128
    assert small(2048).stream().window == 2048 - 512


@pytest.mark.parametrize(
    "of", [iter, list, lambda x: x, lambda x: x.numpy()], ids=["iterator", "list", "torch", "numpy"]
)
def test_frames_come_as_anything_that_has_them_in_order(of):
    model, shown = model_of(), frames(4)
    streams = [model.stream(of(shown), processor_of(model)), watch(model)]
    assert list(streams[0]) == [1, 2, 3, 4]
    assert torch.equal(streams[0].see(shown[0]), [streams[1].see(f) for f in [*shown, shown[0]]][-1])


def test_floats_are_taken_as_the_processor_takes_them():
    model, frame = model_of(), frames(1)[0]
    assert torch.equal(watch(model).see(frame), watch(model).see(frame.float() / 255))


def test_a_stream_can_be_asked_about_before_it_has_seen_anything():
    stream = watch(model_of())
    assert stream.nbytes == stream.tokens == 0
    assert stream.ask(QUESTION, num_beams=2, max_new_tokens=2, min_new_tokens=2)
    with pytest.raises(ValueError, match="no_such_option"):
        stream.ask(QUESTION, no_such_option=1)
    assert stream.tokens == 0


@pytest.mark.parametrize("prompt", ["before_frames", "after_frames"])
@pytest.mark.parametrize("full", ["stop", "slide"])
@pytest.mark.parametrize("part", ["encoder", "language model"])
def test_an_interrupt_leaves_a_stream_as_it_was(monkeypatch, part, full, prompt):
    """Also when some layers have read the frame and others have not, and at the first frame that slides."""
    model = small(CHUNK + 90, question=prompt)
    quiet, broken = (watch(model, full=full, reserve=40 if full == "stop" else 70) for _ in range(2))
    shown = frames(5)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    number = 10 if full == "stop" else quiet.window + 3
    for i in range(number):
        if i in (0, 4, quiet.window, quiet.window + 2):
            with monkeypatch.context() as patch:
                whole = model.encoder if part == "encoder" else model.llm.base_model.layers[-1].mlp
                patch.setattr(whole, "encode_only" if part == "encoder" else "forward", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    broken.see(shown[i % 5])
            assert broken.seen == i
            settings = {"max_new_tokens": 4, "min_new_tokens": 4}
            assert i == 0 or broken.ask(OTHER, **settings) == quiet.ask(OTHER, **settings)
        assert torch.equal(quiet.see(shown[i % 5]), broken.see(shown[i % 5])), i
    for a, b in zip(buffers_of(quiet), buffers_of(broken), strict=True):
        assert torch.equal(a[:, :, : quiet.tokens], b[:, :, : quiet.tokens])


def test_what_cannot_be_streamed_is_reported():
    with pytest.raises(UserError, match="takes frames, not a path"):
        model_of().stream("clip.mp4")
    with pytest.raises(UserError, match="multi_token"):
        model_of(visual="multi_token").stream()
    with pytest.raises(UserError, match="question ahead of the frames"):
        model_of(question="before_frames").stream()
    with pytest.raises(UserError, match="did you mean 'slide'"):
        model_of().stream(full="slid")
    with pytest.raises(UserError, match="no room for a frame"):
        small(40).stream(reserve=40)
    stream = model_of().stream()
    stream.see(frames(1)[0])
    with pytest.raises(UserError, match="need the processor"):
        stream.ask(QUESTION)
    with pytest.raises(UserError, match="started without one"):
        watch(model_of()).ask()


def test_frames_of_any_kind_are_fitted():
    model = model_of()
    stream = watch(model)
    grey = torch.full((3, 2 * FRAME, 3 * FRAME), 90, dtype=torch.uint8)
    state = stream.see(grey)
    assert torch.equal(state, watch(model).see(grey[:, :FRAME, :FRAME]))


@pytest.mark.parametrize("prompt", ["before_frames", "after_frames"])
def test_a_stream_shows_the_look_that_made_the_token(prompt):
    model = model_of(question=prompt)
    shown, stream = frames(3), watch(model)
    with pytest.raises(ValueError, match="no frame"):
        stream.weights()
    seen = []
    for frame in shown:
        stream.see(frame)
        seen.append(stream.weights())
    gaze = gaze_of(model, processor_of(model), Clip(shown, [0.0, 1.0, 2.0], "clip", ""), QUESTION, max_new_tokens=1)
    torch.testing.assert_close(torch.cat(seen, dim=1), torch.as_tensor(gaze.weights["fine"]).float())
