"""What it saves to encode a clip once for all of its questions: python -m benchmarks.questions [--frames 16]

For 1 and for 7 or 8 questions a clip (7.5 in the mean, as in LLaVA-Video-178K): FLOPs of a question, and seconds of the
processor that its forward and backward pass takes in one pack, SmolLM2-135M and DINOv2-small with random weights, one
thread, fp32. `--tiny` measures models of some 50,000 parameters instead.
"""

import argparse
import time

import torch

from fovlm.config.schema import Experiment, load
from fovlm.data.packing import EMPTY, Sample, collate
from fovlm.estimate.flops import mean_cost, total
from fovlm.estimate.shapes import geometry
from fovlm.model.build import build

TEXT, PROMPT = 60, 40  # tokens of a question with its answer, and of those ahead of the frames
QUESTIONS = (1, 7, 8)
LLM = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
LLM |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
ENCODER = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224, "patch_size": 14}
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}


def group(frames: int, size: int, questions: int) -> list[Sample]:
    """Conversations of TEXT tokens about the same frames."""
    shown = torch.randint(0, 256, (frames, 3, size, size), dtype=torch.uint8)
    tokens = [torch.randint(0, 64, (TEXT,)) for _ in range(questions)]
    return [
        Sample(f"{i}", "", shown, frames, text, torch.ones(TEXT), PROMPT, shares=i > 0) for i, text in enumerate(tokens)
    ]


def experiment(tiny: bool) -> Experiment:
    """LR1 with the question ahead of the frames, and shapes in place of folders."""
    base = load("LR1", ["model.question=before_frames"])
    llm, encoder = (LLM | SMALL, ENCODER | SMALL) if tiny else (LLM, ENCODER)
    model = base.model.model_copy(update={"llm": llm, "encoder": encoder, "tokenizer": "none"})
    return base.model_copy(update={"model": model})


def main() -> None:
    """Print a table: FLOPs and processor time of a question, by questions a clip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    e = experiment(given.tiny)
    shapes, model = geometry(e.model), build(e.model)
    found: dict[float, tuple[float, float]] = {}
    model(collate(group(1, e.model.frame_size, 1), e.model.frame_size)).sum().backward()  # warms up
    for n in QUESTIONS:
        samples = group(given.frames, e.model.frame_size, n)
        flops = total(mean_cost(e, shapes, [sum((one.size for one in samples), EMPTY)])).total / n
        batch = collate(samples, e.model.frame_size)
        start = time.process_time()
        (model(batch) * batch.weight).sum().backward()
        found[n] = flops, (time.process_time() - start) / n
        print(f"{n} questions: measured", flush=True)
    found[7.5] = tuple((7 * a + 8 * b) / 15 for a, b in zip(found[7], found[8], strict=True))  # by questions
    print("| questions a clip | GFLOPs a question | processor seconds a question |\n|---|---|---|")
    for n, (flops, seconds) in sorted(found.items()):
        print(f"| {n:g} | {flops / 1e9:.1f} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
