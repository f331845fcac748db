"""An adapter for VLMEvalKit, which has no plug-ins: add the model to its list by hand (docs/evaluation.md).

The interface is that of `vlmeval.vlm.base.BaseModel`: a class with `INTERLEAVE` and `generate_inner(message, dataset)`,
where a message is a list of parts {"type": "text" | "image" | "video", "value": a text or a path}.
"""

from typing import Any, ClassVar

import torch

from fovlm.model.processing import open_model


class Fovlm:
    """A folder that `fovlm convert` made; combine it with VLMEvalKit's BaseModel as docs/evaluation.md shows."""

    INSTALL_REQ: ClassVar[bool] = False
    INTERLEAVE: ClassVar[bool] = False
    VIDEO_LLM: ClassVar[bool] = True

    def __init__(
        self, model_path: str, mode: str | None = None, max_new_tokens: int = 128, max_frames: int = 64, **_: Any
    ):
        super().__init__()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.processor = open_model(model_path, device=device)
        self.processor.max_frames = max_frames
        self.mode, self.max_new_tokens = mode, max_new_tokens

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The greedy answer to one message. Raises UserError for other parts than text, image and video."""
        content = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        inputs = self.processor(messages=[{"role": "user", "content": content}]).to(self.model.device)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, mode=self.mode, do_sample=False)
        return str(self.processor.batch_decode(tokens)[0]).strip()
