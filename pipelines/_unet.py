"""What the families built around a U-Net share: noise tables from scheduler configs, picture inputs, CLIP's states, one denoiser call.

Knows scheduler, U-Net and VAE configs as diffusers writes them. Knows no checkpoint, no tensor names of files, no tokenizer, and no engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentgen.diffusion.level import Level, VariancePreserving
from latentgen.diffusion.schedule import cosine, linear, scaled_linear, zero_terminal_snr
from latentgen.errors import ModelError
from latentgen.models.family import Conditioning, Config, Modules, Scene, Side
from latentgen.pixels.latent import LatentSpec

LATENT_DIFFUSION: Config = {  # Stable Diffusion's own
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "steps_offset": 1}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
TABLES: dict[str, Callable[[int, float, float], tuple[float, ...]]] = {
    "linear": linear, "scaled_linear": scaled_linear, "squaredcos_cap_v2": lambda steps, start, end: cosine(steps)}
LEADING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler", "")  # space so where their config says nothing
SAMPLERS = {  # of other classes, the default
    "EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler_ancestral", "HeunDiscreteScheduler": "heun", "LCMScheduler": "lcm"}
SOLVERS = ("DPMSolver", "UniPC", "DEIS")
BESIDE = "beside"  # the entry of `Conditioning.extra` that the U-Net sees as further channels of x


def noise_path(scheduler: Config) -> VariancePreserving:
    """The training table that a scheduler config describes; Stable Diffusion's own where there is none.

    Raises:
        ModelError: a schedule that is not known, numbers out of range, or an epsilon prediction at zero terminal SNR, where x holds no x0.
    """
    config = scheduler or LATENT_DIFFUSION
    name, kind = str(config.get("_class_name", "")), config.get("beta_schedule", "linear")
    if name.startswith(("FlowMatch", "EDM", "CosineDPM")):
        raise ModelError(f"the scheduler config is of {name:.60}: expected one with betas, as this U-Net was trained, so it belongs to another model")
    if config.get("trained_betas") is not None or not isinstance(kind, str) or kind not in TABLES:
        said = "a table of its own (trained_betas)" if config.get("trained_betas") is not None else f"beta_schedule {kind!r:.60}"
        raise ModelError(f"the scheduler config has {said}: expected beta_schedule {', '.join(TABLES)}, so write the config as one of them")
    steps = _number(config, "num_train_timesteps", 1000, low=2, high=100_000)
    if steps != int(steps):
        raise ModelError(f"the scheduler config sets num_train_timesteps to {steps}: expected a whole number")
    start, end = (_number(config, key, value, low=1e-9, high=0.999) for key, value in (("beta_start", 0.0001), ("beta_end", 0.02)))
    table = TABLES[kind](int(steps), start, end)
    if not config.get("rescale_betas_zero_snr"):
        return VariancePreserving(table)
    if prediction(config) == "epsilon":
        raise ModelError("the scheduler config has rescale_betas_zero_snr with prediction_type 'epsilon', which says nothing of x0 at pure noise: "
                         "expected 'v_prediction' or 'sample', so correct the config")
    return VariancePreserving(zero_terminal_snr(table))


def prediction(scheduler: Config) -> str:
    """What the network returns, "epsilon" where the config says nothing (as diffusers).

    Raises:
        ModelError: a prediction type that is not known.
    """
    said = scheduler.get("prediction_type") or "epsilon"
    if said not in PREDICTIONS:
        raise ModelError(f"the scheduler config has prediction_type {said!r:.60}: expected one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[said]


def run_defaults(scheduler: Config, unet: Config, factor: int) -> dict[str, Any]:
    """Those of `Defaults` that the configs decide: size, sampler, spacing and offset.

    The spacing is the one that the scheduler would use: as its config says, else as its class is written. A table that ends in pure noise must be
    started there, so it is "trailing" where the config leaves it open.

    Raises:
        ModelError: a spacing that is not known, or a number out of range.
    """
    config = scheduler or LATENT_DIFFUSION
    name = str(config.get("_class_name", ""))
    spacing = config.get("timestep_spacing") or ("trailing" if config.get("rescale_betas_zero_snr") else "leading" if name in LEADING else "linspace")
    spacing = "karras" if config.get("use_karras_sigmas") else "exponential" if config.get("use_exponential_sigmas") else spacing
    if spacing == "linspace" and name.startswith(SOLVERS):
        spacing = "trailing"  # theirs leaves the cleanest of steps + 1 times out, which is ours of this name, to one timestep
    if spacing not in ("leading", "trailing", "linspace", "karras", "exponential"):
        raise ModelError(f"the scheduler config has timestep_spacing {spacing!r:.60}: expected leading, trailing or linspace")
    offset = int(_number(config, "steps_offset", 0, low=0, high=100))  # of "leading" spacing, also where a request asks for it
    side = unet.get("sample_size") or 64
    sides = side if isinstance(side, (list, tuple)) and len(side) == 2 else (side, side)
    if not all(isinstance(s, int) and 1 <= s <= 4096 for s in sides):
        raise ModelError(f"the U-Net's config sets sample_size to {side!r:.60}: expected a number of latents, such as 64")
    sampler = {"sampler": SAMPLERS[name]} if name in SAMPLERS else {}
    return {"width": sides[1] * factor, "height": sides[0] * factor, "spacing": spacing, "offset": offset, **sampler}


def latent_spec(vae: Config, *, scale: float = 0.18215) -> LatentSpec:
    """Channels, factor and scale from an AutoencoderKL's config; `scale` where it says none (older configs do not).

    Raises:
        ModelError: levels or channels that no such VAE has.
    """
    levels, channels = vae.get("block_out_channels", (0, 0, 0, 0)), vae.get("latent_channels", 4)
    if not isinstance(levels, (list, tuple)) or not 1 <= len(levels) <= 8 or not isinstance(channels, int) or channels < 1:
        raise ModelError(f"the VAE's config has block_out_channels {levels!r:.60} and latent_channels {channels!r:.60}: "
                         "expected 1 to 8 levels and 1 channel or more")
    factor = 2 ** (len(levels) - 1)
    said, shift = vae.get("scaling_factor"), vae.get("shift_factor")
    return LatentSpec(channels=channels, factor=factor, multiple=factor, scale=scale if said is None else float(said),
                      shift=float(shift or 0.0))


def check_parts(unet: Config, latent: LatentSpec, *words: Config) -> None:
    """Whether the VAE and the text encoders, whose states are joined, are those of this U-Net; what a config does not say is not compared.

    Raises:
        ModelError: they are not.
    """
    if (given := unet.get("out_channels", latent.channels)) != latent.channels:
        raise ModelError(f"the U-Net gives {given!r:.40} channels and the VAE reads {latent.channels}: they are not of one model, so give the VAE "
                         "that belongs to it")
    heard, widths = unet.get("cross_attention_dim"), [config.get("hidden_size") for config in words]
    if isinstance(heard, int) and all(isinstance(width, int) for width in widths) and sum(widths) != heard:
        raise ModelError(f"the U-Net hears words of width {heard} and the text encoder gives {' + '.join(map(str, widths))}: they are not of one "
                         "model, so give the text encoder that belongs to it")


def _number(config: Config, key: str, default: float, *, low: float, high: float) -> float:
    """A number of the scheduler config within [low, high].

    Raises:
        ModelError: it is not one.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and low <= value <= high):
        raise ModelError(f"the scheduler config sets {key} to {value!r:.60}: expected a number from {low:g} to {high:,}")
    return value


