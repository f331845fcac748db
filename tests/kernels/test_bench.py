"""`python -m kernels.bench`: checks before it times, and writes what the figures are worth."""

import csv

import pytest
import torch

from kernels import bench

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its sizes are for a CPU")


@pytest.mark.parametrize("op", ["query", "hidden"])
def test_a_run_writes_a_table_and_a_plot(tmp_path, capsys, op):
    shapes = ["--shapes", "small:2", "small:2:3", "--dtypes", "bfloat16"]
    bench.main([op, *shapes, "--repeat", "3", "--out", str(tmp_path)])
    assert "device: cpu" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "kernels_cpu.csv").open()))
    ours = {
        "query": {"reference"},
        "hidden": {"plain_reference", "absorbed_reference", "sdpa_absorbed_math"},
    }[op]
    assert ours | {"sdpa_math"} <= {row["implementation"] for row in rows}
    assert {(row["mode"], row["grads"]) for row in rows} == {
        (mode, grads) for mode in ("forward", "backward", "both") for grads in ("all", "query")
    }
    for row in rows:
        assert float(row["us20"]) <= float(row["us"]) <= float(row["us80"])
        assert row["device"].startswith("cpu")
        assert row["torch"] == torch.__version__
        assert row["commit"]


@pytest.mark.parametrize("words", [["nope"], ["query", "--shapes", "small"], ["query", "--shapes", "huge:2"]])
def test_a_mistake_is_one_line(capsys, words):
    with pytest.raises(SystemExit) as end:
        bench.main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_another_backend_than_named_is_not_timed(tmp_path, monkeypatch):
    named = {"sdpa_flash": bench.general(bench.sdpa("math"))}
    monkeypatch.setattr(bench, "implementations", lambda op, device: named)
    with pytest.raises(SystemExit, match=r"sdpa_flash .* not timed: SDPA took its backend 'math'"):
        bench.main(["query", "--shapes", "small:2", "--dtypes", "float32", "--out", str(tmp_path)])


@pytest.mark.parametrize("where", ["out", "query", "key"])
def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch, where):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return 1.01 * slope

    def wrong(t, looks):
        t = t | {where: Wrong.apply(t[where])} if where in t else t
        out = bench.plain("reference")(t, looks)
        return out * 1.01 if where == "out" else out

    monkeypatch.setattr(bench, "implementations", lambda op, device: {"reference": wrong})
    with pytest.raises(SystemExit, match=f"wrong, not timed: {where}"):
        bench.main(["query", "--shapes", "small:2", "--dtypes", "float32", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
