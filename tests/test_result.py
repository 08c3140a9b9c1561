"""Plans and results: what is shown, what a file keeps, and that what it keeps makes the same picture again."""

import json
from pathlib import Path

import pytest
from PIL import Image
from test_pipeline import fresh, hole, picture, same

import latentgen
from latentgen.errors import RequestError
from latentgen.pixels.save import read_metadata


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_saved_file_tells_how_to_make_it_again(pipe, tmp_path, suffix):
    result = pipe.txt2img("naïve 🙂 cat", negative_prompt="dog", steps=3, seed=7, batch=2, sampler="ddim", eta=0.5, guidance_interval=(0.1, 0.9), width=48)
    files = result.save(tmp_path / f"cat{suffix}")
    assert [f.name for f in files] == [f"cat-1{suffix}", f"cat-2{suffix}"] and sorted(tmp_path.iterdir()) == sorted(files)
    for image, file, seed in zip(result, files, result.seeds, strict=True):
        recipe = json.loads(read_metadata(file)["latentgen"])
        assert recipe["seed"] == seed and recipe["prompt"] == "naïve 🙂 cat" and recipe["weights"] == result.recipe["weights"]
        said = {key: value for key, value in recipe.items() if key in latentgen.Request.model_fields}
        same(pipe.txt2img(**said), [image])
        assert suffix != ".png" or Image.open(file).tobytes() == image.tobytes()


@pytest.mark.parametrize("options", [
    {"image": picture(67, 45), "strength": 0.33, "steps": 20}, {"image": picture(), "strength": 0.33}, {"image": picture(67, 45), "mask": hole(67, 45)},
    {"image": picture(67, 45), "mask": hole(40, 40), "fit": "resize"}, {"image": picture(40, 40), "width": 64, "height": 48, "fit": "resize"},
    {"image": picture(40, 40), "left": 9, "feather": 4}, {"guidance_scale": 1},
    {"guidance_scale": 1, "negative_prompt": "dog", "eta": 0.5, "strict": False}], ids=str)
def test_a_recipe_is_a_request(pipe, options):
    """Whatever was said: the recipe's own words, with the same pictures, make the same picture."""
    result = pipe.stream("a cat", seed=2, **options).result
    said = {key: value for key, value in json.loads(json.dumps(result.recipe)).items() if key in latentgen.Request.model_fields}
    again = pipe.stream(said.pop("prompt"), **said, **{k: options[k] for k in ("image", "mask") if k in options}).result
    same(again, result)
    assert {**again.recipe, "notes": 0} == {**result.recipe, "notes": 0}


def test_no_path_gets_into_a_file(tiny_folder, tmp_path):
    source, mask = tmp_path / "secret-source.png", tmp_path / "secret-mask.png"
    picture(67, 45).save(source)
    hole(67, 45).save(mask)
    result = fresh(tiny_folder).inpaint("a cat", source, str(mask), steps=2, seed=0)
    saved = result.save(tmp_path / "out.png")[0].read_bytes()
    for private in (str(tmp_path), str(tiny_folder), "secret", str(Path.home()), str(Path.cwd())):
        assert private not in json.dumps(dict(result.recipe)) and (private == "/" or private.encode() not in saved)
        assert private not in str(result.plan) and private not in result._repr_html_()


def test_looking_at_a_result(pipe):
    result = pipe.txt2img("<b>cat</b> & dog", steps=1, seed=0, batch=3, width=48, height=64)
    assert len(result) == 3 and list(result) == list(result.images) and result.image is result.images[0]
    sheet = result.grid()
    assert sheet.size == (96, 128) and sheet.crop((48, 0, 96, 64)).tobytes() == result.images[1].tobytes()
    assert sheet.crop((48, 64, 96, 128)).getextrema() == ((255, 255),) * 3
    assert result.grid(3).size == (144, 64) and result.grid(1).size == (48, 192)
    page = result._repr_html_()
    assert page.count("<img ") == 3 and "&lt;b&gt;cat&lt;/b&gt; &amp; dog" in page and "<b>" not in page
    assert "seeds [0, 1, 2]" in repr(result) and "48x64" in repr(result)
    assert set(result.timings) == {"text", "encode", "sample", "decode", "total"} and min(result.timings.values()) >= 0


def test_the_bar_is_on_stderr_and_only_where_asked(tiny_folder, capsys):
    fresh(tiny_folder, progress=True).txt2img("a cat", steps=2, seed=0)
    shown = capsys.readouterr()
    assert shown.out == "" and "txt2img 64x64" in shown.err
    fresh(tiny_folder, progress=None).txt2img("a cat", steps=2, seed=0)  # nobody watches a test
    assert capsys.readouterr() == ("", "")


def test_a_plan_is_printed_whole_and_makes_no_weights_load(tiny_folder):
    own = fresh(tiny_folder)
    text = str(own.plan("a cat", negative_prompt="dog", image=picture(67, 45), strength=0.5, sampler="ddim", eta=0.25, seed=1))
    for shown in ("tiny", "img2img", "72x48, cropped to 67x45", "eta 0.25", "strength  0.5", "float32 on cpu"):
        assert shown in text, shown
    assert own.residency.resident_bytes() == 0 and "MB of weights" in repr(own)


def test_a_plan_belongs_to_its_pipeline(pipe, tiny_folder):
    plan = pipe.plan("a cat", seed=0, steps=1)
    same(pipe.stream(plan).result, pipe.txt2img("a cat", seed=0, steps=1))
    with pytest.raises(RequestError, match="it takes no options"):
        pipe.stream(plan, steps=3)
    with pytest.raises(RequestError, match="not this pipeline"):
        fresh(tiny_folder, dtype="bfloat16").stream(plan)


def test_a_seed_left_out_is_drawn_and_reported(pipe):
    one, two = pipe.txt2img("a cat", steps=1), pipe.txt2img("a cat", steps=1)
    assert one.seeds != two.seeds
    same(pipe.txt2img("a cat", steps=1, seed=one.seeds[0]), one)
