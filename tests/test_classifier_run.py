"""Classifiers and CLIP in a request: the formula in a run, what a recipe says, and what replay asks for."""

import threading

import pytest
import torch
from safetensors.torch import save_file

import latentgen
from latentgen.errors import ModelError, RequestError
from latentgen.pixels.latent import coloured, preview, rendered
from latentgen.run.recipe import read_recipe

SAID = {"negative_prompt": "blue car", "guidance_scale": 4.0, "steps": 4, "seed": 3, "sampler": "euler"}


def bright(x, level):
    """Likes large values in the first channel."""
    return -((x[:, 0] - 2) ** 2).sum(dim=(1, 2))


class Clean:
    """The same of clean latents, or of pixels."""

    digest = "abc"

    def __init__(self, of="x0"):
        self.of, self.seen = of, []

    def __call__(self, x, level):
        self.seen.append(tuple(x.shape))
        return bright(x, level)


@pytest.fixture(scope="module")
def clip():
    import open_clip

    torch.manual_seed(0)
    seeing = {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    hearing = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(embed_dim=16, vision_cfg=seeing, text_cfg=hearing).eval().requires_grad_(False)


def first(pipe, **said):
    """x0 of the first step, and its level."""
    step = next(iter(pipe.stream("a red heart", **SAID | said)))
    return step.x0, step.level


def test_the_formula_of_a_step_with_a_judge_of_clean_latents(pipe):
    plain, level = first(pipe)
    led, _ = first(pipe, classifier=Clean(), guiders={"classifier": {"scale": 0.01}})
    slope = torch.zeros_like(plain)
    slope[:, 0] = -2 * (plain[:, 0] - 2)
    torch.testing.assert_close(led, plain + 0.01 * level.sigma**2 / (level.alpha**2 + level.sigma**2) * slope, rtol=1e-4, atol=1e-4)


def test_the_formula_of_a_step_with_the_papers_classifier(pipe):
    """Pure noise, where the run starts, says nothing of a class; from the second step on the formula holds."""
    plain, led = ([step for step in pipe.stream("a red heart", **SAID | said)][:2] for said in
                  ({}, {"classifier": bright, "guiders": {"classifier": {"scale": 0.001}}}))
    assert plain[0].level.alpha == 0 and torch.equal(plain[0].x, led[0].x)
    level, slope = plain[1].level, torch.zeros_like(plain[1].x0)
    slope[:, 0] = -2 * (plain[0].x[:, 0] - 2)
    torch.testing.assert_close(led[1].x0, plain[1].x0 + 0.001 * level.sigma**2 / level.alpha * slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("through", ["preview", "decoder"])
def test_pixels_are_those_of_the_preview_or_the_decoder(pipe, through):
    judge = Clean("pixels")
    led, _ = first(pipe, classifier=judge, guiders={"classifier": {"scale": 0.05, "through": through}})
    plain, level = first(pipe)
    assert judge.seen[0] == ((1, 3, 8, 8) if through == "preview" else (1, 3, 64, 64))
    own = plain.clone().requires_grad_()
    with pipe.residency.use("decoder") as modules:
        pixels = coloured(own, pipe.family.latent) if through == "preview" else rendered(modules["vae"], own, pipe.family.latent, call=pipe.family.vae_decode)
        (slope,) = torch.autograd.grad(bright(pixels, level).sum(), own)
    torch.testing.assert_close(led, plain + 0.05 * level.sigma**2 / (level.alpha**2 + level.sigma**2) * slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("speed", ["exact", "plain"])
def test_where_the_network_runs_in_bf16_the_decoder_is_led_through_in_float32(pipe, tiny_folder, speed):
    half = latentgen.load(tiny_folder, dtype="bfloat16", device="cpu", speed=speed, progress=False)
    led, _ = first(half, classifier=Clean("pixels"), guiders={"classifier": {"scale": 0.05, "through": "decoder"}})
    plain, level = first(half)
    own = plain.clone().requires_grad_()
    with pipe.residency.use("decoder") as modules:
        (slope,) = torch.autograd.grad(bright(rendered(modules["vae"], own, pipe.family.latent, call=pipe.family.vae_decode), level).sum(), own)
    torch.testing.assert_close(led, plain + 0.05 * level.sigma**2 / (level.alpha**2 + level.sigma**2) * slope, rtol=1e-3, atol=1e-4)
    assert all(dtype == torch.bfloat16 for _, dtype, *_ in half.residency._here), "no second copy is kept"


def test_the_coloured_tensor_is_what_a_preview_shows(pipe):
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = (coloured(x0, pipe.family.latent).clamp(-1, 1) * 127.5 + 127.5).round().permute(0, 2, 3, 1)
    assert (shown - torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).reshape(8, 8, 3) for i in preview(x0, pipe.family.latent)])).abs().max() <= 1


def test_clip_leads_to_its_words(pipe, clip):
    judge = latentgen.clip_guidance("a red heart", model=clip)
    plain = pipe.txt2img("a cat", **SAID)
    led = pipe.txt2img("a cat", classifier=judge, guiders={"classifier": {"scale": 30.0}}, **SAID)
    scores = [judge(coloured(result.latents, pipe.family.latent), None) for result in (plain, led)]
    assert scores[1] > scores[0] + 0.1 and led.plan.guiders["classifier"]["through"] == "preview"
    assert not any(p.requires_grad for p in clip.parameters())
    again = latentgen.clip_guidance("a blue car", model=clip)
    assert judge.digest == latentgen.clip_guidance("a red heart", model=clip).digest != again.digest


