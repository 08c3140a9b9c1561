"""Weight files that are no denoiser: adapters, VAEs, text encoders and others, known by tensor names and shapes. Names no family and reads no tensor.

Kinds are generic ("a LoRA, of these modules"); which family has such modules is for `identify` to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from latentgen.models.identify import Modules, Shapes

DENOISERS = ("model.diffusion_model.", "double_blocks.", "joint_blocks.", "transformer_blocks.", "single_transformer_blocks.", "up_blocks.",
             "output_blocks.")


@dataclass(frozen=True)
class Kind:
    """What a file is.

    Attributes:
        kind: "LoRA", "VAE" ...
        layout: whose names it has, "" where there is one only.
        details: more about it, for people.
        modules: of a denoiser that it changes or copies.
        width: of the cross-attention that it feeds, where `modules` do not tell.
        fits: (part, config key, value) by which the families are found that have it as a part.
    """

    kind: str
    layout: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    modules: Modules = field(default_factory=dict)
    width: int | None = None
    fits: tuple[str, str, int] | None = None


def adapter(shapes: Shapes) -> Kind | None:
    """An adapter, which may share names with the denoiser that it is for: to be asked before signatures are."""
    return _first((_controlnet, _ip_adapter, _t2i_adapter, _lora, _motion), shapes)


def component(shapes: Shapes) -> Kind | None:
    """A part of a checkpoint alone, or another single network: to be asked after signatures are."""
    if not shapes or any(name.startswith(DENOISERS) for name in shapes):
        return None
    return _first((_vae, _text_encoder, _image_encoder, _embedding, _upscaler), shapes)


def _first(tests: Iterable[Callable[[Shapes], Kind | None]], shapes: Shapes) -> Kind | None:
    return next((kind for test in tests if (kind := test(shapes)) is not None), None)


# Adapters

_PIECE = re.compile(r"^(?P<module>.+?)[._](?:lora_(?:down|up)\.weight|lora_[AB](?:\.[\w-]+)?\.weight|lora(?:_linear_layer)?\.(?:down|up)\.weight"
                    r"|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|oft_blocks|oft_diag|dora_scale|diff|on_input)$")
_WORDS = ("lora", "hada_", "lokr_", "oft_", "dora_", ".diff", "on_input")
_BEFORE = re.compile(r"^(?:base_model\.model\.)?(?:lora_unet_|lora_transformer_|lycoris_|unet\.|transformer\.|(?:model\.)?diffusion_model\.)?")
_TEXT = re.compile(r"^(?:base_model\.model\.)?(?:lora_te\d?_|text_encoder(?:_\d)?\.|text_encoders\.|te\d?\.)")
_NAMING = ((r"lora_(unet|te\d?|transformer)_", "kohya"), (r"lycoris_", "lycoris"), (r"base_model\.model\.", "PEFT"),
           (r"(model\.)?diffusion_model\.", "original"), (r"(unet|transformer|text_encoder(_\d)?)\.", "diffusers"))


def _lora(shapes: Shapes) -> Kind | None:
    pieces: dict[str, dict[str, tuple[int, ...]]] = {}
    sorts = set()
    for name, shape in shapes.items():
        if any(word in name for word in _WORDS) and (found := _PIECE.match(name)):  # the words are a hundred times quicker than the pattern
            end = name[found.end("module") + 1:]
            sorts.add("LoHa" if end.startswith("hada") else "LoKr" if end.startswith("lokr") else "OFT" if end.startswith("oft") else
                      "DoRA" if end == "dora_scale" else "full difference" if end == "diff" else "IA3" if end == "on_input" else "LoRA")
            pieces.setdefault(found["module"], {})[end] = shape
    if not pieces or sorts <= {"full difference"} or any(name.startswith("model.diffusion_model.input_blocks.0.0.weight") for name in shapes):
        return None
    text = [name for name in pieces if _TEXT.match(name)]
    modules: dict[str, tuple[int, int]] = {}
    ranks = set()
    for name, ends in pieces.items():
        rank, size = _low_rank(ends)
        ranks |= {rank} - {0}
        if size is not None and not _TEXT.match(name):
            modules[_BEFORE.sub("", name).replace(".processor.", ".").replace(".", "_")] = size
    first = next(iter(pieces))
    layout = next((layout for begin, layout in _NAMING if re.match(begin, first)), "diffusers" if "." in first else "")
    covers = [*(["denoiser"] if len(pieces) > len(text) else []), *(["text encoder"] if text else [])]
    rank = f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else str(*ranks)
    details = {"sort": " + ".join(sorted(sorts)), "rank": rank, "modules": str(len(pieces)), "changes": " and ".join(covers)}
    return Kind("LoRA", layout, {key: value for key, value in details.items() if value}, modules)


def _low_rank(ends: Mapping[str, tuple[int, ...]]) -> tuple[int, tuple[int, int] | None]:
    """(rank, (values out, values in)) of one module's pieces; 0 and None where they do not tell."""
    down = next((s for e, s in ends.items() if e.startswith(("lora_down", "lora_A", "lora.down", "lora_linear_layer.down", "hada_w1_b"))), ())
    up = next((s for e, s in ends.items() if e.startswith(("lora_up", "lora_B", "lora.up", "lora_linear_layer.up", "hada_w1_a"))), ())
    if len(down) >= 2:
        return down[0], (up[0], down[1]) if len(up) >= 2 else None
    sides = []
    for half in ("lokr_w1", "lokr_w2"):
        whole, a, b = ends.get(half, ()), ends.get(f"{half}_a", ()), ends.get(f"{half}_b", ())
        if len(whole) < 2 and min(len(a), len(b)) < 2:
            return 0, None
        sides.append((whole[0], whole[1]) if len(whole) >= 2 else (a[0], b[1]))
    second = ends.get("lokr_w2_b", ())
    return (second[0] if second else 0), (sides[0][0] * sides[1][0], sides[0][1] * sides[1][1])


