"""Fused kernels for the loss head of preference training.

The losses are those of Reward-aware Preference Optimization (RPO, arXiv 2502.00203).
"""

from .objectives import RPOObjective
from .ops.labels import shift_labels
from .ops.linear_rpo_loss import linear_rpo_loss
from .ops.linear_token_logps import linear_token_logps, linear_token_logps_and_entropy
from .ops.output import RPOOutput
from .ops.preference import preference_loss, sequence_logps
from .ops.ranks import gather_responses
from .ops.rpo_loss import rpo_loss
from .ops.token_logps import token_logps, token_logps_and_entropy

__version__ = "0.2.0"

__all__ = [
    "RPOObjective",
    "RPOOutput",
    "gather_responses",
    "linear_rpo_loss",
    "linear_token_logps",
    "linear_token_logps_and_entropy",
    "preference_loss",
    "rpo_loss",
    "sequence_logps",
    "shift_labels",
    "token_logps",
    "token_logps_and_entropy",
]
