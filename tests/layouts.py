"""Diffusers names to the names that the makers published: the other direction of `latentgen.models.convert`, for tests. Knows torch; no latentgen.

`to_original(kind, state, config)` renames one part, `LAYOUTS` says how each family's single file is put together, `single_file` does it.
Nothing here computes: tensors are renamed, joined, transposed or reshaped, so it works on the meta device and a round trip must be exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Rules = Iterable[tuple[str, str]]

RESNET = (
    ("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."),
    ("time_emb_proj.", "emb_layers.1."), ("conv_shortcut.", "skip_connection."),
)
UNET = (
    ("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."), ("conv_in.", "input_blocks.0.0."),
    ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."), ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
)
VAE = (
    ("conv_norm_out.", "norm_out."), ("conv_shortcut.", "nin_shortcut."), ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."), ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
    ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."), ("mid_block.attentions.0.to_", "mid.attn_1."),
    ("downsamplers.0.conv.", "downsample.conv."), ("upsamplers.0.conv.", "upsample.conv."), (".resnets.", ".block."),
)
OPEN_CLIP = (
    ("text_model.", ""), ("encoder.layers.", "transformer.resblocks."), ("layer_norm1.", "ln_1."), ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."), ("self_attn.", "attn."), ("final_layer_norm.", "ln_final."),
    ("embeddings.token_embedding.", "token_embedding."), ("embeddings.position_embedding.weight", "positional_embedding"),
)
MMDIT = (
    ("pos_embed.pos_embed", "pos_embed"), ("pos_embed.proj.", "x_embedder.proj."),
    ("time_text_embed.timestep_embedder.linear_1.", "t_embedder.mlp.0."), ("time_text_embed.timestep_embedder.linear_2.", "t_embedder.mlp.2."),
    ("time_text_embed.text_embedder.linear_1.", "y_embedder.mlp.0."), ("time_text_embed.text_embedder.linear_2.", "y_embedder.mlp.2."),
    ("norm_out.linear.", "final_layer.adaLN_modulation.1."), ("transformer_blocks.", "joint_blocks."), (".attn.norm_q.", ".x_block.attn.ln_q."),
    (".attn.norm_k.", ".x_block.attn.ln_k."), (".attn.norm_added_q.", ".context_block.attn.ln_q."),
    (".attn.norm_added_k.", ".context_block.attn.ln_k."), (".attn2.norm_q.", ".x_block.attn2.ln_q."), (".attn2.norm_k.", ".x_block.attn2.ln_k."),
    (".attn.to_out.0.", ".x_block.attn.proj."), (".attn.to_add_out.", ".context_block.attn.proj."), (".attn2.to_out.0.", ".x_block.attn2.proj."),
    (".norm1.linear.", ".x_block.adaLN_modulation.1."), (".norm1_context.linear.", ".context_block.adaLN_modulation.1."),
    (".ff.net.0.proj.", ".x_block.mlp.fc1."), (".ff.net.2.", ".x_block.mlp.fc2."), (".ff_context.net.0.proj.", ".context_block.mlp.fc1."),
    (".ff_context.net.2.", ".context_block.mlp.fc2."),
)
FLUX = (
    ("time_text_embed.timestep_embedder.linear_1.", "time_in.in_layer."), ("time_text_embed.timestep_embedder.linear_2.", "time_in.out_layer."),
    ("time_text_embed.text_embedder.linear_1.", "vector_in.in_layer."), ("time_text_embed.text_embedder.linear_2.", "vector_in.out_layer."),
    ("time_text_embed.guidance_embedder.linear_1.", "guidance_in.in_layer."),
    ("time_text_embed.guidance_embedder.linear_2.", "guidance_in.out_layer."),
    ("time_guidance_embed.timestep_embedder.linear_1.", "time_in.in_layer."),
    ("time_guidance_embed.timestep_embedder.linear_2.", "time_in.out_layer."),
    ("time_guidance_embed.guidance_embedder.linear_1.", "guidance_in.in_layer."),
    ("time_guidance_embed.guidance_embedder.linear_2.", "guidance_in.out_layer."), ("context_embedder.", "txt_in."), ("x_embedder.", "img_in."),
    ("norm_out.linear.", "final_layer.adaLN_modulation.1."), ("modulation_img.linear.", "modulation_img.lin."),
    ("modulation_txt.linear.", "modulation_txt.lin."), ("single_stream_modulation.linear.", "single_stream_modulation.lin."),
)
SINGLE = (
    ("single_transformer_blocks.", "single_blocks."), (".norm.linear.", ".modulation.lin."), (".attn.norm_q.weight", ".norm.query_norm.scale"),
    (".attn.norm_k.weight", ".norm.key_norm.scale"), (".proj_out.", ".linear2."), (".attn.to_qkv_mlp_proj.", ".linear1."),
    (".attn.to_out.", ".linear2."),
)
DOUBLE = (
    ("transformer_blocks.", "double_blocks."), (".norm1.linear.", ".img_mod.lin."), (".norm1_context.linear.", ".txt_mod.lin."),
    (".attn.norm_q.weight", ".img_attn.norm.query_norm.scale"), (".attn.norm_k.weight", ".img_attn.norm.key_norm.scale"),
    (".attn.norm_added_q.weight", ".txt_attn.norm.query_norm.scale"), (".attn.norm_added_k.weight", ".txt_attn.norm.key_norm.scale"),
    (".ff.net.0.proj.", ".img_mlp.0."), (".ff.net.2.", ".img_mlp.2."), (".ff_context.net.0.proj.", ".txt_mlp.0."),
    (".ff_context.net.2.", ".txt_mlp.2."), (".ff.linear_in.", ".img_mlp.0."), (".ff.linear_out.", ".img_mlp.2."),
    (".ff_context.linear_in.", ".txt_mlp.0."), (".ff_context.linear_out.", ".txt_mlp.2."), (".attn.to_out.0.", ".img_attn.proj."),
    (".attn.to_add_out.", ".txt_attn.proj."),
)
Z_IMAGE = (
    ("all_final_layer.2-1.", "final_layer."), ("all_x_embedder.2-1.", "x_embedder."), (".attention.norm_q.", ".attention.q_norm."),
    (".attention.norm_k.", ".attention.k_norm."), (".attention.to_out.0.", ".attention.out."),
)
VIDEO_RESNET = (
    ("norm1.", "residual.0."), ("conv1.", "residual.2."), ("norm2.", "residual.3."), ("conv2.", "residual.6."), ("conv_shortcut.", "shortcut."),
)


def _renamed(state: Mapping[str, Tensor], rules: Rules) -> State:
    out = {}
    for name, tensor in state.items():
        for old, new in rules:
            name = name.replace(old, new)
        out[name] = tensor
    return out


def _joined(state: Mapping[str, Tensor], first: str, others: tuple[str, ...], target: str) -> State:
    """Rows of `first` and of the others under one name."""
    out = {}
    for name, tensor in state.items():
        if first in name:
            out[name.replace(first, target)] = torch.cat([tensor, *(state[name.replace(first, other)] for other in others)])
        elif not any(other in name for other in others):
            out[name] = tensor
    return out


def _swapped(tensor: Tensor) -> Tensor:
    """(scale, shift) <-> (shift, scale)."""
    return torch.cat(tensor.chunk(2)[::-1])


def _unet(state: State, config: Mapping[str, Any]) -> State:
    layers = config["layers_per_block"]
    out = {}
    for name, tensor in state.items():
        block = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(?:conv\.(?=\w+$))?(.+)", name)
        middle = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
        if block:
            side, number, kind, index, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
            place = number * (layers + 1) + (index if kind in ("resnets", "attentions") else layers) + (side == "down")
            attends = f"{side}_blocks.{number}.attentions.0.norm.weight" in state
            slot = {"resnets": "0", "attentions": "1", "downsamplers": "0.op", "upsamplers": "2.conv" if attends else "1.conv"}[kind]
            start = f"{'input' if side == 'down' else 'output'}_blocks.{place}.{slot}."
        elif middle:
            kind, rest = middle[1], middle[3]
            start = f"middle_block.{1 if kind == 'attentions' else 2 * int(middle[2])}."
        else:
            kind, start, rest = "", "", name
        out[start + next(iter(_renamed({rest: tensor}, RESNET if kind == "resnets" else () if kind else UNET)))] = tensor
    return out


def _vae(state: State, config: Mapping[str, Any]) -> State:
    last = len(config["up_block_types"]) - 1
    out = {}
    for name, tensor in _renamed(state, VAE).items():
        name = name.replace("encoder.down_blocks.", "encoder.down.")
        name = re.sub(r"decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", name)
        out[name] = tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor  # 1x1 convolutions
    return out


def _vae_inside(state: State, config: Mapping[str, Any]) -> State:
    inside = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    return {re.sub(r"^(post_)?quant_conv", lambda m: inside[m[0]], name): tensor for name, tensor in _vae(state, config).items()}


def _open_clip(state: State, config: Mapping[str, Any]) -> State:
    """Where the module has no projection, the file has one all the same, and one more layer: encoders that stop at the last layer but one."""
    for end in ("weight", "bias"):
        state = _joined(state, f"q_proj.{end}", (f"k_proj.{end}", f"v_proj.{end}"), f"in_proj_{end}")
    out = _renamed(state, OPEN_CLIP)
    width = out["positional_embedding"].shape[1]
    if "text_projection.weight" in out:
        out["text_projection"] = out.pop("text_projection.weight").T.contiguous()
    else:
        last, more = (f"resblocks.{config['num_hidden_layers'] - 1 + i}." for i in (0, 1))
        out |= {name.replace(last, more): tensor for name, tensor in out.items() if last in name}
        out["text_projection"] = torch.empty(width, width, device=out["ln_final.weight"].device, dtype=out["ln_final.weight"].dtype).fill_(0.5)
    return out | {"logit_scale": torch.empty((), device=out["ln_final.weight"].device).fill_(4.6)}


def _mmdit(state: State, config: Mapping[str, Any]) -> State:
    out = {re.sub(r"^proj_out\.", "final_layer.linear.", name): tensor for name, tensor in state.items()}
    for first, target in ((".attn.to_", ".x_block.attn."), (".attn2.to_", ".x_block.attn2.")):
        out = _joined(out, f"{first}q.", (f"{first}k.", f"{first}v."), f"{target}qkv.")
    out = _joined(out, ".attn.add_q_proj.", (".attn.add_k_proj.", ".attn.add_v_proj."), ".context_block.attn.qkv.")
    out = _renamed(out, MMDIT)
    ends = ("final_layer.adaLN_modulation.1.", f"joint_blocks.{config['num_layers'] - 1}.context_block.adaLN_modulation.1.")
    return {name: _swapped(tensor) if name.startswith(ends) else tensor for name, tensor in out.items()}


def _flux(state: State, config: Mapping[str, Any]) -> State:
    single = {name: tensor for name, tensor in state.items() if name.startswith("single_transformer_blocks.")}
    double = {name: tensor for name, tensor in state.items() if name.startswith("transformer_blocks.")}
    rest = {name: tensor for name, tensor in state.items() if name not in single and name not in double}
    single = _renamed(_joined(single, ".attn.to_q.", (".attn.to_k.", ".attn.to_v.", ".proj_mlp."), ".linear1."), SINGLE)
    double = _joined(double, ".attn.to_q.", (".attn.to_k.", ".attn.to_v."), ".img_attn.qkv.")
    double = _renamed(_joined(double, ".attn.add_q_proj.", (".attn.add_k_proj.", ".attn.add_v_proj."), ".txt_attn.qkv."), DOUBLE)
    rest = _renamed(rest, (*FLUX, ("proj_out.", "final_layer.linear.")))
    return {name: _swapped(tensor) if "final_layer.adaLN" in name else tensor for name, tensor in rest.items()} | double | single


def _z_image(state: State, config: Mapping[str, Any]) -> State:
    out = _renamed(_joined(state, ".attention.to_q.", (".attention.to_k.", ".attention.to_v."), ".attention.qkv."), Z_IMAGE)
    return out | {"norm_final.weight": torch.ones_like(out["x_embedder.bias"])}  # published and of no use


def _video_vae(state: State, config: Mapping[str, Any]) -> State:
    out = {}
    for name, tensor in state.items():
        up = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", name)
        if up:
            start, rest = f"decoder.upsamples.{4 * int(up[1]) + (int(up[3]) if up[2] == 'resnets' else 3)}.", up[4]
            name = start + next(iter(_renamed({rest: tensor}, VIDEO_RESNET if up[2] == "resnets" else ())))
        elif ".mid_block.attentions." in name:
            name = name.replace("mid_block.attentions.0.", "middle.1.")
        elif re.search(r"\.(down_blocks\.\d+|mid_block\.resnets\.\d)\.", name):
            blocks = (("mid_block.resnets.0.", "middle.0."), ("mid_block.resnets.1.", "middle.2."), ("down_blocks.", "downsamples."))
            name = next(iter(_renamed({name: tensor}, (*VIDEO_RESNET, *blocks))))
        else:
            name = re.sub(r"^quant_conv\.", "conv1.", re.sub(r"^post_quant_conv\.", "conv2.", name)).replace("coder.conv_in.", "coder.conv1.")
            name = name.replace("coder.norm_out.", "coder.head.0.").replace("coder.conv_out.", "coder.head.2.")
        out[name] = tensor
    return out


def _clip(state: State, config: Mapping[str, Any]) -> State:
    """As transformers 4 saved it: everything but the projection under `text_model.`, position ids included."""
    out = {name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor for name, tensor in state.items()}
    positions = out["text_model.embeddings.position_embedding.weight"]
    return out | {"text_model.embeddings.position_ids": torch.arange(len(positions), device=positions.device)[None]}


def _clip_plain(state: State, config: Mapping[str, Any]) -> State:
    """Without its projection: where the published file has none, the module's is the identity."""
    return {name: tensor for name, tensor in _clip(state, config).items() if name != "text_projection.weight"}