def _sizes(shapes: Shapes, prefix: str = "") -> dict[str, tuple[int, int]]:
    """Every matrix and convolution as the module that it belongs to."""
    return {name.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): (shape[0], shape[1])
            for name, shape in shapes.items() if name.endswith(".weight") and len(shape) >= 2}


def _controlnet(shapes: Shapes) -> Kind | None:
    if any("lllite_" in name[:16] for name in shapes):
        return Kind("ControlNet", "LLLite")
    original = next((p for p in ("control_model.", "") if f"{p}input_hint_block.0.weight" in shapes), None)
    if original is not None and (original or "output_blocks.0.0.in_layers.0.weight" not in shapes):
        return Kind("ControlNet", "original", {"sort": "control LoRA"} if "lora_controlnet" in shapes else {}, _sizes(shapes, original))
    if {"controlnet_cond_embedding.conv_in.weight", "controlnet_x_embedder.weight", "controlnet_blocks.0.weight"} & shapes.keys():
        return Kind("ControlNet", "diffusers", {}, _sizes(shapes))
    return None


def _ip_adapter(shapes: Shapes) -> Kind | None:
    projected = any(name.startswith("image_proj.") for name in shapes)
    if not projected or not any(name.startswith("ip_adapter.") or ".to_k_ip." in name for name in shapes):
        return None
    keys = next((shape for name, shape in shapes.items() if name.endswith("to_k_ip.weight") and len(shape) == 2), (0, 0))
    plus = "image_proj.latents" in shapes
    return Kind("IP-Adapter", details={"sort": "plus (resampler)" if plus else "projection", "width": str(keys[1])}, width=keys[1] or None)


def _t2i_adapter(shapes: Shapes) -> Kind | None:
    for prefix, layout in (("adapter.", "diffusers"), ("", "original")):
        first = shapes.get(f"{prefix}conv_in.weight", ())
        if len(first) == 4 and any(f"{prefix}body.0.{name}.weight" in shapes for name in ("resnets.0.block1", "block1")):
            return Kind("T2I-Adapter", layout, {"channels in": str(first[1])})
    return None


def _motion(shapes: Shapes) -> Kind | None:
    if shapes and all("motion_modules." in name for name in shapes):
        return Kind("motion module")
    return None


# Parts

_VAE_ONLY = re.compile(r"^(encoder\.|decoder\.|quant_conv\.|post_quant_conv\.|bn\.|loss\.|conv[12]\.|model_ema\.)")


def _vae(shapes: Shapes) -> Kind | None:
    prefix = next((p for p in ("first_stage_model.", "vae.") if all(name.startswith(p) for name in shapes)), "")
    inner = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    if not all(_VAE_ONLY.match(name) for name in inner):
        return None
    halves = [half for half in ("encoder", "decoder") if any(f"{half}.{first}.weight" in inner for first in ("conv_in", "conv1", "layers.0"))]
    if not halves:
        return None
    tiny = any(f"{half}.layers.0.weight" in inner for half in halves)
    first = inner.get("decoder.conv_in.weight") or inner.get("decoder.conv1.weight") or inner.get("decoder.layers.0.weight", ())
    last = inner.get("encoder.conv_out.weight", ())
    channels = first[1] if len(first) >= 4 else last[0] // 2 if len(last) >= 4 else 0
    diffusers = tiny or any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in inner)
    details = {"latent channels": str(channels) if channels else "", "sort": "tiny" if tiny else "frames, too" if len(first) == 5 else "",
               "only": f"the {halves[0]}" if len(halves) == 1 else ""}
    return Kind("VAE", "diffusers" if diffusers else "original", {key: value for key, value in details.items() if value},
                fits=("vae", "z_dim" if len(first) == 5 else "latent_channels", channels) if channels else None)


