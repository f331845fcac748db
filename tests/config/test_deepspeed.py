"""An experiment and a file of ds_configs/ become the dictionary for DeepSpeed; every mistake is one line."""

import pytest

from fovlm.config.deepspeed import OWNED, merge, read, resolve
from fovlm.errors import UserError
from helpers.experiments import small

ENGINES = ("zero1", "zero2", "zero2_offload", "zero3")


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_accumulate_in_fp32_and_leave_the_experiment_its_own(engine):
    content = read(engine)
    assert content["data_types"]["grad_accum_dtype"] == "fp32"
    assert not set(OWNED) & set(content)
    merged = merge(small(deepspeed=engine), content, 2, "cpu")
    assert merged["zero_optimization"]["stage"] == int(engine[4])
    assert merged["zero_optimization"]["overlap_comm"] is False
    assert content == read(engine), "merging must not change what it was given"


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_precision(precision, device):
    merged = resolve(small(train={"steps": 1, "precision": precision}), 1, device)
    assert merged["bf16"]["enabled"] == (precision == "bf16" or (precision == "auto" and device == "cuda"))


def test_compiled_layers_are_refused_with_zero3():
    with pytest.raises(UserError, match=r"model\.compile=true: not with ZeRO-3"):
        resolve(small(deepspeed="zero3", model={"compile": True}), 1, "cuda")
    resolve(small(deepspeed="zero3"), 1, "cuda")


BAD_ENGINES = {
    "zero_optimisation": (
        {"zero_optimisation": {"stage": 2}},
        "zero_optimisation: unknown key (did you mean 'zero_optimization'?)",
    ),
    "nested": (
        {"zero_optimization": {"stage": 2, "overlap": True}},
        "zero_optimization.overlap: unknown key (did you mean 'overlap_comm'?)",
    ),
    "auto": (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
        "reduce_bucket_size: 'auto' is not supported",
    ),
    "clipping": ({"gradient_clipping": 1.0}, "gradient_clipping: belongs to the experiment: optim.clip"),
    "optimizer": ({"optimizer": {"type": "Adam"}}, "optimizer: belongs to the experiment"),
    "batch": ({"train_batch_size": 8}, "train_batch_size: belongs to the experiment: train.packs_per_step"),
    "type": (
        {"zero_optimization": {"stage": "2"}},
        "zero_optimization.stage: input should be a valid integer, not '2'",
    ),
    "null": (
        {"zero_optimization": {"stage": 2, "overlap_comm": None}},
        "overlap_comm: input should be a valid boolean",
    ),
    "no object": ({"bf16": True}, "bf16: must be a mapping of keys, not True"),
    "no ZeRO": ({"bf16": {"enabled": True}}, "zero_optimization: is missing"),
    "no stage": ({"bf16": {"enabled": True}, "zero_optimization": {}}, "zero_optimization.stage: is missing"),
}


@pytest.mark.parametrize("case", BAD_ENGINES)
def test_engines_are_checked_key_by_key(case):
    content, expected = BAD_ENGINES[case]
    with pytest.raises(UserError) as error:
        merge(small(), content, 1, "cpu")
    assert str(error.value).startswith("ds_configs/zero2.json: ")
    assert expected in str(error.value)


@pytest.mark.parametrize(("world", "micro_steps"), [(1, 8), (3, 3), (5, 2), (8, 1), (16, 1)])
def test_any_number_of_ranks_shares_the_packs_of_a_step(world, micro_steps):
    assert resolve(small(), world, "cpu")["gradient_accumulation_steps"] == micro_steps


def test_an_unknown_engine_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'zero2'"):
        resolve(small(deepspeed="zer2"), 1, "cpu")
