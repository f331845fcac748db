"""Turn a conversation into tokens, their loss weights and the place of the frames.

The text is the tokenizer's own chat template, rendered with one system message and tokenized as a whole; question and
answer are then found in it by their character offsets. Tokenized separately, they would have other tokens at their
boundaries than the text that generation sees.

    <|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n<|im_start|>user\\nQUESTION<|im_end|>\\n
    <|im_start|>assistant\\nANSWER<|im_end|>

`model.question: before_frames` puts the frames right after QUESTION, `after_frames` puts them at the start. The tokens
are the same for both.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fovlm.errors import SampleError, UserError
from fovlm.fileio import digest

SYSTEM = "You are a helpful AI assistant."
SHOWN, ANSWER = "\ue000shown\ue000", "\ue000answer\ue000"  # private-use characters, to find places in rendered text


@dataclass
class TokenizedText:
    """tokens i64 [s], weight f32 [s] (the share of each in the loss), and the number of tokens before the frames."""

    tokens: Tensor
    weight: Tensor
    prompt: int


class ChatTokenizer:
    """Turns records of a shard into `TokenizedText`. Raises UserError for a tokenizer that has no usable chat template.

    question: `after_frames` | `before_frames`; loss_on: `all_text` | `answer`; most: tokens of a sample.
    `hash` changes with everything that decides which records are usable and how many tokens they have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, question: str, loss_on: str, most: int):
        self.tokenizer, self.question, self.loss_on, self.most = tokenizer, question, loss_on, most
        self.pieces = template(tokenizer)
        what = [tokenizer.backend_tokenizer.to_str(), *self.pieces, question, loss_on, str(most)]
        self.hash = digest("\n".join(what))

    def texts(self, record: dict[str, Any], question: str | None, frames: bool, pair: bool) -> list[TokenizedText]:
        """The one conversation of a record, or the two of a preference `pair`: `chosen`, then `rejected`."""
        if not pair:
            return [self.text(record, question, frames)]
        if "chosen" not in record or "rejected" not in record:
            raise SampleError("no chosen or no rejected answer")
        user = record.get("user")
        return [self.text({"user": user, "assistant": record[s]}, question, frames) for s in ("chosen", "rejected")]

    def text(self, record: dict[str, Any], question: str | None, frames: bool) -> TokenizedText:
        """The tokens of a record with `assistant` and `user` (by default `question`), or `token_ids` and `loss_mask`.

        `frames` says whether the sample has any. Raises SampleError.
        """
        if "token_ids" in record:
            ids, weight, frames_at = self._ready_made(record)
        else:
            ids, answer_from, frames_at = encode(record, question, self.tokenizer, self.pieces)
            weight = [1.0 if self.loss_on == "all_text" or i >= answer_from else 0.0 for i in range(len(ids))]
        prompt = frames_at if frames and self.question == "before_frames" else 0
        if prompt or not frames:
            weight[0] = 0.0  # nothing comes before this token from which it could be predicted
        ids, weight = ids[: self.most], weight[: self.most]
        if not any(weight):
            raise SampleError("nothing to learn within max_tokens")
        return TokenizedText(torch.tensor(ids), torch.tensor(weight), min(prompt, self.most))

    def _ready_made(self, record: dict[str, Any]) -> tuple[list[int], list[float], int]:
        ids: Any = record["token_ids"]
        mask: Any = record.get("loss_mask")
        frames_at = record.get("frames_at")
        if not _whole_numbers(ids, len(self.tokenizer)) or not ids:
            raise SampleError("token_ids are not ids of this tokenizer")
        if not _whole_numbers(mask, 2) or len(mask) != len(ids):
            raise SampleError("loss_mask is not one 0 or 1 for each of token_ids")
        if self.question == "before_frames" and not _whole_numbers([frames_at], len(ids) + 1):
            raise SampleError("no frames_at beside token_ids, which question=before_frames needs")
        return ids, [float(m) for m in mask], frames_at or 0


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a Hugging Face id. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no tokenizer in '{source}' ({reason}): set model.tokenizer to a folder or id with one"
        ) from error


