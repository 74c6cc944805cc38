"""How weights lie on disk, and every map between dialects. Reading never runs what it reads."""

from duomo.checkpoints.load import load_config, load_model, read_config
from duomo.checkpoints.save import save_model

__all__ = ["load_config", "load_model", "read_config", "save_model"]
