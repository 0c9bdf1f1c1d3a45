"""TRL: a trainer for every RPO objective, and faster log-probabilities in TRL's own trainers.

    # K >= 2 responses per prompt, explicit rewards
    from rpo_kernels.adapters.trl import RPOConfig, RPOTrainer
    # DPO, KTO, GRPO, RLOO, SFT: the same losses, our kernels
    from rpo_kernels.adapters.trl import accelerate_trl

Importing it checks the version of TRL.
"""

from .version import check_version

check_version()  # before imports of names that another release of TRL may lack

from .config import RPOConfig  # noqa: E402
from .patch import Acceleration, accelerate_trl  # noqa: E402
from .trainer import RPOTrainer  # noqa: E402

__all__ = ["Acceleration", "RPOConfig", "RPOTrainer", "accelerate_trl"]
