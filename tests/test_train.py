"""Training: names, recolours, held-out lists, the loop's resume, and that exported parts are the trained ones."""

from __future__ import annotations

import colorsys
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_gpu import GPU, Waits
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from latentgen.cli import app
from latentgen.errors import RequestError, TrainingError
from latentgen.run.residency import choose_device
from latentgen.train import denoiser, stages, text, vae
from latentgen.train.captions import HeldOut, Icon, _segment, natural
from latentgen.train.data import PictureSetReader, _recolours, _without_faults
from latentgen.train.draw import draw, svg_of
from latentgen.train.loop import Budget, fit
from latentgen.train.recolour import HUES, hsv_to_rgb, main_hue, recolour, rgb_to_hsv


def test_hue_arithmetic_follows_colorsys() -> None:
    rgb = np.random.default_rng(0).random((500, 3))
    rgb[:6] = [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]]
    wanted = np.array([colorsys.rgb_to_hsv(*p) for p in rgb])
    assert np.allclose(rgb_to_hsv(rgb), wanted, atol=1e-12)
    assert np.allclose(hsv_to_rgb(wanted), [colorsys.hsv_to_rgb(*p) for p in wanted], atol=1e-12)


def _disc(colour: tuple[int, int, int]) -> np.ndarray:
    y, x = np.mgrid[:64, :64] - 32
    inside = (x**2 + y**2 < 700)[..., None]
    return (inside * np.array([*colour, 255])).astype(np.uint8)


@pytest.mark.parametrize("colour", sorted(HUES))
def test_recolour_reaches_the_named_hue_and_keeps_the_shape(colour: str) -> None:
    source = _disc((200, 40, 40))
    hue = main_hue(source)
    assert hue is not None and abs(hue - 0.0) < 0.02
    made = recolour(source, hue, colour)
    assert np.array_equal(made[..., 3], source[..., 3])
    turned = main_hue(made)
    assert turned is not None and abs((turned - HUES[colour] + 0.5) % 1 - 0.5) < 0.02


def test_main_hue_refuses_greys_and_mixtures() -> None:
    assert main_hue(_disc((120, 120, 120))) is None
    mixed = _disc((220, 30, 30))
    mixed[:, 32:] = _disc((30, 30, 220))[:, 32:]
    assert main_hue(mixed) is None


@pytest.mark.parametrize(("label", "said"), [
    ("man: red hair", "man with red hair"), ("man: bald", "bald man"), ("family: man, woman, girl", "family of man, woman, girl"),
    ("woman running: dark skin tone", "woman running, dark skin tone"), ("man: light skin tone, red hair", "man with red hair, light skin tone"), ("red heart", "red heart"),
    ("four o’clock", "four o'clock"),
])
def test_labels_become_natural(label: str, said: str) -> None:
    assert natural(label) == said


def test_run_together_names_are_taken_apart() -> None:
    words = {"alarm", "clock", "bento", "box"}
    assert _segment("alarmclock", words) == "alarm clock"
    assert _segment("bentoboxx", words) is None


def _held_out() -> HeldOut:
    return HeldOut.read(Path(str(resources.files("latentgen.weights"))) / "glyph" / "held-out.json")


def test_held_out_list_is_complete() -> None:
    splits = _held_out()
    assert {"comp", "tone", "style", "concept", "train_drop"} == set(splits.ids.values())
    assert len(splits.recolours) == 425 and "blue heart" in splits.names


def test_variants_of_held_out_concepts_are_held_out_too() -> None:
    from latentgen.train.captions import _hold_out_variants

    listed = [Icon("noto/a", "noto", "a", "woman judge", "s", split="comp", codes="1f469-200d-2696"), Icon("noto/b", "noto", "b", "x", "s", codes="1f469-1f3fb-200d-2696"),
              Icon("noto/c", "noto", "c", "y", "s", codes="1f469-200d-2696-200d-27a1"), Icon("noto/d", "noto", "d", "z", "s", codes="1f468-200d-2696")]
    _hold_out_variants(listed)
    assert [i.split for i in listed] == ["comp", "comp", "comp", "train"]


def test_held_out_pairs_are_never_recoloured() -> None:
    pixels = np.stack([_disc((220, 30, 30)), _disc((30, 160, 40))])
    listed = [Icon("noto/anchor", "noto", "anchor", "anchor", "soft shaded", subgroup="tool"), Icon("noto/x", "noto", "x", "leaf", "soft shaded", subgroup="plant-other")]
    names = {icon.name for icon, _ in _recolours(listed, [0, 1], pixels, _held_out(), lambda *a: None)}
    assert "pink anchor" in names and "blue leaf" in names
    assert "blue anchor" not in names and not names & {f"{n}" for n in _held_out().recolours}


