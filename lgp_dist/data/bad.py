"""Images that could not be decoded: named once, counted by epoch; too many stop the run."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from lgp_dist.data.shards.decode import BadImage
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.errors import UserError

log = logging.getLogger("lgp")


class BadSamples:
    """The bad samples that one rank met, counted by epoch: in an epoch every sample comes once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reasons: dict[int, str] = {}
        """Sample -> what is wrong with it, in the order they were met."""
        self._here: Counter[int] = Counter()
        self._everywhere: Counter[int] = Counter()
        self._last = ""

    def note(self, index: ShardIndex, epoch: int, found: Sequence[tuple[int, BadImage]]) -> None:
        """Counts those of a batch; UserError where this rank alone has more than the limit in an epoch."""
        for sample, error in found:
            if sample not in self.reasons:
                self.reasons[sample] = error.reason
                log.warning("bad sample: %s: %s", index.describe(sample), error.reason)
            self._here[epoch] += 1
            self._last = str(error)
            if self._here[epoch] > self.limit:
                self._stop(self._here[epoch], epoch)

    def check_all(self, steps: Mapping[int, int], epoch_of: Callable[[int], int]) -> None:
        """Adds the counts of all ranks by step; UserError where an epoch has more than the limit."""
        for step, count in steps.items():
            epoch = epoch_of(step)
            self._everywhere[epoch] += count
            if self._everywhere[epoch] > self.limit:
                self._stop(self._everywhere[epoch], epoch)

    def counts(self) -> dict[str, int]:
        """Bad samples of all ranks by epoch, for JSON."""
        return {str(epoch): count for epoch, count in self._everywhere.items()}

    def restore(self, counts: Mapping[str, int]) -> None:
        """Continues from the counts of an earlier start."""
        self._everywhere = Counter({int(epoch): count for epoch, count in counts.items()})

    def _stop(self, count: int, epoch: int) -> None:
        last = f"; the last of this rank: {self._last}" if self._last else ": the log names them."
        raise UserError(f"{count} images of epoch {epoch} are bad, and data.max_bad allows {self.limit}{last}")
