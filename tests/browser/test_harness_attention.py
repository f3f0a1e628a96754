"""AttentionView in a page: what is shown, hovered, clicked, typed, and left behind."""

import dataclasses

import matplotlib as mpl
import numpy as np
import pytest
import torch

import g4lens
from g4lens.inputs.prompt import Prompt
from g4lens.widgets.attention_view import MEAN, AttentionLogic
from tests.browser.harness import Shown

HOSTILE = (
    '<img src=x onerror="window.hurt = true">',
    "</script><script>window.hurt = true</script>",
)


@pytest.fixture(scope="module")
def tiny():
    return g4lens.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def prompt(tiny) -> Prompt:
    picture = g4lens.Image(g4lens.sample("images/corners.png"))
    sound = g4lens.Audio(g4lens.sample("sounds/beeps.wav"))
    content = ["Which colour is here? ", picture, " How many beeps? ", sound, " Go."]
    return tiny.chat([{"role": "user", "content": content}])


@pytest.fixture(scope="module")
def logic(tiny, prompt) -> AttentionLogic:
    return AttentionLogic(tiny, prompt)


def level(logic: AttentionLogic, weights: torch.Tensor, position: int) -> int:
    """The palette's entry for a weight of a row that hides <bos>."""
    weights = weights.clone()
    weights[0] = 0
    return round(255 * float(weights[position] / weights.max()) ** 0.5)


def colour(entry: int) -> tuple[int, ...]:
    return tuple((np.array(mpl.colormaps["cividis"](entry)[:3]) * 255).round().astype(int).tolist())


def painted(view: Shown) -> Shown:
    """Wait until the row that is selected is on view."""
    view.page.locator(".g4a-top tr").first.wait_for()
    view.page.wait_for_function("!document.querySelector('.g4a-strip[aria-busy]')")
    return view


def selection(view: Shown) -> dict:
    return view.page.evaluate("model.values.selection")


def heading(view: Shown) -> str:
    return view.page.locator(".g4a-details .g4-title").inner_text()


def chip(view: Shown, position: int):
    return view.page.locator(f'.g4a-chip[data-p="{position}"]')


def press(view: Shown, *keys: str) -> None:
    for key in keys:
        view.page.keyboard.press(key)


def test_pixels_are_the_palettes_values(show, logic, prompt):
    view = painted(show(logic))
    weights = logic.pattern(4, MEAN, [len(prompt) - 1])[0]
    picture = next(run for run in logic.runs if run["kind"] == "image")
    columns, rows = picture["columns"], picture["rows"]
    for cell in (0, 9, columns * rows - 1):
        row, column = divmod(cell, columns)
        at = (column + 0.5) / columns, (row + 0.5) / rows
        found = view.pixel(".g4a-heat", *at)
        assert found == colour(level(logic, weights, picture["start"] + cell))
    # a chip's bar
    position = 8
    bar = chip(view, position).evaluate("e => e.style.borderBottomColor")
    red, green, blue = colour(level(logic, weights, position))
    assert bar == f"rgb({red}, {green}, {blue})"
    # the overview
    view.page.wait_for_function("document.querySelector('.g4a-overview').width > 300")
    pooled, _ = logic.pooled(4, MEAN)
    n = len(pooled)
    query, key = 100, 50
    expected = round(255 * float(pooled[query, key] / pooled.max()) ** 0.5)
    found = view.pixel(".g4a-overview", (key + 0.5) / n, (query + 0.5) / n)
    assert (
        min(abs(np.subtract(found, colour(e))).max() for e in range(expected - 1, expected + 2))
        <= 1
    )


def test_hover_shows_a_query_until_one_is_pinned(show, logic):
    view = painted(show(logic))
    chip(view, 6).hover()
    view.page.get_by_text("from “i” (position 6)").wait_for()
    assert selection(view)["position"] == logic.n - 1  # only looked at
    view.page.locator("h1").hover()
    view.page.get_by_text(f"(position {logic.n - 1})").first.wait_for()
    chip(view, 6).click()
    assert selection(view)["position"] == 6
    weights = logic.pattern(4, MEAN, [6])[0]
    key = int(weights[1:].argmax()) + 1
    chip(view, key).hover()
    says = f"(position {key}) gets {100 * float(weights[key]):.1f} %"
    assert view.root.get_by_role("status").inner_text().endswith(says)
    chip(view, 9).hover()
    assert "comes after the query" in view.root.get_by_role("status").inner_text()
    assert "position 6" in heading(view)
    press(view, "Escape")
    chip(view, 8).hover()
    view.page.get_by_text("(position 8)").first.wait_for()


