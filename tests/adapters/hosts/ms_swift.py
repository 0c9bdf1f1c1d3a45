"""ms-swift: from arguments of its command line and a file of data to saved weights."""

import json
from pathlib import Path

from safetensors.torch import load_file
from swift import rlhf_trainers
from swift.pipelines import rlhf_main

from ..tiny_models import pairs
from . import STEPS, check_equal, check_weights, write_lines, write_model, write_snippet

CASES = {
    "full": {"tuner_type": "full"},
    "lora": {
        "tuner_type": "lora",
        "lora_rank": 2,
        "target_modules": "q_proj",
        "lora_dropout": 0,
        "learning_rate": 10,
    },
    "ld_alpha": {"tuner_type": "full", "ld_alpha": 0.5, "rpo_alpha": 0.2},
}


def train(work: Path, name: str, case: dict) -> tuple[dict, list[dict]]:
    """Weights, and what was logged at each step."""
    options = {
        "rlhf_type": "dpo",
        "model": work / "model",
        "model_type": "llama",
        "template": "llama3",
        "dataset": work / "pairs.jsonl",
        "split_dataset_ratio": 0,
        "strict": "true",
        "use_hf": "true",
        "check_model": "false",
        "torch_dtype": "float32",
        "use_cpu": "true",
        "output_dir": work / name,
        "add_version": "false",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "weight_decay": 0,
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "report_to": "none",
        "seed": 1,
    }
    arguments = [str(x) for key, value in (options | case).items() for x in (f"--{key}", value)]
    rlhf_main(arguments)
    (saved,) = (work / name).glob(f"**/checkpoint-{STEPS}")
    (weights,) = saved.glob("*model.safetensors")
    state = json.loads((saved / "trainer_state.json").read_text())
    return load_file(weights), state["log_history"][:STEPS]


def main(work: Path) -> None:
    write_model(work / "model")
    start = load_file(work / "model" / "model.safetensors")
    says = lambda role, text: {"role": role, "content": text}
    rows = [
        {
            "messages": [says("user", pair["prompt"]), says("assistant", pair["chosen"])],
            "rejected_response": pair["rejected"],
        }
        for pair in pairs(8)
    ]
    write_lines(work / "pairs.jsonl", rows)

    theirs = {name: train(work, f"{name}-theirs", case) for name, case in CASES.items()}
    plugin = {"external_plugins": write_snippet("ms-swift", work / "rpo_swift.py")}
    for name, case in CASES.items():
        weights, log = train(work, f"{name}-ours", case | plugin)
        check_weights(weights, theirs[name][0], start if name != "lora" else {})
        for ours, host in zip(log, theirs[name][1], strict=True):
            assert ours.keys() == host.keys()
            for metric in (x for x in ours if x.startswith(("loss", "grad", "rewards", "logps"))):
                check_equal(f"{name}: {metric}", ours[metric], host[metric])
            assert str(ours["logits/chosen"]) == "nan"  # ours ran
    assert rlhf_trainers.DPOTrainer.__module__.startswith("_swift_external")
