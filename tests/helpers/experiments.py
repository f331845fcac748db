"""The smallest legal experiment."""

from fovlm.config.schema import Experiment


def small(**changes) -> Experiment:
    values = {
        "sources": {"clips": {"shards": "clips.tar", "kind": "video"}},
        "mixture": {"clips": 1.0},
        "val": ["clips"],
    }
    return Experiment.model_validate({"name": "small", "data": values, "train": {"steps": 10}, **changes})
