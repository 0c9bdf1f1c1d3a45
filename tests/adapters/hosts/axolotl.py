"""axolotl: its plugin manager, its builder of trainers and its trainer."""

import sys
from pathlib import Path

from axolotl.core.builders.rl import HFRLTrainerBuilder
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.enums import RLType
from datasets import Dataset
from peft import LoraConfig

from ..tiny_models import llama, pairs, tokenizer
from . import STEPS, check_equal, check_weights, write_snippet


def train(work: Path, plugins: list[str]) -> tuple[dict, list[dict]]:
    """Weights of the adapter, and what was logged at each step."""
    options = DictDefault(
        rl=RLType.DPO,
        rl_beta=0.1,
        dpo_loss_type=["exo_pair"],
        dpo_label_smoothing=1e-3,
        adapter="lora",
        plugins=plugins,
        sequence_len=64,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        num_epochs=1,
        optimizer="sgd",
        learning_rate=0.1,
        lr_scheduler="constant",
        max_grad_norm=1e9,
        use_cpu=True,
        dataset_processes=1,
        output_dir=str(work / ("ours" if plugins else "theirs")),
    )
    manager = PluginManager.get_instance()
    for plugin in plugins:
        manager.register(plugin)
    model = llama()
    manager.post_model_load(options, model)
    builder = HFRLTrainerBuilder(options, model, tokenizer(), None)
    builder.train_dataset = Dataset.from_list(
        [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs(8)]
    )
    builder.peft_config = LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    trainer = builder.build(STEPS)
    assert (type(trainer).__module__ == "rpo_axolotl") == bool(plugins)
    trainer.train()
    weights = {name: x.detach() for name, x in trainer.model.named_parameters() if "lora_" in name}
    return weights, trainer.state.log_history[:STEPS]


def main(work: Path) -> None:
    sys.path.insert(0, str(work))
    write_snippet("axolotl", work / "rpo_axolotl.py")
    theirs, host_log = train(work, [])
    ours, log = train(work, ["rpo_axolotl.RPOPlugin"])
    check_weights(ours, theirs, {})
    for step, host in zip(log, host_log, strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected"):
            check_equal(name, step[name], host[name])
