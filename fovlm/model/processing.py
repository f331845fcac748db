"""Frames and chat messages -> the inputs of `FoveatedVLM.generate`. And `open_model`: model and processor of a folder.

    messages = [{"role": "user", "content": [{"type": "video", "video": "cat.mp4"}, {"type": "text", "text": "Why?"}]}]
    inputs = processor(messages=messages)
    print(processor.batch_decode(model.generate(**inputs))[0])

Tokens and frames are those of training (`data/chat.py`, `media/clip.py`): a video is one frame a second, each looked at
once; an image is one frame, looked at `image_frames` times.

Letters: B conversations, S text tokens, f frames of a conversation, s pixels of a frame's side.
"""

import logging
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from fovlm.data.chat import TRANSFORMERS_ERRORS, TokenizedText, conversation, load_tokenizer
from fovlm.errors import UserError, did_you_mean
from fovlm.media import decode as media
from fovlm.media.clip import read_clip
from fovlm.media.tolerant import pixels_of
from fovlm.model.configuration import FoveatedConfig
from fovlm.model.folder import check_folder
from fovlm.model.modeling import FoveatedVLM, check_report
from fovlm.model.shipped_code import AUTO_MAP
from fovlm.model.supervised import IGNORED

Seen = tuple[Tensor, list[int]]  # frames u8 [f, 3, s, s], and how often each is looked at
log = logging.getLogger("fovlm")


