"""verl: its plugins, its fused forward and a step of its FSDP engine (unsharded)."""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import verl.utils.experimental.torch_functional as functions
from verl.models.transformers import monkey_patch
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp import transformer_impl

from rpo_kernels import RPOObjective

from ..snippets import SNIPPETS
from ..tiny_models import llama

monkey_patch.is_trl_available = lambda: False  # ours is newer than verl can use
transformer_impl.get_device_id = lambda: "cpu"  # it knows GPUs and NPUs
BETA, LENGTHS, PROMPTS = 0.1, [9, 6, 7, 8], [3, 3, 2, 2]


class Engine(transformer_impl.FSDPEngineWithLMHead):
    """A whole model, on one process."""

    def __init__(self, module):
        self.module = module
        self.use_ulysses_sp = self.pad_to_length = False
        self.engine_config = SimpleNamespace(
            entropy_checkpointing=False, entropy_from_logits_with_chunking=False
        )
        self.compute_entropy_from_logits = transformer_impl.verl_F.entropy_from_logits
        self._autocast_dtype = torch.float32

    def get_data_parallel_group(self):
        return None


def batch(use_fused_kernels: bool, use_remove_padding: bool):
    torch.manual_seed(0)
    jagged = lambda parts: torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    ids = [torch.randint(4, 60, (n,)) for n in LENGTHS]
    scored = [(torch.arange(n) >= p).long() for n, p in zip(LENGTHS, PROMPTS)]
    tensors = {
        "input_ids": jagged(ids),
        "position_ids": jagged([torch.arange(n) for n in LENGTHS]),
        "loss_mask": jagged(scored),
        "ref_logps": -torch.rand(4) * 20,
    }
    options = {
        "temperature": 0.8,
        "calculate_entropy": True,
        "global_batch_size": 4,
        "dp_size": 1,
        "use_fused_kernels": use_fused_kernels,
        "use_remove_padding": use_remove_padding,
    }
    return tu.get_tensordict(tensors, options)


def step(backend: str | None, use_remove_padding: bool, loss_fn) -> dict[str, torch.Tensor]:
    model = llama()
    forward = type(model).forward
    monkey_patch.apply_monkey_patch(
        model,
        use_remove_padding=use_remove_padding,
        use_fused_kernels=backend is not None,
        fused_kernels_backend=backend,
    )
    try:
        micro_batch = batch(backend is not None, use_remove_padding)
        loss, found = Engine(model).forward_step(micro_batch, loss_fn, forward_only=False)
        loss.backward()
    finally:
        type(model).forward = forward  # verl patches the class
    output = found["model_output"]
    gradients = {name: x.grad for name, x in model.named_parameters()}
    return gradients | {
        "loss": loss.detach(),
        "log_probs": output["log_probs"].values(),
        "entropy": output["entropy"].values(),
    }


def token_loss(model_output, data, dp_group=None):
    """Reads log-probabilities and entropies of all tokens, as PPO does of the response's."""
    logps, entropies = model_output["log_probs"].values(), model_output["entropy"].values()
    return (logps * torch.linspace(-1, 1, len(logps)) - 0.1 * entropies).mean(), {}


def dpo_loss(model_output, data, dp_group=None):
    """In verl's terms, without our functions."""
    scored = torch.roll(data["loss_mask"].values(), -1)
    parts = (model_output["log_probs"].values() * scored).split(LENGTHS)
    rewards = BETA * (torch.stack([x.sum() for x in parts]) - data["ref_logps"])
    return -F.logsigmoid(rewards[::2] - rewards[1::2]).mean(), {}


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, x in theirs.items():
        assert x.any(), name
        error = (ours[name] - x).abs().max() / x.abs().max()
        assert error < 1e-4, f"{name}: {error}"


def main(work: Path) -> None:
    assert functions.FusedLinearForPPO.__module__ == "rpo_kernels.adapters.verl"
    calls = []
    ours = functions.FusedLinearForPPO.forward
    functions.FusedLinearForPPO.forward = lambda self, *args, **options: (
        calls.append(self.impl_backend) or ours(self, *args, **options)
    )
    for use_remove_padding in (False, True):
        theirs = step("torch", use_remove_padding, token_loss)
        compare(step("rpo_kernels", use_remove_padding, token_loss), theirs)
    assert calls == ["torch", "rpo_kernels"] * 2

    names: dict = {}
    exec(SNIPPETS["verl"][0], names)
    worker = SimpleNamespace()
    worker.set_loss_fn = lambda loss_fn: setattr(worker, "loss_fn", loss_fn)
    names["use_rpo"](worker, RPOObjective.dpo(BETA), responses=2)
    for use_remove_padding in (False, True):
        theirs = step(None, use_remove_padding, dpo_loss)
        # verl's fused forward has another, unread, value at the end of a padded sequence
        del theirs["log_probs"]
        for backend in (None, "rpo_kernels"):
            compare(step(backend, use_remove_padding, worker.loss_fn), theirs)
