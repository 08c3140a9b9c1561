"""What a run computes once: modulations for all levels, first layers for both sides of guidance. The picture is the plain path's up to rounding."""

import pytest
import torch
from tiny_folders import tiny

import latentgen
from latentgen.diffusion.level import Level
from latentgen.errors import ModelError
from latentgen.models.asked import Asked
from latentgen.models.elsewhere import Elsewhere
from latentgen.models.family import Conditioning
from latentgen.models.modulation import Known, find_modulations, modulated, modulation_names, tables
from latentgen.models.shared import Once, before_words
from latentgen.run import work
from latentgen.run.batch import joined, repeated

HEADS = {"flux1": 4, "flux2": 4, "sd3": 5, "zimage": 4, "qwenimage": 3, "pixart": 0}  # of the tiny networks: linears that read the level alone
UNETS = ("sd15", "sd15-inpaint", "sd15-instruct", "sd21", "sdxl")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def load(kind):
        return latentgen.load(tiny(kind).save(tmp_path_factory.mktemp(kind)), dtype="float32", device="cpu", progress=False)

    return load


def network_of(pipe):
    with pipe.residency.use("denoiser") as modules:
        return next(iter(modules.values()))


def plainly(monkeypatch):
    monkeypatch.setattr(work, "exact", lambda modules, asked, looked_up: modules)


def options(pipe, kind):
    said = {"steps": 3, "seed": 1, "width": 64, "height": 64, "batch": 2}
    if pipe.family.guidance in ("cfg", "image"):
        said |= {"guidance_scale": 4.0, "negative_prompt": "a blue car"}
    else:
        said |= {"true_cfg_scale": 3.0, "negative_prompt": "a blue car"}
    return said


def make(pipe, kind, **more):
    from PIL import Image

    said = options(pipe, kind) | more
    if kind == "sd15-instruct":
        return pipe.edit("a red heart", Image.new("RGB", (64, 64), "teal"), **said)
    return pipe.txt2img("a red heart", **said)


@pytest.mark.parametrize("kind", [*HEADS, *UNETS])
def test_the_picture_is_that_of_the_plain_path(load, kind, monkeypatch):
    pipe = load(kind)
    short = make(pipe, kind)
    plainly(monkeypatch)
    plain = make(pipe, kind)
    size = plain.latents.abs().max()
    assert (short.latents - plain.latents).abs().max() <= 1e-5 * size


@pytest.mark.parametrize("kind", HEADS)
def test_each_modulation_is_evaluated_once_for_all_levels(load, kind):
    """Counted on the very linears of the shared network, which a run may call but not change."""
    pipe = load(kind)
    net = network_of(pipe)
    found = find_modulations(net)
    assert len(found.heads) == HEADS[kind]
    rows = []
    hooks = [head.register_forward_hook(lambda m, args, out: rows.append(len(out))) for head in found.heads.values()]
    embedder = getattr(net, found.end)
    times = []
    hooks.append(embedder.register_forward_hook(lambda m, args, out: times.append(1)))
    made = make(pipe, kind)
    for hook in hooks:
        hook.remove()
    sides = 1 if made.plan.batching == "off" else 2
    assert rows == [3 * sides] * HEADS[kind]  # three levels, on each side
    assert len(times) == 3 * sides
    before = make(pipe, kind)
    assert torch.equal(before.latents, made.latents)


def test_a_weaker_network_reads_the_same_table(load, monkeypatch):
    """PAG's and SLG's are views of the network, so its modulations are evaluated no second time."""
    pipe = load("sd3")
    found, rows = find_modulations(network_of(pipe)), []
    said = {"steps": 3, "seed": 1, "width": 64, "height": 64, "guidance_scale": 4.0, "guiders": {"pag": {}, "slg": {"end": 1.0}}}
    hooks = [head.register_forward_hook(lambda m, args, out: rows.append(len(out))) for head in found.heads.values()]
    made = pipe.txt2img("a red heart", **said)
    [hook.remove() for hook in hooks]
    assert rows == [3 * 2] * len(found.heads)
    plainly(monkeypatch)
    assert (made.latents - pipe.txt2img("a red heart", **said).latents).abs().max() <= 1e-5 * made.latents.abs().max()


