"""Networks made fast in place: each trick computes what the plain path does, to rounding; float32 pipelines do not change at all."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_folders import tiny
from torch import nn
from torch.nn import functional as F

import latentgen
from latentgen.errors import RequestError
from latentgen.models.fast import onednn
from latentgen.models.fast.attention import Attending, all_heads, attend, in_blocks, ways
from latentgen.models.fast.blocks import FastGroupNorm, activated
from latentgen.models.fast.layers import DoublingConv2d, Kernel, PackedConv2d, PackedLinear, doubles, doubling, pack, plus, shifted
from latentgen.models.fast.onednn import Window
from latentgen.models.fast.swap import held_bytes, prepare, swap
from latentgen.models.heard import readers as words_readers
from latentgen.run.recipe import speed_of

KINDS = ("sd15", "sd21", "sdxl", "sd3", "flux1", "flux2", "pixart", "zimage", "qwenimage")
CPU = torch.device("cpu")
packed_here = pytest.mark.skipif(not onednn.available(), reason="this torch or processor has no packed bf16 products")


def dice(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found, wanted, within=1e-5):
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert (found.double() - wanted.double()).abs().max() <= within * wanted.double().abs().max()


def picture(*shape, **more):
    return dice(*shape, **more).contiguous(memory_format=torch.channels_last)


# operators

@packed_here
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_products_are_the_plain_ones(dtype, within):
    x, w, b, y = (dice(*shape, seed=n, dtype=dtype) for n, shape in enumerate(((3, 5, 32), (48, 32), (48,), (3, 5, 48))))
    packed, plain = onednn.pack_linear(w), F.linear(x, w, b)
    near(onednn.linear(x, packed, b), plain, within)
    near(onednn.linear(x.transpose(0, 1), packed, None), F.linear(x.transpose(0, 1), w), within)
    for act, rule in (("gelu", F.gelu), ("gelu_tanh", lambda t: F.gelu(t, approximate="tanh")), ("silu", F.silu), ("relu", F.relu)):
        near(onednn.linear(x, packed, b, act=act), rule(plain), within)
    near(onednn.linear_with(x, y, packed, b, "add"), plain + y, within)
    near(onednn.linear_with(x, y, packed, b, "mul"), plain * y, within)


@packed_here
@pytest.mark.parametrize(("kernel", "at"), [(3, Window(padding=(1, 1))), (1, Window()), (3, Window((2, 2), (1, 1))), (3, Window(padding=(2, 2), dilation=(2, 2)))])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_convolutions_are_the_plain_ones(kernel, at, dtype, within):
    x, w, b = picture(2, 24, 9, 7, dtype=dtype), dice(40, 24, kernel, kernel, seed=1, dtype=dtype), dice(40, seed=2, dtype=dtype)
    packed, plain = onednn.pack_convolution(w, at, x.shape), F.conv2d(x, w, b, at.stride, at.padding, at.dilation)
    other = dice(*plain.shape, seed=3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    near(onednn.convolution(x, packed, b, at), plain, within)
    assert onednn.convolution(x, packed, b, at).is_contiguous(memory_format=torch.channels_last)
    near(onednn.convolution(x, packed, b, at, act="silu"), F.silu(plain), within)
    near(onednn.convolution_plus(x, other, packed, b, at), plain + other, within)
    near(onednn.convolution_plus(x, other, packed, b, at, act="relu"), F.relu(plain + other), within)
    assert torch.equal(onednn.unpacked(packed), w)


# modules

@packed_here
def test_a_packed_module_lets_its_plain_weight_go():
    layer, x = nn.Linear(16, 24), dice(5, 16)
    plain = layer(x).detach()
    pack(layer)
    before = held_bytes(layer)
    with torch.no_grad():
        near(layer(x), plain)
    assert type(layer) is PackedLinear and layer.kernel.plain is None
    assert held_bytes(layer) == before == 4 * (16 * 24 + 24)
    assert (layer.weight.dtype, layer.weight.shape, layer.weight.device.type) == (torch.float32, (24, 16), "cpu")
    with pytest.raises((RuntimeError, NotImplementedError)):
        layer.weight + 1


@packed_here
@torch.no_grad()
def test_a_convolution_keeps_one_order_where_one_will_do():
    """Shapes of one layer of a published network, of which one is small enough to be read in another order on some processors."""
    conv = nn.Conv2d(48, 96, 3, padding=1).bfloat16()
    weight, bias = conv.weight.clone(), conv.bias
    pack(conv)
    for side in (32, 8, 32, 4):
        x = picture(2, 48, side, side, dtype=torch.bfloat16)
        near(conv(x), F.conv2d(x, weight, bias, padding=1), 2e-2)
    orders = {id(p) for p in conv.kernel.packed.values()}
    assert len(conv.kernel.packed) == 3 and len({onednn.order(p) for p in conv.kernel.packed.values()}) == len(orders)
    assert held_bytes(conv) == 2 * (len(orders) * weight.numel() + bias.numel())


@packed_here
def test_threads_pack_once():
    calls = []

    def slow(plain):
        calls.append(1)
        return onednn.pack_linear(plain)

    kernel = Kernel(dice(64, 64))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: kernel.get(None, slow), range(32)))
    assert len(calls) == 1 and len({id(f) for f in found}) == 1


@packed_here
@torch.no_grad()
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("bias", [True, False])
def test_doubling_and_convolution_in_one(mode, bias):
    conv = nn.Conv2d(6, 10, 3, padding=1, bias=bias, padding_mode=mode)
    x = picture(2, 6, 5, 7)
    plain = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    made = doubling(conv)
    assert doubles(conv)
    assert isinstance(made, DoublingConv2d)
    near(made(x), plain)
    assert not doubles(nn.Conv2d(6, 10, 3, padding=1, stride=2)) and not doubles(nn.Conv2d(6, 10, 1))


@packed_here
@torch.no_grad()
def test_a_sum_goes_into_the_product():
    x, y = picture(2, 8, 6, 6), picture(2, 8, 6, 6, seed=1)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    plain = conv(x) + y
    near(plus(conv, x, y), plain)
    pack(conv)
    assert type(conv) is PackedConv2d
    near(plus(conv, x, y), plain)


@packed_here
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_for_all_places_goes_into_the_convolution(bias):
    x, conv = picture(2, 8, 6, 6), nn.Conv2d(8, 12, 3, padding=1, bias=bias)
    one, two = dice(1, 12, seed=1), dice(2, 12, seed=2)
    wanted = [conv(x) + rows[:, :, None, None] for rows in (one, two)]
    near(shifted(conv, x, one), wanted[0])
    pack(conv)
    for rows, plain in zip((one, two), wanted, strict=True):
        near(shifted(conv, x, rows), plain)


@torch.no_grad()
@pytest.mark.parametrize(("groups", "each", "side"), [(16, 6, 16), (32, 10, 8), (16, 3, 31), (16, 6, 32), (8, 16, 8)])
def test_group_norm_is_as_near_to_the_truth_as_pytorchs(groups, each, side):
    """In float32 where bfloat16 is slow, else, and in another layout, PyTorch's own, bit for bit."""
    norm = nn.GroupNorm(groups, groups * each).bfloat16()
    norm.weight.copy_(dice(groups * each, seed=1)), norm.bias.copy_(dice(groups * each, seed=2))
    x = picture(2, groups * each, side, side, dtype=torch.bfloat16) * 3 + 1
    plain, packed, truth = norm(x), norm(x.contiguous()), F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double())
    swap(norm)
    assert type(norm) is FastGroupNorm
    for made, bf16, exact in ((norm(x), plain, truth), (activated(norm, x), F.silu(plain), F.silu(truth))):
        assert made.dtype == bf16.dtype and made.is_contiguous(memory_format=torch.channels_last)
        assert (made.double() - exact).norm() <= (bf16.double() - exact).norm()
    assert torch.equal(activated(norm, x), F.silu(plain)) == (side == 32 or each == 16) and torch.equal(norm(x.contiguous()), packed)