def test_clip_sees_pictures_as_open_clip_prepares_them(clip):
    from open_clip.transform import image_transform
    from PIL import Image

    dice = torch.Generator().manual_seed(1)
    small = Image.fromarray((torch.rand(6, 8, 3, generator=dice) * 255).byte().numpy()).resize((48, 32), Image.Resampling.BICUBIC)
    ready = image_transform(16, is_train=False, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))(small)[None]
    words = clip.encode_text(__import__("open_clip").get_tokenizer("ViT-B-32")(["a cat"]))
    wanted = clip.logit_scale.exp() * torch.nn.functional.cosine_similarity(clip.encode_image(ready), words)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(1, 32, 48, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(latentgen.clip_guidance("a cat", model=clip)(pixels, None), wanted, rtol=0, atol=0.02 * clip.logit_scale.exp().item())


def test_a_batch_is_its_pictures_with_everything_on(pipe):
    said = SAID | {"classifier": Clean(), "guiders": {"classifier": {"scale": 0.01}, "apg": {}, "pag": {}, "static_threshold": {}}, "guidance_rescale": 0.3}
    batch = pipe.txt2img("a red heart", batch=2, **said)
    assert [pipe.txt2img("a red heart", **said | {"seed": seed}).image.tobytes() for seed in (3, 4)] == [image.tobytes() for image in batch.images]


def test_it_holds_to_the_interval_and_its_share_of_the_steps(pipe):
    for said, wanted in (({"guidance_interval": (0.0, 1e-4)}, 0), ({"guiders": {"classifier": {"scale": 0.01, "start": 0.25, "end": 0.75}}}, 2), ({}, 4)):
        judge = Clean()
        pipe.txt2img("a cat", classifier=judge, **SAID | said)
        assert len(judge.seen) == wanted


def test_replay_asks_for_the_same_one(pipe, tmp_path):
    result = pipe.txt2img("a red heart", classifier=Clean(), guiders={"classifier": {"scale": 0.01}}, **SAID)
    file = result.save(tmp_path / "it.png")[0]
    recipe = read_recipe(file)
    assert recipe.data["classifier_sha256"] == "abc" and "classifier" not in recipe.data and recipe.needs == ("classifier",)
    assert any("a classifier leads it, which no file holds" in note for note in recipe.notes)
    without = pipe.replay(file)
    assert not without.identical and without.result is None and without.differences == ("classifier is missing: give the classifier that it was made from",)
    other = Clean()
    other.digest = "def"
    assert pipe.replay(file, classifier=other).differences == ("classifier is not the one that it was made from",)
    assert pipe.replay(file, classifier=Clean()).identical
    nameless = pipe.txt2img("a red heart", classifier=bright, **SAID | {"guiders": {"classifier": {"scale": 0.001}}}).save(tmp_path / "b.png")[0]
    assert read_recipe(nameless).data["classifier_sha256"] == "unknown" and pipe.replay(nameless, classifier=bright).identical


def test_threads_with_classifiers_of_their_own(pipe):
    judges = {scale: {"scale": scale} for scale in (0.0, 0.005, 0.01)}

    def made(scale):
        return pipe.txt2img("a cat", classifier=bright, guiders={"classifier": judges[scale]}, **SAID).image.tobytes()

    wanted, found = {scale: made(scale) for scale in judges}, {}
    threads = [threading.Thread(target=lambda scale=scale: found.update({scale: made(scale)})) for scale in judges]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert found == wanted and len(set(wanted.values())) == 3


@pytest.mark.parametrize("said, word", [
    ({"guiders": "classifier"}, "given as a guider but none is there"), ({"classifier": 3}, "classifier is 3: expected something to call"),
    ({"classifier": Clean("words")}, "it is of 'words': expected x, x0 or pixels"),
    ({"classifier": bright, "guiders": {"classifier": {"through": "decoder"}}}, "is shown latents, not pixels"), ({"cond_fn": bright}, "did you mean 'classifier'")])
def test_what_cannot_be_is_said_while_planning(pipe, said, word):
    with pytest.raises(RequestError, match=word):
        pipe.plan("a cat", **said)


def test_a_classifier_that_gives_no_slope_is_named(pipe):
    with pytest.raises(RequestError, match="has no gradient"):
        pipe.txt2img("a cat", classifier=lambda x, level: torch.zeros(len(x)), **SAID)


def test_clip_models_that_cannot_be(clip, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "it.safetensors")
    for said, kind, word in (({"model": "ViT-B-32"}, RequestError, "belong together"), ({"model": clip, "weights": tmp_path / "it.safetensors"}, RequestError, "together"),
                             ({"model": "ViT-B-33", "weights": tmp_path / "it.safetensors"}, ModelError, "no architecture"),
                             ({"model": "RN50", "weights": tmp_path / "it.pt"}, ModelError, "no .safetensors file"),
                             ({"model": "RN50", "weights": tmp_path / "it.safetensors"}, ModelError, "do not fit RN50")):
        with pytest.raises(kind, match=word):
            latentgen.clip_guidance("a cat", **said)
    with pytest.raises(RequestError, match="prompt is empty"):
        latentgen.clip_guidance(" ", model=clip)
