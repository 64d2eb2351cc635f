"""The ``hierfl`` command: a table of subcommands, each loaded only when it is called.

``hierfl --help`` imports click and this package's table, nothing else. Commands of ``combiners`` and
``controller`` come through the entry-point group ``hierfl.commands``, by their full name.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import click
from click.shell_completion import CompletionItem

from hierfl import __version__
from hierfl.errors import ExtraMissing

__all__ = ["COMMANDS", "EXTRA_OF", "Lazy", "TableGroup", "root"]

EXTRA_OF: Mapping[str, str] = {
    "numba": "server",
    "psutil": "server",
    "ray": "server",
    "torch": "torch",
    "sklearn": "demo",
    "matplotlib": "demo",
    "opentelemetry.exporter": "otlp",
}
"""Which extra brings a package that is not there."""


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """One command: its line in the help, and where it is. Without ``target`` it is a group of ``members``."""

    help: str
    target: str = ""
    """``module:attribute``, or ``entry point`` for one of another package."""
    members: Mapping[str, Lazy] = field(default_factory=dict)


ENTRY_POINT = "entry point"

COMMANDS: Mapping[str, Lazy] = {
    "demo": Lazy(help="See it work: three regions train one model here, in a minute.", target="hierfl.cli.demo:demo"),
    "init": Lazy(help="Write a federation, a job and an app to start from.", target="hierfl.cli.init:init"),
    "up": Lazy(help="Start a whole federation on this machine.", target="hierfl.cli.up:up"),
    "down": Lazy(help="Stop the federation that `up` started.", target="hierfl.cli.up:down"),
    "provision": Lazy(
        help="Make certificates and kits for regions and sites.", target="hierfl.cli.provision:provision"
    ),
    "controller": Lazy(
        help="Run the global controller.",
        members={"serve": Lazy(help="Serve as the federation's controller.", target=ENTRY_POINT)},
    ),
    "combiner": Lazy(
        help="Run a region's combiner.",
        members={"serve": Lazy(help="Serve as the combiner of one region.", target=ENTRY_POINT)},
    ),
    "client": Lazy(help="Run and check a client at a site, and see its receipts.", target="hierfl.cli.client:client"),
    "job": Lazy(help="Check a job before it is submitted.", target="hierfl.cli.job:job"),
    "train": Lazy(help="Submit a job and follow it to its model.", target="hierfl.cli.train:train"),
    "runs": Lazy(help="List, show, cancel and resume runs.", target="hierfl.cli.runs:runs"),
    "status": Lazy(help="Show regions and runs at a glance.", target="hierfl.cli.status:status"),
    "models": Lazy(help="List and export committed models.", target="hierfl.cli.models:models"),
    "trace": Lazy(help="Draw where a round spent its time.", target="hierfl.cli.trace:trace"),
    "audit": Lazy(help="Check a run's receipts, sums, records and models.", target="hierfl.cli.audit:audit"),
    "explain": Lazy(help="Explain an error code, offline.", target="hierfl.cli.explain:explain"),
    "doctor": Lazy(help="Check this machine, a kit and the way to its peers.", target="hierfl.cli.doctor:doctor"),
    "completion": Lazy(help="Print shell completion.", target="hierfl.cli.completion:completion"),
}
"""All that ``hierfl --help`` shows, in its order."""


class TableGroup(click.Group):
    """A group whose help and completion come from a table, so that only the called command is imported."""

    def __init__(self, name: str, table: Mapping[str, Lazy], path: str, help: str) -> None:  # noqa: A002  click's name
        super().__init__(name, help=help)
        self.table = table
        self._path = path

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        lazy = self.table.get(cmd_name)
        if lazy is None:
            return None
        path = f"{self._path} {cmd_name}".strip()
        if lazy.members:
            return TableGroup(cmd_name, lazy.members, path, lazy.help)
        return _from_entry_point(path) if lazy.target == ENTRY_POINT else _load(lazy.target)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.table and not args[0].startswith("-"):
            from hierfl.toml import near

            ctx.fail(f"there is no command {args[0]!r}{near(args[0], self.table)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in self.table.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(n, help=lazy.help) for n, lazy in self.table.items() if n.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


def _load(target: str) -> click.Command:
    module, _, attribute = target.partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


def _from_entry_point(name: str) -> click.Command:
    """Load a command that another package of this project brings (``STYLE.md`` says why by name)."""
    from importlib.metadata import entry_points  # 20 ms: only for the commands that need it

    found = list(entry_points(group="hierfl.commands", name=name))
    if not found:
        raise ExtraMissing(f"hierfl {name}", "hierfl[server]")
    command: click.Command = found[0].load()
    return command


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"hierfl {__version__}")
        ctx.exit()


root = TableGroup(
    "hierfl",
    COMMANDS,
    "",
    "Federated learning for data that may not leave its region.\n\n"
    "Start with `hierfl demo`. Data goes to stdout, talk to stderr; every option has a variable HIERFL_*.",
)
root.no_args_is_help = True
root.params.append(
    click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_version,
        help="Show the version.",
    )
)
root.context_settings = {
    "help_option_names": ["-h", "--help"],
    "auto_envvar_prefix": "HIERFL",
    "color": False if os.environ.get("NO_COLOR") else None,
    "max_content_width": 100,
}
