"""The command line: ``lopsided``."""

from __future__ import annotations

import click


@click.group()
@click.version_option(package_name="lopsided")
def main() -> None:
    """Makes a stock Ollama put each model where it runs fastest on unequal GPUs."""
