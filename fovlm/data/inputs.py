"""What a run reads: its models and shards. What is missing is found before torch is imported, all of it at once."""

import functools
import os
import re
import urllib.error
import urllib.request

from huggingface_hub import try_to_load_from_cache

from fovlm.config.schema import TINY_TOKENIZERS, Experiment
from fovlm.data.shards import HELP, URL, find_shards
from fovlm.errors import UserError
from fovlm.paths import data_root, local_folder, model_root, run_root

ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
TIMEOUT = 5  # seconds for the hub to answer


def check_inputs(experiment: Experiment) -> None:
    """Raise UserError with everything that a run would not find."""
    if problem := missing_inputs(experiment):
        raise UserError(f"{experiment.name} cannot start: {problem}")


def missing_inputs(experiment: Experiment) -> str:
    """What a run would not find, in one line: models, a run to start from, shards. Empty if everything is there."""
    data, start, found = experiment.data, experiment.model.init_from, []
    models = [f"{key}={name}" for key, name in from_hub(experiment).items() if not (_cached(name) or hub_answers())]
    if models:
        found.append(f"{', '.join(models)}: no folder here or below {model_root()}, and {_hub()} does not answer")
    if start and not any(os.path.isdir(folder) for folder in (start, run_root() / start)):
        found.append(f"model.init_from={start}: no such folder, nor a run below {run_root()}")
    for name in dict.fromkeys([*data.mixture, *data.val]):
        pattern = data.sources[name].shards
        generated = data.generate and pattern.startswith(f"{data.generate.folder}/")  # when the run starts
        if not (generated or URL.match(pattern)):
            try:
                find_shards(name, pattern)
            except UserError as error:
                found.append(str(error).removesuffix(f": {HELP}"))
    shards = bool(found) and found[-1].startswith("data.")
    return "; ".join(found) + (f": {HELP}" if shards else "")


def from_hub(experiment: Experiment) -> dict[str, str]:
    """The models of a run that are no local folder: key path -> Hugging Face id (or a path that does not exist)."""
    settings, found = experiment.model, {}
    for key in ("llm", "encoder", "tokenizer"):
        name = getattr(settings, key)
        if key == "tokenizer" and name in TINY_TOKENIZERS:
            continue
        if isinstance(name, str) and local_folder(name) is None and not (data_root() / name).is_dir():
            found[f"model.{key}"] = name
    return found


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached, in seconds: transformers would try for minutes."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false"):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(_hub(), method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _cached(name: str) -> bool:
    files = ("config.json", "tokenizer_config.json")
    return bool(ID.fullmatch(name)) and any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
