"""What training a mixture on many GPUs needs, by calculation: memory a rank, bytes moved, time a step, by layout."""

from .layouts import Layout
from .machine import MACHINES, Machine, make_machine
from .plan import LayoutPlan, plan_layouts
from .shape import ModelShape, read_shape
from .workload import Workload


__all__ = [
    "MACHINES",
    "Layout",
    "LayoutPlan",
    "Machine",
    "ModelShape",
    "Workload",
    "make_machine",
    "plan_layouts",
    "read_shape",
]
