"""What each labelled token costs: the negative logarithm of its label's probability."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """[T] in fp32; zero where the label is IGNORE."""
    return F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORE, reduction="none")
