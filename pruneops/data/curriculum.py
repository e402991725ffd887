"""From pictures of which only what answers hang on is shown, to whole ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pruneops.data.draws import Draws
from pruneops.data.records import SampleDataset
from pruneops.data.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor

#: Up to the first of these shares of a data set nothing but evidence is shown, from the second on all may be.
RAMP = (0.3, 0.8)


class CurriculumDataset(SampleDataset):
    """Pictures with the patches that are shown of them, more and more from the first sample to the last.

    What an answer hangs on is always shown. Of the other patches with something on them it is a share, drawn evenly
    between none and a bound that rises from 0 to 1 with the number of the sample, and of the empty ones that share of
    `background_share`. A model learns to read first and then to find, and a step costs a fraction of one on whole
    pictures (the idea of Li et al., "Scaling Language-Image Pre-training via Masking", arXiv 2212.00794, with labels in
    the place of chance). The data set goes through the samples several times and has to be taken in its order; what is
    shown of one of its entries is always the same.

    Parameters
    ----------
    samples : Samples
        Pictures, no clips.
    processor : LlavaProcessor
        As for `SampleDataset`.
    background_share : float
        In [0, 1].
    passes : int
        How often every sample occurs.

    Raises
    ------
    ValueError
        If the share is not in its range, or the passes are less than one.
    """

    def __init__(self, samples: Samples, processor: Any, background_share: float = 0.2, passes: int = 1) -> None:
        if not 0 <= background_share <= 1:
            raise ValueError(f"background_share: got {background_share}, expected a share in [0, 1]")
        if passes < 1:
            raise ValueError(f"passes: got {passes}, expected at least 1")
        super().__init__(samples, processor)
        self.background_share, self.passes = background_share, passes

    def __len__(self) -> int:
        return self.passes * len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """What `SampleDataset` gives of sample ``index % len(samples)``, and ``shown``, ``(patches,)`` bool."""
        return {**super().__getitem__(index % len(self.samples)), "shown": self.shown(index)}

    def bound(self, index: int) -> float:
        """The largest share of the patches beside the evidence that may be shown of an entry."""
        first, last = RAMP
        return min(1.0, max(0.0, (index / len(self) - first) / (last - first)))

    def shown(self, index: int) -> Tensor:
        """``(patches,)`` bool."""
        turn, picture = divmod(index, len(self.samples))
        sample = self.samples[picture]
        covered = torch.from_numpy(sample.labels()["shape"] != 0).flatten()
        draws, steps = Draws(sample.name, "shown", turn), 1 << 16
        share = self.bound(index) * draws.below(steps) / steps
        drawn = torch.from_numpy(draws.array(steps, len(covered))) / steps
        shown = drawn < share * torch.where(covered, 1.0, self.background_share)
        for question in range(len(sample.turns)):
            shown[sample.evidence(question)] = True
        return shown
