"""Exported graphs compute what PyTorch does, and what cannot be exported is refused in one line."""

import subprocess

import pytest
import torch

from fovlm.cli.main import main
from fovlm.errors import UserError
from fovlm.export import npm
from fovlm.export.compare import nll_of
from helpers.models import ENCODERS, LLMS, sample, tiny_model

pytest.importorskip("onnxruntime", reason="exporting needs the extra [export]")
pytest.importorskip("onnxscript", reason="exporting needs the extra [export]")

from fovlm.export.graphs import STATIC, write_graphs
from fovlm.export.runtime import GraphStream, shrink
from fovlm.model.autoregressive import autoregressive
from helpers.models import pack

SAMPLES = [sample("before", 3, text=7, prompt=3), sample("after", 1, text=5)]


def difference(model, folder) -> float:
    """The largest one in nats, over samples with the question before and after the frames."""
    graphs, kind = GraphStream(folder, threads=1), STATIC if model.config.visual == "coarse" else None
    expected = [autoregressive(model, pack([s], s.size)) for s in SAMPLES]
    return max((nll_of(graphs, s, kind) - e).abs().max().item() for s, e in zip(SAMPLES, expected, strict=True))


def test_graphs_give_the_nll_of_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS["dinov2"], "num_hidden_layers", 1)  # exporting takes seconds a layer
    monkeypatch.setitem(LLMS["llama"], "num_hidden_layers", 1)
    model = tiny_model().eval()
    write_graphs(model, tmp_path)
    assert difference(model, tmp_path) < 1e-5
    with torch.no_grad():  # and they are of this model: another one is not equal
        model.connector.to_query.weight.add_(0.5)
    assert difference(model, tmp_path) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "llm", "settings"),
    [
        ("dinov2_with_registers", "llama", {"visual": "coarse"}),
        ("dinov3_vit", "smollm3", {}),
        ("siglip2_vision_model", "qwen3", {"deep_query": False, "query_dim": 32}),
    ],
)
def test_every_family_and_smaller_weights(tmp_path, encoder, llm, settings, caplog):
    model = tiny_model(encoder=encoder, llm=llm, **settings).eval()
    write_graphs(model, tmp_path)
    assert difference(model, tmp_path) < 1e-4
    sizes = [sum(file.stat().st_size for file in tmp_path.iterdir())]
    for name in ("encoder", "look", "llm"):
        shrink(tmp_path / f"{name}.onnx", "int8")
    sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
    assert sizes[1] < sizes[0]
    assert not [record for record in caplog.records if record.name == "root"]
    assert difference(model, tmp_path) < 0.3


def test_a_multi_token_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no look to export"):
        write_graphs(tiny_model(visual="multi_token"), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "onyx"], "--to is onnx, page, not 'onyx' (did you mean 'onnx'?)"),
        (["--weights", "int9"], "--weights is fp32, int8, int4, not 'int9'"),
        (["--example", "no.mp4"], "no.mp4"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, says):
    assert main(["export", "nowhere", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_package_is_the_pinned_one_or_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path))
    other = tmp_path / "npm" / "huggingface-tokenizers@0.2.0.tgz"
    other.parent.mkdir()
    other.write_bytes(b"another one")
    with pytest.raises(UserError, match="is not the pinned package"):
        npm.tarball("@huggingface/tokenizers@0.2.0")
    assert not other.exists()

    def unreachable(command, **options):
        raise subprocess.CalledProcessError(1, command, stderr="npm error code ENOTFOUND\nnpm error network\n")

    monkeypatch.setattr(npm.subprocess, "run", unreachable)
    with pytest.raises(UserError, match=r"npm cannot fetch onnxruntime-web.*ENOTFOUND"):
        npm.tarball("onnxruntime-web@1.30.0")
