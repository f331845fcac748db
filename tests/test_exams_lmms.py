"""The plug-in under lmms-eval's own command line, in an environment of its own: FOVLM_LMMS_PYTHON names its Python."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from models import tiny_model
from tiny import picture, tokenizer

from fovlm.batch import Sample
from fovlm.exams.vlmevalkit import Fovlm
from fovlm.probe import snug
from fovlm.processor import FoveatedProcessor
from fovlm.text import Chat

PYTHON = os.environ.get("FOVLM_LMMS_PYTHON", "")
OPTIONS = ["red", "it is blue", "red picture here"]
TASK = """
task: fovlm_quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output}
doc_to_visual: !function helpers.visual
doc_to_text: "what is this ?"
doc_to_target: {target}
{more}
"""
CHOICE = "doc_to_choice: options\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
HELPERS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


def folder(path: Path) -> Path:
    """A tiny model as `fovlm convert` leaves one."""
    model = tiny_model(prompt="before").eval()
    model.save_pretrained(path)
    FoveatedProcessor.from_parts(tokenizer(), model.config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def test_the_adapter_for_vlmevalkit_answers(tmp_path):
    (tmp_path / "p.jpg").write_bytes(picture(90, 28))
    adapter = Fovlm(str(folder(tmp_path / "model")), max_new_tokens=3)
    message = [{"type": "image", "value": str(tmp_path / "p.jpg")}, {"type": "text", "value": "what is this ?"}]
    assert isinstance(adapter.generate_inner(message), str)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="FOVLM_LMMS_PYTHON names no environment with lmms-eval 0.7")
def test_lmms_evals_own_command_scores_a_folder(tmp_path):
    from fovlm.media import decode_pictures

    model_folder, tasks, rows, right = folder(tmp_path / "model"), tmp_path / "tasks", [], 0
    tasks.mkdir()
    model = tiny_model(prompt="before").eval()
    chat = Chat(tokenizer(), "before", "answer", 999)
    for n in range(4):
        (tmp_path / f"{n}.jpg").write_bytes(picture(60 * n, 28))
        frames, losses = decode_pictures([("jpg", picture(60 * n, 28))], 28), []
        for option in OPTIONS:
            text = chat.text({"user": "what is this ?", "assistant": option}, None, True)
            batch = snug([Sample("", "", frames, 1, text.tokens, text.weight, text.prompt)], 1)
            with torch.no_grad():
                losses.append(float((model(batch, visual="coarse") * batch.weight).sum()))
        best = losses.index(min(losses))
        answer = best if n % 2 else (best + 1) % 3  # so that every other one is right
        right += n % 2
        rows.append({"image": str(tmp_path / f"{n}.jpg"), "options": OPTIONS, "answer": answer})
    (tmp_path / "quiz.json").write_text("\n".join(map(json.dumps, rows)))
    (tasks / "helpers.py").write_text(HELPERS)
    (tasks / "quiz.yaml").write_text(
        TASK.format(data=tmp_path / "quiz.json", output="multiple_choice", target="answer", more=CHOICE)
    )
    done = subprocess.run(
        [
            *(PYTHON, "-m", "lmms_eval", "--model", "fovlm", "--tasks", "fovlm_quiz", "--include_path", str(tasks)),
            *("--model_args", f"pretrained={model_folder},mode=coarse_only", "--output_path", str(tmp_path / "out")),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("*results.json")
    assert json.loads(file.read_text())["results"]["fovlm_quiz"]["acc,none"] == right / 4
