"""Our losses against TRL's own code on made-up log-probabilities; skipped where it is not installed.

TRL 1.16 computes DPO inside its trainer, so the trainer's method is called with a model that says what we
want. `pip install trl` in an environment with duomo's test dependencies, then `pytest -m oracle`.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from duomo.train.grpo import kl, surrogate
from duomo.train.losses import preference_loss
from duomo.train.losses.preference import Pairs, Settings

pytestmark = pytest.mark.oracle
trl = pytest.importorskip("trl", reason="TRL is not installed here")
NUM_PAIRS, LENGTH = 5, 9
GENERATOR = torch.Generator().manual_seed(0)


def made_up() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of policy and reference, and which tokens are answers: [2 pairs, length]."""
    mask = torch.zeros(2 * NUM_PAIRS, LENGTH)
    for row in range(2 * NUM_PAIRS):
        mask[row, LENGTH - 2 - row % 6 :] = 1
    policy, reference = (-torch.rand(2 * NUM_PAIRS, LENGTH, generator=GENERATOR) * 4 * mask for _ in range(2))
    return policy, reference, mask


def outputs(log_probs: torch.Tensor) -> SimpleNamespace:
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo_and_its_relatives(kind: str) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    policy, reference, mask = made_up()
    lengths = mask.sum(1)
    trainer = MagicMock(spec=DPOTrainer)
    trainer.configure_mock(
        beta=0.3, loss_types=[kind], loss_weights=[1.0], aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
    )  # fmt: skip
    padded = torch.cat((torch.zeros(len(mask), 1), mask), dim=1).long()
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": padded, "attention_mask": padded, "completion_mask": padded,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs(policy), inputs, return_outputs=False)
    sums = policy.sum(1).chunk(2)
    pairs = Pairs(*sums, chosen, rejected, *lengths.chunk(2))
    assert torch.allclose(preference_loss(kind, pairs, Settings(beta=0.3)), theirs, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(smoothing: float) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    policy, _, mask = made_up()
    means = (policy.sum(1) / mask.sum(1)).chunk(2)
    trainer = SimpleNamespace(
        alpha=0.0, beta=2.0, loss_type="simpo", simpo_gamma=0.5, label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs = CPOTrainer.cpo_loss(trainer, *means)[0].mean()
    zeros = torch.zeros(NUM_PAIRS)
    pairs = Pairs(*policy.sum(1).chunk(2), zeros, zeros, *mask.sum(1).chunk(2))
    ours = preference_loss("simpo", pairs, Settings(2.0, label_smoothing=smoothing, simpo_gamma=0.5))
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_grpo(beta: float) -> None:
    """Clipped surrogate and KL over all tokens alike, as TRL's `bnpo`."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    now, drawn, mask = made_up()
    before = now + 0.2 * torch.randn(now.shape, generator=GENERATOR) * mask
    gains = torch.randn(len(now), generator=GENERATOR)
    trainer = MagicMock(spec=GRPOTrainer)
    trainer.configure_mock(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
        beta=beta, loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.2, use_vllm=False,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, aux_loss_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        accelerator=SimpleNamespace(
            gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, torch.zeros_like(now), None),
    )  # fmt: skip
    ids = mask.long()
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": ids,
        "advantages": gains, "old_per_token_logps": drawn, "ref_per_token_logps": before,
    }  # fmt: skip
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    chosen = mask.bool()
    gain_L = gains[:, None].expand_as(now)[chosen]
    ours = -surrogate(now[chosen], drawn[chosen], gain_L, 0.2) + beta * kl(now[chosen], before[chosen])
    assert torch.allclose(ours.mean(), theirs, atol=1e-6)