def test_a_click_on_a_patch_and_on_a_sound_chooses_the_query(show, logic, prompt):
    view = painted(show(logic))
    picture, sound = (run for run in logic.runs if run["kind"] != "text")
    for index, run, cell in ((0, picture, picture["columns"] + 2), (1, sound, 5)):
        canvas = view.page.locator(".g4a-heat").nth(index)
        box = canvas.bounding_box()
        row, column = divmod(cell, run["columns"])
        x = box["width"] * (column + 0.5) / run["columns"]
        canvas.click(position={"x": x, "y": box["height"] * (row + 0.5) / run["rows"]})
        position = run["start"] + cell
        assert selection(view)["position"] == position
        view.page.get_by_text(f"(position {position})").first.wait_for()
    assert "sound 0, 0.20 to 0.24 s" in heading(view)
    token = prompt.tokens[position]
    assert token.span == pytest.approx((0.20, 0.24))


def test_keys(show, logic):
    view = painted(show(logic))
    view.root.focus()
    last = logic.n - 1
    begin = logic.first()["start"]
    press(view, "ArrowLeft", "ArrowLeft", "ArrowRight")
    assert selection(view) == {**begin, "position": last - 1}
    press(view, "ArrowDown", "ArrowDown", "ArrowUp", "]", "]", "[")
    assert selection(view) == {**begin, "position": last - 1, "layer": 5, "head": 0}
    press(view, "[", "[", "d")
    assert selection(view)["head"] == MEAN and selection(view)["direction"] == "to"
    press(view, "d", "Home")
    assert selection(view)["position"] == 0
    press(view, "m")
    assert logic.batch.tokens[0, selection(view)["position"]] == logic.cfg.image_id
    press(view, "m", "m")
    assert logic.batch.tokens[0, selection(view)["position"]] == logic.cfg.audio_id
    press(view, "End", "b")
    assert (
        view.root.get_by_role("button", name="Hide <bos>").get_attribute("aria-pressed") == "false"
    )
    press(view, "v")
    assert view.page.locator(".g4a-bare").count() == 1
    assert view.page.locator(".g4-help").is_hidden()
    press(view, "?")
    for text in ("query before, after", "next modality", "hide or show <bos>"):
        assert view.page.locator(".g4-help").get_by_text(text, exact=True).is_visible()
    for key in range(40):  # past both ends
        press(view, "ArrowDown" if key < 20 else "]")
    painted(view)
    assert (selection(view)["layer"], selection(view)["head"]) == (14, 3)


def test_lists_keep_their_keys(show, logic):
    view = painted(show(logic))
    view.page.get_by_role("combobox", name="Block").focus()
    press(view, "ArrowDown")
    assert selection(view)["layer"] == 5
    press(view, "m", "d")  # a list finds entries by typing
    assert selection(view)["position"] == logic.n - 1 and selection(view)["direction"] == "from"


def test_the_overview_and_the_heads_choose_by_key_and_by_click(show, logic):
    view = painted(show(logic))
    heads = view.page.locator(".g4a-chooser canvas")
    box = heads.bounding_box()
    heads.click(position={"x": box["width"] * 0.5, "y": box["height"] * 12.5 / 15})
    assert (selection(view)["layer"], selection(view)["head"]) == (12, 1)
    press(view, "ArrowUp", "ArrowRight", "Enter")
    assert (selection(view)["layer"], selection(view)["head"]) == (11, 2)
    view.page.wait_for_function("document.querySelector('.g4a-overview').width > 300")
    overview = view.page.locator(".g4a-overview")
    box = overview.bounding_box()
    overview.click(position={"x": 5, "y": box["height"] * 20.5 / logic.n})
    assert selection(view)["position"] == 20
    press(view, "ArrowDown", "Enter")
    assert selection(view)["position"] == 21


def test_a_row_of_no_use_to_others_is_greyed_and_says_so(show, logic):
    view = painted(show(logic))
    notice, strip = view.page.locator(".g4a-notice"), view.page.locator(".g4a-strip")
    view.root.focus()
    press(view, *["ArrowDown"] * 6)
    painted(view)
    assert selection(view)["layer"] == 10 and notice.is_hidden()  # the last row is the answer's
    press(view, "ArrowLeft")
    notice.get_by_text("Read by its own position only: from block 9, the horizon, on").wait_for()
    assert "g4a-own" in strip.get_attribute("class")
    assert "own position only" in view.page.locator(".g4a-note").nth(1).inner_text()
    press(view, "ArrowUp", "ArrowUp")
    painted(view)
    assert selection(view)["layer"] == 8 and notice.is_hidden()
    assert "g4a-own" not in strip.get_attribute("class")


