"""The command line: ``pyro-vae list | train | evaluate | sample | super-resolve | demo``."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Protocol, Union

import tyro
from rich.markup import escape
from rich.table import Table

from pyro_vae import data as data_sets
from pyro_vae.cli.demo import Demo
from pyro_vae.cli.draw import Sample, SuperResolve
from pyro_vae.cli.evaluate import Evaluate
from pyro_vae.cli.recipes import RECIPES
from pyro_vae.cli.train import train_command
from pyro_vae.runtime.distributed import LostProcessError
from pyro_vae.runtime.progress import console, error_console

__all__ = ["main"]


class Command(Protocol):
    """A command of the command line: a dataclass of its options."""

    def run(self) -> None:
        """Carry the command out.

        Raises:
            ValueError, OSError: for a mistake of the user's, in words.
        """


@dataclass(frozen=True)
class List:
    """Name the models and the data sets."""

    def run(self) -> None:
        """Print the names."""
        table = Table("model", "description")
        for name, recipe in RECIPES.items():
            table.add_row(name, (recipe.__doc__ or "").strip())
        console.print(table)
        console.print("data sets: " + ", ".join(data_sets.NAMES), highlight=False)
        console.print("graphs, for vgae: " + ", ".join(data_sets.GRAPHS), highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 for a lost process; 2 for a mistake of the user's; 130 for an interrupt.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A locale may lack the letters of a table: a question mark is better than no table.
            stream.reconfigure(errors="replace")
    command = _parse(arguments)
    with _terminable() as ignore_sigterm:
        try:
            command.run()
        except KeyboardInterrupt as interrupt:
            ignore_sigterm()
            console.print("\n".join(getattr(interrupt, "__notes__", ["interrupted"])), soft_wrap=True)
            # A second signal may end the process before its output is written.
            sys.stdout.flush()
            return 130
        except (ValueError, OSError, LostProcessError) as error:
            ignore_sigterm()
            who = f" in process {rank}" if (rank := os.environ.get("RANK", "0")) != "0" else ""
            text = f"[bold red]error{who}:[/] {escape(str(error))}"
            error_console.print(text, soft_wrap=True, highlight=False)
            return 1 if isinstance(error, LostProcessError) else 2
    return 0


def _parse(arguments: Sequence[str] | None) -> Command:
    commands = {"list": List, "train": train_command(), "evaluate": Evaluate, "sample": Sample}
    commands |= {"super-resolve": SuperResolve, "demo": Demo}
    # Union[...] rather than |, which takes no tuple.
    union: Any = Union[tuple(Annotated[c, tyro.conf.subcommand(n)] for n, c in commands.items())]  # noqa: UP007
    command: Command = tyro.cli(
        union,
        prog="pyro-vae",
        description="Deep latent-variable models with log-likelihoods that can be checked.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    return command


@contextmanager
def _terminable() -> Iterator[Callable[[], object]]:
    """Let SIGTERM interrupt a command as Ctrl-C does; yield a function that ignores SIGTERM from then on.

    Schedulers send SIGTERM, and so does torchrun when a process is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield partial(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
