"""The bundled model's examples: no split leaks, pictures and sounds are what they say."""

import random

import numpy as np
import pytest

from g4lens.analysis import tasks

SPLITS = ("train", "validation", "test")


def drawn(task: str, split: tasks.Split, n: int = 300) -> list[tasks.Example]:
    rng = random.Random(f"{task} {split}")
    return [tasks.TASKS[task](rng, split) for _ in range(n)]


@pytest.mark.parametrize("task", ["capital", "names"])
def test_splits_share_nothing(task):
    def key(example):
        text = example.parts[0]
        names = sorted(name for name in tasks.NAMES if f" {name} " in text)
        return tuple(names) if task == "names" else text

    seen = {split: {key(e) for e in drawn(task, split, 2000)} for split in SPLITS}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_every_capital_is_trained_and_tested():
    assert len(tasks.CAPITALS) >= 30
    for split in SPLITS:
        answers = {e.answer for e in drawn("capital", split, 3000)}
        assert answers == {" " + city for city in tasks.CAPITALS.values()}


def test_the_receiver_is_the_name_that_is_not_repeated():
    for example in drawn("names", "train"):
        words = example.parts[0].replace(",", "").split()
        named = [word for word in words if word in tasks.NAMES]
        (receiver,) = {name for name in named if named.count(name) == 1}
        assert example.answer == " " + receiver


@pytest.mark.parametrize("period", [8, 20, 28])
def test_induction_repeats_what_came_before(period):
    for example in drawn(f"induction {period}", "test", 50):
        words = example.parts[0].split()
        assert words[period:] == words[: len(words) - period]
        assert example.answer == " " + words[len(words) - period]


def test_generators_are_seeded():
    for task, generate in tasks.TASKS.items():
        assert generate(random.Random(3), "test") == generate(random.Random(3), "test"), task


def test_a_picture_shows_its_figures():
    shape = random.Random(0)
    picture = tasks.random_picture(shape)
    pixels = picture.draw(np.random.default_rng(0))
    assert pixels.shape == (384, 384, 3) and pixels.dtype == np.uint8
    for corner, figure in enumerate(picture.corners):
        row, column = divmod(corner, 2)
        centre = pixels[192 * row + 90 : 192 * row + 102, 192 * column + 90 : 192 * column + 102]
        ink = centre.reshape(-1, 3).mean(0) / 255
        nearest = min(tasks.COLOURS, key=lambda c: np.abs(ink - tasks.COLOURS[c]).sum())
        assert nearest == figure.colour
        rim = pixels[192 * row : 192 * row + 8, 192 * column : 192 * column + 8]
        assert rim.mean() > 200


def test_shapes_cover_different_points():
    tiles = {
        s: tasks.Figure("blue", s).draw(np.random.default_rng(1))[..., 0] < 128
        for s in tasks.SHAPES
    }
    shares = {shape: tile.mean() for shape, tile in tiles.items()}
    assert shares["circle"] > shares["cross"] and shares["circle"] > shares["triangle"]
    assert tiles["cross"][96, 35] and not tiles["triangle"][70, 35]


@pytest.mark.parametrize("note", tasks.NOTES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_sound_has_its_note_and_number(note, count):
    wave = tasks.Beeps(note, count).play(np.random.default_rng(0))
    assert wave.shape == (12_800,) and wave.dtype == np.float32 and np.abs(wave).max() <= 1
    loud = np.abs(wave).reshape(-1, 160).max(1) > 0.1
    assert int((np.diff(loud.astype(int), prepend=0) == 1).sum()) == count
    spectrum = np.abs(np.fft.rfft(wave, 16 * len(wave)))
    pitch = spectrum.argmax() * tasks.RATE / (16 * len(wave))
    assert min(tasks.NOTES, key=lambda n: abs(tasks.NOTES[n] - pitch)) == note


def test_questions_have_their_answers():
    corners = tuple(
        tasks.Figure(c, s)
        for c, s in zip(("red", "green", "blue", "yellow"), ("circle", "cross") * 2, strict=True)
    )
    asked = tasks.questions(tasks.Picture(corners), tasks.Beeps("E", 3))
    answers = {question.text: question.answer for question in asked}
    assert answers["What colour is the top left corner?"] == "red"
    assert answers["What shape is the bottom right corner?"] == "cross"
    assert answers["What note is heard?"] == "E"
    assert answers["How many beeps are heard?"] == "three"
    assert answers["What colour is the corner that the beeps count?"] == "blue"
    assert len(answers) == len(asked) == 11
    assert {q.task for q in tasks.questions(None, tasks.Beeps("E", 3))} == {"note", "beeps"}