def test_a_double_of_a_held_out_picture_leaves_training() -> None:
    pixels = np.stack([_disc((220, 30, 30)), _disc((220, 30, 30)), np.zeros((64, 64, 4), np.uint8)])
    listed = [Icon("noto/a", "noto", "a", "person running", "s"), Icon("noto/b", "noto", "b", "woman running", "s", split="comp"), Icon("noto/c", "noto", "c", "blank", "s")]
    kept, rows = _without_faults(listed, pixels)
    assert [(i.id, i.split) for i in kept] == [("noto/a", "comp")] and rows == [0]


def test_svgs_are_squared_and_drawn(tmp_path: Path) -> None:
    body = {"body": '<rect width="8" height="16" fill="currentColor"/>', "width": 8, "height": 16}
    assert 'viewBox="-4 0 16 16"' in svg_of(body) and "#222222" in svg_of(body)
    pytest.importorskip("resvg_py")
    from latentgen.train.draw import _draw_with_python

    rgba = _draw_with_python(svg_of(body), 32)
    assert rgba.shape == (32, 32, 4) and rgba[16, 16, 3] == 255 and rgba[16, 2, 3] == 0 and rgba[16, 16, 0] == 0x22


def test_drawing_keeps_rows_that_are_done(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (10, 200, 30, 255)).save(tmp_path / "a.webp", lossless=True)
    bodies = [{"path": str(tmp_path / "a.webp")}, {"path": str(tmp_path / "a.webp")}]
    first = draw(bodies, tmp_path / "p.npy", size=16, modules=tmp_path / "node_modules")
    assert first.shape == (2, 16, 16, 4) and tuple(first[1, 8, 8]) == (10, 200, 30, 255)
    (tmp_path / "a.webp").unlink()
    seen: list[int] = []
    draw(bodies, tmp_path / "p.npy", size=16, modules=tmp_path / "node_modules", progress=seen.append)
    assert seen == [2]


def test_tokenizer_equals_transformers(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    text.train_tokenizer(["a red heart", "blue car, soft shaded", "zebra crossing"], tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    lines = ["A  red HEART!", "naïve 人 🎈 don't 42", "", "\tnew\nline"]
    ids = theirs(lines, padding="max_length", max_length=text.CONTEXT)["input_ids"]
    assert text.tokens_of(lines, tmp_path).tolist() == ids


def test_towers_equal_transformers_and_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    towers = text.TwoTowers().eval()
    text.train_tokenizer(["a cat"], tmp_path)
    tokens = torch.from_numpy(text.tokens_of(["a cat", "a much longer caption, flat"], tmp_path))
    pixels = torch.rand(2, 3, text.PICTURE_SIZE, text.PICTURE_SIZE) * 2 - 1
    clip = text.to_transformers(towers)
    with torch.no_grad():
        out = clip(input_ids=tokens, pixel_values=pixels)
        assert torch.allclose(out.image_embeds, towers.clip.encode_image(pixels, normalize=True), atol=1e-5)
        assert torch.allclose(out.text_embeds, towers.caption_embedding(tokens), atol=1e-5)
        assert torch.allclose(out.text_embeds, towers.clip.encode_text(tokens, normalize=True), atol=1e-5)
    again = text.from_transformers(clip.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(towers.clip.state_dict().values(), again.clip.state_dict().values(), strict=True))


def test_new_autoencoder_is_a_colour_true_thumbnail() -> None:
    model = vae.new_vae(16).eval()
    pixels = torch.tensor([0.8, -0.5, 0.1])[None, :, None, None].expand(1, 3, 64, 64)
    with torch.no_grad():
        z = vae.encode(model, pixels)
        made = model.decode(z).sample
    assert z.shape == (1, 4, 8, 8)
    assert (made[..., 16:48, 16:48].mean((2, 3)) - pixels[..., 0, 0]).abs().max() < 0.12


def test_schedule_is_diffusers_with_zero_terminal_snr() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=denoiser.BETA_START, beta_end=denoiser.BETA_END, rescale_betas_zero_snr=True).alphas_cumprod
    assert torch.allclose(denoiser.alphas_bar(), theirs, atol=1e-5) and denoiser.alphas_bar()[-1] == 0


def _toy() -> tuple[nn.Module, object, object]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)

    def batches():  # noqa: ANN202
        dice = torch.Generator().manual_seed(1)
        while True:
            x = torch.randn(32, 4, generator=dice)
            yield {"x": x, "y": x.sum(1, keepdim=True)}

    return model, batches(), lambda m, b: {"loss": (m(b["x"]) - b["y"]).square().mean()}


