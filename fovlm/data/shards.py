"""Find shards by pattern, fetch them from a URL, write them. The only module that imports webdataset.

    find_shards("news", "${FOVLM_DATA}/news-{000..041}.tar")   the local files of a source, in order
    write_shards(folder / "news-%03d.tar", samples)            samples are {"__key__", "json", "jpg" | "mp4" | ...}

A shard at an http(s) URL is fetched into the cache once and is a local file from then on. webdataset can also run shell
commands (`pipe:`) and unpickle members; neither is reachable from here.
"""

import http.client
import json
import re
import urllib.request
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset
from braceexpand import braceexpand

from fovlm.errors import UserError
from fovlm.fileio import digest, open_atomically
from fovlm.paths import cache_root, data_root
from fovlm.progress import track

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
TIMEOUT = 60  # seconds without a byte from the server


def find_shards(source: str, pattern: str) -> list[Path]:
    """The local files of a source's pattern: braces are expanded first, then wildcards; URLs are fetched.

    Raises UserError with the source, the pattern and the path when something is missing.
    """
    found: list[Path] = []
    where = f"data.sources.{source}.shards: '{pattern}'"
    try:
        names = list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"{where} has an unbalanced brace") from None
    for name in names:
        name = name.replace("${FOVLM_DATA}", str(data_root()))  # after the expansion: a folder's name may have braces
        if URL.match(name):
            found.append(_fetch(name, where))
        elif re.search(r"[*?\[]", name):
            matches = sorted(Path(path) for path in _glob(data_root() / name))
            if not matches:
                raise UserError(f"{where} matches no file (searched {data_root() / name}): {_HELP}")
            found += matches
        elif not (path := data_root() / name).is_file():
            raise UserError(f"{where}: no file {path}: {_HELP}")
        else:
            found.append(path)
    return list(dict.fromkeys(found))


_HELP = "write or copy the shards, or set FOVLM_DATA"


def _glob(path: Path) -> Iterable[Path]:
    return Path(path.anchor).glob(str(path.relative_to(path.anchor))) if path.is_absolute() else Path().glob(str(path))


def _fetch(url: str, where: str) -> Path:
    """The cached copy of a shard at an http(s) URL."""
    if not url.lower().startswith(("http://", "https://")):
        raise UserError(f"{where}: '{url}' is neither a file nor an http(s) URL")
    name = url.partition("?")[0].rpartition("/")[2]
    file = cache_root() / "shards" / digest(url, 8) / name
    if file.is_file():
        return file
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open_atomically(file) as out:
            blocks = iter(lambda: answer.read(1 << 20), b"")
            for block in track(blocks, f"fetching {name}, MiB", (answer.length or 0) >> 20 or None):
                out.write(block)
            if answer.length:  # the number of bytes that are missing
                raise OSError(f"the connection ended {answer.length} bytes too early")
    except (http.client.HTTPException, OSError) as error:  # URLError is an OSError
        raise UserError(f"{where}: {url} cannot be fetched into {file.parent} ({error})") from error
    return file


def write_shards(pattern: Path, samples: Iterable[dict[str, Any]], per_shard: int = 1000) -> list[Path]:
    """Write samples into tars named `pattern` % 0, 1, ... and return their paths.

    A sample is {"__key__": str, "json": dict, extension: bytes ...}. Each shard gets its name when it is complete. The
    same samples give the same bytes.
    """
    rest = iter(samples)
    paths: list[Path] = []
    while some := list(islice(rest, per_shard)):
        paths.append(Path(str(pattern) % len(paths)))
        write_shard(paths[-1], some)
    return paths


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Write one tar of samples as they come; it gets its name when it is complete."""
    with open_atomically(path) as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0)
        try:
            for sample in samples:
                writer.write({name: _encoded(value) for name, value in sample.items()})
        finally:
            writer.close()


def _encoded(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False).encode() if isinstance(value, dict) else value
