"""The README keeps its word: its Python snippets run in order as pasted, its shell lines run (long ones: their options exist)."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CARD = (ROOT / "weights" / "glyph" / "README.md").read_text("utf-8")  # tells how the shipped model is made again
LONG = ("train", "eval", "bench")  # minutes to hours: only their options are checked


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def test_python_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = _blocks("python")
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102


def test_shell_lines_work(tmp_path: Path) -> None:
    lines = [line for block in [*_blocks("bash"), *_blocks("sh", CARD)] for line in block.splitlines() if line.startswith("latentgen ")]
    assert any(" txt2img " in line for line in lines) and any(" train " in line for line in lines)
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        command = [sys.executable, "-m", "latentgen", *words, *(["--help"] if words[0] in LONG else [])]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        if words[0] in LONG:
            for option in re.findall(r"--[a-z-]+", line):
                assert option in done.stdout, f"{option} of {line!r} is not in its help"


def test_exactly_two_setup_commands_and_the_makefile_has_them() -> None:
    setup = README.split("## Set up")[1].split("\n## ")[0]
    commands = [line for line in re.findall(r"^```sh\n(.*?)^```", setup, flags=re.M | re.S)[0].splitlines() if line.strip()]
    assert [c.split("#")[0].split()[:2] for c in commands] == [["make", "picture"], ["make", "test"]]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in ("picture", "test"))
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
