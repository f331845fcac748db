"""The plug-in for lmms-eval 0.7: `lmms-eval --model fovlm --model_args pretrained=FOLDER --tasks ...`.

lmms-eval finds it through the entry point `lmms_eval.models` of pyproject.toml. Generation tasks get the answers of
`generate`; multiple-choice tasks get the loss of each option, of which lmms-eval takes the smallest. Only lmms-eval's
own process imports this module.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms

from fovlm.data.chat import ChatTokenizer
from fovlm.errors import UserError, did_you_mean
from fovlm.eval.likelihood import View, encode, score, visual_tokens
from fovlm.media import decode
from fovlm.model.modes import mode_of
from fovlm.model.processing import open_model
from fovlm.progress import track

SAMPLING = ("temperature", "top_p", "top_k", "num_beams", "do_sample")
Visuals = Sequence[Any]


class Fovlm(lmms):
    """A folder that `fovlm convert` made. `mode` is by default the last of the model's modes (as in deployment)."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        mode: str | None = None,
        max_frames: int = 64,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            known = ("pretrained", "mode", "max_frames", "dtype", "device")
            word = next(iter(unknown))
            raise UserError(f"--model_args has no '{word}'{did_you_mean(word, known)}: there are {', '.join(known)}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        where = self.accelerator.device if device in (None, "", "cuda") else device
        self.model, self.processor = open_model(pretrained, dtype, where)
        self.processor.max_frames = int(max_frames)
        self.mode = mode_of(mode, self.model.config.visual)

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers the results of several ranks."""
        return self.accelerator.device

    @torch.no_grad()
    def generate_until(self, requests: list[Any]) -> list[str]:
        """An answer to each request, greedy unless the task says otherwise, cut at the task's stop words."""
        answers = []
        for request in self._with_bar(requests):
            text, settings, doc_to_visual, doc, task, split = request.args
            inputs = self.processor(messages=self._messages(text, self._visuals(doc_to_visual, task, split, doc)))
            options = _sampling(settings)
            longest = int(settings.get("max_new_tokens", settings.get("max_gen_toks", 128)))
            inputs = inputs.to(self.model.device)
            tokens = self.model.generate(**inputs, max_new_tokens=longest, mode=self.mode, **options)
            answers.append(_until(self.processor.batch_decode(tokens)[0], settings.get("until") or ()))
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """(loss of the continuation, a sum in nats; whether greedy decoding gives it) of each request.

        The options of one question share the encoding of its frames. Each pair is wrapped as a result, because
        lmms-eval 0.7.3 turns a bare pair into a string, on which its own multiple choice fails. With `--use_cache`
        pairs are computed again, since its cache returns bare ones.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            if len(request.args) != 6:
                raise UserError("acc_mutual_info asks for options without a question, which this model cannot score")
            text, _, _, doc, task, split = request.args
            groups.setdefault((text, doc, task, split), []).append(number)
        found: dict[int, tuple[float, bool]] = {}
        for (text, doc, task, split), numbers in self._with_bar(groups.items()):
            options = [requests[number].args[1] for number in numbers]
            options = [one if isinstance(one, str) else one(self.task_dict[task][split][doc]) for one in options]
            visuals = self._visuals(requests[numbers[0]].args[2], task, split, doc)
            found |= dict(zip(numbers, self._losses(text, visuals, options), strict=True))
        return [GenerationResult(text=_Pair(found[number])) for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not supported: the model was trained on one question about a clip."""
        raise UserError("this model does not support tasks of several rounds")

    def _losses(self, question: str, visuals: Visuals, options: list[str]) -> list[tuple[float, bool]]:
        model, config = self.model, self.model.config
        inputs = self.processor(messages=self._messages(question, visuals))
        chat = ChatTokenizer(
            self.processor.tokenizer, config.question, "answer", config.llm_config.max_position_embeddings
        )
        texts = [chat.text({"user": question, "assistant": option}, None, bool(visuals)) for option in options]
        view = None
        if visuals:
            times = inputs["looks"][0]
            looks = torch.repeat_interleave(torch.arange(len(times)), times).to(model.device)
            prompt = texts[0].tokens[: texts[0].prompt].to(model.device)
            view = View(encode(model, inputs["frames"][0].to(model.device)), looks, prompt)
        nll = score(model, visual_tokens(model, view, self.mode), texts)
        longest = max(int((text.weight > 0).sum()) for text in texts)
        inputs = inputs.to(model.device)
        greedy = model.generate(**inputs, max_new_tokens=longest, mode=self.mode, do_sample=False)[0].cpu()
        answers = [text.tokens[text.weight > 0] for text in texts]
        same = [len(greedy) >= len(a) and bool((greedy[: len(a)] == a).all()) for a in answers]
        return [(float(one.double().sum()), equal) for one, equal in zip(nll, same, strict=True)]

    def _visuals(self, doc_to_visual: Any, task: str, split: str, doc: int) -> list[Any]:
        """The media of a request. Several pictures with more looks than `max_frames` are the frames of one video."""
        visuals = list((doc_to_visual(self.task_dict[task][split][doc]) if doc_to_visual else None) or [])
        pictures = len(visuals) > 1 and all(hasattr(one, "convert") for one in visuals)
        many = len(visuals) * self.processor.image_frames > self.processor.max_frames
        return [visuals] if pictures and many else visuals

    def _messages(self, text: str, visuals: Visuals) -> list[dict[str, Any]]:
        parts = [{"type": kind, kind: media} for media in visuals for kind in [_kind(media)]]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    def _with_bar(self, work: Collection[Any]) -> Iterable[Any]:
        return track(work, f"fovlm, {self.mode}") if self.rank == 0 else work


class _Pair(tuple[float, bool]):
    """A loss and whether it is the greedy answer's. The cache of lmms-eval 0.7.3 calls `strip` on any result and does
    not store an empty one.
    """

    __slots__ = ()

    def strip(self) -> str:
        return ""


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as options of `generate`: greedy unless it samples at a temperature."""
    options = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    sample = bool(options.get("do_sample", options.get("temperature", 0) > 0)) and options.get("temperature", 1) > 0
    if not sample:
        options = {name: options[name] for name in ("num_beams",) if name in options}
    return options | {"do_sample": sample}


def _kind(media: Any) -> str:
    """video or image: tasks give pictures, lists of them, and the paths of videos or pictures."""
    if isinstance(media, list):
        return "video"
    if isinstance(media, (str, Path)):
        return "image" if Path(media).suffix[1:].lower() in decode.PICTURES else "video"
    if isinstance(media, dict):
        raise UserError(f"this task has media other than pictures and videos ({', '.join(map(str, media))})")
    return "image"


def _until(answer: str, stops: str | Sequence[str]) -> str:
    """The answer up to the first of the stop words."""
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            answer = answer.split(stop)[0]
    return answer.strip()
