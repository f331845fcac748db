"""The door to onnxruntime: graphs with smaller weights, and the loop over frames that runs graphs as the page does."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from fovlm.errors import needs

PACKAGES = ("onnx>=1.19", "onnxscript>=0.7", "onnxruntime>=1.23")

with needs("exporting", *PACKAGES):
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

# The quantizers log a line for every matrix, by the root logger.
logging.getLogger().addFilter(lambda record: record.levelno > logging.WARNING)


def shrink(file: Path, weights: str) -> None:
    """Replace a graph by one with int8 or int4 weights of its matrices and embeddings.

    int8: one scale for each column of a matrix, and activations of 8 bits too. int4: one scale for each 32 weights of a
    matrix, and embeddings in int8.
    """
    smaller = file.with_suffix(".smaller")
    operators = ["MatMul", "Gather"]
    if weights == "int4":
        quantizer = MatMulNBitsQuantizer(str(file), bits=4, block_size=32, is_symmetric=True)
        quantizer.model.replace_gemm_with_matmul()
        quantizer.process()
        quantizer.model.save_model_to_file(str(file))
        operators = ["Gather"]
    quantize_dynamic(
        file, smaller, op_types_to_quantize=operators, per_channel=True, weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    smaller.replace(file)
    file.with_name(f"{file.name}.data").unlink(missing_ok=True)  # the weights of a large graph


class GraphStream:
    """One context over the three graphs of a folder. Letters as in `graphs.py`."""

    def __init__(self, folder: Path, threads: int = 0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.encoder, self.look, self.llm = (
            onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("encoder", "look", "llm")
        )
        self.nothing = np.zeros((0, self.llm.get_inputs()[0].shape[1]), np.float32)
        self.no_logits = np.zeros((0, self.llm.get_outputs()[0].shape[1]), np.float32)
        self.forget()

    def forget(self) -> None:
        """An empty context."""
        self.memory = np.zeros((0, self.llm.get_inputs()[3].shape[1]), np.float32)
        self.hidden: np.ndarray | None = None

    def see(self, frame: np.ndarray, kind: int | None = None, scored: Any = ()) -> tuple[np.ndarray, np.ndarray]:
        """Read a frame u8 [3, s, s] as one token -> the weights of its look f32 [layers, H, N], and logits: with
        `scored` [0] those at the frame. By default the query comes from the state so far, at the start from q_first."""
        kind = (0 if self.hidden is None else 2) if kind is None else kind
        (cache,) = self.encoder.run(None, {"frame": frame[None]})
        hidden = np.zeros((1, self.nothing.shape[1]), np.float32) if self.hidden is None else self.hidden
        token, weights = self.look.run(None, {"hidden": hidden, "kind": np.array([kind]), "cache": cache})
        return weights, self._read(token, [], scored)

    def words(self, ids: Any, scored: Any = ()) -> np.ndarray:
        """Read token ids, at least one -> the logits [k, V] at the places `scored` of them."""
        return self._read(self.nothing, ids, scored)

    def answer(self, ids: Any, ends: list[int], most: int) -> list[int]:
        """The most likely answer behind the token ids `ids`, up to a token of `ends` and without it."""
        logits = self.words(ids, [len(ids) - 1])
        new: list[int] = []
        while (best := int(logits[0].argmax())) not in ends and len(new) < most:
            new.append(best)
            logits = self.words([best], [0])
        return new

    def _read(self, visual: np.ndarray, words: Any, scored: Any) -> np.ndarray:
        ids, places = (np.asarray(x, np.int64) for x in (words, scored))
        given = {"visual": visual, "words": ids, "scored": places, "memory": self.memory}
        logits, self.hidden, new = self.llm.run(None, given)
        self.memory = np.concatenate([self.memory, new])
        return logits
