"""What the tests of the command line share: how a small model is asked for, and what a user's mistake is answered."""

from __future__ import annotations

import pytest

from pyro_vae.cli.main import main

SMALL = ("--epochs", "1", "--latent", "2")


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail as a user's mistake does, and return its message on one line."""
    assert main(arguments) == 2
    return " ".join(capsys.readouterr().err.split())
