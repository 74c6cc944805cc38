"""The quant room: which bits, chosen from what a model really reads. `quantize` is its verb."""

from duomo.quant.pipeline import Progress, quantize
from duomo.quant.plan import BitPlan, build_plan

__all__ = ["BitPlan", "Progress", "build_plan", "quantize"]
