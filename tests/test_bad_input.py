"""Bad input: each kind gives one clear sentence that names what was given and what was expected, before any weight loads, and nothing is left behind.

Odd but sound input gives the right picture; it is here too, beside what it is easily confused with.
"""

import io
import json
import math
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import latentgen
from latentgen.errors import ImageError, RequestError

ONE = {"steps": 1, "seed": 0}
each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def untouched(tiny_folder):
    """A pipeline that has never run: what it refuses, it refuses without weights."""
    return latentgen.load(tiny_folder, dtype="float32", device="cpu", progress=False)


def grey(width=64, height=64, value=128):
    return Image.new("RGB", (width, height), (value,) * 3)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sentence(error):
    """The message, if it is one sentence on one line that says what to do and is short enough to read."""
    text = str(error)
    assert text and "\n" not in text and 20 < len(text) < 1000 and ": " in text, text
    assert "Traceback" not in text and "pydantic" not in text and "object at 0x" not in text, text
    return text


def refused(call, *words, kind=RequestError):
    with pytest.raises(kind) as raised:
        call()
    text = sentence(raised.value)
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"
    return text


# Words and numbers


@each("name, values, expected", [
    ("width", [0, -8, 67, 10**9, 10**5000, "big", True, 64.0, 64.5, math.nan, [64], (64, 64), 8200], None),
    ("height", [0, -1, 45, 2**31, "64", False, b"64"], None),
    ("steps", [0, -1, 2.5, 20.0, 10**9, 1001, "20", True, math.inf, np.float64(20)], "a whole number from 1 to 1000"),
    ("strength", [0, -0.1, 1.5, math.nan, math.inf, "0.5", True], "above 0 and up to 1"),
    ("guidance_scale", [math.nan, math.inf, -math.inf, -1, 101, "4", True, [4.0], 1 + 2j], "from 0 to 100 (1 turns guidance off)"),
    ("guidance_rescale", [-0.1, 1.1, math.nan, "no"], "from 0 to 1"),
    ("guidance_interval", [5, (1, 0, 2), "ab", "01", (1, 0), (0.5, 0.5), (0.2, 1.2), (-1, 1), (math.nan, 1), (0, None), {0.2, 0.8}, (), (True, 1.0),
    (False, True),
                           np.array([0.1, 0.9])], "0 <= low < high <= 1"),
    ("eta", [-1, 2, math.nan, "1"], "from 0 to 1"),
    ("shift", [0, -1, math.nan, 1000], "from 0.01 to 100"),
    ("seed", [-1, 2**63, 1.5, "lucky", True, 10**5000, [], [1, -1], [1, "2"], [1, True], [1.0], range(65), {1, 2}, np.array([1, 2]), torch.Generator()],
     "from 0 to 2**63 - 1, or a list of 1 to 64"),
    ("variation_seed", [-1, 2**63, "lucky", [], [3, None]], "from 0 to 2**63 - 1, or a list of 1 to 64"),
    ("variation_strength", [-0.1, 1.1, math.nan, "0.5", True], "from 0 (off) to 1"), ("seed_width", [0, 7, 8200, 64.0, "64", True], "from 8 to 8192"),
    ("batch", [0, -1, 65, 2.0, True, "2"], "from 1 to 64"),
    ("sampler", ["eulr", "", 5, ["euler"], "DPM++ 2M Karras", "\x00"], None),
    ("spacing", ["karas", "", 7, "sgm"], None),
    ("fit", ["stretch", True, ""], "'resize'"),
    ("strict", ["no", 0, 1], "True or False"),
    ("left", [-1, 4097, 1.5, "8", True], "from 0 to 4096"),
    ("feather", [-1, 513, 0.5], "from 0 to 512"),
])
def test_a_value_out_of_range(untouched, name, values, expected):
    for value in values:
        options = ONE | ({"sampler": "ddim"} if name == "eta" else {}) | {name: value}
        image = {"image": grey()} if name in ("strength", "left", "feather") else {}
        text = refused(lambda: untouched.stream("a cat", **image, **options), name.split("_")[0], *([expected] if expected else []))  # noqa: B023
        assert len(text) < 300
        if isinstance(value, (int, float)) and abs(value) < 10**12:
            assert str(value) in text
    assert untouched.residency.resident_bytes() == 0


@each("name, value, meant", [("sampler", "eulr", "'euler'"), ("sampler", "DPM++ 2M Karras", "'dpmpp_2m' with spacing 'karras'"),
                             ("sampler", "Euler a", "'euler_ancestral'"),
                             ("sampler", "DDIMScheduler", "'ddim'"), ("spacing", "karas", "'karras'")])