def template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """The parts of the tokenizer's chat template before the question, between it and the answer, and after the answer.

    Raises UserError when there is no template, or one that changes the messages.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: set model.tokenizer to that of an -Instruct model")

    def render(user: str, answer: str) -> str:
        turns = [("system", SYSTEM), ("user", user), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    rendered = render(SHOWN, ANSWER)
    head, _, rest = rendered.partition(SHOWN)
    middle, _, tail = rest.partition(ANSWER)
    if render("Is it?", "It is.") != f"{head}Is it?{middle}It is.{tail}":
        raise UserError("the tokenizer's chat template changes the messages: set model.tokenizer to another one")
    return head, middle, tail


def conversation(
    turns: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, shown: int | None, before: bool
) -> TokenizedText:
    """The tokens of a conversation up to the place where the answer starts; no token has a weight.

    `turns` are (role, words), the last one a user's. The system message of training is added when there is none. Frames
    belong to turn `shown`: after its words with `before`, otherwise at the start. Raises UserError.
    """
    if turns[:1] and turns[0][0] != "system":
        turns, shown = [("system", SYSTEM), *turns], None if shown is None else shown + 1
    if not turns or turns[-1][0] != "user":
        raise UserError("the last turn of a conversation must be the user's")
    messages = [{"role": role, "content": words.strip()} for role, words in turns]
    if not all(message["content"] for message in messages):
        raise UserError("a turn has no text: add a question or an instruction to the frames")
    if shown is not None:
        messages[shown]["content"] += SHOWN
    messages.append({"role": "assistant", "content": ANSWER})
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False)).partition(ANSWER)[0]
    asked, _, rest = rendered.partition(SHOWN)
    ids, spans = _tokenize(asked + rest, tokenizer)
    prompt = _tokens_up_to(spans, len(asked)) if shown is not None and before else 0
    return TokenizedText(torch.tensor(ids), torch.zeros(len(ids)), prompt)


def encode(
    record: dict[str, Any], question: str | None, tokenizer: PreTrainedTokenizerBase, pieces: tuple[str, str, str]
) -> tuple[list[int], int, int]:
    """(token ids, the first token of the answer, the number of tokens up to the question's end) of a conversation.

    `pieces` are those of `template(tokenizer)`. Raises SampleError.
    """
    head, middle, tail = pieces
    user = _words(record.get("user")) or (question or "").strip()
    answer = _words(record.get("assistant"))
    if not user:
        raise SampleError("no question, and the source has no prompt")
    if not answer:
        raise SampleError("empty answer")
    asked = head + user
    answer_at = len(asked + middle)
    ids, spans = _tokenize(asked + middle + answer + tail, tokenizer)
    # The closing token of the turn belongs to the answer: with it the model learns to stop. White space after it, which
    # some templates add, does not belong to the sample.
    end = 1 + _tokens_up_to(spans, answer_at + len(answer))
    return ids[:end], _tokens_up_to(spans, answer_at), _tokens_up_to(spans, len(asked))


def tokenize_stage1(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, question: str | None = None) -> dict:
    """The pre-tokenized form of a record for a shard's JSON, with a loss on every text token: for stage 1.

    `record` has `assistant` and `user` (by default `question`). Returns token_ids, loss_mask and frames_at; reading
    them gives the same tokens as reading `record`. Raises SampleError.
    """
    ids, _, frames_at = encode(record, question, tokenizer, template(tokenizer))
    return {"token_ids": ids, "loss_mask": [1] * len(ids), "frames_at": frames_at}


def tokenize_sft(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, question: str | None = None) -> dict:
    """The same for stages 2 and 3, with a loss on the answer and the token that ends it."""
    ids, answer_from, frames_at = encode(record, question, tokenizer, template(tokenizer))
    return {"token_ids": ids, "loss_mask": [int(i >= answer_from) for i in range(len(ids))], "frames_at": frames_at}


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, the characters [from, to) of each)."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], encoding["offset_mapping"]


def _tokens_up_to(spans: list[tuple[int, int]], end: int) -> int:
    """How many tokens end at or before the character `end`."""
    return sum(to <= end for _, to in spans)


def _words(value: object) -> str:
    """A message without surrounding white space; "" for a value that is no string. Raises SampleError."""
    if not isinstance(value, str):
        return ""
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # JSON can hold half a surrogate pair
        raise SampleError("text is not Unicode")
    return value.strip()


def _whole_numbers(values: object, limit: int) -> bool:
    """True for a list of integers from 0 to below `limit`."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < limit for v in values)
