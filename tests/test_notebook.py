"""The notebook's live preview and form: with widgets in a real kernel whose Stop button is pressed while the run goes on, without them, and outside."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipykernel
import pytest
from jupyter_client.manager import start_new_kernel
from PIL import Image

from latentgen import notebook
from latentgen.errors import NotFiniteError, RequestError
from latentgen.notebook import watch
from latentgen.notebook.screen import as_html

PATIENCE = 60  # seconds that a cell of the kernel may take


def test_outside_a_notebook_it_runs_to_its_end(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(watch.Nowhere, "show", lambda self, thing: shown.append(thing))
    run = notebook.live(pipe, "a cat", seed=1, steps=4, every=2, size=64)
    assert not run.running and run.result.image.tobytes() == pipe.txt2img("a cat", seed=1, steps=4).image.tobytes()
    assert [thing.size for thing in shown[:-1]] == [(72, 93)] * 2 and shown[-1] is run.result
    with pytest.raises(RequestError, match="every is 0"):
        notebook.live(pipe, "a cat", every=0)


def test_an_interrupted_cell_stops_the_run(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Any, thing: Any) -> None:
        if not isinstance(thing, str):
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.Nowhere, "show", interrupt)
    assert notebook.live(pipe, "a cat", seed=1).result is None


def test_what_goes_wrong_is_shown_and_raised_where_the_result_is_asked_for(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(watch.Nowhere, "show", lambda self, thing: shown.append(thing))
    monkeypatch.setattr("latentgen.run.work.Work.check_finite", lambda *a: (_ for _ in ()).throw(NotFiniteError("the denoiser gave NaN")))
    run = notebook.live(pipe, "a cat", seed=1, background=True)
    with pytest.raises(NotFiniteError):
        _ = run.result
    assert shown[-1] == "NotFiniteError: the denoiser gave NaN"
    with pytest.raises(NotFiniteError):
        notebook.live(pipe, "a cat", seed=1)


def test_in_a_thread_it_is_the_same_picture_and_can_be_stopped(pipe: Any) -> None:
    run = notebook.live(pipe, "a cat", seed=1, steps=3, background=True)
    assert run.result.image.tobytes() == pipe.txt2img("a cat", seed=1, steps=3).image.tobytes()
    ended: list[int] = []
    run = watch.Live(pipe, pipe.plan("a cat", steps=900, seed=1), watch.Nowhere())
    run.on_end = lambda: ended.append(1)
    run.start(background=True)
    run.stop()
    assert run.result is None and not run.running and ended == [1]


def test_a_form_says_what_was_changed(pipe: Any) -> None:
    form = notebook.form(pipe)
    form.fields["prompt"].value = "a cat"
    assert form.request.model_fields_set == {"prompt"}
    form.fields["steps"].value, form.fields["seed"].value, form.fields["sampler"].value, form.fields["guidance_scale"].value = 2, "7", "euler", 3.5
    form.fields["negative_prompt"].value = "a dog"
    said = {"steps": 2, "seed": 7, "sampler": "euler", "guidance_scale": 3.5, "negative_prompt": "a dog"}
    assert {name: getattr(form.request, name) for name in form.request.model_fields_set} == said | {"prompt": "a cat"}
    form.make()
    assert form.result.image.tobytes() == pipe.txt2img("a cat", **said).image.tobytes()
    shown = form.box.children[-1].value
    assert "<img" in shown and "<summary>recipe</summary>" in shown and "guidance_scale" in shown


def test_a_form_tells_what_cannot_be_honoured(pipe: Any) -> None:
    form = notebook.form(pipe)
    form.fields["seed"].value = "seven"
    form.make()
    assert "seed is &#x27;seven&#x27;: expected a whole number" in form.box.children[-1].value and form.result is None
    form.fields["seed"].value, form.fields["width"].value = "", 65
    form.make()
    assert "65" in form.box.children[-1].value and form.result is None


def test_without_widgets(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def bare(name: str, *rest: Any, **more: Any) -> Any:
        if name == "ipywidgets":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", bare)
    monkeypatch.setattr(watch, "in_notebook", lambda: True)
    monkeypatch.setattr(watch, "Output", watch.Nowhere)
    assert not notebook.live(pipe, "a cat", seed=1, steps=2).running  # as in a notebook without them: the cell runs it to its end
    with pytest.raises(RequestError, match=r"latentgen\[notebook\].*use live"):
        notebook.form(pipe)


def test_words_on_the_screen_are_no_html() -> None:
    assert as_html("<b>") == "<p>&lt;b&gt;</p>" and as_html(Image.new("RGB", (2, 2))).startswith('<img src="data:image/png;base64,')


class Kernel:
    """A notebook's kernel and the messages of a front end."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def run(self, code: str) -> tuple[str, list[dict[str, Any]]]:
        """What a cell printed, and what it displayed or updated."""
        printed, shown = [], []

        def heard(message: dict[str, Any]) -> None:
            content = message["content"]
            printed.append(content.get("text", "")) if message["msg_type"] == "stream" else None
            shown.append(content["data"]) if message["msg_type"] in ("display_data", "update_display_data") else None

        reply = self.client.execute_interactive(code, timeout=PATIENCE, output_hook=heard, store_history=False)
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(printed).strip(), shown

    def click(self, comm: str) -> None:
        message = self.client.session.msg("comm_msg", {"comm_id": comm, "data": {"method": "custom", "content": {"event": "click"}}})
        self.client.shell_channel.send(message)


