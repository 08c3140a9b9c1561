"""The command line: files and their names, exit codes, JSON, help, Ctrl-C. Most run in this process; a few need one of their own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from latentgen import terminal
from latentgen.cli import app
from latentgen.cli.meter import Meter
from latentgen.cli.pictures import free_name, slug
from latentgen.pixels.save import read_metadata
from latentgen.run.request import Request

PICTURES = ("txt2img", "img2img", "inpaint", "outpaint", "edit", "plan")
IN_PYTHON = {"latents", "denoising_start", "denoising_end", "classifier"}  # a tensor goes with them, or something to call
STAGES = ("data", "text", "vae", "denoiser", "export")


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    """Runs a picture command in an empty folder on the tiny checkpoint; two steps unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((40, 32), 60).convert("RGB").save("photo.png")
    mask = Image.new("L", (40, 32), 0)
    mask.paste(255, (16, 8, 40, 32))
    mask.save("mask.png")

    def call(*arguments: str) -> Any:
        command, *rest = arguments
        return CliRunner().invoke(app, [command, "--steps", "2", "--model", str(tiny_folder), "--device", "cpu", "--dtype", "float32", *rest])

    return call


def made() -> list[str]:
    return sorted({p.name for p in Path().iterdir()} - {"photo.png", "mask.png"})


@pytest.mark.parametrize("command", [
    ("txt2img", "a red heart"),
    ("img2img", "a red heart", "photo.png", "--strength", "0.5"), ("inpaint", "a red heart", "photo.png", "--mask", "mask.png"),
    ("outpaint", "a red heart", "photo.png", "--left", "8", "--feather", "4")], ids=lambda c: c[0])
def test_every_picture_command_writes_a_picture_with_its_recipe(run: Any, command: tuple[str, ...]) -> None:
    done = run(*command, "--seed", "7")
    assert done.exit_code == 0, done.output
    assert made() == ["a-red-heart-7.png"] and "a-red-heart-7.png" in done.stdout and " s" in done.stdout
    sizes = {"txt2img": (64, 64), "outpaint": (48, 32)}
    with Image.open("a-red-heart-7.png") as image:
        assert image.size == sizes.get(command[0], (40, 32))
    assert json.loads(read_metadata("a-red-heart-7.png")["latentgen"])["task"] == command[0]
    assert "loading" in done.stderr and "step 1/" in done.stderr


def test_default_names_never_overwrite(run: Any) -> None:
    for _ in range(2):
        assert run("txt2img", "cat & dog!", "--seed", "3", "--batch", "2").exit_code == 0
    assert made() == ["cat-dog-3-2.png", "cat-dog-3.png", "cat-dog-4-2.png", "cat-dog-4.png"]
    assert Path("cat-dog-3.png").read_bytes() == Path("cat-dog-3-2.png").read_bytes()


@pytest.mark.parametrize(("name", "kind"), [("x.png", "PNG"), ("x.jpg", "JPEG"), ("x.WEBP", "WEBP")])
def test_the_suffix_chooses_the_format_and_o_overwrites(run: Any, name: str, kind: str) -> None:
    Path(name).write_text("old")
    done = run("txt2img", "cat", "-o", name, "-q", *(() if kind == "PNG" else ("--quality", "60")))
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{name}\n", "")
    with Image.open(name) as image:
        assert image.format == kind


def test_a_folder_takes_default_names_and_a_batch_is_numbered(run: Any) -> None:
    Path("out").mkdir()
    assert run("txt2img", "cat", "--seed", "1", "-o", "out").exit_code == 0
    assert run("txt2img", "cat", "--batch", "2", "-o", "out/x.png").exit_code == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["cat-1.png", "x-1.png", "x-2.png"]


def test_json_of_a_picture_and_of_a_plan(run: Any) -> None:
    done = json.loads(run("txt2img", "cat", "--seed", "5", "--json", "--guidance", "2.5", "--sampler", "ddim", "--eta", "0.5").stdout)
    assert done["files"] == ["cat-5.png"] and done["seeds"] == [5] and done["recipe"]["eta"] == 0.5 and done["recipe"]["guidance_scale"] == 2.5
    edit = ("--image", "photo.png", "--mask", "mask.png", "--strength", "0.5", "--guidance-interval", "0.2", "0.9")
    plan = json.loads(run("plan", "cat", *edit, "--json").stdout)
    assert plan["task"] == "inpaint" and plan["steps"] == 1 and plan["guidance_interval"] == [0.2, 0.9] and len(plan["levels"]) == 2
    assert "outpaint" in run("plan", "cat", "--image", "photo.png", "--top", "8").stdout
    assert made() == ["cat-5.png"]


