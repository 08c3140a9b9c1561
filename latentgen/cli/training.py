"""`latentgen train`: data, text, vae, denoiser, export. Knows folders and minutes; the work and its progress bars are in train/stages.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from latentgen.errors import OutputError, TrainingError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Make a model like glyph from the packaged icon sets; a CPU is enough.",
                  epilog="In this order:  data, then text and vae (in any order), then denoiser, then export. "
                         "Each can be stopped with Ctrl-C and goes on when run again.")


def _folder(flag: str, text: str, *, there: bool = False) -> Any:
    return typer.Option(flag, help=text, metavar="DIR", exists=there, file_okay=False, show_default=False)


Data = Annotated[Path, _folder("--data", "The training set that `train data` made.", there=True)]
Run = Annotated[Path, _folder("--run", "Where the run is kept: state, loss.csv, loss.png, sheet.png and, at the end, the weights in model/.")]
Minutes = Annotated[float, typer.Option(help="Minutes of training in all, above 0; earlier runs in the same folder count.")]
Rate = Annotated[float, typer.Option("--lr", help="Peak learning rate of AdamW, above 0.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads, 1 or more. Default: torch's choice.", show_default=False)]

Device = Annotated[str, typer.Option(help="Where it learns: cpu, cuda, cuda:1, mps or auto.", metavar="NAME")]


@contextmanager
def _stoppable(what: str, *, resumes: bool = True) -> Iterator[None]:
    """Ctrl-C ends in one line that says how to go on; a folder that cannot be read or written is an error in one line."""
    try:
        yield
    except KeyboardInterrupt:
        how = f"what was done is kept; run the same command again to go on with {what}" if resumes else f"run {what} again"
        typer.echo(f"stopped: {how}", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        if isinstance(error, (OutputError, BrokenPipeError)):
            raise
        raise OutputError(f"{what} cannot read or write its files ({error}): check the folders") from error


def _positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise typer.BadParameter(f"{value} is not above 0", param_hint=f"--{name}")


def _finished(run: Path, command: str) -> Path:
    if not ((run / "model").is_dir() or (run / "model_index.json").is_file()):  # a run, or a whole checkpoint such as the shipped one
        raise TrainingError(f"{run.name!r} has no finished weights (model/): run `latentgen train {command}` to its end first")
    return run


@app.command(epilog="Example:  latentgen train data --out glyph-data")
def data(out: Annotated[Path, _folder("--out", "Where the set goes.")],
         size: Annotated[int, typer.Option(help="Side of a picture in pixels, a multiple of 8.")] = 256,
         processes: Annotated[int, typer.Option(help="How many pictures are drawn at once, 1 or more.")] = 2) -> None:
    """Fetch the icon sets and draw the training pictures.

    Needs Node.js (npm) and, the first time, the network. Takes a few minutes and about 10 GB of disk. Writes pictures-SIZE.npy and index.jsonl.
    Stopped, it picks up where it ended.
    """
    _positive(size=size, processes=processes)
    with _stoppable("drawing"):
        from latentgen.train.stages import build_data

        build_data(out, size=size, processes=processes)
    typer.echo(f"{out}: the training set is ready")


@app.command(epilog="Example:  latentgen train text --data glyph-data --run runs/text --minutes 40")
def text(data: Data, run: Run, minutes: Minutes = 40, lr: Rate = 1e-3, threads: Threads = None, device: Device = "cpu",
         resume_from: Annotated[Path | None,
                                _folder("--resume-from", "A checkpoint to start from, such as weights/glyph.", there=True)] = None) -> None:
    """Train the text encoder and its picture tower, a small CLIP.

    Takes --minutes, and a few more the first time to read the captions. Writes model/ and tokenizer/ into the run folder; saves as it goes.
    """
    _positive(minutes=minutes, lr=lr, threads=threads)
    with _stoppable("the text encoder"):
        from latentgen.train.stages import train_text

        train_text(data, run, minutes=minutes, lr=lr, threads=threads, device=device, resume_from=resume_from)
    typer.echo(f"{run / 'model'}: the text encoder is trained")


@app.command(epilog="Example:  latentgen train vae --data glyph-data --run runs/vae --minutes 40")
def vae(data: Data, run: Run, minutes: Minutes = 40, lr: Rate = 6e-4, threads: Threads = None, device: Device = "cpu",
        resume_from: Annotated[Path | None, _folder("--resume-from", "Autoencoder weights to start from.", there=True)] = None,
        decoder_only: Annotated[bool, typer.Option("--decoder-only",
                                                   help="Keep the encoder, so that denoisers trained on its latents stay valid.")] = False) -> None:
    """Train the autoencoder, pictures to latents and back.

    Takes --minutes. Writes model/ into the run folder; saves as it goes, with a sheet of pictures beside what comes back.
    """
    _positive(minutes=minutes, lr=lr, threads=threads)
    with _stoppable("the autoencoder"):
        from latentgen.train.stages import train_vae

        train_vae(data, run, minutes=minutes, lr=lr, threads=threads, device=device, resume_from=resume_from, decoder_only=decoder_only)
    typer.echo(f"{run / 'model'}: the autoencoder is trained")


@app.command(epilog="Example:  latentgen train denoiser --data glyph-data --run runs/unet --text runs/text --vae runs/vae --minutes 120")
def denoiser(data: Data, run: Run, text: Annotated[Path, _folder("--text", "The run folder of `train text`, finished, or a checkpoint.", there=True)],
             vae: Annotated[Path, _folder("--vae", "The run folder of `train vae`, finished, or a checkpoint.", there=True)],
             size: Annotated[int, typer.Option(help="Side of the pictures in pixels: 128 learns four times as fast, 256 is the end.")] = 256,
             minutes: Minutes = 120, lr: Rate = 6e-4, batch: Annotated[int, typer.Option(help="Pictures per step, 1 or more.")] = 48,
             threads: Threads = None, device: Device = "cpu",
             start: Annotated[Path | None, _folder("--start", "U-Net weights to start from, such as a smaller size's RUN/model.", there=True)] = None,
             grow: Annotated[bool, typer.Option("--grow", help="Put a new outer level around the weights of --start: "
                                                               "for pictures of twice their side.")] = False,
             decay: Annotated[float,
                              typer.Option(min=0, max=1, help="Share of the minutes over which the rate falls; 0 where another run follows.")] = 0.3,
             core: Annotated[bool, typer.Option("--core",
                                                help="Leave out skin tones and interface icons: a quarter less to encode first.")] = False) -> None:
    """Train the denoiser, the U-Net that turns noise and words into latents.

    Takes --minutes, and a few more the first time to encode every picture. Writes model/ into the run folder; saves as it goes.
    """
    _positive(size=size, minutes=minutes, lr=lr, batch=batch, threads=threads)
    with _stoppable("the denoiser"):
        from latentgen.train.stages import train_denoiser

        train_denoiser(data, run, size=size, minutes=minutes, lr=lr, batch=batch, threads=threads, device=device, vae=_finished(vae, "vae"),
                       text=_finished(text, "text"), start=start, grow=grow, decay=decay, core=core)
    typer.echo(f"{run / 'model'}: the denoiser is trained")


@app.command(epilog="Example:  latentgen train export --out my-glyph --text runs/text --vae runs/vae --unet runs/unet --data glyph-data")
def export(out: Annotated[Path, _folder("--out", "The checkpoint's folder.")],
           text: Annotated[Path, _folder("--text", "The run folder of `train text`.", there=True)],
           vae: Annotated[Path, _folder("--vae", "The run folder of `train vae`.", there=True)],
           unet: Annotated[Path, _folder("--unet", "The run folder of `train denoiser`.", there=True)], data: Data,
           size: Annotated[int, typer.Option(help="Side of the pictures that the denoiser was trained at last; "
                                                  "becomes the default size.")] = 256) -> None:
    """Lay the trained parts out as one checkpoint.

    Takes a minute. Writes a diffusers folder in float16 with a card.toml, ready for `latentgen txt2img --model OUT`.
    """
    with _stoppable("the export", resumes=False):
        from latentgen.train.stages import export as lay_out

        lay_out(out, text=_finished(text, "text"), vae=_finished(vae, "vae"), unet=_finished(unet, "denoiser"), data=data, size=size)
    typer.echo(f'{out}: the checkpoint is ready; try it with  latentgen txt2img "a red heart" --model {out}')
