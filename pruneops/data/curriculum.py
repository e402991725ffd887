"""From pictures of which only what answers hang on is shown, to whole ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pruneops.data.draws import Draws
from pruneops.data.records import SampleDataset
from pruneops.data.samples import Sample, Samples

if TYPE_CHECKING:
    from torch import Tensor

#: See `CurriculumDataset`.
RAMP = (0.3, 0.8)


class CurriculumDataset(SampleDataset):
    """Pictures with the patches that are shown of them, more and more from the first sample to the last.

    What an answer hangs on is always shown. Of the other patches with something on them it is a share, drawn evenly
    between none and a bound that rises from 0 to 1 with the number of the sample, and of the empty ones that share of
    `background_share`. A model learns to read first and then to find, and a step costs a fraction of one on whole
    pictures (the idea of Li et al., "Scaling Language-Image Pre-training via Masking", arXiv 2212.00794, with labels in
    the place of chance). The data set goes through the samples several times, each time with other questions, lest the
    answers be learnt by heart, and has to be taken in its order; one of its entries is always the same.

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
    ramp : (float, float)
        Up to the first of these shares of its entries nothing but evidence is shown, from the second on all may be;
        (0, 0) is no curriculum.

    Raises
    ------
    ValueError
        If a share is not in its range, or the passes are less than one.
    """

    def __init__(
        self,
        samples: Samples,
        processor: Any,
        background_share: float = 0.2,
        passes: int = 1,
        ramp: Sequence[float] = RAMP,
    ) -> None:
        if not 0 <= background_share <= 1:
            raise ValueError(f"background_share: got {background_share}, expected a share in [0, 1]")
        if passes < 1:
            raise ValueError(f"passes: got {passes}, expected at least 1")
        if len(ramp) != 2 or not 0 <= ramp[0] <= ramp[1] <= 1:
            raise ValueError(f"ramp: got {ramp}, expected two shares in [0, 1], the first no larger than the second")
        super().__init__(samples, processor)
        self.background_share, self.passes, self.ramp = background_share, passes, tuple(ramp)
        self._drawn = [samples.drawn_again(turn) for turn in range(passes)]

    def __len__(self) -> int:
        return self.passes * len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """What `SampleDataset` gives of a sample, and ``shown``, ``(patches,)`` bool."""
        sample = self.sample(index)
        return {**self._encoded(sample, index, sample.pictures), "shown": self.shown(index)}

    def sample(self, index: int) -> Sample:
        """The sample of an entry: number ``index % len(samples)``, with other questions in every pass."""
        turn, picture = divmod(index, len(self.samples))
        return self._drawn[turn][picture]

    def text(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` of an entry, without rendering its picture."""
        sample = self.sample(index)
        side = sample.grid * sample.patch_size
        encoded = self._encoded(sample, index, [np.zeros((side, side, 3), dtype=np.uint8)])
        return {name: encoded[name] for name in ("input_ids", "labels")}

    def bound(self, index: int) -> float:
        """The largest share of the patches beside the evidence that may be shown of an entry."""
        (first, last), share = self.ramp, index / len(self)
        return 1.0 if share >= last else max(0.0, (share - first) / (last - first))

    def shown(self, index: int) -> Tensor:
        """``(patches,)`` bool."""
        sample, turn = self.sample(index), index // len(self.samples)
        covered = torch.from_numpy(sample.labels()["shape"] != 0).flatten()
        draws, steps = Draws(sample.name, "shown", turn), 1 << 16
        share = self.bound(index) * draws.below(steps) / steps
        drawn = torch.from_numpy(draws.array(steps, len(covered))) / steps
        shown = drawn < share * torch.where(covered, 1.0, self.background_share)
        for question in range(len(sample.turns)):
            shown[sample.evidence(question)] = True
        return shown