def test_plan_reads_no_weights(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentgen.run.residency.load_part", lambda *a: pytest.fail("weights were read"))
    assert run("plan", "cat").exit_code == 0


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (("txt2img", "cat", "--steps", "0"), 2, "steps is 0"),
    (("txt2img", "cat", "--sampler", "eular"), 2, "did you mean 'euler'"),
    (("txt2img", "cat", "--eta", "0.5"), 2, "has no eta"),
    (("txt2img", "cat", "--sampler", "euler", "--sampler-option", "s_churn=abc"), 2, "s_churn is 'abc': give a number"),
    (("txt2img", "cat", "--sampler-option", "s_churn"), 2, "expected NAME=VALUE"),
    (("txt2img", "cat", "--sampler-option", "s_churn=1"), 2, "'dpmpp_2m' has no s_churn (it takes none)"),
    (("txt2img", "cat", "--device", "toaster"), 2, "device is"),
    (("txt2img", "cat", "--width", "65"), 2, "65"),
    (("txt2img", "cat", "-o", "x.gif"), 2, "expected .png"),
    (("txt2img", "cat", "-o", "x"), 2, "expected .png"),
    (("txt2img", "cat", "-o", "x.png", "--quality", "50"), 2, "always exact"),
    (("txt2img", "cat", "-o", "x.jpg", "--quality", "101"), 2, "1 to 100"),
    (("txt2img", "cat", "--show", "--json"), 2, "one of the two"),
    (("img2img", "cat", "none.png"), 2, "no file"),
    (("img2img", "photo.png", "cat"), 2, "words first"),
    (("inpaint", "cat", "photo.png", "--mask", "none.png"), 2, "mask"),
    (("outpaint", "cat", "photo.png"), 2, "at least one of"),
    (("plan", "cat", "--left", "8"), 2, "needs an image"),
    (("grid", "cat", "--x", "guidance_scale=1,-4"), 2, "guidance_scale is -4"),
    (("interpolate", "cat", "dog", "-o", "x.gif", "--eta", "0.5"), 2, "has no eta"),
    (("txt2img", "cat", "--model", "no-such-model"), 3, "no model"),
    (("txt2img", "cat", "-o", "nowhere/x.png"), 4, "does not exist"),
    (("txt2img", "cat", "-o", "photo.png/x.png"), 4, "does not exist"),
], ids=lambda v: " ".join(v[2:]) if isinstance(v, tuple) else "")
def test_errors_are_one_line_and_a_code(run: Any, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = run(*arguments)
    assert done.exit_code == code
    line, = done.stderr.splitlines()  # nothing is loaded, or said to be, before what was typed is known to be good
    assert line.startswith("error: ") and says in line and done.stdout == ""
    assert not made()


def test_a_folder_without_write_permission(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentgen.run.pipeline.load", lambda *a, **k: pytest.fail("found too late"))
    monkeypatch.setattr("latentgen.cli.pictures.os.access", lambda path, mode: False)  # root, as whom tests may run, may write anywhere
    done = run("txt2img", "cat", "-o", "x.png")
    assert done.exit_code == 4 and "cannot be written" in done.stderr


def test_a_write_that_fails_late_and_a_bad_model(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentgen.pixels.save.os.replace", full)
    done = run("txt2img", "cat", "-o", "x.png")
    assert done.exit_code == 4 and "No space left" in done.stderr and not made()
    (tmp_path / "card.toml").write_text("name = 1 2")
    assert CliRunner().invoke(app, ["txt2img", "cat", "--model", str(tmp_path)]).exit_code == 3


def test_no_strict_turns_an_error_into_a_note(run: Any) -> None:
    done = run("txt2img", "cat", "--eta", "0.5", "--no-strict", "--quality", "50")
    assert done.exit_code == 0 and "note: ignored: eta" in done.stderr


def test_every_field_of_a_request_can_be_said() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    names = {name: {p.name for p in commands[name].params} for name in PICTURES}
    assert set(Request.model_fields) - IN_PYTHON <= names["plan"]
    assert set(Request.model_fields) - IN_PYTHON <= set().union(*(names[n] for n in PICTURES[:-1]))


@pytest.mark.parametrize("command", [(), *((c,) for c in (*PICTURES, "grid", "interpolate", "recipe", "replay", "variations", "resume", "explain", "models", "eval", "bench", "convergence")), *(("train", c) for c in STAGES)], ids=" ".join)
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert done.exit_code == 0 and " ".join(("latentgen", *command)) in done.stdout.rpartition("Example" if command else "Start with")[2]


@pytest.mark.parametrize("command, text", [("explain", "[flat:shaded:0.5]"), ("txt2img", "[from:to:0.4]"), ("interpolate", "latentgen[video]")])
def test_square_brackets_in_help_are_text(command: str, text: str) -> None:
    assert text in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).stdout


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys, latentgen.cli as c\n"
            "def heavy(): return [m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'tqdm', 'pydantic') if m in sys.modules]\n"
            "first = heavy()\ntry:\n c.app(['txt2img', '--help'])\nexcept SystemExit: pass\n"
            "print('HEAVY', first, [m for m in heavy() if m != 'pydantic'])")  # typer itself takes pydantic, where it is installed, to read defaults
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY [] []", done.stderr


def test_models_lists_and_describes(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentgen.models.card import find_card

    monkeypatch.setattr("latentgen.models.card.cards", lambda: {"tiny": find_card(tiny_folder)})
    table = CliRunner().invoke(app, ["models"]).stdout
    assert "licence" in table and "tiny" in table and "MB" in table
    assert json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)[0]["family"] == "glyph"
    assert "steps 4" in CliRunner().invoke(app, ["models", str(tiny_folder)]).stdout
    assert json.loads(CliRunner().invoke(app, ["models", str(tiny_folder), "--json"]).stdout)["defaults"]["width"] == 64
    assert CliRunner().invoke(app, ["models", "tinny"]).exit_code == 3


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("latentgen ")


def test_train_calls_the_stages_and_survives_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentgen.train import stages

    fakes = {name: create_autospec(getattr(stages, name)) for name in ("build_data", "train_text", "train_vae", "train_denoiser", "export")}
    for name, fake in fakes.items():
        monkeypatch.setattr(stages, name, fake)
    for part in ("data", "text/model", "vae/model", "unet/model"):
        (tmp_path / part).mkdir(parents=True)
    text, vae, unet, data = ([f"--{name}", str(tmp_path / name)] for name in ("text", "vae", "unet", "data"))
    for command in (["data", "--out", str(tmp_path)], ["text", *data, "--run", "r"], ["vae", *data, "--run", "r", "--minutes", "2"],
                    ["denoiser", *data, *text, *vae, "--run", "r", "--size", "128"], ["export", "--out", "o", *text, *vae, *unet, *data]):
        done = CliRunner().invoke(app, ["train", *command])
        assert done.exit_code == 0, done.output
    assert fakes["train_vae"].call_args.kwargs["minutes"] == 2 and fakes["train_denoiser"].call_args.kwargs["size"] == 128
    assert all(fake.call_count == 1 for fake in fakes.values())
    fakes["train_vae"].side_effect = KeyboardInterrupt
    done = CliRunner().invoke(app, ["train", "vae", *data, "--run", "r"])
    assert done.exit_code == 130 and "run the same command again" in done.stderr
    fakes["train_vae"].side_effect = PermissionError(13, "denied")
    assert CliRunner().invoke(app, ["train", "vae", *data, "--run", "r"]).exit_code == 4
    assert CliRunner().invoke(app, ["train", "vae", *data, "--run", "r", "--minutes", "0"]).exit_code == 2
    assert CliRunner().invoke(app, ["train", "denoiser", *data, "--run", "r", "--text", str(tmp_path), *vae]).exit_code == 1  # no model/ there


def test_eval_and_bench_print_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentgen.bench import run as bench
    from latentgen.evaluate import glyph

    judge = create_autospec(glyph.evaluate, return_value={"colour": {"right": 0.81234567}, "counts": [1, 2]})
    measure = create_autospec(bench.bench, return_value={"ratios": {"diffusers float32": 1.5}, "seconds": {"latentgen": 2.0}, "size": [64, 64]})
    monkeypatch.setattr(glyph, "evaluate", judge)
    monkeypatch.setattr(bench, "bench", measure)
    done = CliRunner().invoke(app, ["eval", "glyph", "--data", str(tmp_path), "--out", str(tmp_path / "o"), "--pictures", "9"])
    assert done.exit_code == 0 and "0.8123" in done.stdout and judge.call_args.kwargs == {"pictures": 9, "seed": 0}
    done = CliRunner().invoke(app, ["bench", "--size", "64"])
    assert done.exit_code == 0 and done.stdout.splitlines()[-1].split() == ["ratios", "diffusers", "float32", "1.5"] and "64, 64" in done.stdout
    assert json.loads(CliRunner().invoke(app, ["bench", "--json", "--no-cold"]).stdout)["seconds"] and measure.call_args.kwargs["cold"] is False
    measure.side_effect = ModuleNotFoundError("no", name="resvg_py")
    done = CliRunner().invoke(app, ["bench"])
    assert done.exit_code == 1 and "pip install" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals to a child differ on Windows")
def test_ctrl_c_stops_within_a_step_and_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import latentgen.__main__"  # it may be ignored here
    options = ("--steps", "1000", "--model", str(tiny_folder), "--device", "cpu", "--dtype", "float32", "-o", "x.png")
    with subprocess.Popen([sys.executable, "-c", code, "txt2img", "cat", *options], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        said = []
        for line in child.stderr:
            said.append(line)
            if line.startswith("step 1/1000"):
                child.send_signal(signal.SIGINT)
                break
        rest = child.communicate(timeout=60)
    assert child.returncode in (130, -signal.SIGINT), said  # a shell calls both 130; Python chooses the second where the signal met its own exec()
    assert rest[1].splitlines()[-1] == "stopped" and rest[0] == "" and "Traceback" not in rest[1] and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="pipes differ on Windows")
def test_a_closed_pipe_is_quiet() -> None:
    code = "import latentgen.cli.reports as r, typer, sys\nsys.argv=['latentgen','models','--json']\nimport latentgen.cli as c\nc.main()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_slug_and_free_name(tmp_path: Path) -> None:
    assert [slug(p) for p in ("a red heart", " Ein Haus, groß! ", "красное сердце", "../../etc", "!?", "")] == [
        "a-red-heart", "ein-haus-groß", "красное-сердце", "etc", "picture", "picture"]
    assert slug("word " * 30) == "-".join(["word"] * 9) and len(slug("x" * 500)) == 48
    (tmp_path / "x.png").touch()
    (tmp_path / "x-2.png").symlink_to(tmp_path / "gone")  # a dangling link is a name that is taken, too
    assert free_name(tmp_path, "x").name == "x-3.png"


def test_meter_draws_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from latentgen.diffusion.level import Level
    from latentgen.diffusion.sample import Step

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Meter(shown=True) as meter:
        meter.phase("loading")
        for index in range(3):
            meter.step(Step(index, 3, Level(0.5, 0.5, 500.0), torch.zeros(1), torch.zeros(1)))
        meter._bar.refresh()
    out, err = capsys.readouterr()
    assert out == "" and "3/3" in err and "0:00 left" in err


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("environment", "kind"), [
    ({"KITTY_WINDOW_ID": "1"}, "kitty"), ({"TERM_PROGRAM": "iTerm.app"}, "iterm"), ({"COLORTERM": "truecolor"}, "blocks"), ({"TERM": "xterm"}, None),
    ({"KITTY_WINDOW_ID": "1", "TMUX": "x", "COLORTERM": "truecolor"}, "blocks")])
