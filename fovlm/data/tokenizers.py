"""The tokenizer of a run: a model's own, or a small one for language models that start from random weights.

`model.tokenizer: words` has the words of the training data, `bytes` needs no data. Both use the ChatML template.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fovlm.config.schema import TINY_TOKENIZERS, Experiment
from fovlm.data.chat import SYSTEM, load_tokenizer
from fovlm.data.index import open_indices
from fovlm.data.record import record_of
from fovlm.data.sample_format import read_members
from fovlm.data.shard_cache import shard_cache
from fovlm.data.shards import find_shards
from fovlm.errors import SampleError
from fovlm.paths import cache_root, data_root, local_folder

log = logging.getLogger(__name__)
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def open_tokenizer(experiment: Experiment) -> PreTrainedTokenizerBase:
    """The tokenizer of an experiment. `words` reads the texts of all training shards. Raises UserError."""
    name, llm = tokenizer_path(experiment), experiment.model.llm
    if name == "bytes":
        return byte_tokenizer()
    if name == "words":
        most = llm.get("vocab_size") if isinstance(llm, dict) else None
        return word_tokenizer(words_of(experiment), most)
    return load_tokenizer(name)


def tokenizer_path(experiment: Experiment) -> str:
    """The tokenizer's folder or hub id: as given or below FOVLM_MODELS or FOVLM_DATA, that of the synthetic task, or
    the language model's own; `words` and `bytes` as they are."""
    model, task = experiment.model, experiment.data.generate
    name = model.tokenizer or model.llm
    if name in TINY_TOKENIZERS:
        return str(name)
    if isinstance(name, str):
        prepared = data_root() / name
        return str(local_folder(name) or (prepared if prepared.is_dir() else name))
    assert task is not None  # schema.py checks this
    return str(data_root() / task.folder / "tokenizer")


def word_tokenizer(words: Iterable[str], most: int | None = None) -> PreTrainedTokenizerFast:
    """Every word is a token: these, and those of the template; the first `most`, others are `<unk>`."""
    every = list(dict.fromkeys([*SPECIAL, "system", "user", "assistant", *SYSTEM.split(), *words]))
    if most and len(every) > most:
        log.warning(f"{len(every) - most} of {len(every)} words are unknown to a model with llm.vocab_size={most}")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(every[:most])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return chatml_tokenizer(backend)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte of a text is a token: 259 with the special ones."""
    every = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(every)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return chatml_tokenizer(backend)


def chatml_tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers with the ChatML template, from one that knows the `SPECIAL` tokens."""
    unknown, start, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=unknown, bos_token=start, eos_token=end, pad_token=end, chat_template=CHATML
    )


def words_of(experiment: Experiment) -> list[str]:
    """The words of an experiment's training data, the most frequent first. Raises UserError for missing shards."""
    data, counts = experiment.data, Counter[str]()
    for name in data.mixture:
        counts.update((data.sources[name].prompt or "").split())
        source = data.sources[name]
        shards, fields = find_shards(name, source.shards, shard_cache(data)), source.fields
        for index in open_indices(shards, cache_root(), fields):
            with index.path.open("rb") as shard:
                for at, length in zip(index.offset.tolist(), index.length.tolist()):
                    shard.seek(at)
                    with suppress(SampleError):
                        record = record_of(read_members(shard.read(length)), fields)
                        counts.update(word for text in _texts(record) for word in text.split())
    return sorted(counts, key=lambda word: (-counts[word], word))


def _texts(record: dict[str, Any]) -> Iterator[str]:
    """What is said in a record: all its strings but the name of its source."""
    ahead: list[Any] = [record | {"source": ""}]
    while ahead:
        value = ahead.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | dict):
            ahead += value.values() if isinstance(value, dict) else value
