"""Folders that are saved, loaded and shared: a fresh process, the Auto classes, the hub, and what is no model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from fovlm import FoveatedVLM, open_model
from fovlm.errors import UserError
from helpers.interface import QUESTION, model_of, processor_of
from helpers.launch import fresh_python
from helpers.models import FRAME


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved model with its processor."""
    model = model_of(question="before_frames", image_frames=3)
    model.save_pretrained(tmp_path / "model")
    processor_of(model).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_fresh_process_needs_nothing_but_the_folder(folder):
    """In fp32 and bf16, by our names and by the Auto classes. Looking for transformers is not importing it."""
    code = f"""
import sys, fovlm, importlib.util
importlib.util.find_spec("transformers")
assert not {{"torch", "transformers"}} & set(sys.modules)
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
assert type(AutoConfig.from_pretrained({str(folder)!r})).__name__ == "FoveatedConfig"
import torch
from fovlm import FoveatedProcessor, FoveatedVLM
processor = FoveatedProcessor.from_pretrained({str(folder)!r})
inputs = processor(text={QUESTION!r}, videos=torch.full((2, 3, {FRAME}, {FRAME}), 9, dtype=torch.uint8))
for dtype in (torch.float32, torch.bfloat16):
    model = FoveatedVLM.from_pretrained({str(folder)!r}, dtype=dtype).eval()
    assert model.dtype == dtype
    print(model.generate(**inputs, max_new_tokens=4)[0].tolist())
model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}).eval()
print(model.generate(**inputs, max_new_tokens=4)[0].tolist())
assert type(AutoProcessor.from_pretrained({str(folder)!r})) is FoveatedProcessor
assert type(AutoModel.from_pretrained({str(folder)!r})) is type(model) is FoveatedVLM
"""
    printed = fresh_python(code)
    model, processor = open_model(folder)
    shown = torch.full((2, 3, FRAME, FRAME), 9, dtype=torch.uint8)
    expected = model.generate(**processor(text=QUESTION, videos=shown), max_new_tokens=4)[0].tolist()
    answers = [json.loads(line) for line in printed.splitlines()]
    assert answers[0] == answers[2] == expected
    assert len(answers[1]) > 0


def test_saving_and_loading_changes_nothing_and_keeps_tied_weights_once(folder, tmp_path):
    model, processor = open_model(folder)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert len([name for name in file.keys() if "embed_tokens" in name or "lm_head" in name]) == 1  # noqa: SIM118
    again, other = open_model(tmp_path / "again")
    assert again.llm.get_input_embeddings().weight is again.llm.get_output_embeddings().weight
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert other.to_dict() == processor.to_dict()
    assert other.image_frames == 3
    assert other.question == "before_frames"
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id is not None
    assert isinstance(AutoModel.from_pretrained(tmp_path / "again"), FoveatedVLM)
    (tmp_path / "again" / "processor_config.json").unlink()
    assert AutoProcessor.from_pretrained(tmp_path / "again").image_frames == 3  # from config.json
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "again", dtype="auto")


def test_both_go_to_the_hub(folder, monkeypatch):
    """By inheritance; the network is a stub that keeps the names of what would be sent."""
    import huggingface_hub

    sent: dict[str, set[str]] = {}

    def commit(self, repo_id, operations, **options):
        sent.setdefault(repo_id, set()).update(operation.path_in_repo for operation in operations)

    def create(self, repo_id, **options):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def no_card(*args, **options):
        raise huggingface_hub.utils.EntryNotFoundError("a new repository has no card yet")

    monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    for module in [m for name, m in sys.modules.items() if name.startswith("transformers")]:
        for name, stub in (("create_repo", create), ("create_commit", commit)):
            if name in vars(module):
                monkeypatch.setattr(module, name, lambda *a, stub=stub, **k: stub(None, *a, **k))
        if "create_branch" in vars(module):
            monkeypatch.setattr(module, "create_branch", lambda *a, **k: None)
    for part in open_model(folder):
        part.push_to_hub("me/clip")
    assert {"config.json", "generation_config.json", "model.safetensors", "code/processing.py"} <= sent["me/clip"]
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= sent["me/clip"]


def test_what_is_no_model_is_refused_in_one_line(folder, tmp_path):
    def reason(path: Path | str) -> str:
        with pytest.raises(UserError) as error:
            open_model(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "did you mean 'model'" in reason(folder.parent / "modle")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert f"fovlm convert {tmp_path / 'run'} OUT" in reason(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in reason(tmp_path / "empty")
    assert "is a file" in reason(folder / "config.json")
    with pytest.raises(UserError, match="dtype is auto, bf16 or fp32"):
        open_model(folder, "fp23")
    weights = folder / "model.safetensors"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(folder / "model-00001-of-00002.safetensors")
    assert "missing: model-00002-of-00002.safetensors;" in reason(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "missing: model.safetensors;" in reason(folder)
    weights.write_bytes(b"\0" * 100)
    assert "does not load" in reason(folder)
    (folder / "config.json").write_text('{"model_type": "fovlm", "dino_config": {}}')
    assert "was converted by fovlm 0.1" in reason(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "type 'llama'" in reason(folder)


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, fovlm",
        # The model is not registered in the middle of an import by a module of fovlm.
        "import fovlm.data.chat, sys; assert 'fovlm.model' not in sys.modules; from fovlm import FoveatedVLM",
    ],
)
def test_importing_fovlm_registers_the_auto_classes(folder, imports):
    code = f"""
{imports}
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor):
    print(type(auto.from_pretrained({str(folder)!r})).__name__)
"""
    assert fresh_python(code).split() == ["FoveatedConfig", "FoveatedVLM", "FoveatedVLM", "FoveatedProcessor"]