def test_pictures_in_the_terminal(environment: dict[str, str], kind: str | None) -> None:
    image, stream = Image.effect_noise((90, 60), 90).convert("RGB"), _Terminal()
    assert terminal.protocol(stream, environment) == kind and terminal.protocol(io.StringIO(), environment) is None
    assert terminal.show(image, stream=stream, environment=environment) is (kind is not None)
    text = stream.getvalue()
    if kind == "kitty":
        pieces = text.removesuffix("\n").split("\x1b\\")[:-1]
        assert pieces[0].startswith("\x1b_Ga=T,f=100,q=2,m=1;") and pieces[-1].startswith("\x1b_Gm=0;") and all(len(p) < 4200 for p in pieces)
    if kind == "iterm":
        assert text.startswith("\x1b]1337;File=inline=1;size=") and text.endswith("\x07\n")


def test_half_blocks_are_the_picture() -> None:
    image = Image.new("RGB", (2, 2))
    for at, colour in {(0, 0): (1, 2, 3), (1, 0): (4, 5, 6), (0, 1): (7, 8, 9), (1, 1): (10, 11, 12)}.items():
        image.putpixel(at, colour)
    assert terminal.blocks(image, columns=80, lines=24) == "\x1b[38;2;1;2;3;48;2;7;8;9m▀\x1b[38;2;4;5;6;48;2;10;11;12m▀\x1b[0m\n"
    small = terminal.blocks(image.resize((400, 300)), columns=40, lines=10)
    assert small.count("\n") <= 10 and small.splitlines()[0].count("▀") <= 40


def test_show_without_a_capable_terminal_is_a_note(run: Any) -> None:
    done = run("txt2img", "cat", "--show")
    assert done.exit_code == 0 and "shows no pictures" in done.stderr
