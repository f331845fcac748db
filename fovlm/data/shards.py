"""Find shards by pattern and write them. The only module that imports webdataset.

    find_shards("news", "${FOVLM_DATA}/news-{000..041}.tar")   the shards of a source, in order
    write_shards(folder / "news-%03d.tar", samples)            samples are {"__key__", "json", "jpg" | "mp4" | ...}

webdataset can also run shell
commands (`pipe:`) and unpickle members; neither is reachable from here.
"""

import glob
import json
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from fovlm.config.schema import DataSettings
from fovlm.data.remote_fs import SCHEMES, list_files
from fovlm.data.shard_cache import RemoteShard, Shard, ShardCache, shard_cache
from fovlm.errors import UserError, did_you_mean
from fovlm.fileio import open_atomically
from fovlm.paths import data_root

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def find_shards(source: str, pattern: str, cache: ShardCache | None = None) -> list[Shard]:
    """The shards of a source's pattern: braces are expanded first, then wildcards. Remote ones are fetched into `cache`
    when they are read; without it, into that of the default settings.

    Raises UserError with the source, the pattern and the path when something is missing.
    """
    found: list[Shard] = []
    where = f"data.sources.{source}.shards: '{pattern}'"
    try:
        names = list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"{where} has an unbalanced brace") from None
    urls: list[str] = []
    for name in names:
        name = name.replace("${FOVLM_DATA}", str(data_root()))  # after the expansion: a folder's name may have braces
        if URL.match(name):
            urls.append(_checked(name, where))
        elif re.search(r"[*?\[]", name):
            matches = sorted(map(Path, glob.glob(str(data_root() / name), recursive=True)))
            if not matches:
                raise UserError(f"{where} matches no file (searched {data_root() / name}): {HELP}")
            found += matches
        elif not (path := data_root() / name).is_file():
            raise UserError(f"{where}: no file {path}: {HELP}")
        else:
            found.append(path)
    if urls:
        found += _remote(urls, where, cache or shard_cache(DataSettings()))
    return list(dict.fromkeys(found))


HELP = "write or copy the shards, or set FOVLM_DATA"


def _checked(url: str, where: str) -> str:
    scheme = url.partition(":")[0].lower()
    if scheme not in SCHEMES or "://" not in url:
        near = did_you_mean(scheme, SCHEMES)
        raise UserError(f"{where}: '{url}' is neither a file nor a URL of {', '.join(SCHEMES)}{near}")
    return url


def _remote(urls: list[str], where: str, cache: ShardCache) -> list[Shard]:
    try:
        files = list_files(urls)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    largest = max(files, key=lambda file: file.size)
    if largest.size > cache.limit:
        least = f"data.cache_gb={cache.limit / 1e9:g} is less than {largest.name} needs"
        raise UserError(f"{where}: {least}: set it to {largest.size / 1e9:.2g} at least, better to ten times that")
    return [RemoteShard(file, cache) for file in files]


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
    import webdataset  # imports torch

    with open_atomically(path) as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0)
        try:
            for sample in samples:
                records = {k: json.dumps(v, ensure_ascii=False).encode() for k, v in sample.items() if type(v) is dict}
                writer.write(sample | records)
        finally:
            writer.close()
