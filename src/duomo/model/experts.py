"""What stands between attention and the residual: a dense MLP, or two banks of routed experts and the shared.

Each token goes to the bank of its own modality, chosen by rows prepared with the batch; the shared experts
see every token. A batch of text alone never touches a vision expert's weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from duomo import kernels
from duomo.model.config import BankConfig, ModelConfig
from duomo.model.inputs import Batch
from duomo.model.layers import Linear


class MLP(nn.Module):
    """down(silu(gate x) * up x): layer 0, the dense sibling, and the fused shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int, has_bias: bool) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, intermediate_size, has_bias)
        self.up = Linear(hidden_size, intermediate_size, has_bias)
        self.down = Linear(intermediate_size, hidden_size, has_bias)

    def forward(
        self, hidden_TD: Tensor, batch: Batch | None = None, chosen_TK: Tensor | None = None
    ) -> Tensor:
        return of_kept(self._run, None if batch is None else batch.mixed_rows, hidden_TD)

    def _run(self, hidden_TD: Tensor) -> Tensor:
        return self.down(kernels.gated(self.gate(hidden_TD), self.up(hidden_TD)))  # type: ignore[no-any-return]


class Router(nn.Module):
    """fp32 whatever the model's dtype: weight [E, D] and the correction bias [E]."""

    def __init__(self, config: ModelConfig, bank: BankConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(bank.num_experts, config.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(bank.num_experts, dtype=torch.float32), requires_grad=False)
        self.num_chosen = config.num_chosen
        self.norm_min = config.router_norm_min

    def forward(self, hidden_TD: Tensor) -> kernels.Routing:
        return kernels.route(hidden_TD, self.weight, self.bias, self.num_chosen, self.norm_min)


class ExpertBank(nn.Module):
    """E experts of one modality with their router. `gate_up` is [E, 2F, D], gate rows first."""

    def __init__(self, config: ModelConfig, bank: BankConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, bank.expert_size
        self.router = Router(config, bank)
        self.gate_up = nn.Parameter(torch.empty(bank.num_experts, 2 * size, width))
        self.down = nn.Parameter(torch.empty(bank.num_experts, width, size))

    def forward(
        self,
        hidden_TD: Tensor,
        chosen_TK: Tensor | None = None,
        rows: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """`kept`: the only rows of the result that matter; the others come out as zeros."""
        return self.run_with(self.gate_up, self.down, hidden_TD, chosen_TK, rows, kept)

    def run_with(
        self,
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
        hidden_TD: Tensor,
        chosen_TK: Tensor | None = None,
        rows: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Its choice of experts over these matrices: its own, or with an adapter folded in."""
        routing = self.router(hidden_TD)
        note_choice(routing.expert_ids_TK, chosen_TK, rows)

        def run(own_XD: Tensor, expert_ids_XK: Tensor, weights_XK: Tensor) -> Tensor:
            return kernels.experts(own_XD, expert_ids_XK, weights_XK, gate_up_EFD, down_EDF)

        return of_kept(run, kept, hidden_TD, routing.expert_ids_TK, routing.weights_TK)


def note_choice(expert_ids_TK: Tensor, chosen_TK: Tensor | None, rows: Tensor | None) -> None:
    """Writes a bank's choice into the rows of `chosen_TK` that are its tokens (None: all), if asked for."""
    if chosen_TK is not None:
        chosen_TK[slice(None) if rows is None else rows] = expert_ids_TK


def of_kept(run: Callable[..., Tensor], kept: Tensor | None, hidden_TD: Tensor, *others: Tensor) -> Tensor:
    """`run` over tokens and what else has a row for each: of all, or of the `kept` rows, zeros elsewhere."""
    if kept is None:
        return run(hidden_TD, *others)
    own = (x.index_select(0, kept) for x in (hidden_TD, *others))
    return torch.zeros_like(hidden_TD).index_copy(0, kept, run(*own))


class Experts(nn.Module):
    """The mixture of one layer: text bank, vision bank where there is one, shared experts where there are."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.text_experts is not None, "an expert layer needs a text bank"
        self.text = ExpertBank(config, config.text_experts)
        self.vision = ExpertBank(config, config.vision_experts) if config.vision_experts else None
        has_shared = config.shared_size > 0
        self.shared = MLP(config.hidden_size, config.shared_size, config.use_bias) if has_shared else None

    def forward(self, hidden_TD: Tensor, batch: Batch, chosen_TK: Tensor | None = None) -> Tensor:
        """`chosen_TK`, where given, is filled with the experts each token goes to."""
        routed_TD = self._routed(hidden_TD, batch, chosen_TK)
        if self.shared is None:
            return routed_TD
        rows = batch.mixed_rows
        if rows is None:
            return routed_TD + self.shared(hidden_TD)  # type: ignore[no-any-return]
        return routed_TD.index_add(0, rows, self.shared(hidden_TD.index_select(0, rows)))

    def _routed(self, hidden_TD: Tensor, batch: Batch, chosen_TK: Tensor | None) -> Tensor:
        text_rows, vision_rows = batch.text_rows, batch.vision_rows
        if self.vision is None or not vision_rows.numel():
            return _asked(self.text, batch, hidden_TD, chosen_TK)
        if not text_rows.numel():
            return _asked(self.vision, batch, hidden_TD, chosen_TK)
        text_TD, vision_TD = (hidden_TD.index_select(0, rows) for rows in (text_rows, vision_rows))
        out_TD = torch.zeros_like(hidden_TD)
        out_TD = out_TD.index_copy(0, text_rows, _asked(self.text, batch, text_TD, chosen_TK, text_rows))
        return out_TD.index_copy(
            0, vision_rows, _asked(self.vision, batch, vision_TD, chosen_TK, vision_rows)
        )


def _asked(
    bank: nn.Module, batch: Batch, own_TD: Tensor, chosen_TK: Tensor | None, rows: Tensor | None = None
) -> Tensor:
    """A bank's part of a mixture; `rows` of the batch are its tokens (None: all)."""
    if batch.mixed_rows is None:
        return bank(own_TD, chosen_TK, rows)  # type: ignore[no-any-return]
    kept = batch.mixed_rows
    if rows is not None:
        is_wanted_T = torch.zeros(len(batch.ids_T), dtype=torch.bool, device=rows.device)
        kept = is_wanted_T.index_fill(0, kept, True)[rows].nonzero().flatten()
    return bank(own_TD, chosen_TK, rows, kept)  # type: ignore[no-any-return]
