"""Models that the tests share: small, with every structural case, and nothing at its default."""

import jaxtyping
import pytest
import torch

from g4lens.config import AudioConfig, Gemma4Config, VisionConfig
from g4lens.inputs.batch import Batch
from g4lens.model.gemma4 import Gemma4

torch.set_num_threads(1)  # these tensors are small: a second thread costs more than it brings


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Tests of whole runs go without the checks of shapes: those of the parts have them."""
    unchecked = item.get_closest_marker("unchecked") is not None
    jaxtyping.config.update("jaxtyping_disable", unchecked)
    return (yield)


IMAGE, AUDIO, BOI, EOI, BOA, EOA, VIDEO = range(90, 97)


def small_config(**changes) -> Gemma4Config:
    """Ten blocks: owners 0 to 5, of which 4 is global and 5 local; readers 6 to 9; window 6."""
    values = {
        "n_layers": 10,
        "layer_types": ("local", "local", "local", "local", "global") * 2,
        "n_kv_shared_layers": 4,
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 1,
        "d_head_local": 8,
        "d_head_global": 16,
        "d_mlp": 48,
        "d_vocab": 100,
        "d_ple": 6,
        "sliding_window": 6,
        "n_ctx": 512,
        "vision": VisionConfig(
            n_layers=2, d_model=24, n_heads=3, d_head=8, d_mlp=32, patch_size=4, n_positions=16
        ),
        "audio": AudioConfig(
            n_layers=2, d_model=16, n_heads=2, d_out=20, n_mels=16, conv_channels=(16, 6)
        ),
        "image_id": IMAGE,
        "audio_id": AUDIO,
        "boi_id": BOI,
        "eoi_id": EOI,
        "boa_id": BOA,
        "eoa_id": EOA,
        "video_id": VIDEO,
    }
    return Gemma4Config(**{**values, **changes})


@torch.no_grad()
def randomised(model: Gemma4, seed: int = 0) -> Gemma4:
    """Every weight, gain, scalar and clip bound drawn at random, so that nothing can hide."""
    random = torch.Generator().manual_seed(seed)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, x in tensors.items():
        if name.endswith(("_min", "_max")):
            x.copy_(
                (1 + torch.rand(x.shape, generator=random)) * (1 if name.endswith("max") else -1)
            )
        elif "embed.tokens" in name or "ple_tokens" in name:
            x.copy_(torch.randn(x.shape, generator=random) * x.shape[1] ** -0.5)
        elif x.ndim > 1:
            x.copy_(torch.randn(x.shape, generator=random) * x[0].numel() ** -0.5)
        else:
            x.copy_(torch.rand(x.shape, generator=random) + 0.5)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def cfg() -> Gemma4Config:
    """The small model's numbers."""
    return small_config()


@pytest.fixture(scope="session")
def model(cfg: Gemma4Config) -> Gemma4:
    """The small model, random, without tokenizer."""
    return randomised(Gemma4(cfg))


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two prompts of 23 tokens: longer than three windows."""
    return torch.randint(3, 90, (2, 23), generator=torch.Generator().manual_seed(5))


def unchecked(ids: torch.Tensor) -> Batch:
    """Ids as a batch, whatever they are: a random model writes placeholders too."""
    return Batch(ids, torch.arange(ids.shape[1]).expand_as(ids))


def pictures(*grids: tuple[int, int], patch: int = 4) -> dict[str, torch.Tensor]:
    """Random pictures of so many columns and rows of soft tokens, padded to one size."""
    random = torch.Generator().manual_seed(7)
    most = max(9 * columns * rows for columns, rows in grids)
    pixels = torch.rand(len(grids), most, 3 * patch**2, generator=random)
    positions = torch.full((len(grids), most, 2), -1)
    for i, (columns, rows) in enumerate(grids):
        y, x = torch.meshgrid(torch.arange(3 * rows), torch.arange(3 * columns), indexing="ij")
        positions[i, : x.numel()] = torch.stack([x, y], -1).reshape(-1, 2)
        pixels[i, x.numel() :] = 0
    return {"pixel_values": pixels, "image_position_ids": positions}


def sounds(*n_frames: int, n_mels: int = 16) -> dict[str, torch.Tensor]:
    """Random mel frames, padded to the longest."""
    random = torch.Generator().manual_seed(8)
    mask = torch.arange(max(n_frames)) < torch.tensor(n_frames)[:, None]
    mel = torch.randn(len(n_frames), max(n_frames), n_mels, generator=random)
    return {"input_features": mel * mask[..., None], "input_features_mask": mask}


@pytest.fixture
def seen_and_heard() -> dict[str, torch.Tensor]:
    """One prompt: two pictures (2 and 4 soft tokens) and a sound (5) between words."""
    ids = [
        2,
        11,
        BOI,
        IMAGE,
        IMAGE,
        EOI,
        12,
        BOA,
        *[AUDIO] * 5,
        EOA,
        13,
        BOI,
        *[IMAGE] * 4,
        EOI,
        14,
        15,
    ]
    return {"input_ids": torch.tensor([ids]), **pictures((2, 1), (2, 2)), **sounds(18)}
