"""CLIP as a judge of pictures, to guide by: how well a picture fits words. Knows open_clip's models; knows no family, latent or request."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentgen.errors import ModelError, RequestError

if TYPE_CHECKING:
    from latentgen.diffusion.level import Level

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258,
                                                  0.27577711)  # of the pictures that CLIP was trained on (Radford et al. 2021)


class ClipJudge:
    """log p(words | picture) up to a constant: CLIP's own scale times the cosine of both. Make one with `clip_guidance`.

    Attributes:
        of: what it is shown, as `latentgen.run.steering` reads it.
    """

    of = "pixels"

    def __init__(self, model: Any, words: Tensor, *, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.model, self.words, self.size, self.mean, self.std = model, words, size, mean, std

    def __call__(self, pixels: Tensor, level: Level) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> (B,). As CLIP saw pictures in training: the short side at its size, the middle, normalised."""
        weight = next(self.model.parameters())
        pixels = pixels.to(weight.device).float().clamp(-1, 1)
        share = self.size / min(pixels.shape[2:])
        height, width = (max(self.size, round(side * share)) for side in pixels.shape[2:])
        pixels = torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        pixels = pixels[..., top:top + self.size, left:left + self.size]
        mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        seen = torch.nn.functional.normalize(self.model.encode_image((((pixels + 1) / 2 - mean) / std).to(weight.dtype)).float(), dim=-1)
        return self.model.logit_scale.exp().float() * (seen @ self.words.to(seen))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its weights and of the words as it heard them: what a recipe knows of it."""
        whole = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            whole.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return hashlib.sha256(whole.digest() + self.words.cpu().numpy().tobytes()).hexdigest()


def clip_guidance(prompt: str, *, model: Any, weights: str | Path | None = None, tokenizer: Callable[[list[str]], Tensor] | None = None) -> ClipJudge:
    """A classifier for `classifier=` that leads pictures towards words by CLIP (Crowson 2021; Nichol et al. 2022, GLIDE, section 2.4).

    Args:
        prompt: the words.
        model: an open_clip model, which stays where it is and as it is; or the name of an architecture, "ViT-B-32", with `weights`.
        weights: a .safetensors file with that architecture's weights.
        tokenizer: texts -> (n, length) ids; None takes open_clip's for the architecture.

    Raises:
        RequestError: no words, or weights without an architecture, or the reverse. ModelError: a file that is missing, no safetensors or another
            model's.
    """
    try:
        import open_clip
    except ModuleNotFoundError:
        raise ModelError("CLIP guidance needs open_clip, which is not installed: pip install open_clip_torch") from None
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError("prompt is empty: say what CLIP is to lead to")
    if isinstance(model, str) != (weights is not None):
        raise RequestError("model and weights belong together: give an architecture's name with weights=FILE, or a loaded open_clip model alone")
    name = model if isinstance(model, str) else "ViT-B-32"
    if isinstance(model, str):
        model = _loaded(model, Path(weights or ""))
    with torch.no_grad():
        ids = (tokenizer or open_clip.get_tokenizer(name))([prompt]).to(next(model.parameters()).device)
        words = torch.nn.functional.normalize(model.encode_text(ids).float(), dim=-1)[0]
    told = getattr(model.visual, "preprocess_cfg", None) or {}
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    if not math.isfinite(words.sum().item()):
        raise ModelError("the CLIP model gives NaN or infinity for the words: its weights are damaged, so get them again")
    return ClipJudge(model, words, size=size, mean=tuple(told.get("mean") or MEAN), std=tuple(told.get("std") or STD))


def _loaded(name: str, path: Path) -> Any:
    import open_clip
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if name not in open_clip.list_models():
        raise ModelError(f"{name!r:.60} is no architecture of open_clip: expected one as ViT-B-32 (open_clip.list_models() has all)")
    if path.suffix != ".safetensors" or not path.is_file():
        raise ModelError(f"{path.name!r:.60} is not there or is no .safetensors file: expected weights of {name} in that format")
    model = open_clip.create_model(name, pretrained=None)
    try:
        model.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(f"the weights in {path.name} do not fit {name}: {' '.join(str(error).split())[:200]}") from None
    return model.eval().requires_grad_(False)
