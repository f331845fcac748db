"""Fixtures that several test files use, when garbage is collected, and which signals reach what tests start."""

import gc
import signal
from collections.abc import Iterator

import pytest
import torch
from tokenizers import decoders

from fovlm.model.processing import FoveatedProcessor
from helpers.forked import Forked
from helpers.models import tiny_model


def pytest_configure() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored in the background of a shell, and then by what tests start
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported lives to the end: a collection need not look at it


def pytest_unconfigure() -> None:
    gc.freeze()  # or the end of Python takes seconds


@pytest.fixture(scope="session")
def forked(tmp_path_factory) -> Iterator[Forked]:
    """The ranks of all tests start from one process, which has imported DeepSpeed and transformers."""
    with Forked(tmp_path_factory.mktemp("forked")) as server:
        yield server


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> str:
    """The folder of a tiny model that says one word of its vocabulary after the other."""
    from helpers.tiny import tokenizer  # imports webdataset, which the kernels' tests do without

    out = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_model()
    model.config.llm_config.tie_word_embeddings = model.llm.config.tie_word_embeddings = False
    model.llm.lm_head.weight = torch.nn.Parameter(model.llm.get_input_embeddings().weight.detach().roll(1, 0))
    model.save_pretrained(out)
    words = tokenizer()
    words.backend_tokenizer.decoder = decoders.Fuse()  # spaces are tokens of their own
    FoveatedProcessor.from_parts(words, model.config).save_pretrained(out)
    return str(out)
