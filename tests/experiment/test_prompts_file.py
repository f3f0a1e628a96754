"""Prompts from JSON lines, CSV and saved datasets: what they become, and what is refused."""

import csv
import json
import shutil

import pytest

import g4lens
from g4lens import Audio, Image, InputError
from g4lens.experiment.prompts_file import read_prompts

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, "What is this?"]},
]


@pytest.fixture
def folder(tmp_path):
    """A folder with a picture and a sound, and others beside it."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(g4lens.sample("images/corners.png"), home / "a.png")
    shutil.copy(g4lens.sample("sounds/beeps.wav"), home / "b.wav")
    shutil.copy(home / "a.png", tmp_path / "outside.png")
    return home


def lines(folder, *rows):
    path = folder / "p.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_json_lines(folder):
    found = read_prompts(
        lines(
            folder,
            {"text": "one\u2028line"},
            {"image": "a.png", "audio": ["b.wav", "b.wav"], "text": "what?"},
            {"parts": ["see ", {"image": "a.png"}, " and ", {"audio": "b.wav"}]},
            {"messages": MESSAGES, "text": None},
            {"image": "a.png"},
        )
    )
    assert found[0] == "one\u2028line"
    assert [type(part) for part in found[1]] == [Image, Audio, Audio, str]
    assert [type(part) for part in found[2]] == [str, Image, str, Audio]
    assert found[3][0] == MESSAGES[0] and isinstance(found[3][1]["content"][0], Image)
    assert found[4][0].source == folder / "a.png"


def test_what_is_read_can_be_run(folder):
    model = g4lens.load("tiny")
    rows = {"parts": ["see ", {"image": "a.png"}]}, {"messages": MESSAGES}
    parts, chat = read_prompts(lines(folder, *rows))
    assert len(model.prompt(*parts).images) == 1 and len(model.chat(chat).images) == 1


def test_csv(folder):
    path = folder / "p.csv"
    messages = json.dumps(MESSAGES).replace('"', '""')
    path.write_text(
        f'\ufefftext,image,messages\r\n"a, ""b""\nc",,\r\nd,a.png,\r\n,,"{messages}"\r\n'
    )
    text, parts, chat = read_prompts(path)
    assert text == 'a, "b"\nc'
    assert isinstance(parts[0], Image) and parts[1] == "d"
    assert chat[0] == MESSAGES[0]


def test_cells_are_what_the_file_holds(folder):
    long = "word " * 40_000  # more than csv takes by itself
    limit = csv.field_size_limit()
    (folder / "p.csv").write_bytes(f'text,image\r\n"a\r\nb",\r\n\r\n"{long}",a.png\r\n'.encode())
    text, (_, rest) = read_prompts(folder / "p.csv")
    assert text == "a\r\nb" and rest == long
    assert csv.field_size_limit() == limit


def test_what_a_tool_gave_back(folder):
    back = {"role": "tool", "name": "look", "content": [{"image": "a.png"}, "a square"]}
    value = {"role": "tool", "name": "count", "content": {"n": [1, 2]}}
    ((found, plain),) = read_prompts(lines(folder, {"messages": [back, value]}))
    assert found["content"][0].source == folder / "a.png" and found["content"][1] == "a square"
    assert plain == value


def test_a_saved_dataset(folder):
    datasets = pytest.importorskip("datasets")
    data = {"text": ["x", None], "label": [0, 1], "image": [None, str(folder / "a.png")]}
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.Value("int64"), image=datasets.Image()
    )
    datasets.Dataset.from_dict(data, features=features).save_to_disk(str(folder / "saved"))
    text, parts = read_prompts(folder / "saved")
    assert text == "x" and isinstance(parts[0], Image)
    assert isinstance(parts[0].source, bytes)
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"sentence": ["x"]})).save_to_disk(
        str(folder / "splits")
    )
    with pytest.raises(InputError, match="holds the splits train"):
        read_prompts(folder / "splits")
    with pytest.raises(InputError, match="has the columns sentence, expected one of text"):
        read_prompts(folder / "splits" / "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a"}, "line 1: 'txt' is none of .* Did you mean 'text'"),
        ([1], "expected an object"),
        ({"text": 3}, "text is 3"),
        ({"text": ""}, "the prompt is empty"),
        ({"parts": []}, "parts are no list"),
        ({"parts": [{"picture": "a.png"}]}, "a part is"),
        ({"parts": ["a"], "text": "b"}, "parts stands beside text"),
        ({"messages": "hello"}, "messages are no list"),
        ({"messages": [{"content": "x"}]}, "a message is"),
        ({"image": "none.png"}, r"no image .*none\.png"),
        ({"audio": "none.wav"}, "no audio"),
        ({"image": "../outside.png"}, "'../outside.png' lies outside the folder"),
        ({"image": "/etc/hostname"}, "lies outside"),
        ({"image": "link.png"}, "lies outside"),
        ({"image": "a\0b"}, "is no path"),
        ({"image": "https://example.org/a.png"}, "found a URL, expected a path"),
        ({"image": {"bytes": "../outside.png"}}, "image is .*, expected a path"),
        ({"audio": {"bytes": [1, 2]}}, "audio is .*, expected a path"),
        ({"image": {"bytes": None, "path": "../outside.png"}}, "lies outside"),
        ({"messages": [{"role": "tool", "content": [{"image": "../outside.png"}]}]}, "outside"),
        ({"messages": [{"role": "tool", "content": [1]}]}, "a part is 1"),
        ({"messages": [{"role": "user", "content": [{"image": "../outside.png"}]}]}, "outside"),
    ],
)
def test_bad_lines(folder, row, message):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(InputError, match=message):
        read_prompts(lines(folder, row))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "columns are none"),
        ("text\n", "holds no prompts"),
        ("prompt,text\nx,y\n", "line 1: 'prompt' is none of text, image, audio, messages"),
        ("text,text\nx,y\n", "expected each once"),
        ("text,image\nx\n", "line 2: 1 cells, but there are 2 columns"),
        ('text\n"x\n', "no CSV"),
        ("messages\n[1\n", "messages: no JSON"),
    ],
)
def test_bad_csv(folder, content, message):
    (folder / "p.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(folder / "p.csv")


def test_bad_files(folder):
    for name, message in (
        ("none.jsonl", "no file"),
        ("a.png", "expected a .jsonl or .csv"),
        (".", "no dataset"),
    ):
        with pytest.raises(InputError, match=message):
            read_prompts(folder / name)
    (folder / "p.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        read_prompts(folder / "p.jsonl")
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(lines(folder))
    (folder / "p.jsonl").write_text("[" * 100_000)
    with pytest.raises(InputError, match="no JSON"):
        read_prompts(folder / "p.jsonl")


def test_the_root_may_be_wider_than_the_file_s_folder(folder):
    path = lines(folder, {"image": "../outside.png"})
    assert isinstance(read_prompts(path, root=folder.parent)[0][0], Image)


def test_a_dataset_whose_files_are_elsewhere(folder):
    (folder / "data").mkdir()
    state = {"_data_files": [{"filename": "../../outside.png"}]}
    (folder / "data" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="outside"):
        read_prompts(folder / "data")
