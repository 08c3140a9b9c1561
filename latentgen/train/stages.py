"""The training commands: data, text, vae, denoiser, export. Each wires the pieces and shows progress; each can be killed and run again.

A run folder keeps its state, loss plot and sample sheet (see `loop`) and, when done, its EMA weights in `model/`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from latentgen.errors import TrainingError
from latentgen.run.residency import choose_device
from latentgen.train import denoiser as denoiser_training
from latentgen.train import text as text_training
from latentgen.train import vae as vae_training
from latentgen.train.captions import HeldOut
from latentgen.train.data import PictureSetReader, build
from latentgen.train.loop import Budget, fit

SHEET = ("red heart, flat", "grinning face, soft shaded", "evergreen tree, crisp flat", "blue car, flat", "pizza, 3d render",
         "cat face, glossy gradient",
         "house, cartoon", "rocket, flat", "purple mushroom", "woman astronaut, crisp flat", "sun behind cloud, soft shaded", "green apple")


def held_out_file() -> Path:
    """The list of what is never trained on, as the package carries it."""
    from importlib import resources

    return Path(str(resources.files("latentgen.weights"))) / "glyph" / "held-out.json"


def build_data(out: Path, *, size: int = 256, processes: int = 2) -> Path:
    """Rebuild the training set from its packages (two minutes on two quick cores; about 10 GB on disk, sparse)."""
    bars: dict[str, tqdm] = {}

    def tell(phase: str, now: int, total: int) -> None:
        if phase not in bars:
            bars[phase] = tqdm(total=total, desc=phase, unit="picture")
        bars[phase].update(now)

    try:
        return build(out, held_out=held_out_file(), size=size, processes=processes, progress=tell)
    finally:
        for bar in bars.values():
            bar.close()


def train_vae(data: Path, run: Path, *, minutes: float, lr: float = 6e-4, threads: int | None = None, resume_from: Path | None = None,
              decoder_only: bool = False, device: str = "cpu") -> Path:
    """Train the autoencoder; returns the folder of its weights.

    Args:
        resume_from: a folder of AutoencoderTiny weights to start from (the shipped ones, say) where the run itself has no state yet.
        decoder_only: keep the encoder as it is, so that latents and denoisers made with it stay valid.
        device: "cpu", "cuda", "cuda:1", "mps" or "auto".

    Raises:
        TrainingError: decoder_only without weights to keep the encoder of. RequestError: a device that is not there.
    """
    if decoder_only and resume_from is None:
        raise TrainingError("decoder_only keeps a trained encoder, but none was given: pass resume_from (--resume-from), and a run folder of its own")
    place = choose_device(device)
    _threads(threads)
    reader = PictureSetReader(data)
    torch.manual_seed(_seed(run))
    if resume_from is None:
        model = vae_training.new_vae()
    else:
        from diffusers import AutoencoderTiny

        model = AutoencoderTiny.from_pretrained(resume_from, torch_dtype=torch.float32)
    model = model.to(memory_format=torch.channels_last)
    model.encoder.requires_grad_(not decoder_only)
    rows = reader.rows("comp", "style", "concept")[::37][:10]
    ema = fit(model, lambda m, b: vae_training.loss(m, b, train_encoder=not decoder_only), vae_training.crops(reader, seed=_seed(run)), run,
              Budget(minutes, lr=lr, warmup=60, ema=0.998, decay=0.4), sheet=vae_training.sheet(reader, rows), device=place, label="vae")
    if not decoder_only:
        ema.register_to_config(scaling_factor=vae_training.unit_scale(ema, reader.on_white(reader.rows("train")[::100])))
    return _keep(ema, run)


def train_text(data: Path, run: Path, *, minutes: float, lr: float = 1e-3, threads: int | None = None, batch: int = 192,
               resume_from: Path | None = None, device: str = "cpu") -> Path:
    """Train the text encoder and its picture tower; returns the folder of the CLIPModel and its tokenizer.

    Args:
        resume_from: a glyph folder (text_encoder, vision_tower, tokenizer) to start from where the run has no state yet.
        device: see `train_vae`; it holds for the sentence encoder, too.

    Raises:
        RequestError: a device that is not there.
    """
    place = choose_device(device)
    _threads(threads)
    reader = PictureSetReader(data)
    run.mkdir(parents=True, exist_ok=True)
    tokenizer = run / "tokenizer"
    if not (run / "targets.npy").exists():
        lines = text_training.corpus(reader, HeldOut.read(held_out_file()).recolours)
        if resume_from is None:
            text_training.train_tokenizer(lines, tokenizer)
        else:
            shutil.copytree(resume_from / "tokenizer", tokenizer, dirs_exist_ok=True)
        (run / "lines.json").write_text(json.dumps(lines))
        np.save(run / "targets.part.npy", text_training.sentence_embeddings(lines, device=place))
        (run / "targets.part.npy").replace(run / "targets.npy")
    lines, targets = json.loads((run / "lines.json").read_text()), np.load(run / "targets.npy")
    torch.manual_seed(_seed(run))
    model = text_training.TwoTowers() if resume_from is None else text_training.from_transformers(_shipped_clip(resume_from))
    ema = fit(model, text_training.loss, text_training.pairs(reader, tokenizer, lines, targets, batch=batch, seed=_seed(run)), run,
              Budget(minutes, lr=lr, ema=0.998, weight_decay=0.1), device=place, label="text")
    return _keep(text_training.to_transformers(ema), run)


def train_denoiser(data: Path, run: Path, *, size: int, minutes: float, lr: float = 6e-4, batch: int = 48, threads: int | None = None, vae: Path,
                   text: Path,
                   start: Path | None = None, grow: bool = False, decay: float = 0.3, core: bool = False, device: str = "cpu") -> Path:
    """Train the U-Net at one size; returns the folder of its weights.

    Args:
        size: 128, 256 (or more where the set was drawn larger): the side of the pictures in pixels.
        vae, text: run folders of the two other parts, or a finished checkpoint such as the shipped one.
        start: a folder of U-Net weights to start from where the run has no state yet.
        grow: put a new outer level around those weights, for pictures of twice the side.
        decay: share of the budget over which the learning rate falls; 0 leaves it up for a following run.
        core: leave out skin tones and interface icons (a quarter less to encode before a short run).
        device: see `train_vae`; it holds for the two other parts, too.

    Raises:
        TrainingError: grow without weights to grow from. RequestError: a device that is not there.
    """
    from diffusers import AutoencoderTiny, UNet2DConditionModel

    if grow and start is None:
        raise TrainingError("grow puts a level around trained weights, but none were given: pass start (--start), the model/ of a smaller size's run")
    place = choose_device(device)
    _threads(threads)
    reader = PictureSetReader(data)
    run.mkdir(parents=True, exist_ok=True)
    encoder = _clip(text).text_model.to(place)
    autoencoder = AutoencoderTiny.from_pretrained(_weights(vae, "vae"), torch_dtype=torch.float32).eval().to(place, memory_format=torch.channels_last)
    scale = float(autoencoder.config.scaling_factor)
    rows = denoiser_training.training_rows(reader, core=core)
    latents = denoiser_training.cache_latents(reader, rows, autoencoder,
                                              run / f"latents-{_fingerprint(autoencoder.encoder, [reader.icons[r].id for r in rows])}.npy", size=size)
    states, choices = denoiser_training.cache_text(reader, rows, encoder, text / "tokenizer")
    cache = denoiser_training.Cache((latents.astype(np.float32) * scale).astype(np.float16), states, choices, denoiser_training.weights(reader, rows))
    torch.manual_seed(_seed(run))
    unet = denoiser_training.new_unet() if start is None else UNet2DConditionModel.from_pretrained(start, torch_dtype=torch.float32)
    unet = denoiser_training.grown(unet) if grow else unet
    if place.type == "cpu":
        denoiser_training.explicit_attention(unet)
    sheet = denoiser_training.sheet(autoencoder, encoder, text / "tokenizer", list(SHEET), size=size, scale=scale)
    ema = fit(unet.to(memory_format=torch.channels_last), denoiser_training.loss_function(device=place),
              denoiser_training.batches(cache, batch=batch, seed=_seed(run)), run,
              Budget(minutes, lr=lr, decay=decay, save_minutes=5), sheet=sheet, device=place, label=f"denoiser {size} px")
    return _keep(ema, run)


def export(out: Path, *, text: Path, vae: Path, unet: Path, data: Path, size: int = 256) -> Path:
    """Lay the three trained parts out as one checkpoint: a diffusers folder in float16 with card.toml, picture tower and scheduler.

    Args:
        text, vae, unet: run folders, or a finished checkpoint that the part is taken over from.
        data: the training set, to fit the preview matrix on.
        size: the side in pixels that the denoiser was trained at last: the card's default.
    """
    from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPVisionModelWithProjection

    clip = _clip(text).half()
    words, sight = CLIPTextModel(clip.config.text_config).half(), CLIPVisionModelWithProjection(clip.config.vision_config).half()
    tensors = clip.state_dict()
    _fill(words, tensors, drop="text_model.")
    _fill(sight, tensors, drop="")
    autoencoder = AutoencoderTiny.from_pretrained(_weights(vae, "vae"), torch_dtype=torch.float32)
    reader = PictureSetReader(data)
    preview = vae_training.preview_rows(autoencoder, reader.on_white(reader.rows("train")[::80]))
    words.save_pretrained(out / "text_encoder")
    sight.save_pretrained(out / "vision_tower")
    save_file({"text_projection.weight": tensors["text_projection.weight"].contiguous(), "logit_scale": tensors["logit_scale"].reshape(1)},
              out / "vision_tower" / "text_projection.safetensors")
    network = UNet2DConditionModel.from_pretrained(_weights(unet, "unet"))
    for part, module in (("vae", autoencoder), ("unet", network)):
        module.register_to_config(_name_or_path="")  # diffusers writes the folder it was read from into config.json
        module.half().save_pretrained(out / part)
    if text.resolve() != out.resolve():
        shutil.copytree(text / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    if not (out / "held-out.json").exists():  # `latentgen eval` reads it there
        shutil.copyfile(held_out_file(), out / "held-out.json")
    DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=denoiser_training.BETA_START, beta_end=denoiser_training.BETA_END,
                                prediction_type="v_prediction", rescale_betas_zero_snr=True,
                                timestep_spacing="trailing").save_pretrained(out / "scheduler")
    (out / "model_index.json").write_text(json.dumps(_MODEL_INDEX, indent=1) + "\n")
    (out / "card.toml").write_text(_card(preview, size))
    return out


_MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline", "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
    "safety_checker": [None, None], "scheduler": ["diffusers", "DPMSolverMultistepScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderTiny"]}


def _card(preview: list[list[float]], size: int) -> str:
    rows = ",\n  ".join(str(row) for row in preview)
    return ('name = "glyph"\nfamily = "glyph"\nsummary = "words to colour icons and emoji, runs on any CPU"\nlicence = "Apache-2.0"\n'
            f"preview = [  # latent channels and a constant to RGB in [-1, 1]\n  {rows},\n]\n\n[defaults]\nwidth = {size}\nheight = {size}\n")


def _fill(module: nn.Module, tensors: dict[str, torch.Tensor], *, drop: str) -> None:
    """Load a tower from the whole CLIPModel's tensors, whichever of the two key styles this transformers version uses."""
    wanted = module.state_dict()
    found = {k: tensors[k] if k in tensors else tensors[drop + k] for k in wanted if k in tensors or drop + k in tensors}
    missing, _ = module.load_state_dict(found, strict=False)
    if [m for m in missing if "position_ids" not in m]:
        raise TrainingError(f"the trained towers lack {missing[0]}: train the text encoder again with this version")


