"""sd21: Stable Diffusion 2.x. OpenCLIP-H, a U-Net with cross-attention of width 1024, a factor-8 VAE.

Knows the 512 models (epsilon), the 768 models (v), tables with zero terminal SNR, 9-channel inpainting, and the depth model (a depth map beside x).
The epsilon and v U-Nets have the same tensors, so a single file does not tell which it is: SIGNATURES names sd21-v (the 768 models) first and sd21
second; a folder's scheduler config, a card or `config=` says otherwise. OpenCLIP's last layer is left out of the text encoder, as in training.
"""

from __future__ import annotations

from functools import partial

from latentgen.conditioning.tokens import TokenizerSpec
from latentgen.errors import ModelError
from latentgen.models.family import Defaults, Family, Model, Original, Part, no_inputs
from latentgen.pipelines._unet import (
    check_parts,
    clip_layers,
    depth_map,
    latent_spec,
    masked_picture,
    noise_path,
    of_one_shape,
    predict,
    prediction,
    run_defaults,
)
from latentgen.pipelines.sd15 import PARTS as SD15_PARTS
from latentgen.pipelines.sd15 import check_unet, encode, signatures

PARTS = (
    Part("text_encoder", "transformers.CLIPTextModel", ("text",), original=Original(
        ("cond_stage_model.model.", ""), "convert_open_clip_checkpoint", unique="transformer.resblocks.0.ln_1.weight")),
    *(part for part in SD15_PARTS if part.name != "text_encoder"),
)
INDEX = ("StableDiffusionDepth2ImgPipeline",)  # the other classes name sd15 too; an SD 2 folder under them is known by its U-Net
SIGNATURES = (*signatures("sd21-v", 4, 1024), *signatures("sd21", 4, 1024), *signatures("sd21-inpaint", 9, 1024))


def build(model: Model) -> Family:
    """Stable Diffusion 2.x as the configs describe it.

    Raises:
        ModelError: a U-Net or scheduler that is not of this family, or no scheduler config, without which epsilon and v cannot be told apart.
    """
    unet, scheduler, latent = model.config("unet"), model.config("scheduler"), latent_spec(model.config("vae"))
    if not scheduler:
        raise ModelError("there is no scheduler config, and an sd21 U-Net does not tell whether it predicts epsilon or v: "
                         "add scheduler/scheduler_config.json, which names its prediction_type")
    channels = check_unet(unet, "sd21", channels=(4, 5, 9))
    check_parts(unet, latent, model.config("text_encoder"))
    return Family(
        name="sd21", parts=PARTS, path=noise_path(scheduler), prediction=prediction(scheduler), latent=latent,
        tokenizers={"tokenizer": TokenizerSpec("clip", pad="!")},  # where its own files do not say
        encode=encode, predict=predict, inputs={4: no_inputs, 5: depth_map, 9: masked_picture}[channels],
        task={4: "any", 5: "edit", 9: "inpaint"}[channels], references=1 if channels == 5 else 0,
        fits=partial(of_one_shape, factor=latent.factor), clip_skip=clip_layers(model.config("text_encoder")),
        defaults=Defaults(guidance_scale=7.5, **run_defaults(scheduler, unet, latent.factor)),
    )
