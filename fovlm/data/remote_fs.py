"""Files at https, http, s3 and hf URLs: listed, and read in ranges, with retries. The only module that imports fsspec.

Credentials come from where boto, huggingface_hub and netrc keep them: the environment, ~/.aws, the token of
`hf auth login`, ~/.netrc. They never pass through here, and what servers say is redacted.
"""

import fnmatch
import json
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fovlm.errors import UserError, did_you_mean, needs
from fovlm.fileio import digest
from fovlm.redact import redact

SCHEMES = {"https": "aiohttp", "http": "aiohttp", "s3": "s3fs", "hf": "huggingface_hub"}  # and the package each needs
TRIES, PAUSE = 7, 1.0  # pauses double, in seconds: a minute in all
SILENCE = 60  # seconds without a byte after which a connection counts as lost
REFUSED = {401, 403, 407}
FINAL = REFUSED | {400, 404, 405, 410, 416}  # HTTP statuses that no retry changes
MANIFEST = "manifest.json"  # beside the shards, as `fovlm prepare` writes it: names, sizes, checksums
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file as a server lists it; `version` changes with its content, `checksum` is its BLAKE2b where known."""

    url: str
    size: int
    version: str
    checksum: str = ""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return urlsplit(self.url).path.rpartition("/")[2]


def read_range(file: RemoteFile, start: int, stop: int) -> bytes:
    """The bytes from `start` to before `stop`, or the whole file where the server knows no ranges. Raises UserError."""

    def read(fs: Any) -> bytes:
        data = fs.cat_file(file.url, start=start, end=stop)
        if len(data) not in (stop - start, file.size):
            raise ConnectionError(f"{len(data)} of {stop - start} bytes arrived")
        return data

    return _call(file.url, read)


def list_files(urls: list[str]) -> list[RemoteFile]:
    """The files at URLs whose last part may have wildcards. http has no listing: there a manifest names the files.
    Raises UserError for a file that is not there, with the closest name."""
    found: list[RemoteFile] = []
    for folder in (url.rpartition("/")[0] for url in urls):
        if re.search(r"[*\[]", folder):
            raise UserError(f"{folder}: wildcards are for the last part of a URL; write folders in braces: {{a,b}}")
    folders = {folder: _folder(folder) for folder in dict.fromkeys(url.rpartition("/")[0] for url in urls)}
    unknown = [url for url in urls if _is_http(url) and not _is_pattern(url) and not folders[url.rpartition("/")[0]]]
    with ThreadPoolExecutor(16) as pool:
        heads = dict(zip(unknown, pool.map(_head, unknown), strict=True))
    for url in urls:
        folder, _, name = url.rpartition("/")
        names = fnmatch.filter(folders[folder], name) if _is_pattern(url) else [name]
        listed = [folders[folder][name] for name in sorted(names) if name in folders[folder]]
        files = [heads[url]] if url in heads else listed
        if not files:
            why = f"; http has no listing, and there is no {MANIFEST} with the names" if _is_http(url) else ""
            raise UserError(f"no file {url}{did_you_mean(name, folders[folder])}{'' if folders[folder] else why}")
        found += files
    return found


def _is_http(url: str) -> bool:
    return url.lower().startswith("http")


def _is_pattern(url: str) -> bool:
    return bool(re.search(r"[*\[]" if _is_http(url) else r"[*?\[]", url.rpartition("/")[2]))


def _folder(folder: str) -> dict[str, RemoteFile]:
    """The files of a folder by name; of http those in its manifest."""
    if _is_http(folder):
        entries = _manifest(folder)
        return {n: RemoteFile(f"{folder}/{n}", e["bytes"], e["checksum"], e["checksum"]) for n, e in entries.items()}
    listed = _call(folder, lambda fs: fs.ls(folder, detail=True, refresh=True))
    infos = {info["name"].rpartition("/")[2]: info for info in listed if info["type"] == "file"}
    entries = _manifest(folder) if MANIFEST in infos else {}
    files = {}
    for name, info in infos.items():
        entry = entries.get(name, {})
        if entry and entry["bytes"] != info["size"]:
            raise UserError(f"{folder}/{name} has {info['size']} bytes, and {MANIFEST} beside it says {entry['bytes']}")
        files[name] = RemoteFile(f"{folder}/{name}", info["size"], _version(info), entry.get("checksum", ""))
    return files


def _manifest(folder: str) -> dict[str, dict[str, Any]]:
    """name -> {bytes, checksum, ...} of the manifest in a folder; empty without one."""

    def read(fs: Any) -> bytes:
        try:
            return fs.cat_file(f"{folder}/{MANIFEST}")
        except FileNotFoundError:
            return b'{"shards": []}'

    try:
        return {shard["name"]: shard for shard in json.loads(_call(folder, read))["shards"] if shard["bytes"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/{MANIFEST} is not a manifest of shards ({error})") from error


def _head(url: str) -> RemoteFile:
    info = _call(url, lambda fs: fs.info(url))
    if info["size"] is None:
        raise UserError(f"{url}: its server does not say how large it is")
    return RemoteFile(url, info["size"], _version(info))


def _version(info: dict[str, Any]) -> str:
    """What of a listing changes with the content; not the time, which differs between the servers of a mirror."""
    return digest(json.dumps([info["size"], *(info.get(key) for key in ("ETag", "blob_id"))]), 8)


def _call(url: str, work: Callable[[Any], T]) -> T:
    """`work` on the file system of a URL, tried again while the connection is lost. Raises UserError with the file, the
    host, the tries and the cause."""
    fs, failures = _file_system(url)
    for attempt in range(1, TRIES + 1):
        try:
            return work(fs)
        except failures as error:
            cause, final = _cause(error, fs, url)
            last, pause = attempt == TRIES, PAUSE * 2 ** (attempt - 1)
            line = f"{url} on {_host(fs, url)}: {cause}"
            if final or last:
                raise UserError(line if final else f"{line} (tried {TRIES} times)") from error
            log.warning("%s; try %d of %d in %.0f s", line, attempt + 1, TRIES, pause)
            time.sleep(pause)
    raise AssertionError


def _file_system(url: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """(the file system of a URL, what it raises when it fails). Raises UserError for a missing package."""
    scheme = url.partition(":")[0].lower()
    options: dict[str, Any] = {}
    failures: tuple[type[Exception], ...]
    with needs(f"reading {scheme}://", SCHEMES[scheme]):
        import fsspec

        if scheme == "s3":
            from botocore.exceptions import BotoCoreError

            failures = (OSError, BotoCoreError)
            config = {"connect_timeout": 15, "read_timeout": SILENCE, "retries": {"max_attempts": 1}}
            options = {"config_kwargs": config}
        elif scheme == "hf":
            from huggingface_hub.errors import HfHubHTTPError

            failures = HfHubHTTPError.__bases__  # those of the HTTP client that this release has, and OSError
            options = {"block_size": 1 << 16}
        else:
            import aiohttp

            failures = (OSError, aiohttp.ClientError)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=15, sock_read=SILENCE)
            options = {"client_kwargs": {"trust_env": True, "timeout": timeout}}  # proxies, ~/.netrc
        return fsspec.filesystem(scheme, **options), failures


def _cause(error: Exception, fs: Any, url: str) -> tuple[str, bool]:
    """(why a call failed in a few words, whether no retry can help)."""
    behind = (_is_http(url) and error.__cause__) or error  # http calls everything a missing file
    status = getattr(behind, "status", None) or getattr(getattr(behind, "response", None), "status_code", None)
    words = redact(" ".join(str(behind).split())[:200]) or type(behind).__name__
    if isinstance(error, PermissionError) or status in REFUSED or "credentials" in words.lower():
        return f"access is refused ({words}): {_LOGIN[url.partition(':')[0].lower()]}", True
    if status in FINAL or (behind is error and isinstance(error, FileNotFoundError)):
        return f"there is no such file or folder{_closest(fs, url)}" if status in (None, 404) else words, True
    return f"{type(behind).__name__}: {words}", False


_LOGIN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; log in again where they have expired",
    "hf": "log in with `hf auth login`, or set HF_TOKEN",
} | dict.fromkeys(("http", "https"), "a name and password for this host belong into ~/.netrc")


def _closest(fs: Any, url: str) -> str:
    """The bucket with the closest name, where the buckets may be listed."""
    bucket = urlsplit(url).netloc
    if not url.startswith("s3:"):
        return ""
    try:
        buckets = [name for name in fs.ls("", detail=False) if name != bucket]
    except OSError:
        return ""
    near = did_you_mean(bucket, buckets)
    return near and f"; bucket {bucket}{near}"


def _host(fs: Any, url: str) -> str:
    scheme = url.partition(":")[0].lower()
    where = url if scheme.startswith("http") else fs.endpoint if scheme == "hf" else fs.s3.meta.endpoint_url
    return urlsplit(where).netloc