@pytest.mark.parametrize(("kind", "told"), [("sd15", 3), ("sd21", 3), ("sdxl", 6)])
def test_what_residual_blocks_are_told_is_evaluated_once_for_all_levels(load, kind, told):
    """The time alone, where nothing is added to it: one answer for both sides. Of SDXL's sides each has its own."""
    pipe = load(kind)
    net = network_of(pipe)
    found = find_modulations(net)
    assert len(found.heads) == sum(name.endswith(".time_emb_proj") for name, _ in net.named_modules()) > 0
    rows, times = [], []
    hooks = [head.register_forward_hook(lambda m, args, out: rows.append(len(out))) for head in found.heads.values()]
    hooks.append(net.time_embedding.register_forward_hook(lambda m, args, out: times.append(len(out))))
    made = make(pipe, kind)
    for hook in hooks:
        hook.remove()
    assert made.plan.batching != "off" and rows == [told] * len(found.heads)
    assert found.timed == (times == [1] * 3)
    assert torch.equal(make(pipe, kind).latents, made.latents)


def test_a_part_of_the_rows_is_told_what_all_are():
    asked, inner, row = Asked(), torch.nn.Linear(3, 2), torch.randn(1, 2)
    a, b = (Conditioning(torch.zeros(1, 2, 2)) for _ in range(2))
    asked.tell(Level(1.0, 0.0, 5.0), joined([repeated(a, 1), repeated(b, 1)]))
    known = Known(inner, asked, {(5.0, a): row, (5.0, b): row})
    assert known.same is row and torch.equal(known(torch.zeros(1, 3)), row) and torch.equal(known(torch.zeros(2, 3)), row.expand(2, 2))
    known.table[5.0, b] = 2 * row
    assert known.same is None and torch.equal(known(torch.zeros(2, 3)), torch.cat([row, 2 * row]))
    del known.table[5.0, b]
    x = torch.randn(2, 3)
    assert known.same is None and torch.equal(known(x), inner(x))


