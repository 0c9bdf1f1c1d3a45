"""RPO with an lm_head whose vocabulary is sharded over ranks, none of which holds all logits.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py    # on CPUs (gloo) and GPUs (NCCL)

The backbone is small and replicated, to keep the example about the head. The gradient of the hidden
states is summed over the ranks, so it is the same on each, and the replicas stay equal without
further communication. In a Megatron model, whose layers sum that gradient themselves, pass
`reduce_dhidden=False`.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

from rpo_kernels import RPOObjective, linear_rpo_loss, linear_token_logps

PROMPT, RESPONSE, K = 4, 12, 4  # tokens, tokens, responses per prompt


class Backbone(torch.nn.Module):
    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.layer = torch.nn.GRU(width, width, batch_first=True)

    def forward(self, ids):
        return self.layer(self.embedding(ids))[0]


def shard(vocabulary: int, rank: int, ranks: int) -> slice:
    """Return the rows of the head on a rank; any consecutive rows would do."""
    bounds = [vocabulary * r // ranks for r in range(ranks + 1)]
    return slice(bounds[rank], bounds[rank + 1])


def batch(vocabulary: int, prompts: int, device: torch.device):
    """Return (ids, labels, rewards) of K responses per prompt; even tokens are rewarded."""
    ids = torch.randint(vocabulary, (prompts, K, PROMPT + RESPONSE), device=device)
    ids[..., :PROMPT] = ids[:, :1, :PROMPT]
    labels = ids.roll(-1, 2)  # labels[t] is the token that position t predicts
    labels[..., : PROMPT - 1], labels[..., -1] = -100, -100
    rewards = (ids[..., PROMPT:] % 2 == 0).float().mean(2)
    return ids.flatten(0, 1), labels.flatten(0, 1), rewards.flatten()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vocabulary", type=int, default=1001, help="not divisible by the ranks, if you like"
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=8, help="per step")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()

    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same replica and the same batches on all ranks
    backbone = Backbone(args.vocabulary, args.width).to(device)
    whole = torch.randn(args.vocabulary, args.width, device=device) / args.width**0.5
    weight = whole[shard(args.vocabulary, rank, ranks)].clone().requires_grad_()
    objective = RPOObjective("backward_kl", beta=0.1, eta=10.0)
    optimizer = torch.optim.Adam([*backbone.parameters(), weight], lr=3e-3)

    with torch.no_grad():
        frozen_backbone, frozen_weight = (
            Backbone(args.vocabulary, args.width).to(device),
            weight.detach().clone(),
        )
        frozen_backbone.load_state_dict(backbone.state_dict())
    ids, labels, rewards = batch(args.vocabulary, args.prompts, device)
    with torch.no_grad():
        ref_logps = linear_token_logps(
            frozen_backbone(ids), frozen_weight, labels, process_group=group
        )
    for step in range(args.steps):
        out = linear_rpo_loss(
            backbone(ids),
            weight,
            labels,
            rewards,
            objective,
            ref_logps=ref_logps,
            group_size=K,
            process_group=group,
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 0 or step == args.steps - 1):
            print(
                f"step {step}: loss {out.loss.item():.4f}, agreement "
                f"{out.metrics()['rewards/agreement'].item():.2f}"
            )

    # For comparison: the whole head on every rank. Training does not need it.
    rows = [torch.empty_like(whole[shard(args.vocabulary, r, ranks)]) for r in range(ranks)]
    for r in range(ranks):
        rows[r].copy_(weight.detach()) if r == rank else None
        dist.broadcast(rows[r], r)
    with torch.no_grad():
        hidden = backbone(ids)
        ours = linear_token_logps(hidden, weight, labels, process_group=group)
        alone = linear_token_logps(hidden, torch.cat(rows), labels)
    if rank == 0:
        error = (ours - alone).abs().max().item()
        print(
            f"{ranks} ranks of {weight.shape[0]} rows on {device.type}: log-probs differ from one "
            f"rank's by {error:.1e} at most"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