def test_the_band_of_the_window(show, logic):
    view = painted(show(logic))
    assert view.page.locator(".g4a-band").count() == 1  # global: the diagonal alone
    view.root.focus()
    press(view, "ArrowDown")
    painted(view)
    points = view.page.locator(".g4a-band").nth(1).get_attribute("points")
    assert points == f"0,16 {logic.n - 16},{logic.n}"
    # keys out of the window have no bar, and hatched cells no colour
    assert chip(view, 3).evaluate("e => e.style.borderBottomColor") == ""
    assert chip(view, logic.n - 2).evaluate("e => e.style.borderBottomColor") != ""


def test_sums_and_top_keys_are_exact(show, logic):
    view = painted(show(logic))
    weights = logic.pattern(4, MEAN, [logic.n - 1])[0]
    sums = dict(zip(logic.categories, (weights @ logic.kinds).tolist(), strict=True))
    lines = view.page.locator(".g4a-details .g4-table").nth(0).locator("tr")
    found = [line.split() for line in lines.all_inner_texts()]
    names = {"control": "special", "text": "text", "picture": "image", "sound": "audio"}
    for name, share, _ in found:
        assert float(share) == pytest.approx(100 * sums[names[name]], abs=0.051)
    weights[0] = 0
    top = weights.topk(10)
    cells = [line.split() for line in view.page.locator(".g4a-top tr").all_inner_texts()]
    assert [int(line[0]) for line in cells] == top.indices.tolist()
    assert [float(line[-2]) for line in cells] == pytest.approx(
        (100 * top.values).tolist(), abs=0.051
    )
    view.page.locator(".g4a-top tr").nth(3).click()
    assert selection(view)["position"] == int(top.indices[3])


def test_the_other_direction(show, logic):
    view = painted(show(logic))
    chip(view, 8).click()
    view.root.get_by_role("button", name="From query").click()
    view.page.get_by_text("Queries that give it the most").wait_for()
    received = logic.line(4, MEAN, 8, "to")
    first = view.page.locator(".g4a-top tr").first.inner_text().split()
    assert int(first[0]) == int(received.argmax())
    assert (
        chip(view, 7).evaluate("e => e.style.borderBottomColor") == ""
    )  # it does not see what comes later


def test_stale_answers_are_dropped(show, logic):
    view = painted(show(logic))
    view.page.evaluate("model.hold = true")
    view.root.focus()
    asked = len(view.sent("rows"))
    press(view, "ArrowDown", "ArrowDown", "ArrowDown")
    kept = lambda: view.page.evaluate("model.kept.map(([[m]]) => m.id)")  # noqa: E731
    view.page.wait_for_function("model.kept.length >= 1")
    # one is on its way, the latest waits, the one between is never asked
    assert [fields["layer"] for fields in view.sent("rows")[asked:]] == [5]
    assert heading(view).startswith("Block 4")
    ids = {m["id"]: m for m in view.page.evaluate("model.sent")}
    row = next(i for i, id_ in enumerate(kept()) if ids[id_]["kind"] == "rows")
    view.page.evaluate(f"model.release({row})")
    assert heading(view).startswith("Block 4")
    view.page.wait_for_function(
        "model.sent.filter((m) => m.kind === 'rows').at(-1).fields.layer === 7"
    )
    latest = view.page.evaluate("model.sent.filter((m) => m.kind === 'rows').at(-1).id")
    view.page.wait_for_function(f"model.kept.some(([[m]]) => m.id === {latest})")
    view.page.evaluate(f"model.release({kept().index(latest)})")
    view.page.get_by_text("Block 7, mean over heads").wait_for()


def test_going_back_while_an_answer_is_on_its_way(show, logic):
    view = painted(show(logic))
    view.page.evaluate("model.hold = true")
    view.root.focus()
    press(view, "ArrowDown", "ArrowUp")
    before = view.page.locator(".g4a-top").inner_text()
    view.page.wait_for_function("model.kept.length >= 1")
    view.page.evaluate("model.kept.forEach((_, i) => model.release(i))")
    assert heading(view).startswith("Block 4")
    assert view.page.locator(".g4a-top").inner_text() == before


def test_an_error_is_shown_and_goes_with_the_next_answer(show, logic, monkeypatch):
    view = painted(show(logic))
    monkeypatch.setattr(logic, "rows", refuse)
    view.root.focus()
    press(view, "ArrowDown")
    alert = view.page.get_by_role("alert").filter(has_text="block 5 is not to be had")
    alert.wait_for()
    monkeypatch.undo()
    press(view, "ArrowDown")
    alert.wait_for(state="hidden")
    view.page.get_by_text("Block 6, mean over heads").wait_for()


def refuse(layer, head, start):
    raise g4lens.CacheError(f"block {layer} is not to be had")


