"""The command line."""

from __future__ import annotations

import sys

from vlm_probe.cli import meaning, probing, toy, toy_meaning, training, variants  # noqa: F401 -- commands
from vlm_probe.cli.app import INTERRUPTED, app


def main() -> None:
    """Runs `vlm-probe`."""
    try:
        app.cli(prog="vlm-probe", description="Where image tokens become language.")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"vlm-probe: {error}")
