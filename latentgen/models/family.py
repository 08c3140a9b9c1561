"""The contract between the engine and a model family. Knows shapes of things; names no family and loads nothing.

A family is one file in `pipelines/` that declares data (SIGNATURES, INDEX) and one function, `build`, which makes a `Family` from what is known
of a checkpoint before its weights load. The engine never asks which family it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from latentgen.conditioning.weighting import Weigh, unweighted

if TYPE_CHECKING:
    from torch import Tensor

    from latentgen.conditioning.tokens import TokenizerSpec
    from latentgen.diffusion.level import Level, NoisePath
    from latentgen.pixels.latent import LatentSpec

Modules = Mapping[str, Any]  # part name -> torch module
Config = Mapping[str, Any]  # of one part, as its config.json has it
Stage = Literal["text", "encoder", "denoiser", "decoder"]
Side = Literal["positive", "negative", "none"]  # which evaluation of guidance a conditioning is for; "none" has neither words nor picture


@dataclass(frozen=True)
class Original:
    """How a part lies in the single files that its makers published.

    Attributes:
        prefixes: what its tensors' names begin with; the first that any tensor has counts. "" takes a file that holds this part alone.
        convert: a function of `diffusers.loaders.single_file_utils` that renames them, or "" where names and layout are the module's own.
        unique: a name (after the prefix) that every such file has, by which the part is known to be there.
    """

    prefixes: tuple[str, ...]
    convert: str = ""
    unique: str = ""


@dataclass(frozen=True)
class Part:
    """One module of a checkpoint.

    Attributes:
        name: its key in `Modules`, also its folder in a diffusers layout.
        cls: library and class, "diffusers.UNet2DConditionModel"; taken from this declaration, never from the folder.
        stages: when it is needed.
        optional: the family runs without it (a T5 encoder of several encoders).
        original: where it lies in an original single file; None where no such layout exists.
    """

    name: str
    cls: str
    stages: tuple[Stage, ...]
    optional: bool = False
    original: Original | None = None


@dataclass(frozen=True)
class Signature:
    """By which tensors a denoiser is known; the first signature whose tensors are all there, in these shapes, decides.

    Attributes:
        variant: what it is, also the file `pipelines/configs/<variant>.json` with all configs of that checkpoint.
        layout: whose names these are.
        shapes: tensor name (without any prefix) -> shape; None in a shape fits any size.
        absent: names that must not be there.
        prefixes: what may stand before the names in a file.
    """

    variant: str
    layout: Literal["original", "diffusers"]
    shapes: Mapping[str, tuple[int | None, ...]]
    absent: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("", "model.diffusion_model.")


@dataclass(frozen=True)
class Model:
    """What is known of a checkpoint before any weight is read; `build` makes a `Family` of it.

    Attributes:
        variant: as a signature or a card names it; "" for a folder that fits no published variant exactly.
        configs: part name -> its config.json; "scheduler" and "model_index" too, {} where there is none. Absent parts are absent.
        defaults: a card's overrides, laid over the family's afterwards by the engine.
    """

    variant: str
    configs: Mapping[str, Config]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def config(self, part: str) -> Config:
        """A part's config, {} where it is absent."""
        return self.configs.get(part, {})


@dataclass(frozen=True)
class Words:
    """What `encode` reads: one text as every encoder's tokenizer gives it.

    Attributes:
        ids: tokenizer name -> (n, length) token ids of n chunks (n is 1 where an encoder has one fixed length).
        mask: likewise, 1 at start, words and end, 0 at padding.
        side: "positive" or "negative".
        empty: nothing was said (only ever for the negative side of a request without a negative prompt).
        clip_skip: 1 uses the last layer that the family uses, 2 the one before it (as A1111 counts).
        references: pictures as (1, 3, H, W) in [-1, 1], for encoders that see; empty elsewhere.
        weigh: (tokenizer name, states (n, length, width) that cross-attention reads) -> the states with the weights that were said. `encode` calls
            it once for each such tokenizer, after the last norm and before chunks or encoders are joined; never with a pooled vector.
    """

    ids: Mapping[str, Tensor]
    mask: Mapping[str, Tensor]
    side: Side = "positive"
    empty: bool = False
    clip_skip: int = 1
    references: tuple[Tensor, ...] = ()
    weigh: Weigh = unweighted


@dataclass(frozen=True)
class Scene:
    """What `inputs` reads: the picture side of a request.

    Attributes:
        width, height: of the picture, pixels.
        shape: (c, h, w) of the latent.
        encode: pixels (1, 3, H, W) in [-1, 1] -> native latents (1, c, h, w), by the checkpoint's own VAE (remembered).
        image: the picture that is edited, (1, 3, H, W) in [-1, 1], or None; mask: (1, 1, H, W) in [0, 1], 1 = repaint, or None.
        references: pictures given as `reference`, each (1, 3, H, W) in [-1, 1] at its own size.
        options: the request's further numbers by name: guidance_scale (always), and where said original_size, crop_top_left, target_size,
            aesthetic_score, negative_aesthetic_score ...
    """

    width: int
    height: int
    shape: tuple[int, int, int]
    encode: Callable[[Tensor], Tensor]
    image: Tensor | None = None
    mask: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Words (and more) as tensors. Each is itself alone, so that what was computed of one can be kept by it.

    Attributes:
        tokens: (B, n, width) states for cross-attention or joint attention.
        pooled: (B, width) or None.
        extra: further inputs by names of the family's own choice (mask of tokens, time ids, image latents, ...), each with a batch axis first.
        rows: of a batch, the conditioning of batch 1 that each row is, and the number of the picture that the row is for; set by the engine.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    rows: tuple[tuple[Conditioning, int], ...] = ()


