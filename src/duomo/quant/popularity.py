"""How often each expert is chosen in a synthetic model: evenly, or by a power law as in trained ones.

A trained mixture has favourites. Published counts of OLMoE-1B-7B over 50,000 tokens of five domains (issue
864 of JustVugg/colibri, 2026) give half of its choices to a quarter of its experts and three quarters to half
of them: popularity falls with rank about as rank^-0.65. That ERNIE-4.5's routing looks like this is an
assumption: its counts are not published. Only popularity is imitated, not that one topic keeps choosing the
same experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LIKE_TRAINED = 0.65
"""Exponent of the counts above: of 64 experts the most popular quarter takes 0.53, half of them 0.74."""
_NUM_TOKENS = 4096  # simulated; popularity is met to within about 0.01
_ROUNDS = 300


def popularity(num_experts: int, num_chosen: int, exponent: float) -> Floats:
    """Share of tokens that choose each expert [E], the most popular first; sums to `num_chosen`.

    Proportional to rank^-exponent, and at most 0.95, so that no expert is chosen by every token.
    """
    wanted = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    low, high = 0.0, num_chosen / wanted[-1]
    for _ in range(60):  # what one expert cannot take goes to the others
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(0.95, middle * wanted).sum() < num_chosen else (low, middle)
    shares: Floats = np.minimum(0.95, high * wanted)
    return shares


def correction_bias(
    share_E: Floats, num_chosen: int, logit_deviation: float, seed: int
) -> npt.NDArray[np.float32]:
    """The router bias [E] under which experts are chosen as often as `share_E` says.

    For logits that are independent normals of `logit_deviation`, as random routers give: softmax scores plus
    bias, the largest `num_chosen` win. Found by simulation: a bias rises while its expert is chosen too
    rarely.
    """
    num_experts = len(share_E)
    logits = np.random.default_rng(seed).normal(0, logit_deviation, (_NUM_TOKENS, num_experts))
    scores = np.exp(logits)
    scores /= scores.sum(1, keepdims=True)
    bias = np.zeros(num_experts)
    best, found = np.inf, bias
    for step in np.geomspace(1.0, 0.02, _ROUNDS) / num_experts:
        chosen = np.argpartition(-(scores + bias), num_chosen - 1, axis=1)[:, :num_chosen]
        miss = share_E - np.bincount(chosen.ravel(), minlength=num_experts) / _NUM_TOKENS
        if np.abs(miss).max() < best:
            best, found = np.abs(miss).max(), bias
        bias = bias + step * miss / np.maximum(share_E, 0.02) ** 0.5
    centred: npt.NDArray[np.float32] = (found - found.mean()).astype(np.float32)
    return centred
