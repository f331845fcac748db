"""What a step of the study's arms costs with the encoder in it: python -m benchmarks.scene_time [RUN ...] [--rounds N]

Forward and backward pass of the model itself over one pack of 48 questions about 12 scenes with the most pictures,
which share their encodings as in training, in turns: median process time, one thread, fp32. Writes the table to
benchmarks/results/scene_time.csv, from which time.png of the study is drawn. FOVLM_DATA has the scenes, FOVLM_MODELS
the encoder.
"""

import argparse
import csv
import statistics
import time

import torch

from benchmarks.gauges import versions
from benchmarks.scene_looks import read_questions
from benchmarks.scene_report import TIMES
from fovlm.config.schema import load
from fovlm.data.packing import EMPTY, Batch, Sample, collate
from fovlm.data.tokenizers import open_tokenizer
from fovlm.estimate.flops import mean_cost, total
from fovlm.estimate.shapes import geometry
from fovlm.media.decode import decode_pictures
from fovlm.model.build import build
from fovlm.model.modeling import FoveatedVLM

RUNS = ["law", "law_static", "law_pooled4", "law_pooled16", "law_crop"]
QUESTIONS = 48


def step_of(name: str) -> tuple[FoveatedVLM, Batch, float]:
    """A run's model, a pack of its questions, and FLOPs of a question."""
    e = load(name, [])
    source = e.data.val[-1]
    questions, jpegs = read_questions(source, e.data.sources[source].shards, e, open_tokenizer(e))
    samples: list[Sample] = []
    for q in sorted(questions[:QUESTIONS], key=lambda q: q.picture):
        shares = bool(samples) and samples[-1].key == f"{q.picture}"
        stored = [("jpg", jpegs[n]) for n in range(q.picture, q.picture + q.frames)]
        frames = samples[-1].frames if shares else decode_pictures(stored, e.model.frame_size)
        samples.append(Sample(f"{q.picture}", "", frames, q.frames, q.tokens, q.weight, q.prompt, shares=shares))
    model = build(e.model)
    model.freeze(e.optim.freeze)
    used = sum((sample.size for sample in samples), EMPTY)
    flops = total(mean_cost(e, geometry(e.model), [used])).total / len(samples)
    return model.train(), collate(samples, e.model.frame_size, model.config.tokens_per_look), flops


def main() -> None:
    """Time all runs, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=RUNS)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = {name: step_of(name) for name in given.runs}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(given.rounds + 1):
        for name, (model, batch, _) in steps.items():
            begun = time.process_time()
            model(batch, weight=batch.weight).backward()
            if n:  # the first allocates
                seconds[name].append(time.process_time() - begun)
    rows = [
        {"run": name, "seconds": round(statistics.median(taken), 3), "gflops": round(steps[name][2] / 1e9, 2)}
        | {"torch": torch.__version__, **versions()}
        for name, taken in seconds.items()
    ]
    with open(TIMES, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(TIMES.read_text())


if __name__ == "__main__":
    main()
