"""Whatever a model is called with becomes one checked batch."""

import numpy as np
import pytest
import torch

from g4lens.config import Gemma4Config
from g4lens.errors import InputError
from g4lens.inputs.batch import prepare
from g4lens.inputs.processor import Processor
from g4lens.resources import bundled
from tests.conftest import AUDIO, IMAGE, VIDEO, pictures, small_config, sounds

CFG = small_config()


@pytest.fixture(scope="module")
def processor():
    folder = bundled("data", "tiny")
    return Processor.from_folder(folder, Gemma4Config.from_json(folder))


def test_text_ids_prompts_and_lists(processor):
    cfg = processor.cfg
    text = "The capital of France is"
    prompt = processor.prompt(text)
    for inputs in (text, prompt, prompt.ids[None], [text], [prompt.ids], prompt.ids.tolist()):
        batch = prepare(inputs, processor, cfg)
        assert torch.equal(batch.tokens[0], prompt.ids) and not batch.is_padded
    batch = prepare([text, processor.prompt("Paris")], processor, cfg)
    assert batch.positions[1].tolist() == [-1] * 4 + [0, 1]
    assert batch.tokens[1, :4].tolist() == [cfg.pad_id] * 4
    assert batch.lengths.tolist() == [6, 2] and len(batch.prompts) == 2
    assert prepare(batch, processor, cfg) is batch


def test_pictures_of_unequal_size_are_padded(processor):
    from g4lens import Audio, Image

    rng = np.random.default_rng(0)
    wide, tall = (rng.integers(0, 256, (*s, 3), dtype=np.uint8) for s in ((100, 300), (300, 200)))
    one = processor.prompt(Image(wide), "and", Audio(rng.normal(0, 0.1, 9000), rate=16_000))
    two = processor.prompt(Image(tall), Audio(rng.normal(0, 0.1, 12_000), rate=16_000))
    batch = prepare([one, two], processor, processor.cfg)
    assert batch.pixels.shape[0] == 2 and (batch.patch_positions == -1).any()
    assert batch.mel.shape[0] == 2 and not batch.mel_mask.all()


def test_masks_on_either_side():
    ids = torch.arange(3, 11).reshape(2, 4)
    left = prepare({"input_ids": ids, "attention_mask": [[1] * 4, [0, 0, 1, 1]]}, None, CFG)
    assert left.positions.tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1]]
    assert left.tokens[1].tolist() == [0, 0, 9, 10]
    right = prepare({"input_ids": ids, "attention_mask": [[1] * 4, [1, 1, 1, 0]]}, None, CFG)
    assert right.positions[1].tolist() == [0, 1, 2, -1]


def test_the_names_of_transformers(seen_and_heard):
    ids = seen_and_heard["input_ids"]
    kinds = torch.where(ids == IMAGE, 1, torch.where(ids == AUDIO, 3, 0))
    more = {"mm_token_type_ids": kinds, "num_soft_tokens_per_image": [2, 4]}
    batch = prepare({**seen_and_heard, **more}, None, CFG)
    assert batch.pixels is not None and batch.mel is not None


def mapping(**changes):
    ids = [[2, 11, IMAGE, IMAGE, 12, *[AUDIO] * 5, 13]]
    inputs = {"input_ids": torch.tensor(ids), **pictures((2, 1)), **sounds(18)}
    return {k: v for k, v in {**inputs, **changes}.items() if v is not None}


def twice_the_first():
    positions = pictures((2, 1))["image_position_ids"]
    positions[0, 1] = positions[0, 0]
    return positions