def _fingerprint(encoder: nn.Module, ids: list[str]) -> str:
    """Eight hex digits of an encoder's weights and of the pictures: latents of others are never taken for these."""
    whole = hashlib.sha256("\n".join(ids).encode())
    for tensor in encoder.state_dict().values():
        whole.update(tensor.cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:8]


def _weights(folder: Path, part: str) -> Path:
    """Where a part's weights lie: in a checkpoint's own folder for it, or in a run's model/."""
    return folder / part if (folder / part).is_dir() else folder / "model"


def _clip(folder: Path) -> nn.Module:
    """The two towers of a run or of a checkpoint as a CLIPModel in float32."""
    from transformers import CLIPModel

    if (folder / "text_encoder").is_dir():
        return text_training.to_transformers(text_training.from_transformers(_shipped_clip(folder)))
    return CLIPModel.from_pretrained(folder / "model", attn_implementation="eager", torch_dtype=torch.float32).eval()


def _shipped_clip(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "vision_tower" / "model.safetensors") | load_file(folder / "vision_tower" / "text_projection.safetensors")
    words = load_file(folder / "text_encoder" / "model.safetensors")
    tensors |= {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in words.items()}
    return tensors | {"logit_scale": tensors["logit_scale"].reshape(())}


def _keep(model: nn.Module, run: Path) -> Path:
    part = run / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    save: Callable[[Path], None] = model.save_pretrained  # type: ignore[assignment]
    save(part)
    shutil.rmtree(run / "model", ignore_errors=True)
    part.replace(run / "model")
    return run / "model"


def _threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)


def _seed(run: Path) -> int:
    """Another stream of batches for each continuation, the same for the same point of a run."""
    try:
        return int(json.loads((run / "state.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return 0
