"""Bytes that one rank needs, estimated from shapes alone; `benchmarks/memory.py` compares it with measurements.

What stays for the whole step follows DeepSpeed 0.19.8 (n trainable and z frozen parameters, W ranks, w bytes a weight):

- ZeRO-1 and -2 keep all weights, w (n + z), and a share of the optimizer: fp32 master weights (a copy even in fp32
  runs) and two moments, 12 n / W. ZeRO-3 shares the weights too, and gathers those it is about to use.
- ZeRO-1 keeps an fp32 gradient of all weights, 4 n, ZeRO-2 of its share, 4 n / W, beside that of a micro-step, w n
  (`fovlm/train/gradients.py`).
- Offloading moves master weights and moments to the host, with an fp32 gradient and a staging copy beside them. In bf16
  the accumulated gradient of the share, 4 n / W, stays on the GPU (`_build_compact_grad_partition_buffer`).
- Offloading and ZeRO-3 reduce gradients in buckets, two of them with overlap_comm. A weight larger than a bucket passes
  on its own: its gradient, a clone and an fp32 copy.
- The norm of gradients copies none under ZeRO-1 and -2, where it is ours. ZeRO-3 copies one gradient at a time to fp64,
  8 bytes of a rank's share of the largest; nothing of the activations lives then.

Activations are what autograd stores for the backward pass, at its peak: parts run forward in the order encoder, coarse
pass, looks, fine pass, head, and are freed in reverse, while the running part needs working memory and the gradients of
the cached keys and values grow. The gradient of a weight that is used twice (by both passes; by patches and looks)
waits for its second half, and reaches DeepSpeed only then. Not included: the CUDA context, the allocator's slack, NCCL:
1-2 GB.
"""

from dataclasses import dataclass
from typing import Any

from fovlm.config.schema import Experiment
from fovlm.estimate.shapes import EncoderShape, Geometry, LlmShape, parameters
from fovlm.model.modes import NLL_CHUNK

FP32 = 4


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank. `device` is the sum of the first five; `host` is what offloading puts into main memory."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    host: int

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buckets + self.activations


