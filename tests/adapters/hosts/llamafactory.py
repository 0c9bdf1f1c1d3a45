"""LlamaFactory: from a configuration and files of data to saved weights."""

import importlib.util
import json
from pathlib import Path

from llamafactory.train.dpo import trainer
from llamafactory.train.tuner import run_exp
from safetensors.torch import load_file

from ..tiny_models import pairs
from . import STEPS, check_equal, check_weights, write_model, write_snippet

CASES = {
    "sigmoid": {},
    "lora": {"finetuning_type": "lora", "lora_rank": 2, "lora_target": "q_proj,v_proj"},
    "simpo": {"pref_loss": "simpo", "pref_ftx": 0.1},
    "ld_alpha": {"ld_alpha": 0.5},
}


def train(work: Path, name: str, case: dict) -> tuple[dict, list[dict]]:
    """Weights, and what was logged at each step."""
    run_exp(
        {
            "model_name_or_path": str(work / "model"),
            "stage": "dpo",
            "do_train": True,
            "finetuning_type": "full",
            "pref_beta": 0.1,
            "dataset": "pairs",
            "dataset_dir": str(work),
            "template": "default",
            "cutoff_len": 64,
            "output_dir": str(work / name),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1e9,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_shuffling": True,
            "seed": 1,
        }
        | case
    )
    (weights,) = (work / name).glob("*model.safetensors")
    state = json.loads((work / name / "trainer_state.json").read_text())
    return load_file(weights), state["log_history"][:STEPS]


def main(work: Path) -> None:
    write_model(work / "model")
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    (work / "dataset_info.json").write_text(json.dumps(info))
    (work / "pairs.json").write_text(json.dumps(pairs(8)))
    start = load_file(work / "model" / "model.safetensors")

    theirs = {name: train(work, f"{name}-theirs", case) for name, case in CASES.items()}
    own = trainer.CustomDPOTrainer
    path = write_snippet("LlamaFactory", work / "train_dpo.py")
    spec = importlib.util.spec_from_file_location("train_dpo", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert issubclass(trainer.CustomDPOTrainer, own) and trainer.CustomDPOTrainer is not own
    for name, case in CASES.items():
        weights, log = train(work, f"{name}-ours", case)
        check_weights(weights, theirs[name][0], start if name != "lora" else {})
        for ours, host in zip(log, theirs[name][1], strict=True):
            assert ours.keys() == host.keys()
            assert (str(ours["logits/chosen"]) == "nan") == (name != "ld_alpha")  # ours ran
            for metric in ours.keys() - {"logits/chosen", "logits/rejected"}:
                check_equal(f"{name}: {metric}", ours[metric], host[metric])
