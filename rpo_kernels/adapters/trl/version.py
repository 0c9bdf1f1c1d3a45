"""The releases of TRL that the adapter was tested with.

It uses private names of TRL, so others are refused.
"""

from __future__ import annotations

import trl
from packaging.version import Version

TESTED = "1.16"


def check_version() -> None:
    """Raise ImportError if the installed TRL is not a tested release."""
    installed = Version(trl.__version__)
    if f"{installed.major}.{installed.minor}" != TESTED:
        raise ImportError(
            f"rpo_kernels.adapters.trl: tested with trl {TESTED}.*, found trl {trl.__version__}, "
            f'whose private names may mean something else; pip install "trl>={TESTED},<1.17", or '
            "call rpo_kernels.preference_loss from your own trainer"
        )
