"""OpenRLHF: its actor and its loop of DPO, with a stand-in for DeepSpeed's strategy."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from openrlhf.models import Actor, actor
from openrlhf.trainer.dpo_trainer import DPOTrainer

from rpo_kernels import RPOObjective

from ..snippets import SNIPPETS
from ..tiny_models import llama, pairs, tokenizer
from . import STEPS, check_equal, check_weights

BETA = 0.1
sys.modules["flash_attn.ops"] = None  # an ImportError, where log_probs_from_logits looks for it


class Strategy:
    """One process; keeps what the loop reports."""

    ring_attn_group, accumulated_gradient = None, 1

    def __init__(self):
        model = {"label_smoothing": 0.1, "ipo_enable": False}
        model |= {"aux_loss_coef": 0.0, "nll_loss_coef": 0.2}
        logger = SimpleNamespace(
            wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=1
        )
        self.args = SimpleNamespace(
            model=SimpleNamespace(**model),
            ds=SimpleNamespace(packing_samples=False),
            logger=logger,
            eval=SimpleNamespace(steps=10**6),
            ckpt=SimpleNamespace(save_steps=10**6),
            train=SimpleNamespace(batch_size=2),
        )
        self.reports = []

    def is_rank_0(self):
        return False

    def backward(self, loss, model, optimizer):
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler):
        optimizer.step()
        optimizer.zero_grad()

    def get_grad_norm(self, model):
        return 0.0

    def all_reduce(self, reports):
        self.reports.append(reports)
        return reports


def batches(rows: list[dict], size: int = 2):
    """As OpenRLHF's collate function: ``[B, 1, T]``, right padded, and lengths of the prompts."""
    ids = lambda text: torch.tensor(tokenizer()(text)["input_ids"])
    for i in range(0, len(rows), size):
        batch, lengths = [], []
        for side in ("chosen", "rejected"):
            texts = [ids(row["prompt"] + row[side]) for row in rows[i : i + size]]
            pad = torch.nn.utils.rnn.pad_sequence
            batch.append(pad(texts, batch_first=True)[:, None])
            batch.append(pad([torch.ones_like(x) for x in texts], batch_first=True)[:, None])
        lengths = [len(ids(row["prompt"])) for row in rows[i : i + size]]
        yield *batch, lengths


class Loader(list):
    sampler = None


def load() -> Actor:
    """By name it would be bf16."""
    model = Actor(llama())
    model.packing_samples = False  # set with the name
    return model


def train(ours: bool) -> tuple[dict, list[dict]]:
    """Weights, and what was reported at each step."""
    model, strategy = load(), Strategy()
    trainer = DPOTrainer(
        model,
        load(),
        strategy,
        tokenizer(),
        optimizer := torch.optim.SGD(model.parameters(), lr=0.1),
        Loader(batches(pairs(2 * STEPS))),
        None,
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        beta=BETA,
        max_epochs=1,
    )
    if ours:
        names: dict = {}
        exec(SNIPPETS["OpenRLHF"][0], names)
        names["use_rpo"](trainer, RPOObjective.dpo(BETA, label_smoothing=0.1))
        assert actor.log_probs_from_logits is names["log_probs_from_logits"]
    trainer.fit(strategy.args, num_update_steps_per_epoch=STEPS)
    return model.model.state_dict(), strategy.reports


def main(work: Path) -> None:
    theirs, host_reports = train(ours=False)
    weights, reports = train(ours=True)
    assert len(reports) == STEPS
    check_weights(weights, theirs, llama().state_dict())
    for step, host in zip(reports, host_reports, strict=True):
        for name in host:
            check_equal(name, step[name], host[name])
