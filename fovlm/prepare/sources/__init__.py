"""What `fovlm prepare` reads: general forms (table, llava, messages), published data sets, benchmarks, scenes."""

from fovlm.errors import UserError, did_you_mean
from fovlm.prepare.job import Job, RawSource
from fovlm.prepare.sources import benchmarks, cauldron, llava, messages, rlaif_v, scenes, table

GENERAL = ("table", "llava", "messages")
SOURCES: dict[str, RawSource] = {
    source.name: source
    for source in (
        llava.SOURCE, messages.SOURCE, table.VIDEOS, table.OPENVID, *cauldron.SOURCES, messages.SMOLTALK,
        rlaif_v.SOURCE, scenes.SOURCE, *benchmarks.SOURCES,
    )
}  # fmt: skip


def source_of(job: Job) -> RawSource:
    """The source of a job. Raises UserError for an unknown one, naming those there are."""
    if job.source == "table":
        return table.source_for(job)
    if job.source not in SOURCES:
        names = ["table", *SOURCES, "val"]
        raise UserError(f"no source '{job.source}'{did_you_mean(job.source, names)}: there are {', '.join(names)}")
    return SOURCES[job.source]
