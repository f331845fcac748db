"""All sources by name."""

from fovlm.errors import UserError, nearest
from fovlm.prepare.job import Source
from fovlm.prepare.sources import benchmarks, cauldron, openvid, rlaif_v, smoltalk, videos, webvid

SOURCES: dict[str, Source] = {
    module.SOURCE.name: module.SOURCE for module in (openvid, webvid, cauldron, smoltalk, rlaif_v, videos)
} | {source.name: source for source in benchmarks.SOURCES}


def source_of(name: str) -> Source:
    """Raises UserError naming the sources there are."""
    if name not in SOURCES:
        raise UserError(f"no source '{name}'{nearest(name, SOURCES)}: there are {', '.join(SOURCES)}, and val")
    return SOURCES[name]