def _t5(state: State, config: Mapping[str, Any]) -> State:
    return {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}  # the same as shared.weight


KINDS: dict[str, Callable[[State, Mapping[str, Any]], State]] = {
    "ldm_unet": _unet, "ldm_vae": _vae, "ldm_vae_inside": _vae_inside, "clip": _clip, "clip_plain": _clip_plain, "open_clip": _open_clip,
    "mmdit": _mmdit, "t5": _t5, "flux": _flux, "z_image": _z_image, "video_vae": _video_vae, "same": lambda state, config: dict(state),
}

UNET_, VAE_ = ("ldm_unet", "model.diffusion_model."), ("ldm_vae", "first_stage_model.")
LAYOUTS: dict[str, dict[str, tuple[str, str]]] = {  # family -> part -> (kind, prefix in a file that holds everything)
    "sd15": {"unet": UNET_, "vae": VAE_, "text_encoder": ("clip", "cond_stage_model.transformer.")},
    "sd21": {"unet": UNET_, "vae": VAE_, "text_encoder": ("open_clip", "cond_stage_model.model.")},
    "sdxl": {"unet": UNET_, "vae": VAE_, "text_encoder": ("clip", "conditioner.embedders.0.transformer."),
             "text_encoder_2": ("open_clip", "conditioner.embedders.1.model.")},
    "sdxl-refiner": {"unet": UNET_, "vae": VAE_, "text_encoder_2": ("open_clip", "conditioner.embedders.0.model.")},
    "sd3": {"transformer": ("mmdit", "model.diffusion_model."), "vae": VAE_,
            "text_encoder": ("clip_plain", "text_encoders.clip_l.transformer."), "text_encoder_2": ("clip", "text_encoders.clip_g.transformer."),
            "text_encoder_3": ("t5", "text_encoders.t5xxl.transformer.")},
    "flux1": {"transformer": ("flux", "model.diffusion_model."), "vae": ("ldm_vae", "vae."),
              "text_encoder": ("clip", "text_encoders.clip_l.transformer."), "text_encoder_2": ("t5", "text_encoders.t5xxl.transformer.")},
    "flux2": {"transformer": ("flux", "model.diffusion_model."), "vae": ("ldm_vae_inside", "vae.")},
    "zimage": {"transformer": ("z_image", "model.diffusion_model."), "vae": ("ldm_vae", "vae.")},
    "qwenimage": {"transformer": ("same", "model.diffusion_model."), "vae": ("video_vae", "vae.")},
}


def to_original(kind: str, state: Mapping[str, Tensor], config: Mapping[str, Any], *, prefix: str = "") -> State:
    """One part under its published names.

    Args:
        kind: a key of KINDS.
        state: the module's own state dict.
        config: the part's config, of which the numbers of layers and blocks are read.
        prefix: put before every name.
    """
    return {prefix + name: tensor for name, tensor in KINDS[kind](dict(state), config).items()}


def single_file(layout: str, parts: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Mapping[str, Any]]) -> State:
    """Parts (name -> state dict) that the layout knows, in one original file; `save_file` wants them contiguous, which they are not all."""
    out: State = {}
    for name, (kind, prefix) in LAYOUTS[layout].items():
        if name in parts:
            out |= to_original(kind, parts[name], configs[name], prefix=prefix)
    return out