def clip_layers(*encoders: Config) -> int:
    """How many layers the shallowest of these CLIP text encoders has, by their configs; 12 where none says."""
    said = [layers for config in encoders if isinstance(layers := config.get("num_hidden_layers"), int)]
    return min(said, default=12)


def clip_states(encoder: Any, ids: Tensor, *, skip: int = 1, weigh: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """States of a CLIP text model, its final norm applied, for cross-attention.

    Args:
        ids: (n, length) token ids of n chunks.
        skip: 1 for the last layer, 2 for the one before it, up to `clip_layers`.
        weigh: what the states (n, length, width) go through before they are joined; None leaves them.

    Returns:
        (1, n * length, width), the chunks joined end to end.
    """
    if skip == 1:
        states = encoder(ids).last_hidden_state
    else:
        hidden = encoder(ids, output_hidden_states=True).hidden_states  # the embeddings, then each layer's, before the final norm
        states = getattr(encoder, "text_model", encoder).final_layer_norm(hidden[-skip])
    states = states if weigh is None else weigh(states)
    return states.reshape(1, -1, states.shape[-1])


def beside(x: Tensor, conditioning: Conditioning) -> Tensor:
    """x (B, c, h, w) with the picture channels that `inputs` made, if any, after its own: (B, c + k, h, w)."""
    channels = conditioning.extra.get(BESIDE)
    return x if channels is None else torch.cat([x, channels.to(x)], dim=1)


def predict(modules: Modules, x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
    """(B, c, h, w) latents -> what the U-Net was trained to predict, float32."""
    unet = modules["unet"]
    dtype = next(unet.parameters()).dtype  # unet.dtype walks through every module
    x = beside(x, conditioning).to(dtype).contiguous(memory_format=torch.channels_last)
    return unet(x, told_time(x, level), conditioning.tokens.to(dtype), return_dict=False)[0].float()


def told_time(x: Tensor, level: Level) -> Tensor:
    """(B,) what the network is told of the level, filled in where x is: a number would be copied there in every step, which waits for a GPU."""
    return torch.full((len(x),), level.time, device=x.device)


def masked_picture(scene: Scene, side: Side) -> dict[str, Tensor]:
    """What a 9-channel inpaint U-Net sees beside x: mask and latents of the picture with the masked area grey, (1, 1 + c, h, w).

    The mask is cut at 0.5 and read at each latent's first pixel, as the checkpoints were trained. Without a picture, or without a mask, everything
    is to be painted: a mask of ones and a grey picture. The same on every side of guidance.
    """
    picture, mask = scene.image, scene.mask
    if picture is None or mask is None:
        picture, mask = torch.zeros(1, 3, scene.height, scene.width), torch.ones(1, 1, scene.height, scene.width)
    hard = (mask >= 0.5).float()
    latents = scene.encode(picture * (1 - hard))
    small = torch.nn.functional.interpolate(hard, size=scene.shape[1:], mode="nearest")
    return {BESIDE: torch.cat([small.to(latents), latents], dim=1)}


def reference_latents(scene: Scene, side: Side, latent: LatentSpec) -> dict[str, Tensor]:
    """What an 8-channel editing U-Net sees beside x: the reference's raw latents, (1, c, h, w), as the VAE gives them; zeros on the side "none"."""
    if side == "none":
        return {BESIDE: torch.zeros(1, *scene.shape)}
    picture, size = scene.references[0], (scene.height, scene.width)
    if picture.shape[-2:] != size:
        picture = torch.nn.functional.interpolate(picture, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    return {BESIDE: latent.to_raw(scene.encode(picture))}


def depth_map(scene: Scene, side: Side) -> dict[str, Tensor]:
    """What a 5-channel depth U-Net sees beside x: the reference read as a depth map (near is bright), (1, 1, h, w) stretched to [-1, 1]."""
    depth = torch.nn.functional.interpolate(scene.references[0].mean(1, keepdim=True), size=scene.shape[1:], mode="bicubic", align_corners=False)
    low, high = depth.amin(), depth.amax()
    return {BESIDE: 2 * (depth - low) / (high - low).clamp(min=1e-6) - 1}


def of_one_shape(reference: tuple[int, int], picture: tuple[int, int], factor: int) -> str:
    """What is wrong with a reference, whose shape must be the picture's, which was rounded to whole latents; both (width, height)."""
    (width, height), (wide, high) = reference, picture
    if abs(height * wide / width - high) <= factor * (1 + height / width):
        return ""
    return (f"the reference is {width}x{height} but the picture will be {wide}x{high}, of another shape: "
            "crop the reference, or leave width and height out")