# attention

@torch.no_grad()
@pytest.mark.parametrize("way", [in_blocks, all_heads])
@pytest.mark.parametrize(("shape", "keys"), [((2, 3, 100, 40), 100), ((1, 2, 600, 64), 77), ((1, 1, 33, 16), 2049)])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])  # of queries: the largest scores would overflow without the largest taken off
def test_attention_by_products_is_attention(way, shape, keys, size):
    q, k, v = size * dice(*shape), dice(shape[0], shape[1], keys, shape[3], seed=1), dice(shape[0], shape[1], keys, shape[3], seed=2)
    exact = torch.softmax(q.double() @ k.double().transpose(-1, -2) / math.sqrt(shape[3]), -1) @ v.double()
    near(way(q, k, v), exact.float(), 2e-5)
    assert way(q, k, v).transpose(1, 2).is_contiguous()
    near(way(q, k, v, 0.1), F.scaled_dot_product_attention(q, k, v, scale=0.1), 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("channels", [40, 64, 72])  # of which the first leaves room for what adds up the scores
def test_attention_in_half_precision_is_as_near_as_its_numbers(channels):
    q, k, v = (dice(1, 2, 512, channels, seed=n, dtype=torch.bfloat16) for n in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for way in (in_blocks, all_heads):
        assert ((way(q, k, v).double() - exact).square().mean() / exact.square().mean()).sqrt() < 2 * 2**-8


@torch.no_grad()
def test_the_way_depends_on_shapes_and_number_type_alone(monkeypatch):
    q = dice(1, 2, 512, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert ways(q, q, q) is in_blocks and ways(*[q[:, :, :64]] * 3) is all_heads and ways(*[q[:, :, :8]] * 3) is None
    assert ways(*[q.float()] * 3) is None
    assert torch.equal(attend(q.float(), q.float(), q.float()), F.scaled_dot_product_attention(q.float(), q.float(), q.float()))
    assert torch.equal(attend(q, q, q), in_blocks(q, q, q))


@torch.no_grad()
def test_within_a_processor_pytorchs_call_is_ours_where_it_asks_for_nothing_else():
    q, k, v = (dice(1, 2, 300, 64, seed=n, dtype=torch.bfloat16) for n in range(3))
    mask = torch.zeros(300, 300, dtype=torch.bool).tril_().logical_not_()
    outside, ours = F.scaled_dot_product_attention(q, k, v), in_blocks(q, k, v)
    with Attending():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), ours)
        assert torch.equal(F.scaled_dot_product_attention(q, k, value=v, dropout_p=0.0, is_causal=False, attn_mask=None), ours)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, scale=0.3), in_blocks(q, k, v, 0.3))
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(masked, F.scaled_dot_product_attention(q, k, v, attn_mask=mask)) and torch.equal(causal, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), outside) and not torch.equal(outside, ours)


