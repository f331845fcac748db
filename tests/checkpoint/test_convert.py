"""From ZeRO shards to a folder that transformers loads: the same weights and NLL, or a clear error."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from fovlm.checkpoint import convert, store, verify, zero_reader
from fovlm.checkpoint.locate import open_run
from fovlm.checkpoint.reference import ReferenceOutputs, mean_nll
from fovlm.checkpoint.safetensors_writer import byte_size
from fovlm.checkpoint.verify import reference_nll
from fovlm.checkpoint.zero_reader import ZeroWeights
from fovlm.cli.main import main
from fovlm.errors import EXIT_USER_ERROR, UserError
from fovlm.model.encoders.dinov2 import released_name
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.processing import load_model
from helpers.models import pack, tiny_model
from helpers.zero_files import SAMPLES, reseal, write_run

EMBEDDINGS, HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"


def nll(model: FoveatedVLM) -> torch.Tensor:
    with torch.no_grad():
        return model(pack(SAMPLES)).float()


def same(model: FoveatedVLM, other: FoveatedVLM) -> None:
    """The same NLL up to the last bits: kernels treat mapped and allocated memory differently."""
    torch.testing.assert_close(nll(model), nll(other), rtol=1e-6, atol=1e-6)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert not found.keys() & set(opened.keys()), "a tensor stored twice"
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.fixture
def run(tmp_path) -> Path:
    """The simplest run: one checkpoint of step 5."""
    write_run(tmp_path / "run", tiny_model(seed=3))
    return tmp_path / "run"


@pytest.mark.parametrize(("world", "frozen"), [(1, "nothing"), (3, "nothing"), (2, "backbones")])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_converted_model_gives_the_same_nll(tmp_path, stage, world, frozen):
    model = tiny_model(seed=3)
    if frozen == "backbones":
        model.freeze(["encoder", "llm"])
    write_run(tmp_path / "run", model, stage, world)
    out = convert.convert(tmp_path / "run", tmp_path / "out", dtype="fp32")
    again = FoveatedVLM.from_pretrained(out)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    same(again, model)
    weights = stored(out)
    assert HEAD not in weights, "a tied weight is stored once"
    assert len(weights) == len(model.state_dict()) - 1
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight


@pytest.mark.parametrize(
    "families",
    [
        ("dinov2_with_registers", "llama"),
        ("dinov3_vit", "qwen3"),
        ("siglip_vision_model", "smollm3"),
        ("siglip2_vision_model", "llama"),
    ],
)
def test_every_family_converts(tmp_path, families):
    encoder, llm = families
    model = tiny_model(seed=3, encoder=encoder, llm=llm)
    write_run(tmp_path / "run", model)
    again = FoveatedVLM.from_pretrained(convert.convert(tmp_path / "run", tmp_path / "out", dtype="fp32"))
    assert again.state_dict().keys() == model.state_dict().keys()
    same(again, model)


def test_an_untied_head_is_converted(tmp_path):
    model = tiny_model(seed=3)
    model.config.llm_config.tie_word_embeddings = False
    model = FoveatedVLM(model.config)
    assert model.llm.lm_head.weight is not model.llm.model.embed_tokens.weight
    write_run(tmp_path / "run", model)
    again = FoveatedVLM.from_pretrained(convert.convert(tmp_path / "run", tmp_path / "out", dtype="fp32"))
    assert torch.equal(again.llm.lm_head.weight, model.llm.lm_head.weight)
    same(again, model)


@pytest.mark.parametrize("stage", [2, 3])
def test_buffers_keep_their_type(tmp_path, stage):
    model = tiny_model(seed=3)
    model.connector.register_buffer("seen", torch.arange(5))
    model.connector.register_buffer("not_kept", torch.arange(5), persistent=False)
    path = write_run(tmp_path / "run", model, stage, dtype=torch.bfloat16)
    weights = ZeroWeights(path / store.ENGINE)
    assert torch.equal(weights.read("connector.seen"), torch.arange(5))
    assert "connector.not_kept" not in weights.shapes
    assert weights.ties == {HEAD: EMBEDDINGS}
    assert torch.equal(weights.read(HEAD), model.llm.lm_head.weight)


@pytest.mark.parametrize("stage", [2, 3])  # 1 is stored like 2
def test_weights_are_the_same_after_files_are_mapped_again(tmp_path, stage, monkeypatch):
    """As happens every 256 MB; frozen weights and buffers are stored in other places than the trained ones."""
    weights = ZeroWeights(write_run(tmp_path / "run", tiny_model(seed=3), stage=stage) / "engine")
    before = {name: weights.read(name) for name in weights.shapes}
    monkeypatch.setattr(zero_reader, "RELEASE_AFTER", 0)
    assert all(torch.equal(weights.read(name), before[name]) for name in list(weights.shapes)[::4])
    assert "encoder.backbone.embeddings.mask_token" in before


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_type_is_checked_against_the_reference_outputs(tmp_path, dtype, trained):
    model = tiny_model(seed=3)
    path = write_run(tmp_path / "run", model, dtype=trained)
    out = convert.convert(tmp_path / "run", tmp_path / "out", dtype=dtype)
    written = {value.dtype for value in stored(out).values()}
    assert written == {convert.DTYPES[dtype]}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(convert.DTYPES[dtype]).removeprefix("torch.")
    reference = ReferenceOutputs.load(path)
    assert reference is not None
    assert reference.precision == str(trained).removeprefix("torch.")
    card = (out / "README.md").read_text()
    assert f"{mean_nll(reference.nll):.6f} as recorded" in card
    apart = float(re.search(r"per token (\S+) over", card)[1])
    assert apart < 1e-4, "the same weights, computed in the same type"
    assert ("rounded to bf16" in card) == ((dtype, trained) == ("bf16", torch.float32))


def test_rounding_to_bf16_hides_no_wrong_weight(tmp_path):
    path = write_run(tmp_path / "run", tiny_model(seed=3))
    model = load_model(convert.convert(tmp_path / "run", tmp_path / "out", dtype="bf16"), torch.float32)
    weights = ZeroWeights(path / "engine")
    with torch.no_grad():
        model.connector.to_llm.weight[0, 0] *= 1.01
    with pytest.raises(UserError, match=r"connector\.to_llm\.weight is not the stored weight"):
        verify.restore_weights(model, weights)


def test_large_models_are_split_with_an_index(run, tmp_path):
    out = convert.convert(run, tmp_path / "out", dtype="fp32", shard_size="50KB")
    files = sorted(f.name for f in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(out).values())
    assert all((out / f).stat().st_size < 70_000 for f in files)
    same(FoveatedVLM.from_pretrained(out), tiny_model(seed=3))


def test_tokenizer_generation_config_and_card_are_written(run, tmp_path):
    score = {"loss": 1.25, "by_source": {"clips": 1.25}, "error": 0.01}
    (run / "run_summary.json").write_text(json.dumps({"step": 5, "commit": "abc", "scores": {"coarse_fine": score}}))
    (run / "maps").mkdir()
    for step in (2, 5):
        (run / "maps" / f"step-{step:08}.png").write_bytes(b"picture %d" % step)
    out = convert.convert(run, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template
    assert GenerationConfig.from_pretrained(out).eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    card = (out / "README.md").read_text()
    for line in (
        "`tiny`: a test",
        "5 steps, 90 samples",
        "`clips`",
        "1.2500 ± 0.0196",
        "from_pretrained",
        "Verified: NLL",
        "pipeline_tag: image-text-to-text",
        "license: apache-2.0",
        "pip install transformers",
        "(gaze.png)",
    ):
        assert line in card
    assert (out / "gaze.png").read_bytes() == b"picture 5"
    assert str(tmp_path) not in card.split("All settings")[0], "no folder of this machine"
    assert not [p for p in tmp_path.iterdir() if p.name not in ("run", "out")], "nothing is left beside it"


def test_choosing_a_checkpoint_by_name_or_step(tmp_path):
    run = tmp_path / "run"
    for step, best in ((5, False), (10, True), (15, False)):
        write_run(run, tiny_model(seed=step), step=step, best=best)
    for which, step in ((None, 10), ("best", 10), ("latest", 15), ("5", 5), ("step-00000005", 5)):
        assert open_run(run, which).state.step == step
    assert open_run(run / "checkpoints" / "step-00000005").state.step == 5
    assert open_run(run / "checkpoints").state.step == 10
    with pytest.raises(UserError, match="no checkpoint of step 7; there are best, latest, 5, 10, 15"):
        open_run(run, "7")


def test_a_damaged_best_checkpoint_falls_back_with_a_warning(tmp_path, caplog):
    run = tmp_path / "run"
    for step, best in ((5, False), (10, True), (15, False)):
        path = write_run(run, tiny_model(seed=step), step=step, best=best)
        if best:
            (path / "experiment.yaml").write_text("damaged")
    assert open_run(run).state.step == 15
    assert "checkpoint step-00000010 is damaged" in caplog.text
    with pytest.raises(UserError, match=r"step-00000010: experiment\.yaml has 7 bytes.*; --step 15 is another"):
        open_run(run, "best")


def test_a_checkpoint_without_reference_outputs(tmp_path, capsys):
    write_run(tmp_path / "run", tiny_model(seed=3), reference=False)
    out = convert.convert(tmp_path / "run", tmp_path / "out", dtype="fp32")
    same(FoveatedVLM.from_pretrained(out), tiny_model(seed=3))
    assert "Not verified" in (out / "README.md").read_text()
    assert "Not verified" in capsys.readouterr().err


def test_another_models_weights_fail_loudly_with_both_numbers(run, tmp_path, monkeypatch):
    """One small tensor of zeros in place of its weights is enough."""
    honest = ZeroWeights.read
    lost = "connector.to_llm.weight"
    monkeypatch.setattr(ZeroWeights, "read", lambda self, name: honest(self, name) * (name != lost))
    for dtype in ("fp32", "bf16"):
        with pytest.raises(UserError, match=r"not the trained one: NLL \d\.\d+ as converted.* \d\.\d+ as recorded"):
            convert.convert(run, tmp_path / "out", dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "and nothing is left of it"


def test_weights_of_another_shape_are_refused(run, tmp_path):
    path = run / "checkpoints" / "step-00000005"
    settings = json.loads((path / store.CONFIG).read_text())
    settings["query_dim"] = 25
    (path / store.CONFIG).write_text(json.dumps(settings))
    reseal(path)
    with pytest.raises(UserError, match="not those of its model"):
        convert.convert(run, tmp_path / "out")


@pytest.mark.parametrize("stage", [2, 3])
def test_missing_and_damaged_shards_are_named(tmp_path, stage):
    path = write_run(tmp_path / "run", tiny_model(seed=3), stage, world=3)
    shard = path / store.ENGINE / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt is missing"):
        convert.convert(tmp_path / "run", tmp_path / "out")
    reseal(path)  # as if it had never been listed
    with pytest.raises(
        UserError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt missing, of the shards of 3 ranks"
    ):
        convert.convert(tmp_path / "run", tmp_path / "out")
    shard.write_bytes(content[:-2000])
    reseal(path)
    with pytest.raises(UserError, match=r"zero_pp_rank_1.*cannot be read"):
        convert.convert(tmp_path / "run", tmp_path / "out")
    shard.write_bytes(content)
    reseal(path)
    assert convert.convert(tmp_path / "run", tmp_path / "out").is_dir()


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_code_in_a_shard_is_not_run(run, tmp_path):
    mark, path = tmp_path / "mark", run / "checkpoints" / "step-00000005"
    shard = path / store.ENGINE / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(shard)
    torch.save({**state, "ds_config": Evil(mark)}, shard)
    reseal(path)
    with pytest.raises(UserError, match=r"more than tensors and plain values .*could run code: refused"):
        convert.convert(run, tmp_path / "out")
    assert not mark.exists()
    torch.load(shard, weights_only=False)
    assert mark.exists(), "or the test's file could not have done harm"


def test_user_errors_are_one_line_with_status_2(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FOVLM_RUNS", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    shutil.copytree(run, tmp_path / "unsealed")
    (tmp_path / "unsealed" / "checkpoints" / "step-00000005" / store.MANIFEST).unlink()
    cases = [
        (["nowhere", "out"], "no such folder"),
        (["rum", "out"], "did you mean 'run'?"),
        (["empty", "out"], "neither a run"),
        (["unsealed", "out"], "no complete checkpoint"),
        (["unsealed/checkpoints/step-00000005", "out"], "its save did not complete"),
        (["run", "full"], "not empty"),
        (["run", "full/precious.txt/out"], "cannot make this folder"),
        (["run", "out", "--step", "9"], "no checkpoint of step 9"),
        (["run/checkpoints/step-00000005", "out", "--step", "5"], "is one checkpoint"),
        (["run", "out", "--dtype", "fp64"], "--dtype is bf16 or fp32"),
        (["run", "out", "--shard-size", "huge"], "no size"),
        (["x" * 300, "out"], "File name too long"),
    ]
    monkeypatch.chdir(tmp_path)
    for arguments, said in cases:
        assert main(["convert", *arguments]) == EXIT_USER_ERROR
        error = capsys.readouterr().err
        assert said in error, error
        assert error.strip().count("\n") == 0, error
    assert (tmp_path / "full" / "precious.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()
    assert main(["convert", "run", "out"]) == 0
    assert main(["convert", "out", "again"]) == EXIT_USER_ERROR
    assert "a model already" in capsys.readouterr().err


def test_weights_are_written_under_dinov2s_released_names(run, tmp_path):
    weights = stored(convert.convert(run, tmp_path / "out"))
    assert all(released_name(name) == name for name in weights if name.startswith("encoder."))
    assert any("llm." in name and "q_proj" in name for name in weights)


def test_reference_outputs_do_not_depend_on_the_pack(tmp_path):
    path = write_run(tmp_path / "run", tiny_model(seed=3))
    reference = ReferenceOutputs.load(path)
    assert reference is not None
    assert [s.key for s in reference.samples] == [s.key for s in SAMPLES]
    torch.testing.assert_close(torch.cat(reference_nll(tiny_model(seed=3), reference)), torch.cat(reference.nll))


@pytest.mark.parametrize(("text", "number"), [("4GB", 4 * 10**9), ("1.5 MiB", 3 << 19), ("500", 500), ("2kb", 2000)])
def test_sizes(text, number):
    assert byte_size(text) == number
