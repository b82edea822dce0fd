"""Callbacks for `transformers.Trainer`."""

from .balance_loss import BalanceLossCallback
from .leading_callback import add_leading_callback


__all__ = ["BalanceLossCallback", "add_leading_callback"]
