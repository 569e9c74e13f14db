"""`completion`: the script that makes a shell complete commands."""

import click
from click.shell_completion import get_completion_class

from dali_diffusemix.cli.display import echo
from dali_diffusemix.cli.options import StyledCommand


@click.command("completion", cls=StyledCommand, short_help="Print the script for tab completion in a shell.")
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the script that makes SHELL (bash, zsh or fish) complete commands, options and paths.

    Add the line for your shell to its start-up file:

    \b
      ~/.bashrc                   eval "$(dali-diffusemix completion bash)"
      ~/.zshrc                    eval "$(dali-diffusemix completion zsh)"
      ~/.config/fish/config.fish  dali-diffusemix completion fish | source

    \b
    Example:
      dali-diffusemix completion bash
    """
    complete = get_completion_class(shell)
    assert complete is not None
    source = complete(ctx.find_root().command, {}, "dali-diffusemix", "_DALI_DIFFUSEMIX_COMPLETE").source()
    # Click's script for fish splits at every comma, which breaks lists of prompts.
    echo(source.replace('string split ","', 'string split --max 1 ","'), nl=False)
