"""What a command cannot do without."""

from __future__ import annotations

import importlib.util


def require(command: str, *packages: str, otherwise: str = "") -> None:
    """Ends the command with a message where a package is not installed; ``otherwise``: what else
    serves.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise SystemExit(
                f"{command}: the package {name} is not installed; install it{otherwise}"
            )
