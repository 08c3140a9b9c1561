"""The picture tower and the text tower of one checkpoint as embedders. Knows CLIP's two towers in a model folder; judges nothing.

`vision_tower/` holds a CLIPVisionModelWithProjection and `text_projection.safetensors` (key "text_projection.weight", (embedding, text width));
the text tower is the checkpoint's own `text_encoder`. Safetensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from latentgen.errors import ModelError
from latentgen.evaluate.scores import unit
from latentgen.models.family import Part

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Towers:
    """Both towers, in float32 on the CPU.

    Attributes:
        size: side of the pictures that the picture tower reads, in pixels.
    """

    picture: nn.Module
    text: nn.Module
    projection: Tensor
    tokenizer: Path
    size: int

    @classmethod
    def read(cls, folder: Path) -> Towers:
        """Load the towers of a model folder.

        Raises:
            ModelError: a file is missing, damaged, or the towers do not fit each other.
        """
        import torch

        from latentgen.models.files import part_config, weights_files
        from latentgen.models.load import Source, load_part

        def tower(name: str, cls: str) -> Any:
            place = folder / name
            return load_part(Source(f"{folder.name}/{name}", weights_files(place), part_config(place)), Part(name, cls, ()), torch.float32)

        picture, text = tower("vision_tower", "transformers.CLIPVisionModelWithProjection"), tower("text_encoder", "transformers.CLIPTextModel")
        projection = _projection(folder / "vision_tower" / "text_projection.safetensors")
        expected = (picture.config.projection_dim, text.config.hidden_size)
        if tuple(projection.shape) != expected:
            raise ModelError(f"text_projection.weight has shape {tuple(projection.shape)}: expected {expected}, so it belongs to other towers")
        return cls(picture, text, projection, folder / "tokenizer", picture.config.image_size)

    def pictures(self, pictures: Sequence[np.ndarray | Image.Image]) -> np.ndarray:
        """n pictures on white ((H, W, 3) uint8 or PIL) -> (n, d) float32, unit rows."""
        import torch

        pixels = np.stack([small(p, self.size) for p in pictures])
        with torch.no_grad():
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            return unit(self.picture(pixel_values=x).image_embeds.numpy())

    def captions(self, lines: Sequence[str], *, batch: int = 128) -> np.ndarray:
        """n captions (at most 30 tokens are read, as in training) -> (n, d) float32, unit rows."""
        import torch

        from latentgen.train.text import tokens_of

        ids = torch.from_numpy(tokens_of(lines, self.tokenizer))
        with torch.no_grad():
            pooled = torch.cat([self.text(part).pooler_output for part in ids.split(batch)])
            return unit((pooled @ self.projection.T).numpy())


def _projection(path: Path) -> Tensor:
    from safetensors.torch import load_file

    from latentgen.models.header import read_header

    if not path.is_file():
        raise ModelError(f"vision_tower has no {path.name}: expected the text tower's projection there, so get the model folder again")
    read_header(path)
    tensors = load_file(path)
    if "text_projection.weight" not in tensors:
        raise ModelError(f"vision_tower/{path.name} has {', '.join(tensors) or 'no tensor'}: expected text_projection.weight")
    return tensors["text_projection.weight"].float()


def small(picture: np.ndarray | Image.Image, side: int) -> np.ndarray:
    """A picture ((H, W, 3) uint8 or PIL) as (side, side, 3) uint8, each pixel the mean of its area."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture.convert("RGB")
    return np.asarray(image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BOX))
