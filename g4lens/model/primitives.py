"""The operations that the decoder and both towers share."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from g4lens.hooks import HookPoint


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if that is what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Divide by the root mean square, then multiply by a gain. Computed at least in float32.

    Gemma's gain is the weight itself, not 1 + weight: `Gemma4RMSNorm` in transformers'
    `models/gemma4/modeling_gemma4.py`.

    Args:
        d: size of the last axis.
        axes: names of the input's axes.
        eps: added to the mean square.
        gain: False for a norm without weight.
    """

    def __init__(self, d: int, axes: str, *, eps: float, gain: bool = True):
        super().__init__()
        self.d, self.eps = d, eps
        self.weight = nn.Parameter(torch.ones(d)) if gain else None
        self.hook_scale = HookPoint(axes)  # the last axis has size one
        self.hook_normalized = HookPoint(axes)

    def forward(self, x: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes d"]:
        """The normalised input, in its own dtype."""
        wide = widened(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / self.d
        scale = self.hook_scale((mean_square + self.eps).sqrt())
        normalized = self.hook_normalized(wide / scale)
        return (normalized if self.weight is None else normalized * self.weight).to(x.dtype)


class ClippedLinear(nn.Linear):
    """A linear map whose inputs and outputs are clamped to stored bounds.

    The bounds are infinite until a checkpoint or a training run sets them: `Gemma4ClippableLinear`.
    """

    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)
        for side in ("input", "output"):
            self.register_buffer(f"{side}_min", torch.tensor(-torch.inf))
            self.register_buffer(f"{side}_max", torch.tensor(torch.inf))

    def forward(self, input: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes d_out"]:
        """The clamped output of the clamped input."""
        output = super().forward(input.clamp(self.input_min, self.input_max))
        return output.clamp(self.output_min, self.output_max)


def linear(d_in: int, d_out: int, clipped: bool) -> nn.Linear:
    """A linear map without bias: clipped, as in most towers, or plain."""
    return ClippedLinear(d_in, d_out) if clipped else nn.Linear(d_in, d_out, bias=False)


class MLP(nn.Module):
    """gelu(x W_gate) * (x W_in), then W_out. The hook points have TransformerLens's names."""

    def __init__(self, d_model: int, d_mlp: int, clipped: bool = False):
        super().__init__()
        self.gate_proj = linear(d_model, d_mlp, clipped)
        self.up_proj = linear(d_model, d_mlp, clipped)
        self.down_proj = linear(d_mlp, d_model, clipped)
        self.hook_pre = HookPoint("batch pos d_mlp")
        self.hook_pre_linear = HookPoint("batch pos d_mlp")
        self.hook_post = HookPoint("batch pos d_mlp")
        self.hook_out = HookPoint("batch pos d_model")

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP makes of the normalised stream."""
        pre = self.hook_pre(self.gate_proj(x))
        pre_linear = self.hook_pre_linear(self.up_proj(x))
        post = self.hook_post(F.gelu(pre, approximate="tanh") * pre_linear)
        return self.hook_out(self.down_proj(post))


Angles = Float[Tensor, "#batch pos 1 half"]


def rotary_angles(
    positions: Int[Tensor, "batch pos"], d_head: int, base: float, fraction: float = 1.0
) -> tuple[Angles, Angles]:
    """Cosine and sine of the angle by which each pair of channels turns.

    Args:
        positions: padding, at -1, turns like position 0.
        d_head: channels of a head; the frequencies are `base ** (-2 i / d_head)`.
        base: theta.
        fraction: pairs past this share do not turn (transformers' "proportional" rotation).
    """
    half = d_head // 2
    n_turning = int(fraction * half)
    exponents = torch.arange(0, 2 * n_turning, 2, device=positions.device).float() / d_head
    frequencies = torch.zeros(half, device=positions.device)
    frequencies[:n_turning] = 1.0 / base**exponents
    angles = (positions.clamp(min=0)[..., None].float() * frequencies)[:, :, None, :]
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch pos head d_head"], angles: tuple[Angles, Angles]
) -> Float[Tensor, "batch pos head d_head"]:
    """Turn channel i together with channel i + d_head / 2, at least in float32."""
    cos, sin = angles
    a, b = widened(x).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
