"""examples/trl_rpo.py runs from its command line: a tiny model, the pairs that ship with it; and so
does the TRL snippet of docs/trainers.md.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from .tiny_models import llama, tokenizer

pytestmark = [pytest.mark.xdist_group("trl"), pytest.mark.filterwarnings("ignore")]
pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from transformers import Trainer  # noqa: E402

from rpo_kernels import RPOObjective  # noqa: E402
from rpo_kernels.objectives import DISTANCES, PRESETS  # noqa: E402

from .snippets import DOCS  # noqa: E402
from .test_trl_trainer import groups  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def trl_rpo(monkeypatch):
    """Its module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    monkeypatch.delitem(sys.modules, "trl_rpo", raising=False)
    import trl_rpo

    return trl_rpo


@pytest.fixture
def example(trl_rpo, tmp_path):
    """Its main, for a model in a folder."""
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    fixed = f"--model {tmp_path}/model --output_dir {tmp_path}/out --disable_tqdm True".split()
    fixed += "--max_steps 3 --logging_steps 1 --gradient_checkpointing False".split()
    return lambda *more: trl_rpo.main([*fixed, *more])


def test_trl_example_trains_and_evaluates_on_its_own_pairs(example):
    trainer = example("--eval_strategy", "steps", "--eval_steps", "3")
    logged = trainer.state.log_history
    assert [entry["loss"] for entry in logged if "loss" in entry] and trainer.state.global_step == 3
    assert any("eval_rewards/agreement" in entry for entry in logged)
    # policy = reference at first
    assert logged[0]["rewards/target_margin"] > 0 and abs(logged[0]["rewards/margins"]) < 1e-4


def test_trl_example_passes_its_options_to_the_trainer(example, tmp_path):
    data = tmp_path / "groups.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in groups([3, 2, 4, 3, 2, 2])))
    objective = '{"distance": "squared", "eta": 0.5}'
    trainer = example(
        "--data",
        str(data),
        "--objective",
        objective,
        "--beta",
        "0.05",
        "--lora",
        "--held_out",
        "0",
        "--eval_strategy",
        "no",
    )
    assert (trainer.objective.distance, trainer.objective.eta, trainer.objective.beta) == (
        "squared",
        0.5,
        0.05,
    )
    assert trainer.state.global_step == 3 and hasattr(trainer.model, "disable_adapter")
    with pytest.raises(SystemExit, match="got 6: none is left"):
        example("--data", str(data), "--held_out", "6")


@pytest.mark.parametrize("name", [*DISTANCES, *PRESETS])
def test_trl_example_has_the_defaults_of_every_objective(trl_rpo, tmp_path, name):
    options = ["--output_dir", str(tmp_path), "--objective"]
    expected = RPOObjective(name) if name in DISTANCES else getattr(RPOObjective, name)()
    assert trl_rpo.parse([*options, name])[1].make_objective() == expected
    if name == "simpo":
        _, config = trl_rpo.parse([*options, '{"preset": "simpo", "beta": 2.5}'])
        assert config.make_objective() == RPOObjective.simpo(2.5)


def test_trl_example_stays_short():
    assert len((EXAMPLES / "trl_rpo.py").read_text().splitlines()) <= 100


def test_rpo_trainer_of_the_trainers_page_trains_and_accelerate_trl_follows(tmp_path, monkeypatch):
    source = re.search(r"```python\n(.*?)```", (DOCS / "trainers.md").read_text(), re.DOTALL)[1]
    cpu = "objective=objective, use_cpu=True, bf16=False, max_steps=1, report_to='none'"
    assert "use_cpu=True, bf16=False" in source  # what the page says to add
    trained, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: trained.append(self) or train(self))
    monkeypatch.chdir(tmp_path)
    names = {"model": llama(), "ref_model": llama(seed=1), "tokenizer": tokenizer()}
    names["rows"] = Dataset.from_list(groups([2, 3, 2, 4, 2, 2, 3, 2]))
    source = source.replace("objective=objective", cpu).replace(
        "\naccelerate_trl()", "\nundo = accelerate_trl().undo"
    )
    exec(compile(source, "docs/trainers.md", "exec"), names)
    names["undo"]()
    assert trained[0].state.global_step == 1 and trained[0].objective == names["objective"]
