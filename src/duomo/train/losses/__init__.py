"""Every loss of the kit: router terms for each modality apart, tokens, preferences.

Each is a plain function of tensors that returns one scalar, so that a test can retype it by hand.
"""

from duomo.train.losses.preference import PREFERENCES, preference_loss
from duomo.train.losses.router import (
    balance_loss,
    nudge_bias,
    orthogonality_loss,
    orthogonality_step,
    router_z_loss,
    usage_of,
)
from duomo.train.losses.tokens import sequence_log_probs, summed_token_loss, token_balanced_loss, token_loss

__all__ = [
    "PREFERENCES",
    "balance_loss",
    "nudge_bias",
    "orthogonality_loss",
    "orthogonality_step",
    "preference_loss",
    "router_z_loss",
    "sequence_log_probs",
    "summed_token_loss",
    "token_balanced_loss",
    "token_loss",
    "usage_of",
]
