"""Judging: colours against colorsys, ranks and distances against brute force, and a whole evaluation of a tiny random checkpoint."""

from __future__ import annotations

import colorsys
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen.errors import ModelError, RequestError
from latentgen.evaluate import choose, scores
from latentgen.evaluate.colour import EDGES, RING, colour_scores, dominant_colour, hue_sector, named_colour, neighbours
from latentgen.evaluate.glyph import evaluate
from latentgen.evaluate.towers import Towers
from latentgen.train.captions import Icon
from latentgen.train.recolour import HUES, recolour

STYLES = ("flat", "blob", "cartoon", "rounded")
NAMES = ("heart", "cat", "house", "tree", "star")


def disc(rgb: tuple[float, float, float], side: int = 32) -> np.ndarray:
    """(side, side, 3) uint8: a disc of one colour (0 to 1) on white."""
    y, x = np.mgrid[:side, :side] - side / 2 + 0.5
    picture = np.full((side, side, 3), 255, np.uint8)
    picture[x**2 + y**2 < (0.4 * side) ** 2] = np.round(np.array(rgb) * 255)
    return picture


@pytest.mark.parametrize("name", HUES)
@pytest.mark.parametrize(("saturation", "value"), [(0.85, 0.9), (0.7, 0.95)])
def test_every_training_hue_has_its_own_name(name: str, saturation: float, value: float) -> None:
    assert dominant_colour(disc(colorsys.hsv_to_rgb(HUES[name], saturation, value))) == name


@pytest.mark.parametrize("name", HUES)
def test_training_recolours_are_recognised(name: str) -> None:
    rgb = np.round(np.array(colorsys.hsv_to_rgb(0.6, 0.8, 0.8)) * 255)
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[6:26, 6:26] = (*rgb, 255)
    made = recolour(rgba, 0.6, name)
    assert dominant_colour((made[..., :3] + (255 - made[..., 3:])).astype(np.uint8)) == name


@pytest.mark.parametrize(("rgb", "name"), [((0.1, 0.1, 0.1), "black"), ((0.55, 0.56, 0.55), "grey"), ((0.9, 0.9, 0.9), "white"), ((0.45, 0.27, 0.15), "brown"),
                                           ((1.0, 0.6, 0.75), "pink"), ((0.75, 0.05, 0.05), "red"), ((1.0, 1.0, 1.0), "white")])
def test_colours_that_lightness_decides(rgb: tuple[float, float, float], name: str) -> None:
    assert dominant_colour(disc(rgb)) == name


def test_the_larger_area_wins_and_a_grey_outline_does_not() -> None:
    picture = disc((0.1, 0.3, 0.9))
    picture[:, 22:] = np.where(picture[:, 22:] < 255, np.array([230, 30, 30], np.uint8), picture[:, 22:])
    picture[14:18] = 120
    assert dominant_colour(picture) == "blue"


def test_sectors_follow_colorsys_around_the_circle() -> None:
    hues = np.array([colorsys.rgb_to_hsv(*colorsys.hsv_to_rgb(h, 1, 1))[0] for h in np.linspace(0, 0.999, 200)])
    assert [RING[i] for i in hue_sector(np.array(list(HUES.values())))] == list(HUES)
    steps = np.diff(hue_sector(hues))
    assert set(steps.tolist()) <= {0, 1, -(len(RING) - 1)} and len(EDGES) == len(RING)


def test_neighbours_are_mutual() -> None:
    for name in (*RING, "brown", "black", "grey", "white"):
        assert name not in neighbours(name)
        assert all(name in neighbours(other) for other in neighbours(name))
    assert neighbours("blue") == {"teal", "purple"} and neighbours("brown") == {"red", "orange"}


def test_colour_words_open_a_caption() -> None:
    assert [named_colour(t) for t in ("blue heart", "a Red car", "gray fox", "blackbird", "man with red hair")] == ["blue", "red", "grey", None, None]
    assert colour_scores(["red", "blue", "red"], ["red", "teal", "green"]) == {"pictures": 3, "exact": 0.3333, "within_one": 0.6667}
    assert colour_scores([], [])["exact"] is None