# networks

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tiny(kind).save(tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


def draw(pipe, **more):
    said = {"steps": 2, "seed": 1, "width": 128, "height": 64} | more
    said |= {"guidance_scale": 4.0, "negative_prompt": "a blue car"} if pipe.family.guidance == "cfg" else {}
    return pipe.txt2img("a red heart", **said)


def swapped(monkeypatch):
    """Let every network be swapped, in float32 too."""
    monkeypatch.setattr("latentgen.run.residency.prepare", lambda module, speed, device: swap(module) if type(module).__module__.startswith("diffusers.") else module)


@packed_here
@pytest.mark.parametrize("kind", KINDS)
def test_a_swapped_network_makes_the_same_picture(kind, folder, monkeypatch):
    plain = draw(latentgen.load(folder(kind), dtype="float32", device="cpu", speed="plain", progress=False))
    swapped(monkeypatch)
    fast = draw(latentgen.load(folder(kind), dtype="float32", device="cpu", progress=False))
    near(fast.latents, plain.latents)
    difference = [abs(a - b) for a, b in zip(fast.image.tobytes(), plain.image.tobytes(), strict=True)]
    assert max(difference) <= 1


@packed_here
@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_it_is_as_near_to_the_truth(kind, folder):
    truth = draw(latentgen.load(folder(kind), dtype="float32", device="cpu", speed="plain", progress=False)).latents
    error = {speed: (draw(latentgen.load(folder(kind), dtype="bfloat16", device="cpu", speed=speed, progress=False)).latents - truth).square().mean().sqrt()
             for speed in ("exact", "plain")}
    assert error["exact"] <= 1.5 * error["plain"]


@packed_here
@torch.no_grad()
def test_no_plain_weight_is_left_behind(folder):
    """After a picture, what a pipeline holds is its weights once, and the doubled convolutions beside them."""
    plain, exact = (latentgen.load(folder("sd15"), dtype="bfloat16", device="cpu", speed=speed, progress=False) for speed in ("plain", "exact"))
    for pipe in (plain, exact):
        draw(pipe)
    with exact.residency.use("denoiser") as modules:
        kernels = [m.kernel for m in modules["unet"].modules() if hasattr(m, "kernel")]
        doubled = sum(m.kernel.bytes for m in modules["unet"].modules() if isinstance(m, DoublingConv2d))
    assert all(kernel.plain is None or kernel.packed == {} for kernel in kernels) and sum(bool(kernel.packed) for kernel in kernels) > 0.9 * len(kernels)
    with exact.residency.use("decoder") as modules:
        doubled += sum(m.kernel.bytes for m in modules["vae"].modules() if isinstance(m, DoublingConv2d))
    assert doubled and exact.residency.resident_bytes() <= 1.02 * (plain.residency.resident_bytes() + doubled)


def test_float32_networks_and_others_processors_stay_as_they_are(folder, monkeypatch):
    net = nn.Sequential(nn.Linear(2, 2))
    assert prepare(net, speed="exact", device=CPU) is net and type(net[0]) is nn.Linear
    unet = tiny("sd15").modules["unet"]
    kinds = [type(m) for m in unet.modules()]
    assert [type(m) for m in prepare(unet, speed="exact", device=CPU).modules()] == kinds
    monkeypatch.setattr(onednn, "available", lambda: False)
    pipe = latentgen.load(folder("sd15"), dtype="bfloat16", device="cpu", progress=False)
    with pipe.residency.use("denoiser") as modules:
        assert [type(m) for m in modules["unet"].modules()] == kinds


def test_keys_and_values_of_the_words_are_computed_once(folder):
    pipe = latentgen.load(folder("sd15"), dtype="float32", device="cpu", progress=False)
    with pipe.residency.use("denoiser") as modules:
        readers = [modules["unet"].get_submodule(name) for name in words_readers(modules["unet"])]
    calls = []
    hooks = [reader.register_forward_hook(lambda *_: calls.append(1)) for reader in readers]
    plain = latentgen.load(folder("sd15"), dtype="float32", device="cpu", speed="plain", progress=False)
    made, wanted = draw(pipe, steps=4), draw(plain, steps=4)
    assert len(calls) == len(readers) > 0
    near(made.latents, wanted.latents)
    changing = draw(pipe, steps=4)
    assert len(calls) == 2 * len(readers) and torch.equal(changing.latents, made.latents)
    for hook in hooks:
        hook.remove()


def test_words_that_change_on_the_way_are_read_again(folder):
    said = {"dialect": "a1111"}
    exact, plain = (latentgen.load(folder("sd15"), dtype="float32", device="cpu", speed=speed, progress=False).txt2img(
        "[a red heart:a blue car:0.5]", steps=4, seed=1, width=64, height=64, **said) for speed in ("exact", "plain"))
    near(exact.latents, plain.latents)


@packed_here
def test_attention_that_is_weakened_is_heard_where_it_is_fast(folder):
    """pag listens to torch's own call of attention."""
    for kind, size in (("sd15", 128), ("sd3", 128)):
        made = {speed: draw(latentgen.load(folder(kind), dtype="bfloat16", device="cpu", speed=speed, progress=False), guiders={"pag": {"scale": 3.0}}, width=size,
                            height=size).latents for speed in ("exact", "plain")}
        assert (made["exact"] - made["plain"]).square().mean().sqrt() <= 0.05 * made["plain"].square().mean().sqrt()


# what the user says

def test_speed_is_told_and_kept(folder):
    with pytest.raises(RequestError, match="speed is 'fast': expected one of 'exact', 'plain'"):
        latentgen.load(folder("sd15"), speed="fast")
    pipe = latentgen.load(folder("sd15"), dtype="float32", device="cpu", speed="plain", progress=False)
    made = draw(pipe)
    assert "speed plain" in str(made.plan) and made.recipe["speed"] == "plain"
    assert [speed_of(said) for said in ({}, {"speed": "plain"}, {"speed": "exact"}, {"speed": "compiled"})] == [
        {"speed": "plain", "compile": False}, {"speed": "plain", "compile": False}, {"speed": "exact", "compile": False}, {"speed": "exact", "compile": True}]
    with pytest.raises(RequestError, match="which is not this pipeline"):
        latentgen.load(folder("sd15"), dtype="float32", device="cpu", progress=False).stream(made.plan)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_make_the_same_picture(folder):
    plain = latentgen.load(folder("sd15"), dtype="float32", device="cpu", speed="plain", progress=False)
    compiled = latentgen.load(folder("sd15"), dtype="float32", device="cpu", compile=True, progress=False)
    made = draw(compiled)
    assert made.plan.speed == "compiled"
    near(made.latents, draw(plain).latents)


def test_without_a_compiler_compiling_is_refused(folder, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    pipe = latentgen.load(folder("sd15"), dtype="float32", device="cpu", compile=True, progress=False)
    with pytest.raises(RequestError, match="needs a C\\+\\+ compiler"):
        draw(pipe)
