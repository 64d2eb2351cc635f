"""``hierfl completion``: what a shell needs to complete hierfl's commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]

_HOW = {
    "bash": 'add to ~/.bashrc: eval "$(hierfl completion bash)"',
    "zsh": 'add to ~/.zshrc: eval "$(hierfl completion zsh)"',
    "fish": "run once: hierfl completion fish > ~/.config/fish/completions/hierfl.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(_HOW)))
def completion(shell: str) -> None:
    """Print a script that makes SHELL complete hierfl's commands.

    \b
    bash:  eval "$(hierfl completion bash)"        in ~/.bashrc
    zsh:   eval "$(hierfl completion zsh)"         in ~/.zshrc
    fish:  hierfl completion fish > ~/.config/fish/completions/hierfl.fish
    """
    from hierfl.cli.root import root

    kind = get_completion_class(shell)
    assert kind is not None, "the choices are the shells that click knows"
    click.echo(kind(root, {}, "hierfl", "_HIERFL_COMPLETE").source())
