"""Data sets of the Hugging Face hub: fetched into the cache, then prepared like any other folder."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from fovlm.errors import UserError
from fovlm.paths import cache_root
from fovlm.redact import redact

PREFIX = "hf://datasets/"
# HfHubHTTPError is an OSError and an error of the HTTP client that this release of huggingface_hub has.
FAILURES: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError)


def fetch_dataset(url: str) -> Path:
    """`hf://datasets/OWNER/NAME[@REVISION][/FOLDER or FILE]` -> a local copy of it, below the cache.

    huggingface_hub fetches what is not there yet, resumes what was cut off, and knows the user's token. Raises
    UserError, with what it says, for what cannot be fetched.
    """
    owner, _, rest = url.removeprefix(PREFIX).partition("/")
    name, _, below = rest.strip("/").partition("/")
    name, _, revision = name.partition("@")
    if not url.startswith(PREFIX) or not owner or not name:
        raise UserError(
            f"{url}: write {PREFIX}OWNER/NAME, with a folder or file of it behind it where not all is needed"
        )
    folder = cache_root() / "datasets" / f"{owner}--{name}{'@' if revision else ''}{revision}"
    patterns = [below, f"{below}/*"] if below else None
    try:
        snapshot_download(
            f"{owner}/{name}", repo_type="dataset", revision=revision or None, local_dir=folder, allow_patterns=patterns
        )
    except FAILURES as error:
        reason = redact(" ".join(str(error).split())[:300])
        raise UserError(f"{url} cannot be fetched ({reason}); the same command resumes where it was cut off") from error
    if not (folder / below).exists():
        raise UserError(f"{url}: the data set {owner}/{name} has no '{below}'")
    return folder / below
