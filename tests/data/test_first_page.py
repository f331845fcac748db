"""The example at the top of `fovlm/data/__init__.py` gives the values that it shows."""

from fovlm.config.schema import load
from fovlm.data import synthetic
from fovlm.data.dataloader import plan_steps
from fovlm.data.dataset import open_dataset, pack_budget
from fovlm.data.packing import PackSize
from fovlm.data.tokenizers import open_tokenizer


def test_the_way_of_one_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVLM_DATA", str(tmp_path))
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))
    experiment = load("quickstart", ["data.generate.train_clips=400", "data.generate.val_clips=1"])
    synthetic.make(experiment.data.generate)
    tokenizer = open_tokenizer(experiment)
    dataset = open_dataset(experiment, tokenizer, experiment.data.mixture)
    assert dataset.mix(1) == (0, 1)
    assert dataset.size(1) == PackSize(frames=4, looks=4, text=25, prompt=17)
    samples, issue = dataset.read(1)
    assert ([sample.key for sample in samples], issue) == (["video-000.tar/clip000330"], None)
    plan = next(plan_steps(dataset, pack_budget(experiment), packs=8, cursor=0))
    assert plan.packs[1] == [1, 7, 11, 21, 31, 41, 51, 61, 71, 77, 81]
    assert plan.cursor == 85
