"""The command line: which commands there are, and how an error becomes one line and an exit code. Knows no model, tensor or picture.

Commands import what they need when they run, so that `latentgen --help` loads neither torch nor diffusers.
Exit codes: 0 done, 1 other errors, 2 bad input, 3 a bad model, 4 output that cannot be written, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from latentgen.cli import approximating, guiders, inspecting, pictures, replaying, reports, samplers, series, training
from latentgen.errors import LatentgenError, ModelError, OutputError, RequestError

EXIT_CODES = ((RequestError, 2), (ModelError, 3), (OutputError, 4), (LatentgenError, 1))  # ImageError is a RequestError


class Commands(TyperGroup):
    """The root group: every error that the library raises on purpose leaves as one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        try:
            value = super().invoke(ctx)
            sys.stdout.flush()  # a reader that has gone is found here, not while Python shuts down
            return value
        except LatentgenError as error:
            typer.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
            raise typer.Exit(next(code for kind, code in EXIT_CODES if isinstance(error, kind))) from None
        except ModuleNotFoundError as error:
            if (error.name or "latentgen").startswith("latentgen"):
                raise
            typer.echo(f"error: this needs the package {error.name!r}, which is not installed: pip install 'latentgen[train]'", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            with suppress(OSError, ValueError):  # what is still buffered goes nowhere, silently
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        import latentgen

        typer.echo(f"latentgen {latentgen.__version__}")
        raise typer.Exit


app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
                  epilog='Start with:  latentgen txt2img "a red heart"')


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)] = False) -> None:
    """Words to pictures with latent diffusion.

    Every command explains itself with --help.
    """


PICTURES, MODELS, MAKING = "Pictures", "Models", "Making and judging models"
for function in (pictures.txt2img, pictures.img2img, pictures.inpaint, pictures.outpaint, pictures.edit, pictures.plan, pictures.explain):
    app.command(rich_help_panel=PICTURES, epilog=pictures.EXAMPLES[function.__name__])(function)
for function in (series.grid, series.interpolate):
    app.command(rich_help_panel=PICTURES, epilog=series.EXAMPLES[function.__name__])(function)
for function in (replaying.recipe, replaying.replay, replaying.variations, replaying.resume):
    app.command(rich_help_panel=PICTURES, epilog=replaying.EXAMPLES[function.__name__])(function)
app.command(rich_help_panel=MODELS, epilog=reports.EXAMPLES["models"])(reports.models)
app.command(rich_help_panel=MODELS, epilog=inspecting.EXAMPLES["inspect"])(inspecting.inspect)
app.command(rich_help_panel=MODELS, epilog=samplers.EXAMPLES["samplers"])(samplers.samplers)
app.command(rich_help_panel=MODELS, epilog=guiders.EXAMPLES["guiders"])(guiders.guiders)
app.command(rich_help_panel=MODELS, epilog=approximating.EXAMPLES["approximations"])(approximating.approximations)
app.command(rich_help_panel=MODELS, epilog=approximating.EXAMPLES["tune"])(approximating.tune)
app.add_typer(training.app, name="train", rich_help_panel=MAKING)
app.command("eval", rich_help_panel=MAKING, epilog=reports.EXAMPLES["eval"])(reports.evaluate)
app.command(rich_help_panel=MAKING, epilog=reports.EXAMPLES["bench"])(reports.bench)
app.command(rich_help_panel=MAKING, epilog=reports.EXAMPLES["convergence"])(reports.convergence)


def main() -> None:
    """The entry point of the `latentgen` command."""
    app(prog_name="latentgen")
