"""Turn a conversation into tokens, their loss weights and the place of the frames.

The text is the tokenizer's own chat template, rendered with one system message and tokenized as a whole; questions and
answers are then found in it by their character offsets. Tokenized separately, they would have other tokens at their
boundaries than the text that generation sees.

    <|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n<|im_start|>user\\nQUESTION<|im_end|>\\n
    <|im_start|>assistant\\nANSWER<|im_end|>\\n<|im_start|>user\\nNEXT QUESTION<|im_end|>\\n ...

`model.question: before_frames` puts the frames right after the first QUESTION, `after_frames` puts them at the start.
The tokens are the same for both. A record has one of

    {"user": QUESTION, "assistant": ANSWER}
    {"turns": [{"user": .., "assistant": ..}, ..]}                    several turns, a loss on each answer
    {"messages": [{"role": .., "content": ..}, ..]}                   the same; a system message may come first
    {"token_ids": [..], "loss_mask": [..], "frames_at": ..}           tokenized ahead of time
    {"conversations": [RECORD, ..]}                                   several conversations over the same frames

and may have a `weight`, by which its part of the loss is multiplied.
"""

import sys
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fovlm.errors import SampleError, UserError
from fovlm.fileio import digest

SYSTEM = "You are a helpful AI assistant."
SHOWN, ANSWER = "\ue000shown\ue000", "\ue000answer\ue000"  # private-use characters, to find places in rendered text
SPARE = 64  # tokens that are looked at beyond those that are used: the last ones depend on where the text is cut
MOST = 2**16 - 1  # conversations of a sample: the table of samples counts so far
# What transformers raises for files and settings that make no sense, or a model that does not fit in memory.
TRANSFORMERS_ERRORS: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError, ImportError)
TRANSFORMERS_ERRORS += (LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
TRANSFORMERS_ERRORS += (SafetensorError, StrictDataclassError)


@dataclass
class TokenizedText:
    """tokens i64 [s], weight f32 [s] (the share of each in the loss), and the number of tokens before the frames."""

    tokens: Tensor
    weight: Tensor
    prompt: int


class ChatTokenizer:
    """Turns records of a shard into `TokenizedText`. Raises UserError for a tokenizer that has no usable chat template.

    question: `after_frames` | `before_frames`; loss_on: `all_text` | `answer`; most: tokens of a conversation.
    `hash` changes with everything that decides which records are usable and how many tokens they have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, question: str, loss_on: str, most: int):
        self.tokenizer, self.question, self.loss_on, self.most = tokenizer, question, loss_on, most
        self.around: dict[int, tuple[str, ...]] = {}  # by the number of turns
        self.characters = (most + SPARE) * max(map(len, tokenizer.get_vocab()))  # what so many tokens can hold
        what = [tokenizer.backend_tokenizer.to_str(), *template(tokenizer), question, loss_on, str(most)]
        self.hash = digest("\n".join(what))

    def texts(self, record: dict[str, Any], question: str | None, frames: bool, pair: bool) -> list[TokenizedText]:
        """One conversation, or the two of a preference `pair`: `chosen`, then `rejected`. Raises SampleError."""
        if not pair:
            return [self.text(record, question, frames)]
        if "chosen" not in record or "rejected" not in record:
            raise SampleError("no chosen or no rejected answer")
        user = record.get("user")
        weight = {"weight": record["weight"]} if "weight" in record else {}
        both = [weight | {"user": user, "assistant": record[side]} for side in ("chosen", "rejected")]
        return [self.text(one, question, frames) for one in both]

    def text(self, record: dict[str, Any], question: str | None, frames: bool) -> TokenizedText:
        """The tokens of one conversation; its first question is `question` by default.

        `frames` says whether the sample has any. Raises SampleError.
        """
        if "token_ids" in record:
            ids, weight, frames_at = self._ready_made(record, frames)
        else:
            ids, mask, frames_at = self._encode(record, question)
            weight = [1.0 if self.loss_on == "all_text" else float(m) for m in mask]
        prompt = frames_at if frames and self.question == "before_frames" else 0
        if prompt or not frames:
            weight[0] = 0.0  # nothing comes before this token from which it could be predicted
        of_all = weight_of(record)
        ids, weight = ids[: self.most], [w * of_all for w in weight[: self.most]]
        if not any(weight):
            raise SampleError("nothing to learn within max_tokens")
        return TokenizedText(torch.tensor(ids), torch.tensor(weight), min(prompt, self.most))

    def _encode(self, record: dict[str, Any], question: str | None) -> tuple[list[int], list[int], int]:
        """(token ids, 1 for each token of an answer and 0 for others, the number of tokens up to the end of the first
        question) of a conversation. Raises SampleError.

        Only the first `most` tokens must be right. A long text is tokenized up to so many `characters`, which usually
        hold more, and as a whole only where they do not.
        """
        system, turns = turns_of(record, question)
        turns = turns[: self.most]  # each has a token at least
        if len(turns) not in self.around:
            self.around[len(turns)] = around(self.tokenizer, len(turns))
        head, before, *rest = self.around[len(turns)]
        text, answers = head + system + before, []
        asked = len(text) + len(turns[0][0])
        for (user, answer), middle, after in zip(turns, rest[::2], rest[1::2], strict=True):
            text += user + middle
            answers.append((len(text), len(text) + len(answer)))
            text += answer + after
        ids, spans = _tokenize(text[: self.characters], self.tokenizer)
        if len(text) > self.characters and len(ids) < self.most + SPARE:
            ids, spans = _tokenize(text, self.tokenizer)
        mask, end = [0] * len(ids), 0
        for first, last in answers:
            # The closing token of the turn belongs to the answer: with it the model learns to stop. White space after
            # the last one, which some templates add, does not belong to the sample.
            start, end = _tokens_up_to(spans, first), min(1 + _tokens_up_to(spans, last), len(ids))
            mask[start:end] = [1] * (end - start)
        return ids[:end], mask[:end], _tokens_up_to(spans, asked)

    def _ready_made(self, record: dict[str, Any], frames: bool) -> tuple[list[int], list[float], int]:
        ids: Any = record["token_ids"]
        mask: Any = record.get("loss_mask")
        frames_at = record.get("frames_at")
        if not _whole_numbers(ids, len(self.tokenizer)) or not ids:
            raise SampleError("token_ids are not ids of this tokenizer")
        if not _whole_numbers(mask, 2) or len(mask) != len(ids):
            raise SampleError("loss_mask is not one 0 or 1 for each of token_ids")
        if frames and self.question == "before_frames" and not _whole_numbers([frames_at], len(ids) + 1):
            raise SampleError("no frames_at beside token_ids, which question=before_frames needs")
        return ids, [float(m) for m in mask], frames_at or 0


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a Hugging Face id. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except TRANSFORMERS_ERRORS as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"no tokenizer in '{source}' ({reason}): set model.tokenizer to a folder or id with one"
        ) from error


def template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """The parts of the tokenizer's chat template before the question, between it and the answer, and after the answer.
    Raises UserError when there is no template, or one that changes the messages."""
    head, before, middle, tail = around(tokenizer, 1)
    return head + SYSTEM + before, middle, tail


def around(tokenizer: PreTrainedTokenizerBase, turns: int) -> tuple[str, ...]:
    """The parts of the chat template around the 1 + 2 * turns messages of a conversation: before the system message,
    between any two messages, and after the last answer. Raises UserError as `template` does."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: set model.tokenizer to that of an -Instruct model")

    def render(messages: list[str]) -> str:
        roles = ["system", *["user", "assistant"] * turns]
        listed = [{"role": role, "content": content} for role, content in zip(roles, messages, strict=True)]
        return str(tokenizer.apply_chat_template(listed, tokenize=False))

    pieces = render([ANSWER] * (1 + 2 * turns)).split(ANSWER)
    words = ["Be brief.", *["Is it?", "It is."] * turns, ""]
    if len(pieces) != len(words) or render(words[:-1]) != "".join(a + b for a, b in zip(pieces, words, strict=True)):
        raise UserError("the tokenizer's chat template changes the messages: set model.tokenizer to another one")
    return tuple(pieces)


