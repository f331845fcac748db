"""Removes secrets and the path of the home folder from text that leaves the machine."""

import os
import re
from pathlib import Path
from typing import Any

HIDDEN = "[hidden]"
# Environment variables whose values are secrets: a word of the name ends like this (PGPASSWORD, not TOKENIZER_DIR).
SECRET_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASS(?:WORD|WD|PHRASE)?|CREDENTIAL)S?(?![A-Z])", re.IGNORECASE)
# Secrets by their form: user:password@ in a URL, a signature or token in its query, keys of Hugging Face, AWS, wandb.
SECRETS = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),
    re.compile(r"(?<=[?&])[\w.-]*(?:key|token|secret|signature|credential|sig)[\w.-]*=[^&\s]+", re.IGNORECASE),
    re.compile(r"\b(?:hf_\w{20,}|AKIA[0-9A-Z]{16}|wandb_v1_\w{20,})"),
)


def redact(value: Any) -> Any:
    """A copy of text, or of lists and mappings of it, with secrets hidden and the home folder as `~`."""
    if isinstance(value, dict):
        return {redact(key): redact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    for name, secret in os.environ.items():
        if SECRET_NAME.search(name) and len(secret) >= 8:
            text = text.replace(secret, HIDDEN)
    for pattern in SECRETS:
        text = pattern.sub(HIDDEN, text)
    home = os.path.expanduser("~")
    return re.sub(re.escape(home) + r"(?=/|$)", "~", text) if len(home) > 1 else text
