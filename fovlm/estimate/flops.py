"""FLOPs of one sample of any run, forward and backward, and how many samples a budget buys.

The convention, which is that of `torch.utils.flop_counter`:

- A matrix product [m, k] x [k, n] is 2 m n k; nothing else counts (norms, activations, softmax, pooling, embeddings).
- Attention is counted as executed, the full square and not its causal half: 2 products forward, 5 backward (the scores
  are computed once more). A look's attention is one query over the N keys of its frame; in the last layer, which has
  none unless positions are rotary, every head is a query over the N rows, and key and value projection are applied once
  per look (`encoder.py`; ZeRO-3 does otherwise, for about 1 % more of the encoder, which is not counted).
- A linear layer has one product forward and two backward: the gradient of its weights (not if frozen) and of its input
  (not where nothing before it learns). A frozen encoder has no backward for its patches; a frozen language model still
  passes gradients through to the looks.
- A sample is counted alone. Padding is waste.
- What is computed to keep less in memory is `recompute` and not in `total`: checkpointed layers, the logits, and what
  looks cost more over rows than over keys and values, where the layers before the last keep rows (`Encoder.form`).

Letters as in `data/packing.py` and `shapes.py`: F frames, K looks, S text tokens, P of them ahead of the frames. A
sample may be several conversations over the same frames.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fovlm.config.schema import Experiment
from fovlm.data.packing import PackSize
from fovlm.errors import UserError
from fovlm.estimate.shapes import Geometry, geometry

# Dense bf16 FLOP/s from the vendor's data sheets, by a part of the device's name; the first match counts.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


@dataclass(frozen=True)
class Cost:
    """FLOPs. `total` is the model's: forward and backward without `recompute`."""

    forward: float = 0
    backward: float = 0
    recompute: float = 0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.forward * times, self.backward * times, self.recompute * times)