def conversations(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a sample's conversations: itself, or those that it lists. Raises SampleError."""
    several = record.get("conversations", [record])
    if not isinstance(several, list) or not several or not all(isinstance(one, dict) for one in several):
        raise SampleError("conversations are not a list of records")
    if len(several) > MOST:
        raise SampleError(f"more than {MOST} conversations")
    return [{"weight": record["weight"]} | one for one in several] if "weight" in record else several


def weight_of(record: dict[str, Any]) -> float:
    """The weight of a conversation in the loss, 1 by default. Raises SampleError."""
    weight = record.get("weight", 1.0)
    if type(weight) not in (int, float) or not 0 < weight <= sys.float_info.max:
        raise SampleError("weight is not a number above 0")
    return float(weight)


def turns_of(record: dict[str, Any], question: str | None = None) -> tuple[str, list[tuple[str, str]]]:
    """The system message and the turns (question, answer) of a conversation, without surrounding white space.

    The first question is `question` when the record has none. A last question without an answer is left out. Raises
    SampleError.
    """
    system, several = SYSTEM, record.get("turns", [record])
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise SampleError("messages are not a list of {role, content}")
        if messages and messages[0].get("role") == "system":
            system, messages = _words(messages[0].get("content")), messages[1:]
        if any(m.get("role") != ("user", "assistant")[i % 2] for i, m in enumerate(messages)):
            raise SampleError("the roles of messages do not alternate between user and assistant")
        pairs = zip(messages[::2], messages[1::2], strict=False)
        several = [{"user": asked.get("content"), "assistant": said.get("content")} for asked, said in pairs]
    if not isinstance(several, list) or not several or not all(isinstance(turn, dict) for turn in several):
        raise SampleError("no turns of {user, assistant}")
    turns = [(_words(turn.get("user")), _words(turn.get("assistant"))) for turn in several]
    turns[0] = (turns[0][0] or (question or "").strip(), turns[0][1])
    if not turns[0][0]:
        raise SampleError("no question, and the source has no prompt")
    if not all(asked for asked, _ in turns):
        raise SampleError("a turn without a question")
    if not all(answer for _, answer in turns):
        raise SampleError("empty answer")
    return system, turns


def conversation(
    turns: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, shown: int | None, before: bool
) -> TokenizedText:
    """The tokens of a conversation up to the place where the answer starts; no token has a weight.

    `turns` are (role, words), the last one a user's, or the assistant's: then its words and the token that ends the
    turn follow, with a weight of 1. The system message of training is added when there is none. Frames
    belong to turn `shown`: after its words with `before`, otherwise at the start. Raises UserError.
    """
    turns = list(turns)
    if turns[:1] and turns[0][0] != "system":
        turns, shown = [("system", SYSTEM), *turns], None if shown is None else shown + 1
    answer = turns.pop()[1].strip() if turns and turns[-1][0] == "assistant" else ""
    if not turns or turns[-1][0] != "user":
        raise UserError("the last turn of a conversation must be the user's, or the assistant's answer to it")
    messages = [{"role": role, "content": words.strip()} for role, words in turns]
    if not all(message["content"] for message in messages):
        raise UserError("a turn has no text: add a question or an instruction to the frames")
    if shown is not None:
        messages[shown]["content"] += SHOWN
    messages.append({"role": "assistant", "content": ANSWER})
    rendered, _, tail = str(tokenizer.apply_chat_template(messages, tokenize=False)).partition(ANSWER)
    asked, _, rest = rendered.partition(SHOWN)
    ids, spans = _tokenize(asked + rest + (answer + tail if answer else ""), tokenizer)
    prompt = _tokens_up_to(spans, len(asked)) if shown is not None and before else 0
    weight = torch.zeros(len(ids))
    if answer:
        end = 1 + _tokens_up_to(spans, len(asked + rest + answer))
        ids, weight = ids[:end], weight[:end]
        weight[_tokens_up_to(spans, len(asked + rest)) :] = 1
    return TokenizedText(torch.tensor(ids), weight, prompt)


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, the characters [from, to) of each)."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], encoding["offset_mapping"]


def _tokens_up_to(spans: list[tuple[int, int]], end: int) -> int:
    """How many tokens end at or before the character `end`."""
    return bisect_right(spans, end, key=lambda span: span[1])


def _words(value: object) -> str:
    """A message without surrounding white space; "" for a value that is no string. Raises SampleError."""
    if not isinstance(value, str):
        return ""
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        raise SampleError("text is not Unicode") from None
    return value.strip()


def _whole_numbers(values: object, limit: int) -> bool:
    """True for a list of integers from 0 to below `limit`."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < limit for v in values)
