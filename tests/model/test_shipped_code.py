"""A saved model loads where transformers is and fovlm is not: same answers, same losses."""

import json
import os

import pytest
import torch

from fovlm import open_model
from helpers.interface import frames, model_of, processor_of, says
from helpers.launch import fresh_python

CODE = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

assert not [folder for folder in sys.path if __import__("os").path.isdir(folder + "/fovlm")]
folder, shown = sys.argv[1], torch.load(sys.argv[1] + "/shown.pt")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
parts = [{"type": "video", "video": shown}, {"type": "text", "text": "what is this ?"}]
question = [{"role": "user", "content": parts}]
answer = [{"role": "assistant", "content": "this is blue"}]
tokens = model.generate(**processor(messages=question), max_new_tokens=6)[0].tolist()
with torch.no_grad():
    loss = model(**processor(messages=question + answer)).loss.item()
ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
said = ask(text=question, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
model.save_pretrained(sys.argv[2])
processor.save_pretrained(sys.argv[2])
assert not [name for name in sys.modules if name.split(".")[0] in ("fovlm", "kernels")]
print(json.dumps([tokens, loss, said]))
"""


@pytest.mark.parametrize("question", ["after_frames", "before_frames"])
def test_a_saved_model_loads_without_fovlm(tmp_path, question):
    model, shown = model_of(question=question), frames(3)
    model.save_pretrained(tmp_path / "model")
    processor = processor_of(model)
    processor.save_pretrained(tmp_path / "model")
    torch.save(shown, tmp_path / "model" / "shown.pt")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["HF_MODULES_CACHE"] = str(tmp_path / "cache")

    def load(folder, again) -> list:
        printed = fresh_python(CODE, str(folder), str(again), env=env, cwd=tmp_path)
        return json.loads(printed.splitlines()[-1])

    tokens, loss, said = load(tmp_path / "model", tmp_path / "again")
    asked = says("what is this ?", video=shown)
    answer = model.generate(**processor(messages=asked), max_new_tokens=6)
    assert tokens == answer[0].tolist()
    assert said == processor.batch_decode(answer)[0]
    with torch.no_grad():
        trained = [*asked, {"role": "assistant", "content": "this is blue"}]
        assert loss == pytest.approx(model(**processor(messages=trained)).loss.item(), abs=1e-5)
    # What is saved there brings its code along again, in one place.
    code = {file.name for file in (tmp_path / "model" / "code").iterdir()}
    assert {file.name for file in (tmp_path / "again" / "code").iterdir()} == code >= {"processing.py", "modeling.py"}
    assert not list((tmp_path / "again").glob("*.py"))
    again, _ = open_model(tmp_path / "again")
    assert torch.equal(again.connector.q_static, model.connector.q_static)
