"""Runs ``python -m sjepa_deploy``, which is ``sjepa``."""

from __future__ import annotations

import sys

from sjepa_deploy.cli import group, run_command

if __name__ == "__main__":
    sys.exit(run_command(group, "python -m sjepa_deploy", sys.argv[1:]))
