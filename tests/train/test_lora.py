"""Adapters in our own training: only they and the connector move, a resume is exact, the folder of a run converts."""

import pytest
import torch

from fovlm import FoveatedVLM
from fovlm.checkpoint.convert import convert
from fovlm.checkpoint.locate import open_run
from fovlm.config import schema
from fovlm.errors import UserError
from fovlm.estimate.shapes import geometry, parameters
from fovlm.model.lora import is_adapter
from helpers.models import pack, tiny_model
from helpers.training import arguments, environment, rows, write_data
from helpers.zero_files import SAMPLES, write_run

LORA = ["model.lora={rank: 4, alpha: 8.0}", "train.steps=8", "train.save_every=4", "data.workers=0"]
QUIET = ["data.val=[]", "train.eval_every=0", "train.best=train_loss"]


def test_the_dry_run_counts_adapters_and_mistakes_are_named():
    whole, lora = (schema.load("LR1", more) for more in ([], ["model.lora.rank=16"]))
    shapes = geometry(lora.model)
    count, llm = parameters(lora, shapes)["llm"], parameters(whole, geometry(whole.model))["llm"]
    assert count.frozen == llm.trainable
    assert count.trainable == 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192))  # layers, rank, q and o, k and v
    assert shapes.llm.linears == geometry(whole.model).llm.linears
    with pytest.raises(UserError, match="take llm out"):
        schema.load("LR1", ["model.lora={}", "optim.freeze=[llm]"])
    with pytest.raises(UserError, match=r"no linear layer 'q_prj' \(did you mean 'q_proj'"):
        geometry(schema.load("LR1", ["model.lora.targets=[q_prj]"]).model)


def test_adapters_are_merged(tmp_path):
    model = tiny_model(seed=3, lora={"rank": 4, "alpha": 16.0, "targets": ["q_proj", "down_proj"]})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if is_adapter(name):
                weight.normal_(std=0.3)
    assert {name for name, p in model.llm.named_parameters() if p.requires_grad} == {
        name for name, _ in model.llm.named_parameters() if is_adapter(name)
    }
    write_run(tmp_path / "run", model)
    again = FoveatedVLM.from_pretrained(convert(tmp_path / "run", tmp_path / "out", dtype="fp32"))
    assert again.state_dict().keys() == tiny_model().state_dict().keys()
    with torch.no_grad():
        trained, merged, plain = (each(pack(SAMPLES)) for each in (model, again, tiny_model(seed=3)))
        assert torch.equal(open_run(tmp_path / "run").model()(pack(SAMPLES)), trained)
    torch.testing.assert_close(merged, trained, rtol=1e-5, atol=1e-5)
    assert (merged - plain).abs().max() > 0.01


@pytest.mark.slow
def test_adapters_train_resume_exactly_and_convert(forked, tmp_path):
    home = write_data(tmp_path)
    forked.run(2, arguments(home, "whole", *LORA, *QUIET), environment(home))
    half = home / "runs" / "whole" / "checkpoints" / "step-00000004"
    again = [*arguments(home, "again", *LORA, *QUIET), f"train.resume={half}"]
    forked.run(1, again, environment(home))
    whole, resumed = ([row["loss"] for row in rows(home, name)] for name in ("whole", "again"))
    assert len(resumed) == 4
    assert resumed == pytest.approx(whole[4:], rel=1e-5)
    assert whole[-1] < whole[0]
    saved = open_run(home / "runs" / "whole")
    stored = saved.weights()
    moved = [name for name in stored.shapes if ".lora_B." in name and stored.read(name).abs().max() > 0]
    assert len(moved) == 2 * 4  # layers, targets
    model = FoveatedVLM.from_pretrained(convert(home / "runs" / "whole", home / "converted", dtype="fp32"))
    assert not any(map(is_adapter, model.state_dict()))
