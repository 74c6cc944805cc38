"""Pictures with questions whose answers are known by construction: what the embedded model learns from."""

from duomo.tasks.handwriting import Handwriting, load_handwriting
from duomo.tasks.scene import Example, Split, Turn, split_of

__all__ = ["Example", "Handwriting", "Split", "Turn", "load_handwriting", "split_of"]
