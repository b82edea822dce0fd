"""Looking inside a mixture: which expert serves what."""

from .pictures import expert_load_table, plot_expert_load


__all__ = ["expert_load_table", "plot_expert_load"]