def test_a_misspelt_name_is_understood(untouched, name, value, meant):
    refused(lambda: untouched.plan("a cat", **{name: value}), f"did you mean {meant}", repr(value))


@each("said, meant", [("num_inference_steps", "steps"), ("cfg_scale", "guidance_scale"), ("n_iter", "batch"), ("num_images_per_prompt", "batch"),
                      ("denoising_strength", "strength"),
                      ("generator", "seed"), ("subseed", "variation_seed"), ("subseed_strength", "variation_strength"), ("seed_resize_from_w", "seed_width"),
                      ("variation_amount", "variation_strength"), ("seeds", "seed"), ("negative", "negative_prompt"), ("init_image", "image"), ("mask_image", "mask"),
                      ("scheduler", "sampler"), ("stepz", "steps"),
                      ("Steps", "steps"), ("callback", "on_step"), ("guidance_scal", "guidance_scale")])
def test_an_unknown_option_is_understood(untouched, said, meant):
    refused(lambda: untouched.txt2img("a cat", **{said: 5}), repr(said), f"did you mean {meant!r}")


def test_an_option_like_no_other_lists_them(untouched):
    text = refused(lambda: untouched.txt2img("a cat", xyzzy_mode=1), "'xyzzy_mode' is not a known option", "guidance_scale", "spacing")
    assert "self" not in text and "model_config" not in text


@each("said", ["lora", "controlnet", "ip_adapter_image", "freeu", "embeddings"])
def test_what_there_is_not_yet(untouched, said):
    refused(lambda: untouched.txt2img("a cat", **{said: 5}), f"'{said}' is not a known option: latentgen does not have it yet, so leave it out")


@each("prompt, words", [
    (None, "prompt is None: expected one string"), ([], "prompt is empty"), (["a", "b"], "call once per prompt"), (5, "prompt is 5"),
    (b"cat", "b'cat'"),
    ("x" * 2**20, "1,048,576 characters: at most 20,000"), ("a\x00b", "NUL character at position 1"),
    ("a cat \ud800", "surrogate pair at position 6"),
    ("é" * 9000, "tokens in 600 chunks: at most 480 (16 chunks of 30)"), (np.array(["a", "b"]), "prompt is array"), (np.zeros((64, 64)), "prompt is array")])
def test_prompts_that_cannot_be_read(untouched, prompt, words):
    refused(lambda: untouched.txt2img(prompt, **ONE), words)
    if prompt is not None:
        refused(lambda: untouched.txt2img("a cat", negative_prompt=prompt, **ONE), words.replace("prompt is", "negative_prompt is"))
    assert untouched.residency.resident_bytes() == 0


@each("prompt, chunks", [("", 1), ("   ", 1), ("cat\n\ttree", 1), ("🙂" * 20, 3), ("a cat " * 40, 3), ("<|endoftext|>", 1), ("日本語 العربية", 1),
                         ("'; DROP TABLE", 1), ("{}%s\\", 1)])
def test_prompts_that_can(pipe, prompt, chunks):
    result = pipe.txt2img(prompt, **ONE)
    assert (len(result.plan.prompt.ids) > 1) is (chunks > 1), len(result.plan.prompt.ids)
    assert any("the prompt is empty" in n for n in result.notes) is (not prompt.strip())
    assert any("chunks" in n for n in result.notes) is (chunks > 1)


def test_a_long_negative_prompt_lengthens_the_prompt(pipe):
    plan = pipe.stream("a cat", negative_prompt="dog " * 70, **ONE)
    assert len(plan.plan.prompt.ids) == len(plan.plan.negative.ids) == 3 and plan.result


def test_numbers_of_numpy_are_numbers(pipe):
    plain = pipe.txt2img("a cat", seed=3, steps=2, guidance_scale=3.5, width=64)
    for whole, real in ((np.int64, np.float64), (np.uint8, np.float32), (np.int16, np.float16)):
        same = pipe.txt2img("a cat", seed=whole(3), steps=whole(2), guidance_scale=real(3.5), width=whole(64))
        assert same.image.tobytes() == plain.image.tobytes() and same.recipe == plain.recipe
        json.dumps(same.recipe)
    refused(lambda: pipe.txt2img("a cat", steps=np.float64(2.5)), "steps is 2.5")
    refused(lambda: pipe.txt2img("a cat", guidance_scale=np.float32("nan")), "guidance_scale is nan")