@dataclass(frozen=True)
class Defaults:
    """What a request gets where it says nothing."""

    width: int = 512
    height: int = 512
    steps: int = 20
    sampler: str = "dpmpp_2m"
    spacing: str = "trailing"
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0
    image_guidance_scale: float = 1.5
    strength: float = 0.75
    shift: float = 1.0
    offset: int = 0  # of "leading" spacing, in training steps


def no_inputs(scene: Scene, side: Side) -> Mapping[str, Tensor]:
    """`Family.inputs` of a family that hears words only."""
    return {}


def any_fits(reference: tuple[int, int], picture: tuple[int, int]) -> str:
    """`Family.fits` of a family that looks at references of any size."""
    return ""


@dataclass(frozen=True)
class Family:
    """An architecture with its conventions, for one checkpoint.

    Attributes:
        name: as cards name it.
        parts: its modules (absent optional ones left out).
        path: how levels run from noise to clean.
        prediction: what the network returns: "epsilon", "v", "flow", "x0" or "edm".
        latent: shape and scale of latents.
        tokenizers: name (also its folder in a diffusers layout) -> what it is and how long its chunks are. The first one counts what the plan shows.
        encode: (modules of stage "text", words) -> Conditioning of batch 1.
        predict: (modules of stage "denoiser", x (B, c, h, w) float32, level, conditioning of batch B) -> raw output, float32, shaped like x.
        inputs: (scene, side) -> further entries of `Conditioning.extra`, batch 1, on the CPU or where `scene.encode` leaves them. Runs before the
            denoiser is there.
        guidance: "cfg" (two evaluations), "image" (three: words and picture, picture, neither; Brooks et al. 2023), "embedded" (an input of the
            network, and CFG beside it where `true_cfg_scale` asks for it) or "none".
        combine: None for plain guidance, else (x, level, x0 with the words, x0 with the negative ones, scale) -> x0.
        shift: None, or (width, height, steps) -> shift of the levels where the request says none.
        terminal: where the last level before the clean one lies on the path; shifted levels are stretched to it. 0 leaves them.
        task: what this checkpoint was made for: "any"; "inpaint" if its network takes mask and picture itself (`masked` is then not used, and without
            a picture it sees an empty one); "edit" if it needs `reference`.
        references: how many pictures `reference` may hold, 0 for none.
        fits: ((width, height) of a reference, of the picture that is made) -> what is wrong with the reference, "" where nothing is.
        reads_pictures: the text encoder sees the references.
        clip_skip: the largest that there is a layer for; 1 where no layer can be chosen.
        options: further fields of a request that `inputs` reads from `scene.options` ("original_size", "aesthetic_score" ...).
        vae_encode, vae_decode: (vae, pixels) -> raw latents and back, where the plain call is not enough (packing, statistics, a frame axis).
    """

    name: str
    parts: tuple[Part, ...]
    path: NoisePath
    prediction: str
    latent: LatentSpec
    tokenizers: Mapping[str, TokenizerSpec]
    encode: Callable[[Modules, Words], Conditioning]
    predict: Callable[[Modules, Tensor, Level, Conditioning], Tensor]
    inputs: Callable[[Scene, Side], Mapping[str, Tensor]] = no_inputs
    guidance: Literal["cfg", "image", "embedded", "none"] = "cfg"
    combine: Callable[[Tensor, Level, Tensor, Tensor, float], Tensor] | None = None
    shift: Callable[[int, int, int], float] | None = None
    terminal: float = 0.0
    task: Literal["any", "inpaint", "edit"] = "any"
    references: int = 0
    fits: Callable[[tuple[int, int], tuple[int, int]], str] = any_fits
    reads_pictures: bool = False
    clip_skip: int = 1
    options: tuple[str, ...] = ()
    vae_encode: Callable[[Any, Tensor], Tensor] | None = None
    vae_decode: Callable[[Any, Tensor], Tensor] | None = None
    defaults: Defaults = Defaults()


class FamilyFile(Protocol):
    """What the engine reads from a file in `pipelines/`.

    Attributes:
        SIGNATURES: by which its denoisers are known, the most special first.
        INDEX: pipeline classes whose model_index.json it takes ("StableDiffusionPipeline"), for folders that fit no signature.
        PARTS: every part that any variant has.
        build: what is known of a checkpoint -> its family.
    """

    SIGNATURES: tuple[Signature, ...]
    INDEX: tuple[str, ...]
    PARTS: tuple[Part, ...]

    @staticmethod
    def build(model: Model) -> Family: ...