def estimate(
    experiment: Experiment, shapes: Geometry, ds_config: dict[str, Any], world: int, pack: tuple[int, int] | None = None
) -> Estimate:
    """The bytes of one of `world` ranks; `ds_config` is the resolved DeepSpeed dict (`deepspeed_config.merge`).

    `pack` is (frames, text tokens); by default the pack within the budget that takes most.
    """
    zero = ds_config["zero_optimization"]
    stage, bf16 = zero["stage"], ds_config["bf16"]["enabled"]
    offload = _on_host(zero, "offload_optimizer")
    w = 2 if bf16 else FP32
    counts = parameters(experiment, shapes).values()
    n, z = sum(c.trainable for c in counts), sum(c.frozen for c in counts)
    share = -(-n // world)
    big = max(
        shapes.llm.V * shapes.llm.E if "llm" not in experiment.optim.freeze and not experiment.model.lora else 0,
        shapes.encoder.D * shapes.encoder.mlp,
    )

    weights, host = w * (n + z), 0
    if stage == 3:
        weights = -(-weights // world)
        if _on_host(zero, "offload_param"):
            weights, host = 0, weights
        if world > 1 or not weights:
            live = zero.get("stage3_max_live_parameters", 10**9) + zero.get("stage3_prefetch_bucket_size", 5 * 10**7)
            weights += w * min(n + z, live)
    if experiment.train.objective == "dpo":
        weights += w * (n + z)  # the frozen reference

    accumulates = ds_config["gradient_accumulation_steps"] > 1
    ours = stage < 3 and not offload
    if ours:
        gradients = w * n + FP32 * (n if stage == 1 else share)
    else:
        gradients = 0 if offload and (stage == 3 or not bf16) else FP32 * share

    optimizer = 3 * FP32 * share
    if offload:
        # Master weights, moments, their gradient, the staging copy, and in fp32 the sum of micro steps.
        host += optimizer + FP32 * share + w * (share + big) + (FP32 * share if accumulates and not bf16 else 0)
        optimizer = 0

    bucket = zero.get("reduce_bucket_size", 5 * 10**8)
    buckets = w * bucket * (2 if zero.get("overlap_comm") else 1)
    buckets += min(big, n) * ((2 * w if big > bucket else w) + FP32 + (w if offload else 0))
    moving = sum(activations(experiment, shapes, w, pack, stage).values())
    if stage == 3:
        moving = max(moving, 2 * FP32 * -(-min(big, n) // world))
    return Estimate(weights, gradients, optimizer, 0 if ours else buckets, moving, host)


def _on_host(zero: dict[str, Any], key: str) -> bool:
    return key in zero and zero[key]["device"] != "none"


def activations(
    experiment: Experiment, shapes: Geometry, w: int, pack: tuple[int, int] | None = None, stage: int = 2
) -> dict[str, int]:
    """Bytes at the peak of a micro step, by the part that stores them; `working` is the running part's own.

    `w` is the bytes of an activation: 2 in bf16, 4 in fp32. `pack` as for `estimate`, `stage` is that of ZeRO.
    """
    data = experiment.data
    # Bytes grow with frames and with text, and a budget buys one or the other, so one of its two ends takes most.
    ends = [(data.pack_cost // data.frame_cost, 1), (1, data.pack_cost)]
    worst = [_activations(experiment, shapes, w, *one, stage) for one in ([pack] if pack else ends)]
    return max(worst, key=lambda parts: sum(parts.values()))


def _activations(experiment: Experiment, shapes: Geometry, w: int, F: int, S: int, stage: int) -> dict[str, int]:
    model, data = experiment.model, experiment.data
    vit, llm = "encoder" not in experiment.optim.freeze, "llm" not in experiment.optim.freeze
    K, P = F * data.image_frames, S if model.question == "before_frames" else 0
    L = K * shapes.T + S
    d, asks, deep = shapes.encoder, model.visual != "multi_token", model.deep_query
    separate = asks and not (deep and vit)  # the static look, when it does not ride along

    rows = F * (d.N + (asks and deep and vit))
    again = "encoder" in model.grad_checkpoint
    absorbs = deep and not d.rotary and stage < 3  # rows are cached, in the last layer or in all (`Encoder.form`)
    everywhere = absorbs and (again or not vit)
    tensors = (d.layers if everywhere else 2 * d.layers - absorbs) if deep else 1
    cached = w * rows * d.D * tensors if asks else 0
    # The frames in bytes; rows of a checkpointed walk are the layers' inputs, which it stores in any case.
    encoder = F * d.side**2 * d.patch + _walk(d, rows, 0 if everywhere and vit else cached, w, vit, again)
    looks = 2 * w * d.D
    if deep:  # a checkpointed look stores its inputs; over rows, every head's query and result are as wide as a row
        looks = (w * d.D if again else _block_bytes(d, w) + everywhere * 2 * w * d.H * d.D) * d.layers
    per_look = looks * K
    coarse = looks * F * separate
    prefix, whole = (_read(shapes.llm, M, w, llm, "llm" in model.grad_checkpoint) for M in (K + P, L))
    stored = {"encoder": encoder, "coarse_looks": coarse}
    for turn in range(shapes.rounds):
        stored |= {f"coarse_llm_{turn}": prefix, f"fine_looks_{turn}": per_look}
    stored |= {"fine_llm": whole}

    chunk = min(S, NLL_CHUNK)
    embedding = w * shapes.llm.V * shapes.llm.E * llm  # its gradient waits for its last use, and grows by copies
    # The norm of a layer's rows, for its looks, and its gradient.
    relook = 2 * w * rows * d.D if everywhere and again else 0
    working = {
        "encoder": _layer_work(d, rows, w, again) if vit else 0,
        "coarse_looks": relook,
        "fine_llm": _read_work(shapes.llm, L, w, llm, "llm" in model.grad_checkpoint) + embedding,
        # fp32 logits and their log-softmax, beside the logits of another type
        "head": (2 * FP32 + (w if w < FP32 else 0)) * chunk * shapes.llm.V + embedding * (2 if chunk < S else 1),
    }
    for turn in range(shapes.rounds):
        prefix_work = _read_work(shapes.llm, K + P, w, llm, "llm" in model.grad_checkpoint)
        working |= {f"coarse_llm_{turn}": prefix_work + embedding, f"fine_looks_{turn}": embedding + relook}

    order = [*stored, "head"]
    # Gradients of the cache exist from the last look's backward pass on.
    grown = cached if vit and (shapes.rounds or separate) else 0
    waiting_llm = w * (shapes.llm.parameters - shapes.llm.V * shapes.llm.E) if llm and shapes.rounds else 0
    waiting_vit = w * d.parameters if vit and deep and shapes.rounds else 0
    worst: dict[str, int] = {}
    for at, part in enumerate(order):
        now = {name: stored[name] for name in order[: at + 1] if name in stored} | {"working": working[part]}
        if part not in ("head", "fine_llm"):
            now["working"] += grown
            now["waiting gradients"] = waiting_vit + (waiting_llm if part != "encoder" else 0)
        if sum(now.values()) > sum(worst.values()):
            worst = now
    return worst


def _block_bytes(d: EncoderShape, w: int) -> int:
    """Bytes a row stores in an encoder layer, keys and values excluded: both norms' inputs and outputs, query,
    attention's output, the layer scales' inputs, and the MLP's inside."""
    return w * (8 * d.D + (2 if d.matrices == 2 else 4) * d.mlp) + 4 * FP32 + FP32 * d.H


def _walk(d: EncoderShape, rows: int, cached: int, w: int, learns: bool, checkpoint: bool) -> int:
    """The patch walk. A frozen one stores the cache alone; a checkpointed one each layer's input and the cache."""
    if not learns:
        return cached
    pixels = w * (rows // d.N) * d.N * d.patch
    if checkpoint:
        return cached + pixels + w * rows * d.D * d.layers
    return pixels + rows * (_block_bytes(d, w) + 2 * w * d.D) * d.layers


def _layer_work(d: EncoderShape, rows: int, w: int, checkpoint: bool) -> int:
    """Working memory of one encoder layer: gradients inside the MLP, and what a checkpointed layer recomputes."""
    again = _block_bytes(d, w) + 2 * w * d.D if checkpoint else 0
    return rows * (again + w * (2 * d.D + d.mlp))


def _layer_bytes(m: LlmShape, M: int, w: int, learns: bool) -> int:
    """Bytes a layer of the language model stores for M positions.

    Norms compute in fp32. Keys and values are repeated for every head. A frozen layer needs no inputs of its products.
    """
    norms = 2 * m.E * (FP32 + (2 * w if learns else 0))
    attention = 4 * w * m.asked + FP32 * m.heads
    mlp = (4 if learns else 3) * w * m.inner
    return M * (norms + attention + mlp)


def _read(m: LlmShape, M: int, w: int, learns: bool, checkpoint: bool) -> int:
    """The language model over M positions: all layers, or the inputs of checkpointed ones; final norm."""
    inside = w * M * m.E if checkpoint else _layer_bytes(m, M, w, learns)
    return inside * m.layers + M * m.E * (FP32 + 2 * w)


def _read_work(m: LlmShape, M: int, w: int, learns: bool, checkpoint: bool) -> int:
    """Working memory of one layer: gradients inside the MLP and of the residual."""
    again = _layer_bytes(m, M, w, learns) if checkpoint else 0
    return again + w * M * (3 * m.inner + 3 * m.E)
