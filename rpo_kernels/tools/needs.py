"""What a command requires: packages, and positive numbers."""

from __future__ import annotations

import argparse
import importlib.util


def positive(text: str) -> int:
    """Return the argument as an integer from 1 to 2^31 - 1; argparse prints the error."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def require(command: str, *packages: str, otherwise: str = "") -> None:
    """Exit with a message if a package is missing; `otherwise` names an alternative."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise SystemExit(
                f"{command}: the package {name} is not installed; install it{otherwise}"
            )
