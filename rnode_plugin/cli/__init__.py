"""The command line ``rnode-cli``: the group of all commands, which turns errors into messages and exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback

import click

from .._version import __version__
from ..errors import ConfigError, PluginError, RnodeError, first_line, is_out_of_memory
from ..plugins import builtin, registry
from .options import loaded

__all__ = ["main"]

_WAITING = (
    "GOMP_SPINCOUNT",
    "OMP_WAIT_POLICY",
    "KMP_BLOCKTIME",
)  # they set how a thread of OpenMP waits


class _Misuse(click.ClickException):
    """An invalid request, which ends with exit code 2."""

    exit_code = 2


def _command(name: str) -> click.Command:
    command = registry.get("commands", name)
    if not isinstance(command, click.Command):
        raise PluginError(f"the command {name!r}: its plugin registers {command!r}, which is not a click command.")
    return command


class _Commands(click.Group):
    """The commands in the registry, built in or from plugins. A command's module is imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return registry.names("commands")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if ctx.resilient_parsing and cmd_name not in registry.names("commands"):
            return None  # of a line that is still typed, which a shell completes
        # refuses an unknown name: click's own refusal could name neither the commands nor a plugin that failed
        return _command(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sentences = dict(loaded("commands", lambda name: _command(name).get_short_help_str(limit=200)))
        ours = builtin.COMMANDS
        others = sorted(sentences.keys() - {name for section in ours.values() for name in section})
        for title, names in [*ours.items(), ("From plugins", others)]:
            if rows := [(name, sentences[name]) for name in names if name in sentences]:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)
        except click.NoSuchOption as error:
            raise _named_as_setting(error) from None
        except RnodeError as error:
            if ctx.params.get("debug"):
                traceback.print_exception(error)
            hint = "" if not isinstance(error, PluginError) else " `rnode-cli --debug ...` shows the traceback."
            raise (_Misuse if isinstance(error, ConfigError) else click.ClickException)(f"{error}{hint}") from error
        except (RuntimeError, MemoryError) as error:  # from a device; `fit` explains more of them itself
            if ctx.params.get("debug") or not is_out_of_memory(error):
                raise
            raise click.ClickException(
                f"out of memory ({first_line(error).rstrip('.')}). Use fewer samples at once, or another --device."
            ) from error
        except OSError as error:
            if error.errno == errno.EPIPE or ctx.params.get("debug"):  # click handles a pipe without a reader
                raise
            prefix = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{prefix}{(error.strerror or str(error)).lower()}.") from error


def _named_as_setting(error: click.NoSuchOption) -> click.UsageError:
    """The error for an unknown option, with the setting of the same name for a command that takes ``--set``."""
    command = None if error.ctx is None else error.ctx.command
    if command is not None and any(each.name == "assignments" for each in command.params):
        from ..experiments.recipes.recipe import get_recipe, named_settings  # pydantic

        known = dict.fromkeys(path for name in ("digits", "table") for path, _ in get_recipe(name).settings())
        if named := named_settings(error.option_name.lstrip("-").replace("-", "_"), known):
            ways = " or ".join(f"--set {each}=VALUE" for each in named)
            return click.UsageError(f"no such option {error.option_name}: a setting is given by {ways}.", error.ctx)
    return error


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rnode-cli")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(*, debug: bool) -> None:
    """Train, evaluate and sample regularized neural ODE flows (RNODE)."""
    # Let OpenMP's threads sleep soon when they wait for each other, after a hundredth of libgomp's usual spinning:
    # on a busy machine, a spinning thread holds the core that the thread it waits for needs. libgomp reads the
    # variable when torch loads it. If the user has set one of these variables, nothing changes.
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = "3000"
    # a terminal that cannot show a character, such as Latin-1, gets a question mark, and the command goes on
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