def test_the_weights_of_modulations_are_about_a_quarter():
    """Of the published FLUX.1 sizes, counted on the meta device at two and four blocks and scaled to nineteen and thirty-eight."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        net = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    sizes = {name: sum(p.numel() for p in net.get_submodule(name).parameters()) for name in modulation_names(net)}
    double = sum(n for name, n in sizes.items() if name.startswith("transformer_blocks"))
    single = sum(n for name, n in sizes.items() if name.startswith("single_transformer_blocks"))
    whole = 19 * sum(p.numel() for p in net.transformer_blocks.parameters()) + 38 * sum(p.numel() for p in net.single_transformer_blocks.parameters())
    assert 0.25 < (19 * double + 38 * single) / whole < 0.3


def test_a_level_that_was_not_foreseen_is_asked_of_the_network():
    torch.manual_seed(0)
    net = tiny("flux1").modules["transformer"]
    asked, words = Asked(), Conditioning(torch.randn(1, 4, 32), torch.randn(1, 32))

    def call(network, time=500.0):
        grid = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(2.0))
        return network(torch.ones(1, 4, 64), words.tokens, words.pooled, torch.full((1,), time / 1000), img_ids=grid, txt_ids=torch.zeros(4, 3),
                       guidance=torch.tensor([3.5]), return_dict=False)[0]

    seen = modulated(net, asked, tables(net, [((500.0, words), call)]))
    for time in (500.0, 250.0):
        asked.tell(Level(0.5, 0.5, time), repeated(words, 1))
        torch.testing.assert_close(call(seen, time), call(net, time), rtol=1e-5, atol=1e-5)
    asked.rows = ()  # nobody tells: the network answers as ever
    assert torch.equal(call(seen, 250.0), call(net, 250.0))


def test_sampling_with_an_adaptive_solver_is_right_too(load, monkeypatch):
    pipe = load("flux1")
    said = {"steps": 2, "seed": 1, "width": 64, "height": 64, "sampler": "rk45", "sampler_options": {"rtol": 0.5}}
    short = pipe.txt2img("a red heart", **said)
    plainly(monkeypatch)
    plain = pipe.txt2img("a red heart", **said)
    assert (short.latents - plain.latents).abs().max() <= 1e-4 * plain.latents.abs().max()


def test_what_comes_before_the_words_is_computed_once_for_both_sides(load):
    pipe = load("sd15")
    net = network_of(pipe)
    names = [name for name in before_words(net)]
    assert names == ["conv_in", "down_blocks.0.resnets.0", *(f"down_blocks.0.attentions.0.{n}" for n in
                                                             ("norm", "proj_in", "transformer_blocks.0.norm1", "transformer_blocks.0.attn1"))]
    rows = {}
    hooks = [net.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: rows.setdefault(name, []).append(len(out)))
             for name in (*names, "mid_block")]
    make(pipe, "sd15")
    for hook in hooks:
        hook.remove()
    assert rows.pop("mid_block") == [2] * 6  # two pictures, three steps, both sides in one call
    assert rows == {name: [1] * 6 for name in names}


def test_where_the_sides_differ_from_the_start_nothing_is_shared(load):
    """A picture that guides is an input of the first layer, and one side does not see it."""
    pipe = load("sd15-instruct")
    net = network_of(pipe)
    rows = []
    hook = net.conv_in.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    make(pipe, "sd15-instruct", batch=1)
    hook.remove()
    assert rows == [3] * 3


@pytest.mark.parametrize(("texts", "pictures", "sides"), [(2, 1, 2), (2, 3, 2), (3, 2, 3), (1, 4, 1)])
def test_sides_are_told_by_the_rows(texts, pictures, sides):
    asked = Asked()
    words = [Conditioning(torch.zeros(1, 2, 2)) for _ in range(texts)]
    asked.tell(Level(1.0, 0.0, 0.0), joined([repeated(c, pictures) for c in words]))
    assert (asked.sides, asked.heard) == (sides, tuple(words))


def test_rows_in_another_order_are_not_taken_for_sides():
    asked = Asked()
    a, b = (Conditioning(torch.zeros(1, 2, 2)) for _ in range(2))
    asked.rows = ((a, 0), (b, 0), (a, 1), (b, 1))
    assert asked.sides == 1
    inner = torch.nn.Linear(3, 3)
    x = torch.randn(4, 3)
    assert torch.equal(Once(inner, asked)(x), inner(x))


@pytest.mark.parametrize("kind", [*(kind for kind, count in HEADS.items() if count), *UNETS])
def test_by_stage_the_weights_of_modulations_stay_in_their_file(kind, tmp_path):
    """The picture is the resident one's, bit for bit; an adaptive sampler, which asks about levels that nobody foresaw, is answered too."""
    folder = tiny(kind).save(tmp_path / kind)
    resident, staged = (latentgen.load(folder, dtype="float32", device="cpu", residency=policy, progress=False) for policy in ("resident", "stage"))
    for sampler in ({}, {"sampler": "rk45", "sampler_options": {"rtol": 0.5}, "steps": 2}):
        assert torch.equal(make(staged, kind, **sampler).latents, make(resident, kind, **sampler).latents)
    names = modulation_names(network_of(resident))
    with staged.residency.use("denoiser") as modules, resident.residency.use("denoiser") as whole:
        (lean,), (net,) = modules.values(), whole.values()
        left = {name for name, module in lean.named_modules() if isinstance(module, Elsewhere)}
        assert left == set(names)
        missing = {name for name, _ in net.named_parameters()} - {name for name, _ in lean.named_parameters()}
        assert missing == {f"{name}.{each}" for name in names for each, _ in net.get_submodule(name).named_parameters()}


def test_a_modulation_that_is_not_finite_is_found_when_it_is_read(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny("flux1").save(tmp_path / "flux1")
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["single_transformer_blocks.0.norm.linear.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    staged = latentgen.load(folder, dtype="float32", device="cpu", residency="stage", progress=False)
    with pytest.raises(ModelError, match="1 tensors of .* have NaN"):
        make(staged, "flux1")
