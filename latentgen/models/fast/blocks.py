"""Small blocks of diffusers' networks with fewer passes over memory. Knows diffusers' classes; knows no family.

Each class here is a class of diffusers with another `forward`; where a block is not of the plain kind that it was written for, the original's runs.
A block is turned into it in place, by its class: its children, and whoever holds it, stay.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.functional import group_norm, silu

from latentgen.models.fast.attention import Attending, attend, ways
from latentgen.models.fast.layers import PackedLinear, doubles, doubling, halves, packs, plus, shifted
from latentgen.models.modulation import Known


class FastGEGLU(GEGLU):
    """value(x) * gelu(gate(x)): the halves are two linears, so that neither is cut out of a wide row, and both are finished as they are computed."""

    value: PackedLinear
    gate: PackedLinear

    @staticmethod
    def fits(old: GEGLU) -> bool:
        """Whether it is of the plain kind."""
        return packs(old.proj)

    def prepared(self) -> None:
        """Cut the one linear in two."""
        self.value, self.gate = halves(self.proj)
        del self.proj
        self.gate.act = "gelu"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., inner)."""
        return self.value.times(hidden_states, self.gate(hidden_states))


class FastGELU(GELU):
    """Linear and GELU in one."""

    @staticmethod
    def fits(old: GELU) -> bool:
        """Whether it is of the plain kind."""
        return packs(old.proj)

    def prepared(self) -> None:
        """The linear applies it."""
        self.proj.act = "gelu_tanh" if self.approximate == "tanh" else "gelu"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.proj(hidden_states)


class FastGroupNorm(nn.GroupNorm):
    """Group norm of small pictures in float32: PyTorch's kernel for channels-last ones is 2 to 6 times as slow in bf16.

    It is the more exact one. Measured on one thread; from LARGE places on it takes another way, and groups of whole vectors are fast in bf16, too.
    """

    LARGE, MANY, WHOLE = 1024, 2**21, 16  # places; numbers whose float32 copy leaves the cache; channels of a group

    @staticmethod
    def fits(old: nn.GroupNorm) -> bool:
        """Whether it is of the plain kind."""
        return old.affine

    def prepared(self) -> None:
        """Nothing to do."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> the same shape."""
        return self._precise(x).to(x.dtype) if self._small(x) else super().forward(x)

    def activated(self, x: Tensor) -> Tensor:
        """The same through SiLU."""
        return silu(self._precise(x), inplace=True).to(x.dtype) if self._small(x) else silu(super().forward(x), inplace=True)

    def _small(self, x: Tensor) -> bool:
        odd = x.ndim == 4 and self.num_channels // self.num_groups % self.WHOLE
        return bool(odd) and x.dtype == torch.bfloat16 and x.shape[2] * x.shape[3] < self.LARGE and x.numel() < self.MANY and x.is_contiguous(
            memory_format=torch.channels_last)

    def _precise(self, x: Tensor) -> Tensor:
        return group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)