def test_the_last_seeds(pipe):
    last = pipe.txt2img("a cat", steps=1, seed=2**63 - 2, batch=2)
    assert last.seeds == (2**63 - 2, 2**63 - 1)
    assert pipe.txt2img("a cat", steps=1, seed=last.seeds[1]).image.tobytes() == last.images[1].tobytes()
    refused(lambda: pipe.plan("a cat", seed=2**63 - 1, batch=2), "seed is 9223372036854775807 with a batch of 2")


@each("options, words", [
    ({"seed": [1, 2], "batch": 3}, "seed holds 2 seeds but 3 pictures are asked for: give one for each picture, and leave batch out"),
    ({"seed": [1, 2], "variation_seed": [3], "variation_strength": 0.1}, "holds"), ({"seed_width": 64}, "seed_width is given alone"),
    ({"seed_width": 63, "seed_height": 64}, "seed_width is 63: expected a multiple of 8, so use 56 or 64"),
    ({"variation_seed": 2**63 - 1, "variation_strength": 0.1, "batch": 2}, "variation_seed is 9223372036854775807 with a batch of 2")], ids=str)
def test_seeds_that_do_not_fit_together(untouched, options, words):
    refused(lambda: untouched.plan("a cat", **options), words)


# Things said together


CONTRADICTIONS = [
    ({"negative_prompt": "dog", "guidance_scale": 1.0}, "negative_prompt is given but guidance_scale is 1"),
    ({"eta": 0.5}, "sampler 'dpmpp_2m' has no eta"), ({"fit": "resize"}, "fit is given but this is txt2img"),
    ({"eta": 0.5, "sampler": "ddim", "sampler_options": {"eta": 0.0}}, "eta is given twice"),
    ({"eta": 0.5, "sampler": "euler"}, "sampler 'euler' has no eta"), ({"guidance_rescale": 0.5, "guidance_scale": 1}, "guidance_scale is 1"),
    ({"guidance_interval": (0.2, 0.8), "guidance_scale": 1}, "guidance_scale is 1"), ({"shift": 3.0}, "rectified flow"),
    ({"strength": 0.5}, "txt2img has nothing to keep"), ({"variation_seed": 3}, "variation_seed is given but variation_strength is 0"),
    ({"variation_seed": 3, "variation_strength": 0.0}, "pass variation_strength above 0"),
    ({"feather": 4}, "feather is given but this is txt2img"), ({"image": grey(), "left": 8, "strength": 0.5}, "outpaint has nothing to keep")]


@each("options, words", CONTRADICTIONS, ids=lambda v: None if isinstance(v, str) else "+".join(v))
def test_contradictions_are_errors_or_notes(pipe, options, words):
    refused(lambda: pipe.stream("a cat", **ONE, **options), words)
    result = pipe.stream("a cat", strict=False, **ONE, **options).result
    assert [n for n in result.notes if n.startswith("ignored: ") and words in n]


def test_what_only_looks_like_a_contradiction(pipe):
    for options in ({"guidance_scale": 1, "guidance_interval": (0.0, 1.0), "guidance_rescale": 0.0},
                    {"negative_prompt": "", "guidance_scale": 1}, {"shift": 1.0}, {"guidance_scale": 0.0}):
        assert pipe.txt2img("a cat", **ONE, **options).notes == ()


@each("task, options, words", [
    ("txt2img", {"image": grey()}, "called with the input of img2img"), ("txt2img", {"mask": grey()}, "called with the input of inpaint"),
    ("txt2img", {"left": 8}, "outpaint"),
    ("img2img", {"image": None}, "it takes an image"), ("img2img", {"image": grey(), "mask": grey()}, "no mask"),
    ("inpaint", {"image": grey(), "mask": None}, "an image and a mask"),
    ("inpaint", {"image": None, "mask": grey()}, "inpaint needs an image"),
    ("outpaint", {"image": grey()}, "at least one of left, right, top, bottom"),
    ("outpaint", {"image": None, "left": 8}, "outpaint needs an image"),
    ("outpaint", {"image": grey(), "left": 8, "width": 64}, "leave width, height and mask out"),
    ("outpaint", {"image": grey(), "left": 8, "mask": grey()}, "leave width, height and mask out"),
    ("inpaint", {"image": grey(), "mask": grey(), "left": 8}, "no left")])
def test_the_wrong_method(untouched, task, options, words):
    refused(lambda: getattr(untouched, task)("a cat", **options), words)
    assert untouched.residency.resident_bytes() == 0


