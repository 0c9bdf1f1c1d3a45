"""TRL: a trainer for every RPO objective, and faster log-probabilities in TRL's own trainers.

    # K >= 2 responses per prompt, explicit rewards
    from rpo_kernels.adapters.trl import RPOConfig, RPOTrainer
    # DPO, KTO, GRPO, RLOO, SFT: the same losses, our kernels
    from rpo_kernels.adapters.trl import accelerate_trl

Importing it checks the version of TRL.
"""

from .config import RPOConfig
from .patch import Acceleration, accelerate_trl
from .trainer import RPOTrainer

__all__ = ["Acceleration", "RPOConfig", "RPOTrainer", "accelerate_trl"]