class FoveatedProcessor(ProcessorMixin):
    """The processor of a FoveatedVLM. `tokenizer` needs a chat template; the rest are the model's settings and a limit.

    Call it with `messages` (one conversation or a list of them), or with `text` (a question, or one for each
    conversation) beside `videos` and `images`. A video is a path, frames [f, 3, h, w] or [f, h, w, 3] (a tensor, an
    array or a list of pictures); an image is a path, [3, h, w], [h, w, 3] or a picture. Pixels are u8, or floats from
    0 to 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        frame_size: int = 224,
        question: str = "after_frames",
        image_frames: int = 1,
        max_frames: int = 64,
        chat_template: str | None = None,
    ):
        self.frame_size, self.question = frame_size, question
        self.image_frames, self.max_frames = image_frames, max_frames
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_parts(cls, tokenizer: PreTrainedTokenizerBase, config: FoveatedConfig) -> "FoveatedProcessor":
        """The processor of a model."""
        return cls(tokenizer, **_settings(config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "FoveatedProcessor":
        """As in transformers; a tokenizer's own code never runs."""
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs | {"trust_remote_code": False})

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As in transformers; without a processor_config.json the settings are those of config.json."""
        found, left = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "frame_size" not in found:
            found |= _settings(FoveatedConfig.from_pretrained(pretrained_model_name_or_path))
        return found, left

    @classmethod
    def register_for_auto_class(cls, *args: Any) -> None:
        """Nothing: `auto_map` and `code/` are always written, so transformers need not add a second copy."""

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, and where its code is in a model's folder."""
        return super().to_dict() | {"auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "frames", "looks", "prompt"]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        videos: Any = None,
        messages: Sequence[Any] | None = None,
        return_tensors: str = "pt",
        padding: bool = True,
    ) -> BatchFeature:
        """Model inputs: input_ids and attention_mask i64 [B, S], padded on the left; frames u8 [B, f, 3, s, s] and
        looks i64 [B, f] (0 where padded), both left out when there are none; prompt i64 [B], the tokens ahead of the
        frames. Where a conversation ends with an answer of the assistant, also labels i64 [B, S] for training: the
        answer's tokens with the one that ends it, else -100. Always padded, always torch tensors. Raises UserError.
        """
        if return_tensors != "pt" or not padding:
            raise UserError(
                f"only return_tensors='pt' and padding=True are supported, not {return_tensors!r} and {padding}"
            )
        if (messages is None) == (text is None):
            raise UserError("give either messages, or text beside videos and images")
        if messages is None:
            messages = self._as_messages(text, images, videos)
        elif images is not None or videos is not None:
            raise UserError("videos and images go into the messages: {'type': 'video', 'video': path or frames}")
        elif messages and isinstance(messages[0], dict):
            messages = [messages]
        if not messages:
            raise UserError("no conversation to process")
        return self._padded([self._conversation(turns) for turns in messages])

    def apply_chat_template(self, conversation: Any, *args: Any, tokenize: bool = False, **kwargs: Any) -> Any:
        """With `tokenize` the model inputs, as by calling the processor; else the text, without the frames."""
        if tokenize:
            return self(messages=conversation)
        many = conversation if isinstance(conversation[0], list) else [conversation]
        ids = [self._conversation(turns)[0].tokens for turns in many]
        rendered = [self.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in ids]
        return rendered if conversation is many else rendered[0]

    def decode(self, *args: Any, skip_special_tokens: bool = True, **kwargs: Any) -> Any:
        """The tokenizer's `decode`, without its special tokens."""
        return self.tokenizer.decode(*args, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, *args: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """The tokenizer's `batch_decode`, without its special tokens: the answers, from what `generate` returns."""
        return self.tokenizer.batch_decode(*args, skip_special_tokens=skip_special_tokens, **kwargs)

    def _conversation(self, turns: Sequence[dict[str, Any]]) -> tuple[TokenizedText, Seen]:
        """The messages of a conversation -> its text and its frames, which all belong to one turn."""
        spoken: list[tuple[str, str]] = []
        seen: list[Seen] = []
        shown = None
        for number, turn in enumerate(turns):
            words, shows = self._turn(turn)
            spoken.append((turn["role"], words))
            if shows and shown is not None:
                raise UserError("videos and images belong to one turn of a conversation, and here are two with some")
            if shows:
                shown, seen = number, shows
        frames = [part for part, _ in seen] or [torch.zeros(0, 3, self.frame_size, self.frame_size, dtype=torch.uint8)]
        looks = [number for _, numbers in seen for number in numbers]
        text = conversation(spoken, self.tokenizer, shown, self.question == "before_frames")
        return text, (torch.cat(frames), looks)

    def _turn(self, turn: dict[str, Any]) -> tuple[str, list[Seen]]:
        """One message -> its words and its frames."""
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            raise UserError("a message is {'role': 'user', 'content': words or a list of parts}")
        if isinstance(turn["content"], str):
            return turn["content"], []
        words, seen = [], []
        for part in turn["content"]:
            kind = part.get("type", "") if isinstance(part, dict) else ""
            given = next((part[key] for key in (kind, "path", "url") if key in part), None) if kind else None
            if kind not in ("text", "image", "video") or given is None:
                hint = did_you_mean(kind, ("text", "image", "video"))
                raise UserError(f"a part of a message is {{'type': 'video', 'video': ...}}, image or text{hint}")
            if kind == "text":
                words.append(given)
            else:
                seen.append(self.video(given) if kind == "video" else self.image(given))
        return "\n".join(words), seen

    def video(self, given: Any) -> Seen:
        """A path or frames -> frames of the model's size, at most `max_frames`, looked at once. Raises UserError."""
        frames = self._read(given) if isinstance(given, (str, Path)) else self._frames(given)
        return frames, [1] * len(frames)

    def image(self, given: Any) -> Seen:
        """A path or a picture -> one frame of the model's size, looked at `image_frames` times. Raises UserError."""
        frames = self._read(given, 1) if isinstance(given, (str, Path)) else self._frames([given])
        return frames, [self.image_frames] * len(frames)

    def _read(self, path: str | Path, most: int | None = None) -> Tensor:
        clip = read_clip(path, self.frame_size, most or self.max_frames)
        if clip.note:
            warnings.warn(f"{path}: {clip.note}", stacklevel=2)
        return clip.frames

    def _frames(self, given: Any) -> Tensor:
        """Pictures in memory -> u8 [f, 3, s, s], at most `max_frames` of them, evenly spaced."""
        if not isinstance(given, (Tensor, np.ndarray, list, tuple)) or not len(given):
            raise UserError("no frames: a video is a path, or a tensor, an array or a list of one picture or more")
        if isinstance(given, Tensor) and given.dtype == torch.uint8 and given.shape[1:] == (3, *2 * (self.frame_size,)):
            return given[media.spread(len(given), self.max_frames)]
        chosen = [_pixels(given[n]) for n in media.spread(len(given), self.max_frames)]
        return torch.from_numpy(np.stack([media.fit(p, self.frame_size) for p in chosen])).permute(0, 3, 1, 2)

    @staticmethod
    def _as_messages(text: str | Sequence[str] | None, images: Any, videos: Any) -> list[Any]:
        """`text`, `images` and `videos` -> messages. One text has all images and videos, several have one each."""
        one = isinstance(text, str)
        questions: list[str] = [text] if isinstance(text, str) else list(text or ())
        parts: list[list[dict[str, Any]]] = [[] for _ in questions]
        for kind, given in (("video", videos), ("image", images)):
            if given is None:
                continue
            several = isinstance(given, (list, tuple)) and not (one and kind == "video" and _is_frames(given))
            shown = list(given) if several else [given]
            if not one and len(shown) != len(questions):
                raise UserError(f"{len(questions)} texts and {len(shown)} {kind}s: give one for each, or None")
            for number, what in enumerate(shown):
                if what is not None:
                    parts[0 if one else number].append({"type": kind, kind: what})
        return [
            [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
            for question, shown in zip(questions, parts, strict=True)
        ]

    def _padded(self, conversations: list[tuple[TokenizedText, Seen]]) -> BatchFeature:
        B = len(conversations)
        S, f = (
            max(len(part) for part in parts)
            for parts in zip(*((t.tokens, s[1]) for t, s in conversations), strict=True)
        )
        pad = self.tokenizer.pad_token_id
        ids = torch.full((B, S), pad if pad is not None else self.tokenizer.eos_token_id or 0)
        labels = torch.full((B, S), IGNORED)
        mask, looks = torch.zeros(B, S, dtype=torch.int64), torch.zeros(B, f, dtype=torch.int64)
        frames = torch.zeros(B, f, 3, self.frame_size, self.frame_size, dtype=torch.uint8)
        for row, (text, (shown, times)) in enumerate(conversations):
            ids[row, S - len(text.tokens) :] = text.tokens
            mask[row, S - len(text.tokens) :] = 1
            labels[row, S - len(text.tokens) :] = torch.where(text.weight > 0, text.tokens, IGNORED)
            frames[row, : len(shown)] = shown
            looks[row, : len(times)] = torch.tensor(times, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if f:
            inputs |= {"frames": frames, "looks": looks}
        if (labels != IGNORED).any():
            inputs["labels"] = labels
        return BatchFeature(inputs | {"prompt": torch.tensor([text.prompt for text, _ in conversations])})


def _settings(config: FoveatedConfig) -> dict[str, Any]:
    return {"frame_size": config.frame_size, "question": config.question, "image_frames": config.image_frames}


def _is_frames(given: Sequence[Any]) -> bool:
    """Whether a list is one video, not several: its entries are pictures, not paths or clips."""
    return all(hasattr(x, "convert") or (hasattr(x, "ndim") and x.ndim == 3) for x in given)


def _pixels(picture: Any) -> np.ndarray:
    """A picture, array or tensor [3, h, w] or [h, w, 3], u8 or floats of 0 to 1 -> u8 [h, w, 3]. Raises UserError."""
    if hasattr(picture, "convert"):  # a Pillow image
        picture = pixels_of(picture)
    pixels = picture.cpu().numpy() if isinstance(picture, Tensor) else np.asarray(picture)
    if pixels.ndim == 3 and pixels.shape[0] == 3 != pixels.shape[-1]:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise UserError(f"a frame is [3, height, width] or [height, width, 3], not {list(pixels.shape)}")
    if np.issubdtype(pixels.dtype, np.floating) and pixels.size and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise UserError(f"a frame's pixels are u8 from 0 to 255 or floats from 0 to 1, not {pixels.dtype}")
    return np.ascontiguousarray(pixels)


def open_model(
    folder: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[FoveatedVLM, FoveatedProcessor]:
    """The model and processor of a folder, ready to use. `dtype` is bf16, fp32, torch's, or auto: as stored, but not
    bf16 on a CPU without products in it, where a frame takes five times as long; a warning says so.

    Raises UserError for a folder that is not there or holds no model, and for missing or damaged weights.
    """
    types: dict[str, Any] = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}
    if isinstance(dtype, str) and dtype not in types:
        raise UserError(f"dtype is auto, bf16 or fp32, not '{dtype}'{did_you_mean(dtype, types)}")
    model = load_model(Path(folder), types[dtype] if isinstance(dtype, str) else dtype)
    load_tokenizer(str(folder))
    if dtype == "auto" and model.dtype == torch.bfloat16 and torch.device(device).type == "cpu" and not cpu_has_bf16():
        log.warning("computing in fp32: this processor has no products in bf16, the type of the weights")
        model = model.float()
    return model.to(device), FoveatedProcessor.from_pretrained(folder)


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bf16 (AVX512-bf16, AMX, or what oneDNN knows of an ARM): else it converts."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def load_model(folder: Path, dtype: str | torch.dtype) -> FoveatedVLM:
    """The model of a folder in a type of torch ("auto": as stored), for inference. Raises UserError as `open_model`."""
    try:
        check_folder(folder)
    except OSError as error:  # no permission, or not a possible name
        raise UserError(f"{str(folder)[:100]} cannot be read: {error.strerror or error}") from error
    try:
        model, report = FoveatedVLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except TRANSFORMERS_ERRORS as error:
        raise UserError(f"{folder}: the model does not load: {' '.join(str(error).split())[:200]}") from error
    check_report(report, str(folder))
    return model.eval()


AutoProcessor.register(FoveatedConfig, FoveatedProcessor, exist_ok=True)