def test_on_step_belongs_to_calls(untouched):
    refused(lambda: untouched.stream("a cat", on_step=list), "'on_step' belongs to txt2img", "loop over the steps")


@each("size, words", [((67, 64), "width is 67: expected a multiple of 8, so use 64 or 72"), ((64, 45), "height is 45"), ((8, 4), "height is 4"),
                      ((8192, 8192), "67 megapixels")])
def test_sizes(untouched, size, words):
    refused(lambda: untouched.plan("a cat", width=size[0], height=size[1]), words)
    refused(lambda: untouched.plan("a cat", image=grey(), width=size[0], height=size[1], fit="resize"), words)


def test_small_sizes(pipe):
    result = pipe.txt2img("a cat", width=8, height=8, **ONE)
    assert result.image.size == (8, 8) and "is far from this model's own 64x64" in result.notes[0]
    assert pipe.img2img("a cat", grey(1, 1), **ONE).image.size == (1, 1)
    assert pipe.txt2img("a cat", width=8, height=512, **ONE).image.size == (8, 512)


# Pictures


def transparent(mode="RGBA"):
    image = Image.new("RGBA", (64, 64), (200, 40, 40, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    return image.convert(mode)


def turned():
    """A CMYK JPEG, 40 wide and 64 high on disk, that EXIF turns by a quarter: the left edge is white when seen."""
    image = Image.new("CMYK", (40, 64), (0, 200, 200, 0))
    image.paste((0, 0, 0, 0), (0, 0, 40, 8))
    exif = Image.Exif()
    exif[0x0112] = 8
    return encoded(image, "JPEG", exif=exif, quality=95)


def ramp(mode):
    values = {"I;16": np.linspace(0, 65535, 64).astype(np.uint16), "F": np.linspace(0, 1, 64, dtype=np.float32), "L": np.linspace(0, 255, 64).astype(np.uint8),
              "1": np.repeat([0, 255], 32).astype(np.uint8)}[mode]
    image = Image.fromarray(np.tile(values, (64, 1)))
    return image.convert("1") if mode == "1" else image


def palette():
    image = transparent("RGBA").convert("RGB").quantize(4)
    image.info["transparency"] = image.getpixel((0, 0))
    return image


PICTURES = {  # name: (picture, size, colour seen at the left, and at the right)
    "RGBA": (transparent(), (64, 64), (255, 255, 255), (200, 40, 40)), "LA": (transparent("LA"), (64, 64), (255, 255, 255), (88, 88, 88)),
    "L": (ramp("L"), (64, 64), (0, 0, 0), (255, 255, 255)), "P": (transparent().convert("RGB").quantize(4), (64, 64), (0, 0, 0), (200, 40, 40)),
    "P with a colour key": (palette(), (64, 64), (255, 255, 255), (200, 40, 40)), "1": (ramp("1"), (64, 64), (0, 0, 0), (255, 255, 255)),
    "I;16": (ramp("I;16"), (64, 64), (0, 0, 0), (255, 255, 255)), "F": (ramp("F"), (64, 64), (0, 0, 0), (255, 255, 255)),
    "CMYK turned by EXIF": (turned(), (64, 40), (255, 255, 255), (255, 55, 55)), "PNG bytes": (encoded(grey()), (64, 64), (128,) * 3, (128,) * 3),
    "float array": (np.full((64, 64, 3), 0.5, np.float32), (64, 64), (128,) * 3, (128,) * 3), "uint8 array": (np.full((64, 64), 7, np.uint8),
    (64, 64), (7,) * 3, (7,) * 3),
    "tensor": (torch.full((3, 64, 64), 0.5, requires_grad=True), (64, 64),
    (128,) * 3, (128,) * 3), "bfloat16 tensor": (torch.ones(1, 1, 64, 64).bfloat16(), (64, 64), (255,) * 3, (255,) * 3)}


@each("name", PICTURES)
def test_pictures_of_every_kind_are_seen_as_a_viewer_shows_them(pipe, name):
    source, size, left, right = PICTURES[name]
    result = pipe.inpaint("a cat", source, np.zeros(size[::-1], np.float32), **ONE)  # nothing repainted: what comes back is what was read
    assert result.image.mode == "RGB" and result.image.size == size
    for x, colour in ((0, left), (size[0] - 1, right)):
        seen = result.image.getpixel((x, size[1] // 2))
        assert max(abs(a - b) for a, b in zip(seen, colour, strict=True)) <= (8 if "CMYK" in name else 1), seen
    assert pipe.img2img("a cat", source, **ONE).image.size == size


NOISY = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def bomb():
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    data = bytearray(encoded(grey(8, 8)))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@each("source, words", [
    (encoded(NOISY)[:2000], "damaged or cut short"), (encoded(NOISY, "JPEG")[:600], "damaged or cut short"), (encoded(NOISY)[:20], "image"),
    (b"", "not a picture"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"), (bomb(), "image"), ("nowhere.png", "no file"),
    ("https://example.org/cat.png", "download it first"), ("", "no file"),
    ("a\x00b", "image"), (".", "no file"), (5, "a int"), (object(), "a object"), ([grey()], "a list"),
    (np.zeros((64, 64, 2), np.uint8), "(64, 64, 2)"), (np.zeros((2, 64, 64, 3), np.uint8), "one picture"),
    (np.zeros((64, 64, 3), np.int64), "int64"), (np.full((64, 64, 3), 200.0), "200"), (np.full((64, 64, 3), np.nan), "NaN"),
    (np.zeros((0, 64, 3), np.uint8), "no pixels"),
    (torch.zeros(64, 64, 3), "channels first"), (torch.zeros(2, 3, 64, 64), "one picture"), (np.zeros((5000, 5000), np.uint8), "5000x5000"),
    (np.array(["a"]), "image")],
    ids=lambda v: None if isinstance(v, str) else type(v).__name__)
def test_pictures_that_cannot_be_read(untouched, source, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of bombs before it refuses them
        refused(lambda: untouched.img2img("a cat", source, **ONE), "image", words, kind=ImageError)
        refused(lambda: untouched.inpaint("a cat", grey(), source, **ONE), "mask", kind=ImageError)
    assert untouched.residency.resident_bytes() == 0


def test_a_cut_file_on_disk(untouched, tmp_path):
    (tmp_path / "cut.png").write_bytes(encoded(NOISY)[:3000])
    refused(lambda: untouched.img2img("a cat", tmp_path / "cut.png", **ONE), "cut.png", "damaged or cut short", kind=ImageError)
    (tmp_path / "cut.png").unlink()  # no handle of ours holds it


def test_masks_of_every_kind(pipe):
    options = {"image": NOISY, **ONE}
    refused(lambda: pipe.inpaint("a cat", NOISY, grey(32, 32), **ONE),
            "mask is 32x32 but the image is 64x64: resize the mask, or pass fit='resize'", kind=ImageError)
    box = Image.new("L", (32, 32))
    box.paste(255, (0, 0, 16, 32))
    made = np.asarray(pipe.inpaint("a cat", mask=box, fit="resize", **options).image)
    assert (made[:, 32:] == np.asarray(NOISY)[:, 32:]).all() and (made[:, :32] != np.asarray(NOISY)[:, :32]).mean() > 0.9
    assert pipe.inpaint("a cat", mask=Image.new("L", (64, 64)), **options).image.tobytes() == NOISY.tobytes()
    white = np.asarray(pipe.inpaint("a cat", mask=Image.new("1", (64, 64), 1), **options).image)
    assert (white != np.asarray(NOISY)).mean() > 0.9
    soft = pipe.inpaint("a cat", mask=np.full((64, 64), 0.5, np.float32), **options).image
    assert soft.tobytes() not in (NOISY.tobytes(), white.tobytes())
    refused(lambda: pipe.inpaint("a cat", NOISY, np.eye(64, dtype=np.uint8), **ONE), "nearly black", "multiply a 0/1 mask by 255", kind=ImageError)
    assert pipe.inpaint("a cat", mask=np.eye(64, dtype=bool), **options).image.size == (64, 64)


def test_a_soft_mask_that_fades_away_in_resizing(pipe):
    """One grey pixel in a large mask is next to nothing in a small one: refused while planning or honoured, never an error after the run."""
    faint = np.zeros((640, 640), np.float32)
    faint[320, 320] = 0.5
    try:
        run = pipe.stream("a cat", image=NOISY, mask=faint, fit="resize", **ONE)
    except ImageError:
        return
    assert run.result.image.size == (64, 64)


def test_the_callers_own_objects_stay_as_they_are(pipe):
    image, mask = transparent(), np.ones((64, 64), np.float32)
    before = image.tobytes(), image.mode
    pipe.inpaint("a cat", image, mask, **ONE)
    assert (image.tobytes(), image.mode) == before and (mask == 1).all()


# What diffusers 0.42.1 takes without a word (the list): each is refused here, or done


@each("options, words", [
    ({"steps": -1}, "steps is -1: expected a whole number from 1"), ({"height": 0}, "height is 0"), ({"guidance_scale": math.nan}, "guidance_scale is nan"),
    ({"width": 67, "height": 45}, "width is 67: expected a multiple of 8"), ({"guidance_scale": math.inf}, "guidance_scale is inf"),
    ({"num_inference_steps": 3}, "did you mean 'steps'"), ({"negative_prompt": "dog", "guidance_scale": 1.0}, "negative_prompt is given but guidance_scale is 1"),
    ({"image": np.arange(64 * 64 * 3).reshape(64, 64, 3) % 400}, "int64 values: expected uint8"), ({"sampler": "EDMEulerScheduler"}, "did you mean 'euler'"),
    ({"sampler": "LCMScheduler"}, "did you mean 'lcm'"), ({"generator": torch.Generator(), "batch": 4}, "did you mean 'seed'"),
    ({"latents": torch.zeros(1, 4, 7, 8), "denoising_start": 0.5, "width": 64, "height": 64}, "latents have shape (1, 4, 7, 8): expected (batch, 4, 8, 8)"),
    ({"latents": torch.zeros(1, 16, 8, 8), "denoising_start": 0.5}, "latents have shape (1, 16, 8, 8): expected (batch, 4"),
    ({"latents": torch.zeros(2, 4, 8, 8), "denoising_start": 0.5}, "latents hold 2 pictures, batch is 1"), ({"latents": torch.zeros(1, 4, 8, 8)}, "belong together"),
    ({"latents": torch.full((1, 4, 8, 8), math.nan), "denoising_start": 0.5}, "of finite numbers"),
    ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.int64), "denoising_start": 0.5}, "latents is"), ({"latents": np.zeros((1, 4, 8, 8))}, "latents is")],
    ids=lambda v: None if isinstance(v, str) else "+".join(v))
def test_what_others_take_without_a_word(untouched, options, words):
    refused(lambda: untouched.stream("a cat", **{"seed": 0} | options), words)
    assert untouched.residency.resident_bytes() == 0


def test_four_channels_are_a_picture_with_transparency_and_no_latent(pipe):
    """Channels first or last: what is clear is white, as a viewer shows it."""
    clear = np.asarray(transparent())
    expected = pipe.img2img("a cat", transparent(), **ONE).image.tobytes()
    assert pipe.img2img("a cat", clear, **ONE).image.tobytes() == expected
    assert pipe.img2img("a cat", torch.from_numpy(clear.copy()).permute(2, 0, 1)[None], **ONE).image.tobytes() == expected


def test_consistency_samplers_work_on_what_the_model_predicts(pipe):
    """LCM asks for x0, which every prediction gives: on a model that was not made for it that is a weak picture, never another model's arithmetic."""
    run = pipe.stream("a cat", sampler="lcm", steps=2, seed=0, guidance_scale=1.0)
    steps = list(run)
    assert torch.equal(steps[-1].x, steps[-1].x0) and bool(torch.isfinite(steps[-1].x).all())


# And then


def test_after_all_that_the_next_call_works(untouched, pipe):
    assert untouched.residency.resident_bytes() == 0  # every refusal above came before weights
    assert untouched.txt2img("a cat", seed=1, steps=2).image.tobytes() == pipe.txt2img("a cat", seed=1, steps=2).image.tobytes()


def test_a_reference_without_a_picture(pipe):
    refused(lambda: pipe.plan("a cat", reference=[]), "reference holds no picture")


def test_words_given_twice(pipe):
    refused(lambda: pipe.plan("a cat", prompt="a dog"), "prompt is given twice")


@each("said, cure", [("tilling", "did you mean 'seamless'"), ("s_churn", "sampler_options={'s_churn': ...}"), ("torch_dtype", "pass it to latentgen.load(...)"),
                     ("prompt_embeds", "pass prompt and negative_prompt"), ("output_type", ".images and .latents")])
def test_an_option_of_another_place_is_shown_its_place(untouched, said, cure):
    refused(lambda: untouched.txt2img("a cat", **{said: 5}), f"'{said}' is not a known option", cure)


def test_a_plan_takes_its_words_by_name_too(untouched):
    assert str(untouched.plan(prompt="a cat", seed=1)) == str(untouched.plan("a cat", seed=1))
    refused(lambda: untouched.plan(seed=1), "prompt is None: expected one string")