TOO_LONG = torch.full((1, 600), 5)
WRONG = [
    ("text", "but this model has no tokenizer"),
    (None, "found a NoneType, expected text, a Prompt"),
    (7, "found a int"),
    ([], "an empty list of prompts"),
    ([None], "found a NoneType"),
    (torch.zeros(2, 3, 4, dtype=torch.long), r"found a Tensor of shape \(2, 3, 4\)"),
    (torch.zeros(1, 0, dtype=torch.long), r"token ids are \(1, 0\)"),
    (torch.rand(1, 4), "token ids are torch.float32, expected integers"),
    (torch.ones(1, 4, dtype=torch.bool), "expected integers"),
    (torch.tensor([[5, 100]]), "token id 100 is outside the vocabulary: 0 to 99"),
    (torch.tensor([[5, -1]]), "token id -1 is outside"),
    (TOO_LONG, "a prompt of 600 tokens is longer than the context of 512"),
    (torch.tensor([[5, VIDEO]]), "g4lens takes no videos"),
    (torch.tensor([[5, IMAGE]]), r"1 image placeholders, but the inputs make 0 soft tokens"),
    (
        {"input_idz": torch.ones(1, 2)},
        r"inputs hold 'input_idz', expected input_ids.*Did you mean 'input_ids'",
    ),
    ({"attention_mask": torch.ones(1, 2)}, "but no 'input_ids'"),
    ({"input_ids": "abc"}, "input_ids is no tensor"),
    (
        {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 2)},
        r"attention_mask is \(1, 2\)",
    ),
    ({"input_ids": torch.ones(1, 3).long(), "attention_mask": [[1, 0, 1]]}, "has holes"),
    (
        {"input_ids": torch.ones(2, 2).long(), "attention_mask": [[1, 1], [0, 0]]},
        "prompt 1 is empty",
    ),
    (
        {"input_ids": torch.ones(1, 2).long(), "attention_mask": [[1, 2]]},
        "other values than 0 and 1",
    ),
    (mapping(image_position_ids=None), "need both 'pixel_values' and 'image_position_ids'"),
    (mapping(input_features_mask=None), "need both 'input_features'"),
    (
        mapping(pixel_values=None, image_position_ids=None),
        "2 image placeholders, but the inputs make 0",
    ),
    (mapping(**pictures((2, 2))), r"2 image placeholders, but the inputs make 4 soft tokens \[4\]"),
    (mapping(**sounds(40)), r"5 audio placeholders, but the inputs make 10 soft tokens \[10\]"),
    (mapping(pixel_values=torch.rand(1, 18, 47)), r"expected \[image, patch, 48\]"),
    (mapping(pixel_values=torch.full((1, 18, 48), torch.nan)), "pixel_values hold NaN"),
    (mapping(input_features=torch.full((1, 18, 16), torch.inf)), "input_features hold NaN"),
    (mapping(input_features=torch.rand(1, 18, 15)), r"expected \[sound, frame, 16\]"),
    (mapping(image_position_ids=torch.full((1, 18, 2), 99)), "go beyond the tower's 16"),
    (mapping(image_position_ids=torch.zeros(1, 18, 2).long()), "expected whole grids of 3 x 3"),
    (
        mapping(num_soft_tokens_per_image=[3]),
        r"num_soft_tokens_per_image is \[3\], but the pictures make \[2\]",
    ),
    (mapping(mm_token_type_ids=torch.zeros(1, 11)), "marks other tokens with 1"),
    (mapping(mm_token_type_ids=torch.zeros(1, 2)), r"mm_token_type_ids is \(1, 2\)"),
    (mapping(mm_token_type_ids=torch.full((1, 11), 7)), "other values than 0, 1, 2 and 3"),
    (mapping(mm_token_type_ids=torch.full((1, 11), 2)), "marks other tokens with 1"),
    (
        {"input_ids": [[2, 3]], "mm_token_type_ids": [[2, 0]]},
        "marks other tokens with 2 than the placeholders 96",
    ),
    (
        {"input_ids": [[2, 3]], "num_soft_tokens_per_image": [2]},
        r"num_soft_tokens_per_image is \[2\], but the pictures make \[\]",
    ),
    ({"input_ids": [[2, 3]], "attention_mask": [[0.5, 1.0]]}, "other values than 0 and 1"),
    ([2**70], "a row of token ids is no tensor"),
    ({}, "inputs hold nothing but no 'input_ids'"),
    (mapping(pixel_values=torch.zeros(1, 18, 48).byte()), "pixel_values are torch.uint8"),
    (mapping(image_position_ids=torch.zeros(1, 18, 2)), "image_position_ids torch.float32"),
    (mapping(pixel_values=torch.zeros(0, 18, 48)), r"pixel_values are \(0, 18, 48\)"),
    (mapping(image_position_ids=torch.full((1, 18, 2), -1)), "expected whole grids of 3 x 3"),
    (mapping(image_position_ids=twice_the_first()), "expected whole grids of 3 x 3"),
    (mapping(input_features=torch.zeros(1, 18, 16).long()), "input_features are torch.int64"),
    (mapping(input_features_mask=torch.zeros(1, 18)), "leaves sound 0 no frames"),
]


@pytest.mark.parametrize(("inputs", "says"), WRONG)
def test_wrong_inputs(inputs, says):
    with pytest.raises(InputError, match=says):
        prepare(inputs, None, CFG)


def test_pictures_may_not_straddle_prompts():
    ids = torch.tensor([[2, 5, IMAGE], [2, IMAGE, 5]])
    with pytest.raises(
        InputError, match="prompt 0 has 1 image placeholders, which no whole images"
    ):
        prepare({"input_ids": ids, **pictures((2, 1))}, None, CFG)


def test_a_model_without_towers():
    blind = small_config(vision=None, audio=None)
    with pytest.raises(InputError, match="no tower for image inputs"):
        prepare(mapping(), None, blind)