def activated(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of norm(x)."""
    return norm.activated(x) if isinstance(norm, FastGroupNorm) else silu(norm(x), inplace=True)


class FastResnet(ResnetBlock2D):
    """A residual block: activations in place, the sum at its end done by the last convolution."""

    @staticmethod
    def fits(old: ResnetBlock2D) -> bool:
        """Whether it is of the plain kind."""
        plain = old.time_embedding_norm == "default" or old.time_emb_proj is None and old.time_embedding_norm != "scale_shift"
        return plain and old.upsample is None and old.downsample is None and isinstance(old.nonlinearity, nn.SiLU) and not old.skip_time_act

    def prepared(self) -> None:
        """Nothing to do."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """(B, in, H, W), (B, t) -> (B, out, H, W)."""
        h = activated(self.norm1, input_tensor)
        h = self.conv1(h) if self.time_emb_proj is None else shifted(self.conv1, h, self.told(temb))
        h = activated(self.norm2, h)
        beside = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        out = plus(self.conv2, h, beside)
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor

    def told(self, temb: Tensor | None) -> Tensor:
        """What it is told of the level, (B, c), or (1, c) where that is known and the same for all."""
        known = self.time_emb_proj.same if isinstance(self.time_emb_proj, Known) else None
        return self.time_emb_proj(silu(temb)) if known is None else known


class FastUpsample(Upsample2D):
    """Doubling and convolution in one, on the small picture."""

    @staticmethod
    def fits(old: Upsample2D) -> bool:
        """Whether it is of the plain kind."""
        return bool(old.interpolate and old.use_conv and not old.use_conv_transpose and old.norm is None and old.name == "conv") and doubles(old.conv)

    def prepared(self) -> None:
        """The convolution that was there stays for pictures that are not exactly doubled."""
        self.doubled = doubling(self.conv)

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """(B, c, H, W) -> (B, c', 2H, 2W), or of `output_size`."""
        if output_size is None or [2 * side for side in hidden_states.shape[-2:]] == list(output_size):
            return self.doubled(hidden_states)
        return super().forward(hidden_states, output_size)


class FastTinyBlock(AutoencoderTinyBlock):
    """Three convolutions and a sum, all ReLUs done by the convolutions."""

    @staticmethod
    def fits(old: AutoencoderTinyBlock) -> bool:
        """Whether it is of the plain kind."""
        return [type(layer) for layer in old.conv] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d] and packs(old.conv[-1])

    def prepared(self) -> None:
        """The last convolution takes the ReLU after the sum."""
        self.conv[-1].act = "relu"

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        h = x
        for layer in self.conv[:-1]:
            h = layer(h)
        return plus(self.conv[-1], h, self.skip(x))


class FastAttention(Attention):
    """Self- and cross-attention of U-Nets and autoencoders, without a copy between layouts."""

    @staticmethod
    def fits(old: Attention) -> bool:
        """Whether it is of the plain kind."""
        odd = (old.spatial_norm, old.norm_cross, old.norm_q, old.norm_k, old.added_kv_proj_dim)
        return type(old.processor) is AttnProcessor2_0 and all(value is None for value in odd) and old.to_k is not None and len(old.to_out) == 2

    def prepared(self) -> None:
        """Nothing to do."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
                **kwargs: Any) -> Tensor:
        """(B, n, c) or (B, c, H, W) -> the same shape."""
        if type(self.processor) is not AttnProcessor2_0 or attention_mask is not None or any(value is not None
                                                                                             for name, value in kwargs.items() if name != "temb"):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        x = hidden_states
        if self.group_norm is not None:
            x = self.group_norm(x if x.ndim == 4 else x.transpose(1, 2))
            x = x if hidden_states.ndim == 4 else x.transpose(1, 2)
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2) if x.ndim == 4 else x
        words = tokens if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (made.unflatten(-1, (self.heads, -1)).transpose(1, 2) for made in (self.to_q(tokens), self.to_k(words), self.to_v(words)))
        made = attend(q, k, v).transpose(1, 2).flatten(2)
        out = self.to_out[0]
        if not self.residual_connection:
            made = out(made)
        else:
            made = plus(out, made, hidden_states.permute(0, 2, 3, 1).flatten(1, 2) if hidden_states.ndim == 4 else hidden_states)
        if hidden_states.ndim == 4:
            made = made.unflatten(1, hidden_states.shape[2:]).permute(0, 3, 1, 2)
        return made if self.rescale_output_factor == 1 else made / self.rescale_output_factor


class FastTransformerBlock(BasicTransformerBlock):
    """A block of a U-Net's transformer: sums in place, the last one done by its linear."""

    @staticmethod
    def fits(old: BasicTransformerBlock) -> bool:
        """Whether it is of the plain kind."""
        parts = (getattr(old, "fuser", None), old.pos_embed, old._chunk_size)
        return old.norm_type == "layer_norm" and all(part is None for part in parts) and old.attn2 is not None and not old.only_cross_attention

    def prepared(self) -> None:
        """Nothing to do."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Tensor | None = None,
                encoder_attention_mask: Tensor | None = None, timestep: Any = None, cross_attention_kwargs: dict[str, Any] | None = None,
                **kwargs: Any) -> Tensor:
        """(B, n, c) -> (B, n, c)."""
        if cross_attention_kwargs or self._chunk_size is not None or not isinstance(self.ff, FeedForward):
            return super().forward(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs,
                                   **kwargs)
        x = self.attn1(self.norm1(hidden_states), encoder_hidden_states=None, attention_mask=attention_mask).add_(hidden_states)
        x = self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask).add_(x)
        first, *_, last = (layer for layer in self.ff.net if not isinstance(layer, nn.Dropout))
        return plus(last, first(self.norm3(x)), x)


class FastTransformer(Transformer2DModel):
    """A U-Net's transformer whose result goes back to a picture without a change of layout."""

    @staticmethod
    def fits(old: Transformer2DModel) -> bool:
        """Whether it is of the plain kind."""
        return bool(old.is_input_continuous)

    def prepared(self) -> None:
        """Nothing to do."""

    def _get_output_for_continuous_inputs(self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int,
                                          inner_dim: int) -> Tensor:
        if not self.use_linear_projection:
            return plus(self.proj_out, hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2), residual)
        made = plus(self.proj_out, hidden_states, residual.permute(0, 2, 3, 1).flatten(1, 2))
        return made.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class FastSequence(nn.Sequential):
    """Layers in a row: a ReLU goes into the convolution before it, a doubling into the one after it."""

    @staticmethod
    def fits(old: nn.Sequential) -> bool:
        """Whether there is anything to join."""
        return any(isinstance(layer, nn.Conv2d) for layer in old)

    def prepared(self) -> None:
        """Join neighbours; what is left of them is an identity, so that the names of the others stay."""
        layers = list(self)
        for n, (before, after) in enumerate(zip(layers, layers[1:], strict=False)):
            if type(before) is nn.Upsample and before.mode == "nearest" and before.scale_factor == 2 and doubles(after):
                self[n], self[n + 1] = nn.Identity(), doubling(after)
            elif type(before) is nn.Conv2d and type(after) is nn.ReLU and packs(before):
                before.act = "relu"
                self[n + 1] = nn.Identity()


BLOCKS: dict[type[nn.Module], Any] = {
    GEGLU: FastGEGLU, GELU: FastGELU, nn.GroupNorm: FastGroupNorm, ResnetBlock2D: FastResnet, Upsample2D: FastUpsample,
    AutoencoderTinyBlock: FastTinyBlock, Attention: FastAttention,
    BasicTransformerBlock: FastTransformerBlock, Transformer2DModel: FastTransformer, nn.Sequential: FastSequence,
}


def attending(processor: Any, *, choose: Any = ways) -> Any:
    """A processor of the same kind that computes the same, its attention by the way that is chosen for its tensors; see `Attending`."""
    kind = type(processor)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Attending(choose):
            return kind.__call__(self, *args, **kwargs)

    call.__wrapped__ = kind.__call__  # diffusers reads the names of its arguments
    made = type(kind.__name__, (kind,), {"__call__": call})
    own = made.__new__(made)
    own.__dict__.update(vars(processor))
    own.plain = processor
    return own
