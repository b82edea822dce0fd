"""The main job, end to end, on one machine in minutes."""

from hf_sparse_moe.quickstart.story import QuickstartOptions, run_quickstart


__all__ = ["QuickstartOptions", "run_quickstart"]