def sample_cost(experiment: Experiment, shapes: Geometry, size: PackSize) -> dict[str, Cost]:
    """FLOPs of one training sample, by part: encoder, coarse_looks, fine_looks, coarse_llm, fine_llm, connector, head.

    `coarse_llm` is the language model over the prefixes, `fine_llm` over the whole sample. A static look that rides
    along in the patch walk is part of `encoder`. A preference run (`size` counts both answers) adds `reference`.
    """
    if experiment.train.objective == "dpo":
        one = PackSize(size.frames // 2, size.looks // 2, size.text // 2, size.prompt // 2)
        parts = {name: cost * 2 for name, cost in _text_cost(experiment, shapes, one).items()}
        return parts | {"reference": Cost(forward=total(parts).forward)}
    return _text_cost(experiment, shapes, size)


def total(parts: dict[str, Cost]) -> Cost:
    """All parts together."""
    return sum(parts.values(), Cost())


def mean_cost(experiment: Experiment, shapes: Geometry, sizes: Iterable[PackSize]) -> dict[str, Cost]:
    """FLOPs by part of the mean sample."""
    counts = Counter(sizes)
    mean: dict[str, Cost] = {}
    for size, count in counts.items():
        for name, cost in sample_cost(experiment, shapes, size).items():
            mean[name] = mean.get(name, Cost()) + cost * (count / counts.total())
    return mean


def samples_for(budget: float, flops_per_sample: float) -> int:
    """How many samples a budget of FLOPs buys. Raises UserError when it does not buy one."""
    samples = int(budget / flops_per_sample)
    if samples < 1:
        raise UserError(f"train.flops={budget:.3g} is less than one sample costs ({flops_per_sample:.3g}): raise it")
    return samples


def samples_of(experiment: Experiment, sizes: Iterable[PackSize]) -> int | None:
    """The number of samples of a run: as given, or from its FLOPs budget and its samples' sizes; None for a run of so
    many steps. Raises UserError as `geometry` and `samples_for` do."""
    train = experiment.train
    if train.flops is None:
        return train.samples
    return samples_for(train.flops, total(mean_cost(experiment, geometry(experiment.model), sizes)).total)


def peak_flops(name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device of this name; None for a CPU or a GPU that is not in the list."""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def largest(experiment: Experiment, name: str) -> PackSize:
    """The largest sample of a source that the settings let through: an upper bound, for when there is no data yet."""
    data, source = experiment.data, experiment.data.sources[name]
    frames = {"text": 0, "image": 1}.get(source.kind, data.max_frames)
    looks = data.image_frames if source.kind == "image" else frames
    answers = 2 if source.kind == "preference" else 1
    prompt = data.max_tokens if experiment.model.question == "before_frames" and frames else 0
    return PackSize(answers * frames, answers * looks, answers * data.max_tokens, answers * prompt)


def _text_cost(experiment: Experiment, shapes: Geometry, size: PackSize) -> dict[str, Cost]:
    model, optim = experiment.model, experiment.optim
    vit, llm = "encoder" not in optim.freeze, "llm" not in optim.freeze and not model.lora
    again = "encoder" in model.grad_checkpoint
    F, K, S, P = size.frames, size.looks, size.text, size.prompt
    n = 1 + (size.shared // F if F else 0)  # conversations, which are counted as equally long
    D, E, Q, T, rounds = shapes.encoder.D, shapes.llm.E, shapes.Q, shapes.T, shapes.rounds
    asks = model.visual != "multi_token"
    rides = asks and model.deep_query and vit
    coarse = 1 if F and asks else 0
    return {
        "encoder": _walk(shapes, F, rides, not model.deep_query or not asks, vit, again),
        "coarse_looks": _looks(shapes, F if asks and not rides else 0, model.deep_query, vit, again),
        "fine_looks": _looks(shapes, K, model.deep_query, vit, again) * rounds,
        "coarse_llm": _read(shapes, (K + P) / n if K else 0, llm, "llm" in model.grad_checkpoint) * (n * rounds),
        "fine_llm": _read(shapes, (K * T + S) / n, llm, "llm" in model.grad_checkpoint) * n,
        "connector": _linear(coarse, Q, D)
        + (_linear(F, D, E) if asks else _linear(F * T, D, E, flows=vit))
        + (_linear(K, E, Q) + _linear(K, Q, D) + _linear(K, D, E)) * rounds,
        "head": _again(_linear(S, E, shapes.llm.V, learns=llm)),
    }


def _linear(rows: float, width: int, out: int, learns: bool = True, flows: bool = True) -> Cost:
    """`learns`: its weights do; `flows`: something before it does."""
    product = 2 * rows * width * out
    return Cost(product, product * (learns + flows))


def _attention(rows: float, keys: float, width: int, gradients: bool = True) -> Cost:
    """Rows over keys; `gradients`: keys and values need them too."""
    product = 2 * rows * keys * width
    return Cost(2 * product, (5 if gradients else 3) * product)


def _again(cost: Cost) -> Cost:
    """The same, with its forward pass done again in the backward pass."""
    return Cost(cost.forward, cost.backward, cost.forward)


def _block(shapes: Geometry, rows: int, learns: bool) -> Cost:
    """What follows the keys and values in an encoder layer: query, output projection and MLP."""
    d = shapes.encoder
    return _linear(rows, d.D, d.D, learns) * 2 + _linear(rows, d.D, d.mlp, learns) * d.matrices


def _walk(shapes: Geometry, F: int, rides: bool, whole: bool, learns: bool, checkpoint: bool) -> Cost:
    """The frames' patches through all layers; through the last one only the riding look unless `whole`."""
    d = shapes.encoder
    rows = F * (d.N + rides)
    keys = _linear(rows, d.D, d.D) * 2
    layer = keys + _block(shapes, rows, True) + _attention(rows, d.N, d.D)
    last = layer if whole else _last_look(shapes, F * rides, True)
    if d.rotary and not whole:
        last += keys
    layers = layer * (d.layers - 1) + last
    walk = _linear(F * d.side**2, d.patch, d.D, flows=False) + (_again(layers) if checkpoint else layers)
    return walk if learns else Cost(walk.forward)


def _looks(shapes: Geometry, K: int, deep: bool, learns: bool, checkpoint: bool) -> Cost:
    """Queries through all layers over their caches, or one attention over the features."""
    d = shapes.encoder
    attention = _attention(K, d.N, d.D, gradients=learns)
    if not deep:
        return attention
    layer, last = _block(shapes, K, learns) + attention, _last_look(shapes, K, learns)
    looks = layer * (d.layers - 1) + last
    if learns and not checkpoint:
        return looks
    more = (last.total - layer.total) * (d.layers - 1)  # over rows in all layers
    return looks + Cost(recompute=more + (last.forward * d.layers if checkpoint else 0))


def _last_look(shapes: Geometry, K: int, learns: bool) -> Cost:
    """Queries through the last layer: attention over rows, with the projections of keys and values absorbed; over keys
    where positions are rotary."""
    d = shapes.encoder
    if d.rotary:
        return _block(shapes, K, learns) + _attention(K, d.N, d.D, gradients=learns)
    projections = _linear(K, d.D, d.D, learns) * 2
    return _block(shapes, K, learns) + projections + _attention(K * d.H, d.N, d.D, gradients=learns)


def _read(shapes: Geometry, M: float, learns: bool, checkpoint: bool) -> Cost:
    """The language model's layers over M positions."""
    m = shapes.llm
    *linears, down = (_linear(M, width, out, learns) for width, out in m.linears)
    before = sum(linears, _attention(M, M, m.asked))
    # Recomputation stops once everything is there that the backward pass needs, which is ahead of the last product.
    return ((_again(before) if checkpoint else before) + down) * m.layers
