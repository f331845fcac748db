"""The dry run: complete, without weights, data or network; exact where the shards have been indexed."""

import socket

import pytest

from fovlm.config import experiments
from fovlm.config.schema import DataSettings, DataSource, Experiment, ModelSettings, TrainSettings, load
from fovlm.data.dataset import open_dataset
from fovlm.data.packing import PackSize
from fovlm.data.shards import write_shards
from fovlm.errors import UserError
from fovlm.estimate.dry_run import describe, largest_sizes, length, real_shares, sizes_of
from fovlm.estimate.flops import mean_cost, total
from fovlm.estimate.shapes import geometry
from fovlm.train import trainer
from helpers.tiny import picture, tokenizer

SECTIONS = ["experiment", "DeepSpeed", "parameters", "FLOPs per sample", "length", "packs", "memory per rank"]


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No models, no data, no network."""

    def refuse(*_, **__):
        raise AssertionError("the dry run went to the network")

    for name in ("FOVLM_MODELS", "FOVLM_DATA", "FOVLM_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def tiny(data: DataSettings, **train) -> Experiment:
    llm = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    dino = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    model = ModelSettings(llm=llm, encoder=dino, frame_size=28, tokenizer=str(data.sources["a"].prompt), query_dim=16)
    return Experiment(name="tiny", model=model, data=data, train=TrainSettings(best="train_loss", **train))


def test_everything_is_reported_without_data_or_weights(bare):
    text = describe(load("1.7B-C1-F"), 8, "cuda")
    at = [text.index(f"-- {section}") for section in SECTIONS]
    assert at == sorted(at)
    for figure in ("1,711,376,384", "86,579,712", "AT MOST", "train.flops", "in a step", "activations", '"stage": 2'):
        assert figure in text
    assert "in main memory" not in text
    assert "in main memory" in describe(load("1.7B-C1-F", ["deepspeed=zero2_offload"]), 1, "cuda")


@pytest.mark.parametrize("name", list(experiments.names()))
def test_every_named_run_can_be_described(name, bare):
    e = load(name)
    assert f"{e.name}: {e.note}" in describe(e, 2, "cpu")


def test_mistakes_are_reported_as_in_the_run(bare):
    with pytest.raises(UserError, match=r"model\.llm"):
        describe(load("LR1", ["model.llm=nowhere"]), 2, "cuda")


def test_real_sizes_are_used_where_shards_are_indexed(bare):
    folder = bare / "tokenizer"
    tokenizer().save_pretrained(folder)
    samples = [
        {"__key__": f"{i}", "json": {"user": "what is this ?", "assistant": "a red " * (1 + i)}}
        | {f"{n:03}.png": picture(n) for n in range(1 + i % 3)}
        for i in range(6)
    ]
    write_shards(bare / "FOVLM_DATA" / "a-%d.tar", samples)
    source = DataSource(shards="a-0.tar", kind="video", prompt=None)
    data = DataSettings(
        sources={"a": source},
        mixture={"a": 1.0},
        pack_cost=256,
        frame_cost=16,
        max_frames=4,
        max_tokens=64,
        loss_on="all_text",
    )
    e = tiny(data, flops=1e9)
    e = e.model_copy(update={"model": e.model.model_copy(update={"tokenizer": str(folder)})})

    most, why = sizes_of(e)
    assert (set(most), "no index yet" in why) == ({PackSize(4, 4, 64, 0)}, True)
    assert not list((bare / "FOVLM_DATA").glob("*.index"))  # looking made none
    assert "AT MOST" in describe(e, 1, "cpu")

    dataset = open_dataset(e, tokenizer(), data.mixture)  # as the run does: makes the index
    sizes, why = sizes_of(e)
    assert (sizes[:20], why) == ([dataset.size(i) for i in range(20)], "")
    text = describe(e, 1, "cpu")
    assert "AT MOST" not in text
    mean = total(mean_cost(e, geometry(e.model), sizes)).total
    assert f"{int(1e9 / mean):,}" in text


def test_the_packs_of_a_step_and_its_time(bare):
    """Sizes that fill packs exactly and others that do not; seconds from FLOPs, by hand."""
    e = load("LR1", ["data.pack_cost=2560"])
    full = [[PackSize(16, 16, 128, 0)] * 4, [PackSize(32, 32, 256, 0)] * 2]
    assert real_shares(full) == dict.fromkeys(("frames", "prefix", "sequence", "text"), 1.0)
    assert real_shares([[PackSize(65, 65, 1, 0)]])["frames"] == 65 / 66
    text = describe(e, 4, "cuda")
    long = length(e, geometry(e.model), largest_sizes(e))
    assert f"{1e3 * long.per_step * long.per_sample / (0.4 * 989e12 * 4):.1f} ms" in text
    assert "989.00 TFLOP/s dense bf16 (H100) on each of 4" in text


def test_samples_in_a_step_are_those_that_packing_takes(bare):
    e = load("LR1", ["data.pack_cost=2560"])
    shapes = geometry(e.model)
    assert length(e, shapes, [PackSize(16, 16, 128, 0)] * 400).per_step == 4 * e.train.packs_per_step
    assert length(e, shapes, [PackSize(64, 64, 512, 0)] * 3).per_step == 3
    assert {size.frames for size in largest_sizes(e)} == {0, 64}


def test_a_checkpoint_that_does_not_exist_is_refused(bare, monkeypatch, capsys):
    monkeypatch.setenv("FOVLM_RUNS", str(bare / "runs"))
    assert trainer.main(["LR1", "train.resume=nowhere", "--dry-run"]) == 2
    assert "train.resume=nowhere: nowhere: no such folder" in capsys.readouterr().err
    assert trainer.main(["LR1", "--dry-run"]) == 0


def test_a_tokenizer_that_the_model_has_no_embeddings_for_is_reported(tmp_path, bare):
    tokenizer().save_pretrained(tmp_path / "words")
    data = DataSettings(
        sources={"a": DataSource(shards="none.tar", kind="text", prompt=str(tmp_path / "words"))}, mixture={"a": 1.0}
    )
    e = tiny(data, steps=3)
    small = e.model_copy(update={"model": e.model.model_copy(update={"llm": e.model.llm | {"vocab_size": 7}})})
    with pytest.raises(UserError, match="38 words and the language model's vocabulary 7"):
        describe(small, 1, "cpu")