_CLIP = {768: "CLIP-L", 1024: "OpenCLIP-H", 1280: "OpenCLIP-bigG"}
_T5 = {512: "T5-small", 768: "T5-base", 1024: "T5-large", 2048: "T5-XL", 4096: "T5-XXL"}
_CHAT = {(151936, 2560): "Qwen3-4B", (151936, 4096): "Qwen3-8B", (152064, 3584): "Qwen2.5-VL-7B", (131072, 5120): "Mistral-Small-3"}
_EMBEDDINGS = ("embeddings.token_embedding.weight", "token_embedding.weight", "shared.weight", "embed_tokens.weight", "token_embd.weight")


def _text_encoder(shapes: Shapes) -> Kind | None:
    name = next((n for n in shapes if n.endswith(_EMBEDDINGS) and len(shapes[n]) == 2), None)
    if name is None:
        return None
    words, width = shapes[name]
    joined = {n.rpartition(".")[0] for n in shapes}
    if any(".SelfAttention.q" in n for n in joined) or any(n.startswith("enc.blk.") for n in joined):
        layout = "GGUF" if name == "token_embd.weight" else "diffusers"
        sort = _T5.get(width, f"T5 of width {width}") if words < 100_000 else f"UMT5 of width {width}"
        return Kind("text encoder", layout, {"encoder": sort}, fits=("text_encoder", "d_model", width))
    if any("resblocks.0." in n for n in joined) or any("text_model.encoder.layers.0." in n or n.startswith("encoder.layers.0.") for n in joined):
        layout = "original" if any("resblocks.0." in n for n in joined) else "diffusers"
        pictures = {"sees": "pictures, too"} if any(n.startswith(("vision_model.", "visual.")) for n in joined) else {}
        sort = _CLIP.get(width, "") if 49_400 <= words <= 49_500 else ""
        return Kind("text encoder", layout, {"encoder": sort or f"CLIP of width {width}", **pictures}, fits=("text_encoder", "hidden_size", width))
    if any(".self_attn.q_proj" in n for n in joined) or any(n.startswith("blk.0.attn_q") for n in joined):
        sort = _CHAT.get((words, width), f"language model of width {width}")
        layout = "GGUF" if name == "token_embd.weight" else "diffusers"
        return Kind("text encoder", layout, {"encoder": sort}, fits=("text_encoder", "hidden_size", width))
    return None


def _image_encoder(shapes: Shapes) -> Kind | None:
    patch = next((shape for name, shape in shapes.items() if name.endswith("vision_model.embeddings.patch_embedding.weight")), ())
    return None if len(patch) != 4 else Kind("image encoder", "diffusers", {"width": str(patch[0])})


_WIDTHS = {768: "CLIP-L", 1024: "OpenCLIP-H", 1280: "OpenCLIP-bigG", 4096: "T5-XXL"}


def _embedding(shapes: Shapes) -> Kind | None:
    """Textual inversion: a few vectors of an encoder's width, under a placeholder's name or one of a few fixed ones."""
    vectors = [shape for shape in shapes.values() if len(shape) in (1, 2) and shape[-1] in _WIDTHS and (len(shape) == 1 or 1 <= shape[0] <= 128)]
    fixed = shapes.keys() <= {"emb_params", "clip_l", "clip_g", "t5xxl", "clip_h"}
    if len(vectors) != len(shapes) or not (fixed or (len(shapes) == 1 and "." not in next(iter(shapes)))):
        return None
    said = ", ".join(f"{shape[0] if len(shape) == 2 else 1} of {_WIDTHS[shape[-1]]}" for shape in vectors)
    return Kind("textual-inversion embedding", "A1111" if fixed else "diffusers", {"vectors": said})


def _upscaler(shapes: Shapes) -> Kind | None:
    if {"body.0.rdb1.conv1.weight", "model.1.sub.0.RDB1.conv1.0.weight"} & shapes.keys():
        return Kind("upscaler", details={"sort": "ESRGAN"})
    return None