def test_a_silent_kernel_is_noticed_and_heard_again(show, logic):
    view = show(logic, hold=True, clock=True)
    view.page.wait_for_function("model.kept.length >= 3")
    view.page.clock.run_for(6000)
    silence = view.page.get_by_role("alert").filter(has_text="No word from the kernel")
    assert silence.count() == 0
    view.page.clock.run_for(6000)
    silence.wait_for()
    assert "run this cell again" in silence.inner_text()
    view.page.evaluate("model.hold = false; model.kept.forEach((_, i) => model.release(i))")
    painted(view)
    silence.wait_for(state="hidden")


def test_play(show, logic):
    view = painted(show(logic))
    button = view.root.get_by_role("button", name="Play sound 0")
    view.page.evaluate(
        """() => {
          window.played = [];
          HTMLMediaElement.prototype.play = function () { window.played.push(this.src); };
        }"""
    )
    button.click()
    view.page.wait_for_function("window.played.length === 1")
    head = view.page.evaluate(
        "fetch(window.played[0]).then((r) => r.arrayBuffer())"
        ".then((b) => [b.byteLength, String.fromCharCode(...new Uint8Array(b).slice(0, 4))])"
    )
    assert head == [44 + 2 * len(logic.batch.prompts[0].sounds[0].samples), "RIFF"]
    view.root.focus()
    press(view, "p")
    view.page.wait_for_function("window.played.length === 2")
    assert len(view.sent("wave")) == 1


def test_python_moves_the_view(show, logic):
    view = painted(show(logic))
    view.page.evaluate(
        "model.set('selection', { layer: 12, head: 1, position: 20, direction: 'from' })"
    )
    view.page.get_by_text("Block 12, head 1: from").wait_for()
    assert view.page.get_by_role("combobox", name="Block").input_value() == "12"
    view.page.evaluate("model.set('selection', { layer: 99, head: 1 })")
    assert view.root.get_by_role("status").inner_text() == "This block is not in the cache."
    assert heading(view).startswith("Block 12")


def test_nothing_is_left_behind(show, logic):
    view = painted(show(logic))
    assert view.page.evaluate("model.listeners.length") > 0
    assert view.clean_up() == 0


def test_two_views_on_one_page(show, logic):
    view = painted(show(logic))
    view.page.evaluate(
        """async () => {
          const el = document.getElementById("el").cloneNode(false);
          document.querySelector("main").append(el);
          el.id = "other";
          window.other = Object.assign({}, model, { values: { ...model.values, selection: {} } });
          window.second = await window.view.render({ model: window.other, el });
        }"""
    )
    other = view.page.locator("#other .g4lens")
    other.locator(".g4a-top tr").first.wait_for()
    other.focus()
    press(view, "ArrowDown")
    other.get_by_text("Block 5, mean over heads").wait_for()
    assert heading_of(view, "#el").startswith("Block 4")
    view.page.evaluate("second()")
    assert other.count() == 0 and view.root.count() == 1


def heading_of(view: Shown, where: str) -> str:
    return view.page.locator(f"{where} .g4a-details .g4-title").inner_text()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [500, 1100])
def test_axe_finds_nothing(show, logic, dark, width):
    view = painted(show(logic, dark=dark, width=width))
    view.root.focus()
    press(view, "?", *["ArrowDown"] * 8, "ArrowLeft")
    painted(view)
    assert view.violations() == []


def test_hostile_texts_stay_texts(show, tiny):
    prompt = tiny.prompt("a b c d e f")
    tokens = list(prompt.tokens)
    for i, text in enumerate(HOSTILE, start=2):
        tokens[i] = dataclasses.replace(tokens[i], text=text, role=text)
    logic = AttentionLogic(tiny, dataclasses.replace(prompt, tokens=tuple(tokens)))
    for run in logic.runs:  # the text of a token comes from the tokenizer: put ours in its place
        for i, text in enumerate(HOSTILE, start=2):
            if run["start"] == i:
                run["texts"][0] = text
    view = painted(show(logic))
    chip(view, 2).click()
    painted(view)
    assert view.page.locator(".g4a-chip", has_text="<img src=x").count() == 1
    assert view.page.locator("#el img").count() == view.page.locator("#el script").count() == 0
    assert "<img src=x" in heading(view)
    assert view.page.evaluate("window.hurt") is None
    assert view.page.locator(".g4a-role", has_text="</script>").count() == 1


@pytest.mark.parametrize("ids", [[2], [2, 5, 6, 7]])
def test_short_prompts(show, tiny, ids):
    view = painted(show(AttentionLogic(tiny, ids)))
    view.root.focus()
    press(view, "ArrowLeft", "ArrowRight", "m", "p", "b", "b", "d", "]")
    painted(view)
    assert view.page.locator(".g4a-chip").count() == len(ids)
    assert view.page.locator(".g4a-figure").count() == 0
