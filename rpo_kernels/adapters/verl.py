"""A backend for verl's fused log-probabilities and entropies:

    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=rpo_kernels

verl imports this module in every worker, through the entry points of the group `verl.plugins`.
Other backends are unchanged. Tested with verl 0.9.1, for the engines whose models call
`FusedLinearForPPO` (FSDP).
"""

from __future__ import annotations

import verl.utils.experimental.torch_functional as functions
from torch import Tensor, nn
from verl.models.transformers import monkey_patch

from rpo_kernels import linear_token_logps_and_entropy

NAME = "rpo_kernels"

_patch_forward = monkey_patch.patch_forward_with_backends


class FusedLinearForPPO(functions.FusedLinearForPPO):
    """verl's module with one more backend."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__(chunk_size, "torch" if impl_backend == NAME else impl_backend)
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,  # [..., H]
        vocab_weights: Tensor,  # [V, H]
        input_ids: Tensor,  # [...], aligned with hidden_states
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies `[...]`, in nats."""
        if self.impl_backend != NAME:
            return super().forward(hidden_states, vocab_weights, input_ids, temperature)
        return linear_token_logps_and_entropy(
            hidden_states, vocab_weights, input_ids, temperature=temperature
        )


def patch_forward_with_backends(
    model: nn.Module, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
) -> None:
    """Patch a model as verl does; our backend uses the forward of verl's `torch` backend."""
    forward_of = "torch" if fused_kernels_backend == NAME else fused_kernels_backend
    _patch_forward(model, use_fused_kernels, forward_of)
    if use_fused_kernels and fused_kernels_backend == NAME:
        vars(model)["_verl_fused_kernels_backend"] = NAME


functions.FusedLinearForPPO = FusedLinearForPPO
monkey_patch.patch_forward_with_backends = patch_forward_with_backends
