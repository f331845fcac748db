"""The plug-in under lmms-eval's own command line, in an environment of its own: FOVLM_LMMS_PYTHON names its Python.

The expected answers are those of our own `generate`, asked in the words that lmms-eval's tasks are known to use.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fovlm.checkpoint.reference import collate_tight
from fovlm.data.chat import ChatTokenizer
from fovlm.data.packing import Sample
from fovlm.eval.vlmevalkit import Fovlm
from fovlm.media import encode
from fovlm.media.decode import decode_pictures
from fovlm.model.modeling import FoveatedVLM
from fovlm.model.processing import FoveatedProcessor, open_model
from helpers.models import tiny_model
from helpers.tiny import picture, tokenizer

PYTHON = os.environ.get("FOVLM_LMMS_PYTHON", "")
OPTIONS = ["red", "it is blue", "red picture here"]
ASK = "what is this ?"
POPE = "is it red here ?"
POPE_ASKED = POPE + "\nAnswer the question using a single word or phrase."
MVBENCH = "what is shown here ?"
MVBENCH_ASKED = f"Question:{MVBENCH}\nOption:\n(A) red\n(B) blue\nOnly give the best option.\n"
GREYS = [10, 200, 60, 250, 110, 30, 220]
QUIZ = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output}
doc_to_visual: !function helpers.visual
doc_to_text: "what is this ?"
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
SHIPPED = """
include: {include}
task: {task}
dataset_path: {kind}
dataset_kwargs: {{data_files: {{{split}: {data}}}}}
"""  # lmms-eval's own task, words and scoring, on rows of ours
HELPERS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


def folder(path: Path, model: FoveatedVLM | None = None) -> Path:
    """A tiny model as `fovlm convert` leaves one."""
    model = model or tiny_model(question="before_frames").eval()
    model.save_pretrained(path)
    FoveatedProcessor.from_parts(words(), model.config).save_pretrained(path)
    words().save_pretrained(path)
    return path


def words() -> Any:
    return tokenizer(["A", "B", "(", ")"])


def taught() -> FoveatedVLM:
    """A tiny model that tells bright from dark, in the words of three tasks."""
    model, chat, samples = (
        tiny_model(question="before_frames"),
        ChatTokenizer(words(), "before_frames", "answer", 999),
        [],
    )
    for grey in (0, 40, 80, 120, 150, 190, 230, 255):
        said = {POPE_ASKED: "yes", ASK: "yes it is blue"} if grey > 130 else {POPE_ASKED: "no", ASK: "no it is red"}
        said[MVBENCH_ASKED] = "A" if grey > 130 else "B"
        for user, answer in said.items():
            text = chat.text({"user": user, "assistant": answer}, None, True)
            frames = torch.full((2, 3, 28, 28), grey, dtype=torch.uint8)[: 2 if user == MVBENCH_ASKED else 1]
            samples.append(Sample("", "", frames, len(frames), text.tokens, text.weight, text.prompt))
    batch, optimizer = collate_tight(samples, 1), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        (model(batch) * batch.weight).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def best_option(model: FoveatedVLM, image: bytes) -> int:
    """The option of least loss, from a pass over the whole conversation."""
    frames, chat, losses = (
        decode_pictures([("jpg", image)], 28),
        ChatTokenizer(words(), "before_frames", "answer", 999),
        [],
    )
    for option in OPTIONS:
        text = chat.text({"user": ASK, "assistant": option}, None, True)
        batch = collate_tight([Sample("", "", frames, 1, text.tokens, text.weight, text.prompt)], 1)
        with torch.no_grad():
            losses.append(float((model(batch) * batch.weight).sum()))
    return losses.index(min(losses))


def test_the_adapter_for_vlmevalkit_answers(tmp_path):
    (tmp_path / "p.jpg").write_bytes(picture(90, 28))
    adapter = Fovlm(str(folder(tmp_path / "model")), max_new_tokens=3)
    message = [{"type": "image", "value": str(tmp_path / "p.jpg")}, {"type": "text", "value": "what is this ?"}]
    assert isinstance(adapter.generate_inner(message), str)


def lmms_eval(path: Path, out: str, *more: str, launch: tuple[str, ...] = ()) -> tuple[dict, dict, str]:
    """Run its command -> results by task, (answers by task, in the order of the rows), what it printed."""
    done = subprocess.run(
        [
            *(PYTHON, *launch, "-m", "lmms_eval", "--model", "fovlm", "--include_path", str(path / "tasks")),
            *("--tasks", "fovlm_quiz,fovlm_pope,fovlm_mvbench,fovlm_until,fovlm_short", "--log_samples"),
            *("--model_args", f"pretrained={path / 'model'},device=cpu", "--output_path", str(path / out), *more),
        ],
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(path), "HF_DATASETS_CACHE": str(path / "hf"), "OMP_NUM_THREADS": "1"}
        | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [*(path / out).rglob("*results.json")], done.stderr[-3000:]
    (file,) = (path / out).rglob("*results.json")
    answers = {}
    for samples in (path / out).rglob("*samples_*.jsonl"):
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        answers[samples.stem.split("samples_")[1]] = [line["filtered_resps"] for line in lines]
    return json.loads(file.read_text())["results"], answers, done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="FOVLM_LMMS_PYTHON names no environment with lmms-eval 0.7")
def test_lmms_evals_own_command_scores_a_folder(tmp_path):
    model, processor = open_model(folder(tmp_path / "model", taught()))
    find = "import importlib.util as u; print(u.find_spec('lmms_eval').submodule_search_locations[0])"
    shipped = Path(subprocess.check_output([PYTHON, "-c", find], text=True).strip()) / "tasks"
    tasks, videos = tmp_path / "tasks", tmp_path / "mvbench_video" / "perception" / "videos"
    tasks.mkdir()
    videos.mkdir(parents=True)

    def says(kind: str, shown: Path, asked: str, most: int) -> str:
        content = [{"type": kind, kind: str(shown)}, {"type": "text", "text": asked}]
        inputs = processor(messages=[{"role": "user", "content": content}])
        return processor.batch_decode(model.generate(**inputs, max_new_tokens=most, do_sample=False))[0].strip()

    quiz, pope, mvbench, said = [], [], [], {"pope": [], "mvbench": [], "until": [], "short": []}
    for n, grey in enumerate(GREYS):
        image, film = tmp_path / f"{n}.jpg", videos / f"{n}.mp4"
        image.write_bytes(picture(grey, 28))
        film.write_bytes(encode.encode_video([np.full((28, 28, 3), grey, np.uint8)] * 2, 1))
        said["pope"].append(says("image", image, POPE_ASKED, 128))
        said["mvbench"].append(says("video", film, MVBENCH_ASKED, 16))
        said["until"].append(says("image", image, ASK, 9).split(" it")[0].strip())
        said["short"].append(says("image", image, ASK, 3))
        best, wrong = best_option(model, picture(grey, 28)), n in (1, 4)
        quiz.append({"image": str(image), "options": OPTIONS, "answer": (best + wrong) % 3})
        quiz[-1] |= {"until": "elsewhere" if wrong else said["until"][n], "short": said["short"][0]}
        truth = {"yes": "no", "no": "yes"}[said["pope"][n]] if wrong else said["pope"][n]
        pope.append({"question_id": str(n), "question": POPE, "answer": truth, "image": image.read_bytes()})
        right = {"A": "red", "B": "blue"}[said["mvbench"][n]]
        pair = ["red", "blue"]
        answer = pair[1 - pair.index(right)] if n == 3 else right
        mvbench.append({"video": film.name, "question": MVBENCH, "candidates": pair, "answer": answer})
    assert {*said["pope"]} == {*said["until"]} == {"yes", "no"}
    assert {*said["mvbench"]} == {"A", "B"}

    (tmp_path / "quiz.json").write_text("\n".join(map(json.dumps, quiz)))
    (tmp_path / "mvbench.json").write_text("\n".join(map(json.dumps, mvbench)))
    write_parquet(tmp_path / "pope.parquet", pope)
    (tasks / "helpers.py").write_text(HELPERS)
    for name, output, target, more, metric in (
        ("quiz", "multiple_choice", "answer", "doc_to_choice: options", "acc"),
        ("until", "generate_until", "until", 'generation_kwargs: {max_new_tokens: 9, until: [" it"]}', "exact_match"),
        ("short", "generate_until", "short", "generation_kwargs: {max_new_tokens: 3, temperature: 0}", "exact_match"),
    ):
        settings = {"data": tmp_path / "quiz.json", "output": output, "target": target, "more": more, "metric": metric}
        (tasks / f"{name}.yaml").write_text(QUIZ.format(task=f"fovlm_{name}", **settings))
    for name, include, kind, split, file in (
        ("pope", "pope/pope.yaml", "parquet", "test", "pope.parquet"),
        ("mvbench", "mvbench/mvbench_action_count.yaml", "json", "train", "mvbench.json"),
    ):
        settings = {"include": shipped / include, "kind": kind, "split": split, "data": tmp_path / file}
        (tasks / f"{name}.yaml").write_text(SHIPPED.format(task=f"fovlm_{name}", **settings))

    results, answers, _ = lmms_eval(tmp_path, "out")
    assert {name: answers[f"fovlm_{name}"] for name in said} == said
    assert results["fovlm_quiz"]["acc,none"] == pytest.approx(5 / 7)
    assert results["fovlm_until"]["exact_match,none"] == pytest.approx(5 / 7)
    assert results["fovlm_short"]["exact_match,none"] == pytest.approx(said["short"].count(said["short"][0]) / 7)
    assert results["fovlm_mvbench"]["mvbench_accuracy,none"] == pytest.approx(100 * 6 / 7)
    hits = sum(row["answer"] == answer == "yes" for row, answer in zip(pope, said["pope"], strict=True))
    assert results["fovlm_pope"]["pope_accuracy,none"] == pytest.approx(5 / 7)
    assert results["fovlm_pope"]["pope_precision,none"] == pytest.approx(hits / said["pope"].count("yes"))
    assert results["fovlm_pope"]["pope_recall,none"] == pytest.approx(hits / [r["answer"] for r in pope].count("yes"))

    ranks = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    cache = ("--use_cache", str(tmp_path / "cache"))
    for out, launch in (("ranks", (*ranks, "--mixed_precision", "no", "--dynamo_backend", "no")), ("again", ())):
        same, there, printed = lmms_eval(tmp_path, out, *cache, launch=launch)
        assert there == answers
        for task, found in results.items():
            figures = {key: value for key, value in found.items() if "stderr" not in key}
            assert {key: same[task][key] for key in figures} == figures
        assert ("all 28 requests served from cache" in printed) == (out == "again")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with a picture, as `datasets` stores them."""
    kinds = {name: {"dtype": "string", "_type": "Value"} for name in ("question_id", "question", "answer")}
    features = {"info": {"features": kinds | {"image": {"_type": "Image"}}}}
    table = pa.Table.from_pylist([row | {"image": {"bytes": row["image"], "path": ""}} for row in rows])
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
