"""The plug-in for lmms-eval 0.7: `lmms-eval --model fovlm --model_args pretrained=FOLDER --tasks ...`.

Found by lmms-eval through the entry point `lmms_eval.models` of pyproject.toml. Tasks that generate get what `generate`
answers; tasks of multiple choice get the loss of each option, which is what lmms-eval compares (it takes the least).
Only lmms-eval's own process imports this module.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from rich.progress import track

from fovlm.data.chat import ChatTokenizer
from fovlm.errors import UserError, did_you_mean
from fovlm.eval.likelihood import View, encode, score, visual
from fovlm.media import decode
from fovlm.model.modes import MODES
from fovlm.model.processing import open_model

SAMPLING = ("temperature", "top_p", "top_k", "num_beams", "do_sample")
Visuals = Sequence[Any]


class Fovlm(lmms):
    """A folder that `fovlm convert` made. `mode` is the last of the model's modes unless told (as deployed)."""

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
        modes = MODES[self.model.config.visual]
        if mode is not None and mode not in modes:
            raise UserError(f"mode={mode}{did_you_mean(mode, modes)}: this model has {', '.join(modes)}")
        self.mode = mode or modes[-1]

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers the numbers of several ranks."""
        return self.accelerator.device

    @torch.no_grad()
    def generate_until(self, requests: list[Any]) -> list[str]:
        """An answer to each request, greedy unless the task says otherwise, cut at the task's stop words."""
        answers = []
        for request in self._with_bar(requests):
            words, settings, doc_to_visual, doc, task, split = request.args
            inputs = self.processor(messages=self._asked(words, self._shown(doc_to_visual, task, split, doc)))
            options = _sampling(settings)
            most = int(settings.get("max_new_tokens", settings.get("max_gen_toks", 128)))
            made = self.model.generate(**inputs.to(self.model.device), max_new_tokens=most, mode=self.mode, **options)
            answers.append(_until(self.processor.batch_decode(made)[0], settings.get("until") or ()))
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """(loss of the continuation: a sum in nats, least is best; whether greedy decoding gives it) of each request.

        The requests of one question, its options, share one encoding of its frames. Each pair is wrapped as a result:
        lmms-eval 0.7.3 makes a string of a bare one, on which its own multiple choice then fails. With `--use_cache`
        they are computed again, since what that gives back is a bare one.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            if len(request.args) != 6:
                raise UserError("acc_mutual_info asks for options without a question, which this model cannot score")
            words, _, _, doc, task, split = request.args
            groups.setdefault((words, doc, task, split), []).append(number)
        found: dict[int, tuple[float, bool]] = {}
        for (words, doc, task, split), numbers in self._with_bar(groups.items()):
            continuations = []
            for number in numbers:
                said = requests[number].args[1]
                continuations.append(said if isinstance(said, str) else said(self.task_dict[task][split][doc]))
            shown = self._shown(requests[numbers[0]].args[2], task, split, doc)
            found |= dict(zip(numbers, self._losses(words, shown, continuations), strict=True))
        return [GenerationResult(text=_Pair(found[number])) for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered: the model was trained on one question about a clip."""
        raise UserError("tasks of several rounds are not offered by this model")

    def _losses(self, words: str, shown: Visuals, continuations: list[str]) -> list[tuple[float, bool]]:
        model, config = self.model, self.model.config
        asked = self._asked(words, shown)
        inputs = self.processor(messages=asked)
        chat = ChatTokenizer(
            self.processor.tokenizer, config.question, "answer", config.llm_config.max_position_embeddings
        )
        texts = [chat.text({"user": words, "assistant": said}, None, bool(shown)) for said in continuations]
        view = None
        if shown:
            times = inputs["looks"][0]
            looks = torch.repeat_interleave(torch.arange(len(times)), times).to(model.device)
            ahead = texts[0].tokens[: texts[0].prompt].to(model.device)
            view = View(encode(model, inputs["frames"][0].to(model.device)), looks, ahead)
        nll = score(model, visual(model, view, self.mode), texts)
        most = max(int((text.weight > 0).sum()) for text in texts)
        inputs = inputs.to(model.device)
        greedy = model.generate(**inputs, max_new_tokens=most, mode=self.mode, do_sample=False)[0].cpu()
        answers = [text.tokens[text.weight > 0] for text in texts]
        same = [len(greedy) >= len(a) and bool((greedy[: len(a)] == a).all()) for a in answers]
        return [(float(one.double().sum()), equal) for one, equal in zip(nll, same, strict=True)]

    def _shown(self, doc_to_visual: Any, task: str, split: str, doc: int) -> list[Any]:
        """What a task shows. Several pictures whose looks go beyond `max_frames` are the frames of one video."""
        visuals = list((doc_to_visual(self.task_dict[task][split][doc]) if doc_to_visual else None) or [])
        pictures = len(visuals) > 1 and all(hasattr(one, "convert") for one in visuals)
        many = len(visuals) * self.processor.image_frames > self.processor.max_frames
        return [visuals] if pictures and many else visuals

    def _asked(self, words: str, shown: Visuals) -> list[dict[str, Any]]:
        parts = [{"type": kind, kind: what} for what in shown for kind in [_kind(what)]]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]

    def _with_bar(self, work: Any) -> Iterator[Any]:
        return iter(track(list(work), description=f"fovlm, {self.mode}", disable=self.rank != 0, transient=True))


class _Pair(tuple[float, bool]):
    """A loss and whether it is the greedy answer's. `strip` is what the cache of lmms-eval 0.7.3 asks of any result:
    an empty one is not kept.
    """

    __slots__ = ()

    def strip(self) -> str:
        return ""


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as `generate` takes them: greedy unless it samples at a temperature."""
    options = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    sample = bool(options.get("do_sample", options.get("temperature", 0) > 0)) and options.get("temperature", 1) > 0
    if not sample:
        options = {name: options[name] for name in ("num_beams",) if name in options}
    return options | {"do_sample": sample}


def _kind(shown: Any) -> str:
    """video or image: tasks hand over pictures, lists of them, and the paths of videos or pictures."""
    if isinstance(shown, list):
        return "video"
    if isinstance(shown, (str, Path)):
        return "image" if Path(shown).suffix[1:].lower() in decode.PICTURES else "video"
    if isinstance(shown, dict):
        raise UserError(f"this task shows something else than pictures and videos ({', '.join(map(str, shown))})")
    return "image"


def _until(answer: str, stops: str | Sequence[str]) -> str:
    """The answer up to the first of the stop words."""
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            answer = answer.split(stop)[0]
    return answer.strip()