def test_loop_learns_logs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    model, batches, loss = _toy()
    ema = fit(model, loss, batches, tmp_path, Budget(0.02, lr=0.03, warmup=1, ema=0.9), bf16=False, sheet=lambda m: Image.new("RGB", (4, 4)))
    first = json.loads((tmp_path / "state.json").read_text())
    assert first["step"] > 20 and (tmp_path / "loss.png").exists() and (tmp_path / "sheet.png").exists()
    rows = (tmp_path / "loss.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[3]) < 0.2 * float(rows[1].split(",")[3])
    fresh, batches, loss = _toy()
    again = fit(fresh, loss, batches, tmp_path, Budget(0.02, lr=0.03), bf16=False)
    assert torch.equal(again.weight, ema.weight), "a used-up budget trains no further and gives the saved average"
    fit(_toy()[0], loss, batches, tmp_path, Budget(0.03, lr=0.03), bf16=False)
    assert json.loads((tmp_path / "state.json").read_text())["step"] > first["step"]
    assert not list(tmp_path.glob("*.part"))


def test_loop_keeps_its_state_when_interrupted(tmp_path: Path) -> None:
    model, batches, loss = _toy()
    calls = 0

    def interrupted(m, b):  # noqa: ANN001, ANN202
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        return loss(m, b)

    with pytest.raises(KeyboardInterrupt):
        fit(model, interrupted, batches, tmp_path, Budget(1.0), bf16=False)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 14


def test_loop_gives_up_on_a_loss_that_stays_nan(tmp_path: Path) -> None:
    model, batches, _ = _toy()
    with pytest.raises(TrainingError, match="not finite for 20 steps"):
        fit(model, lambda m, b: {"loss": m(b["x"]).mean() * float("nan")}, batches, tmp_path, Budget(1.0), bf16=False)


def _set(folder: Path, count: int = 24) -> Path:
    """A picture set of coloured discs at 32 px."""
    folder.mkdir(parents=True)
    dice = np.random.default_rng(0)
    pixels = np.stack([_disc(tuple(dice.integers(0, 255, 3)))[::2, ::2] for _ in range(count)])
    np.save(folder / "pictures-32.npy", pixels)
    icons = [Icon(f"noto/{n}", "noto", str(n), f"disc {n}", "flat", keywords=["round"], split="train" if n % 4 else "comp") for n in range(count)]
    (folder / "index.jsonl").write_text("".join(i.to_json() + "\n" for i in icons))
    return folder


def test_reader_composites_and_splits(tmp_path: Path) -> None:
    reader = PictureSetReader(_set(tmp_path / "set"), size=32)
    assert len(reader.rows("train")) == 18 and len(reader.rows("comp")) == 6
    picture = reader.on_white([0])[0]
    assert picture.shape == (32, 32, 3) and tuple(picture[0, 0]) == (255, 255, 255)
    with pytest.raises(TrainingError, match="latentgen train data"):
        PictureSetReader(tmp_path / "nothing")


def test_denoiser_cache_batches_and_loss(tmp_path: Path, tiny_folder: Path) -> None:
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel

    reader = PictureSetReader(_set(tmp_path / "set"), size=32)
    autoencoder = AutoencoderTiny.from_pretrained(tiny_folder / "vae").eval()
    encoder = CLIPTextModel.from_pretrained(tiny_folder / "text_encoder").eval()
    rows = denoiser.training_rows(reader)
    latents = denoiser.cache_latents(reader, rows, autoencoder, tmp_path / "z.npy", size=32)
    states, choices = denoiser.cache_text(reader, rows, encoder, tiny_folder / "tokenizer")
    assert latents.shape == (18, 4, 4, 4) and states.shape[1:] == (32, 16)
    cache = denoiser.Cache(np.array(latents), states, choices, denoiser.weights(reader, rows))
    batch = next(denoiser.batches(cache, batch=6, seed=0))
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    terms = denoiser.loss_function()(unet, batch)
    terms["loss"].backward()
    assert terms["loss"].item() > 0 and any(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())
    sheet = denoiser.sheet(autoencoder, encoder, tiny_folder / "tokenizer", ["a"] * 6, size=32, scale=1.0)(unet)
    assert sheet.size == (192, 32)


def test_losses_stay_on_their_device() -> None:
    """On a CUDA device that is made up, where an operation on tensors of two devices is an error as on a real one."""
    from diffusers import UNet2DConditionModel

    with FakeTensorMode(), Waits():  # who answers what the host asks of it
        with GPU:
            towers, autoencoder, unet = text.TwoTowers(), vae.new_vae(), UNet2DConditionModel(
                sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=8, cross_attention_dim=16,
                attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
        words, pixels = torch.zeros(2, 32, dtype=torch.long, device=GPU), torch.zeros(2, 3, 96, 96, device=GPU)
        batches = ((towers, text.loss, {"pixels": pixels, "tokens": words, "extra": words, "targets": torch.zeros(2, 384, device=GPU)}),
                   (autoencoder, vae.loss, {"pixels": pixels.byte()}),
                   (unet, denoiser.loss_function(device=GPU), {"latents": torch.zeros(2, 4, 8, 8, device=GPU), "states": torch.zeros(2, 5, 16, device=GPU)}))
        for network, loss, batch in batches:
            assert all(term.device == GPU for term in loss(network, batch).values())
        states = torch.zeros(2, 5, 16, device=GPU)
        assert denoiser.sample(unet, states, states[:1], size=64, steps=2).device == GPU


def test_a_device_reaches_every_part_and_one_that_is_missing_is_refused(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = _set(tmp_path / "set"), []
    monkeypatch.setattr(stages, "PictureSetReader", lambda folder: PictureSetReader(folder, size=32))
    monkeypatch.setattr(stages, "fit", lambda model, *_, device, **__: seen.append(device) or model)
    monkeypatch.setattr(stages.text_training, "sentence_embeddings", lambda lines, *, device: seen.append(device) or np.zeros((len(lines), 384), np.float32))
    stages.train_vae(data, tmp_path / "vae", minutes=1, device="auto")
    stages.train_text(data, tmp_path / "text", minutes=1, device="auto")
    stages.train_denoiser(data, tmp_path / "unet", size=32, minutes=1, vae=tmp_path / "vae", text=tmp_path / "text", device="auto")
    assert seen == [choose_device("auto")] * 4
    for train in (stages.train_vae, stages.train_text):
        with pytest.raises(RequestError, match="device is 'cuda:99', which this machine does not have: use 'auto' or 'cpu'"):
            train(tmp_path / "nowhere", tmp_path / "run", minutes=1, device="cuda:99")
    said = CliRunner().invoke(app, ["train", "vae", "--data", str(data), "--run", str(tmp_path / "run"), "--device", "toaster"])
    assert (said.exit_code, said.stderr) == (2, "error: device is 'toaster': expected 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps'\n")
    assert not (tmp_path / "run").exists()


def test_a_grown_denoiser_keeps_what_it_learnt() -> None:
    from diffusers import UNet2DConditionModel

    config = {"layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 4, "sample_size": 8}
    inner = UNet2DConditionModel(block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **config)
    unet = denoiser.grown(inner, channels=8)
    assert unet.config.block_out_channels == (8, 16, 32) and unet.config.sample_size == 16
    assert unet(torch.randn(2, 4, 16, 16), 5, torch.randn(2, 7, 16)).sample.shape == (2, 4, 16, 16)
    old, new = inner.state_dict(), unet.state_dict()
    assert torch.equal(new["down_blocks.2.attentions.0.proj_in.weight"], old["down_blocks.1.attentions.0.proj_in.weight"])
    assert torch.equal(new["up_blocks.0.resnets.0.conv1.weight"], old["up_blocks.0.resnets.0.conv1.weight"])
    t = torch.tensor([3.0, 900.0])
    coarse = unet.time_embedding.linear_1(unet.time_proj(t)) - inner.time_embedding.linear_1(inner.time_proj(t))
    assert coarse.abs().mean() < inner.time_embedding.linear_1(inner.time_proj(t)).abs().mean()  # nearly the time that it was told before
    with pytest.raises(TrainingError, match="expected 8, half of the outermost"):
        denoiser.grown(inner, channels=16)


def test_growing_needs_weights(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="pass start"):
        stages.train_denoiser(tmp_path, tmp_path, size=256, minutes=1, vae=tmp_path, text=tmp_path, grow=True)
