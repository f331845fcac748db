"""The monitor of broken samples: names each one in the log, and ends a run that meets too many."""

from collections import Counter
from collections.abc import Iterable

from fovlm import distributed
from fovlm.data.packing import Batch, SampleIssue
from fovlm.train.logger import Logger

FEW = 1000  # samples: among fewer, a single broken one would exceed any reasonable fraction


class BadSamples:
    """Broken samples that substitutes replaced. More than `max_fraction` of the samples seen ends the run."""

    def __init__(self, max_fraction: float):
        self.max_fraction = max_fraction
        self.unreported: list[SampleIssue] = []  # of this rank
        self.counts: Counter[tuple[str, str]] = Counter()  # of this rank, since the run started or resumed

    def add(self, batches: Iterable[Batch]) -> None:
        """Note the broken samples of this rank's packs."""
        issues = [issue for batch in batches for issue in batch.bad]
        self.unreported += issues
        self.counts.update((issue.source, issue.cause) for issue in issues)

    def report(self, seen: int, logger: Logger, step: int) -> None:
        """Log the broken samples of all ranks: each by name, and how many by (source, cause).

        `seen` are the samples of all ranks since the run started or resumed. Every rank must call it. Raises
        SharedError past the limit.
        """
        for issue in (issue for part in distributed.gather(self.unreported) for issue in part):
            logger.info(f"{issue.source}: sample {issue.key} in {issue.shard} is replaced: {issue.cause}")
        self.unreported = []
        total: Counter[tuple[str, str]] = sum(distributed.gather(self.counts), start=Counter())
        if total:
            logger.log(step, {f"bad/{source}/{cause}": n for (source, cause), n in total.items()})
        if total.total() > self.max_fraction * max(seen, FEW):
            causes = ", ".join(f"{n} x {source}: {cause}" for (source, cause), n in total.most_common(5))
            raise distributed.SharedError(
                f"{total.total()} of {seen} samples were broken ({causes}), more than "
                f"data.max_bad_fraction={self.max_fraction} allows; log.txt names shard and key of each"
            )
