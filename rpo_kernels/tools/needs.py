"""Packages that a command requires."""

from __future__ import annotations

import importlib.util


def require(command: str, *packages: str, otherwise: str = "") -> None:
    """Exit with a message if a package is missing; `otherwise` names an alternative."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise SystemExit(
                f"{command}: the package {name} is not installed; install it{otherwise}"
            )