@pytest.fixture(scope="module")
def kernel(tiny_folder: Path) -> Iterator[Kernel]:
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=PATIENCE)
    try:
        made = Kernel(client)
        made.run("import torch, time, latentgen, ipywidgets\nfrom latentgen.notebook import live, form\ntorch.set_num_threads(1)\nfrom ipywidgets import Widget\n"
                 f"pipe = latentgen.load({str(tiny_folder)!r}, device='cpu', dtype='float32', progress=False)\n"
                 "def button(name):\n"
                 "    from ipywidgets.widgets.widget import _instances\n"
                 "    return [w for w in _instances.values() if isinstance(w, ipywidgets.Button) and w.description == name and w.comm][-1].comm.comm_id")
        yield made
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_the_stop_button_stops_within_a_step(kernel: Kernel) -> None:
    """The cell that starts the run has ended; the click comes over the wire as a front end sends it."""
    _, shown = kernel.run("run = live(pipe, 'a cat', steps=1000, seed=1)")
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)
    kernel.click(kernel.run("print(button('Stop'))")[0])
    assert kernel.run("print(run.result)")[0] == "None"
    assert kernel.run("print(run.running, len([t for t in __import__('threading').enumerate() if t.name == 'latentgen live']))")[0] == "False 0"


def test_a_run_that_is_left_alone_shows_previews_and_the_recipe(kernel: Kernel) -> None:
    printed, shown = kernel.run("run = live(pipe, 'a cat', steps=4, seed=1)\nprint(run.result.seeds)")
    pages = [data["text/html"] for data in shown if data.get("text/html")]
    assert printed == "(1,)" and len(pages) == 5 and all("<img" in page for page in pages) and "<summary>recipe</summary>" in pages[-1]


def test_the_form_makes_and_stops(kernel: Kernel) -> None:
    _, shown = kernel.run("f = form(pipe)\nf.fields['prompt'].value = 'a cat'\nf.fields['steps'].value = 1000\nf")
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)
    kernel.click(kernel.run("print(button('Make'))")[0])
    assert kernel.run("print(f._live is not None)")[0] == "True"  # cells run while the picture is made
    kernel.click(kernel.run("print(button('Stop'))")[0])
    assert kernel.run("print(f.result)")[0] == "None" and "stopped after step" in kernel.run("print(f.box.children[-1].value)")[0]


@pytest.mark.skipif(ipykernel.version_info[:2] < (7, 4), reason="older kernels hear no button while a cell waits")
def test_the_button_is_heard_while_a_cell_awaits_the_run(kernel: Kernel) -> None:
    kernel.run("run = live(pipe, 'a cat', steps=1000, seed=1)")
    comm = kernel.run("print(button('Stop'))")[0]
    waiting = kernel.client.execute("said = await run", store_history=False)
    kernel.click(comm)
    reply = kernel.client.get_shell_msg(timeout=PATIENCE)
    while reply["parent_header"].get("msg_id") != waiting:
        reply = kernel.client.get_shell_msg(timeout=PATIENCE)
    assert reply["content"]["status"] == "ok" and kernel.run("print(said, run.running)")[0] == "None False"