def test_ranks_equal_a_sort() -> None:
    dice = np.random.default_rng(0)
    queries, classes = scores.unit(dice.normal(size=(20, 8))), scores.unit(dice.normal(size=(30, 8)))
    own = dice.integers(30, size=20)
    expected = [int(np.argsort(-(classes @ q)).tolist().index(o)) for q, o in zip(queries, own, strict=True)]
    assert scores.ranks(queries, classes, own).tolist() == expected
    assert scores.shares(np.array([0, 4, 5, 9])) == {"top1": 0.25, "top5": 0.5}
    assert scores.ranks(np.ones((1, 2)), np.ones((3, 2)), np.array([1])).tolist() == [2]  # a tie is no hit


def test_a_prototype_leaves_its_own_drawing_out() -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 4))
    sums, counts = scores.prototypes(vectors, np.array([0, 0, 0, 1, 1, 1]), 2)
    assert counts.tolist() == [3, 3]
    np.testing.assert_allclose(scores.without(sums, np.array([0]), vectors[:1])[0], scores.unit(vectors[1:3].mean(0)))


def test_nearest_equals_brute_force() -> None:
    dice = np.random.default_rng(0)
    ours, theirs = dice.random((5, 48), dtype=np.float32), dice.random((23, 48), dtype=np.float32)
    theirs[17] = ours[3]
    distance, row = scores.nearest(ours, ((range(at, min(at + 7, 23)), theirs[at:at + 7]) for at in range(0, 23, 7)))
    every = np.sqrt(((ours[:, None] - theirs) ** 2).mean(-1))
    assert row.tolist() == every.argmin(1).tolist() and row[3] == 17
    np.testing.assert_allclose(distance, every.min(1), atol=1e-3)
    assert scores.closeness(distance)["share_below_0.05"] == 0.2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set of simple discs: five names in four styles, held-out rows of each split and a recolour."""
    folder = tmp_path_factory.mktemp("data")
    icons = [Icon(f"{s}/{n}", s, n, n, s) for n in NAMES for s in STYLES]
    icons += [Icon(f"{s}/blue-heart", s, "blue-heart", "blue heart", s, split="comp") for s in STYLES[:3]]
    icons += [Icon("flat/x", "flat", "x", "moon", "flat", split="concept"), Icon("flat/y", "flat", "y", "cat", "flat", split="style")]
    icons += [Icon("flat/z", "flat", "z", "man, light skin tone", "flat", split="tone"), Icon("recolour/red/flat/tree", "flat", "flat/tree", "red tree", "flat")]
    pixels = np.zeros((len(icons), 256, 256, 4), np.uint8)
    for n, icon in enumerate(icons):
        rgb = colorsys.hsv_to_rgb(0.6 if "blue" in icon.name else 0.0 if "red" in icon.name else n / len(icons), 0.8, 0.9)
        pixels[n, 40:200 + n, 40:200] = (*(int(255 * c) for c in rgb), 255)
    np.save(folder / "pictures-256.npy", pixels)
    (folder / "index.jsonl").write_text("".join(i.to_json() + "\n" for i in icons))
    return folder


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a random picture tower, one step a picture."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("judged") / "tiny"
    shutil.copytree(tiny_folder, folder)
    card = folder / "card.toml"
    card.write_text(card.read_text().replace("steps = 4", "steps = 1"))
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=96, patch_size=24, projection_dim=8)
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "vision_tower")
    save_file({"text_projection.weight": torch.randn(8, 16)}, folder / "vision_tower" / "text_projection.safetensors")
    (folder / "held-out.json").write_text(json.dumps({"recolor_heldout": ["blue tree", "green star", "pink house"], "comp_names": ["blue heart"]}))
    return folder


def test_the_choice_is_repeatable_and_clean(data: Path) -> None:
    icons = [Icon(**json.loads(line)) for line in (data / "index.jsonl").read_text().splitlines()]
    rows = choose.concepts(icons, 3, 0)
    assert rows == choose.concepts(icons, 3, 0) != choose.concepts(icons, 3, 1)
    assert len({icons[r].name for r in rows}) == 3 and all(icons[r].split == "train" and choose.is_base(icons[r]) for r in rows)
    assert set(choose.candidates(icons)) == {*NAMES, "blue heart"} and len(choose.candidates(icons)["cat"]) == 5
    assert [icons[r].style for r in choose.coloured_drawings(icons, each=2)] == list(STYLES[:2])
    assert {split: len(rows) for split, rows in choose.held_out_rows(icons, 2, 0).items()} == {"comp": 2, "style": 1, "concept": 1, "tone": 1}


def test_towers_give_unit_vectors_and_equal_transformers(model: Path) -> None:
    from safetensors.torch import load_file
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    towers = Towers.read(model)
    picture = disc((0.9, 0.1, 0.1), side=96)
    vector = towers.pictures([picture, picture])
    np.testing.assert_allclose(np.linalg.norm(vector, axis=1), 1, rtol=1e-5)
    stock = CLIPVisionModelWithProjection.from_pretrained(model / "vision_tower")
    with torch.no_grad():
        expected = stock(pixel_values=torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1).image_embeds.numpy()
    np.testing.assert_allclose(vector[0], scores.unit(expected)[0], atol=1e-5)
    text = CLIPTextModelWithProjection(towers.text.config.__class__(**towers.text.config.to_dict() | {"projection_dim": 8}))
    tower = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(model / "text_encoder" / "model.safetensors").items()}
    text.load_state_dict(tower | {"text_projection.weight": towers.projection}, strict=True)
    ids = [towers.text.config.bos_token_id, *_ids(model, "a red heart"), *[towers.text.config.eos_token_id] * 32][:32]
    with torch.no_grad():
        expected = text.eval()(torch.tensor([ids])).text_embeds.numpy()
    np.testing.assert_allclose(towers.captions(["a red heart", "cat"])[0], scores.unit(expected)[0], atol=1e-5)


def _ids(model: Path, text: str) -> list[int]:
    from latentgen.conditioning.tokens import ClipTokens

    return ClipTokens.read(model / "tokenizer").ids(text)


def test_a_whole_evaluation_and_a_second_run_that_makes_nothing(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = evaluate(model, data, tmp_path / "out", pictures=3, progress=False)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["concepts"]["pictures"] == 3 and report["concepts"]["candidates"] == 6 and report["concepts"]["drawings"] == 24
    assert set(report["concepts"]) >= {"generated", "real", "shuffled"} and 0 <= report["concepts"]["generated"]["by_caption"]["top5"] <= 1
    assert report["vae"]["psnr_db"]["count"] == 6 and report["vae"]["psnr_db"]["quartile1"] <= report["vae"]["psnr_db"]["quartile3"]
    assert report["colour"]["comp"]["real"] == {"pictures": 3, "exact": 1.0, "within_one": 1.0}
    assert report["colour"]["recolour"]["generated"]["pictures"] == 3 and report["colour"]["recolour"]["real"]["exact"] == 1.0
    assert report["memory"]["training_pictures"] == 21 and report["memory"]["generated"]["concepts"]["count"] == 3
    assert all((tmp_path / "out" / name).is_file() for name in report["sheets"]["files"])
    assert str(tmp_path) not in json.dumps(report) and not list((tmp_path / "out").glob("*.part"))

    import latentgen.evaluate.made as made

    (tmp_path / "out" / "made" / "concepts" / "001.png").write_bytes(b"torn")
    saved: list[Path] = []
    keep = made.save_image
    monkeypatch.setattr(made, "save_image", lambda image, path, **k: saved.append(path) or keep(image, path, **k))
    again = evaluate(model, data, tmp_path / "out", pictures=3, progress=False)
    assert [p.name for p in saved] == ["001.png"]  # only what could not be read
    assert {k: again[k] for k in ("concepts", "colour", "memory")} == {k: report[k] for k in ("concepts", "colour", "memory")}


def test_what_is_missing_is_named(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="held-out.json"):
        evaluate(tiny_folder, data, tmp_path)
    with pytest.raises(RequestError, match="pictures is 0"):
        evaluate(tiny_folder, data, tmp_path, pictures=0)
