"""The published data sets that `fovlm prepare` reads, one module each."""

from fovlm.errors import UserError, did_you_mean
from fovlm.prepare.job import RawSource
from fovlm.prepare.sources import benchmarks, cauldron, openvid, rlaif_v, scenes, smoltalk, videos, webvid

SOURCES: dict[str, RawSource] = {
    module.SOURCE.name: module.SOURCE for module in (openvid, webvid, cauldron, smoltalk, rlaif_v, videos, scenes)
} | {source.name: source for source in benchmarks.SOURCES}


def find_source(name: str) -> RawSource:
    """Raises UserError for an unknown source, naming those there are."""
    if name not in SOURCES:
        raise UserError(f"no source '{name}'{did_you_mean(name, SOURCES)}: there are {', '.join(SOURCES)}, and val")
    return SOURCES[name]
