"""Removes secrets and the path of the home folder from text that leaves the machine."""

import os
import re
from pathlib import Path
from typing import Any

HIDDEN = "[hidden]"
# Environment variables whose values are secrets: a word of the name ends like this (PGPASSWORD, not TOKENIZER_DIR).
SECRET_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASS(?:WORD|WD|PHRASE)?|CREDENTIAL)S?(?![A-Z])", re.IGNORECASE)
SECRET_WORD = r"key|token|secret|signature|credential|(?<![a-z])sig(?![a-z])|pass(?:word|wd|phrase)?|pwd|auth(?!or)"
FORMS = (
    r"hf_\w{20,}",  # Hugging Face
    r"gh[opsur]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}",
    r"sk-(?=[\w-]*\d)[\w-]{20,}",  # OpenAI and others
    r"xox[a-z]-[\w-]{10,}",  # Slack
    r"AIza[\w-]{30,}|A[KS]IA[0-9A-Z]{16}",  # Google, AWS
    r"wandb_v1_\w{20,}|[0-9a-f]{40}\b",  # wandb, now and before
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",  # a JSON web token
)
# Secrets by their form, in a URL (user:password@, a signature in its query), and behind a word that says so.
URL_SECRETS = (
    re.compile(r"(?<=://)[^/\s]+(?=@)"),
    re.compile(rf"(?<=[?&;])[\w.-]*(?:{SECRET_WORD})[\w.-]*=[^&\s]+", re.IGNORECASE),
)
SECRETS = (
    re.compile(rf"\b(?:{'|'.join(FORMS)})"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    *URL_SECRETS,
    re.compile(r"(?<=\bBearer )\S{8,}", re.IGNORECASE),
    re.compile(r"\b[\w-]*(?:api_?key|password|passwd|secret)['\"]?\s*[=:]\s*['\"]?[^\s'\",}]{6,}", re.IGNORECASE),
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
