"""The page in Chromium: what a person does, and what they read."""

import base64
import re
import shlex
import shutil
import subprocess
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.page.models import CLASSES, LONG, served, write_model
from visformer.data import imagenet
from visformer.verbs.predictor import Predictor

PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1440, "height": 900}
DROP = """([kind, files]) => {
  const transfer = new DataTransfer();
  for (const [name, type, data] of files) {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], name, { type }));
  }
  const options = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
  document.body.dispatchEvent(new (kind === "paste" ? ClipboardEvent : DragEvent)(kind, options));
}"""
STRENGTHS = """canvas => {
  const { width, height } = canvas, data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const row = (y) => Array.from({ length: width }, (_, x) => data[4 * (y * width + x) + 3]);
  return Array.from({ length: height }, (_, y) => row(y));
}"""


@pytest.fixture
def open_page(chromium):
    """`open_page(url, **context options)` -> a page. Afterwards: no error in its console, no answer of another host."""
    opened = []

    def start(url, expected=(), **options):
        context = chromium.new_context(**{"viewport": DESKTOP, "color_scheme": "light", **options})
        page = context.new_page()
        page.set_default_timeout(15_000)
        problems, hosts = [], set()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("response", lambda response: hosts.add(urlsplit(response.url).netloc))
        page.on(
            "filechooser", lambda chooser: None
        )  # from now on: what is set up only with the key press comes too late
        page.goto(url)
        opened.append((context, url, problems, hosts, expected))
        return page

    yield start
    for context, url, problems, hosts, expected in opened:
        assert not [text for text in problems if not any(word in text for word in expected)]
        assert hosts - {""} <= {urlsplit(url).netloc}
        assert context.cookies() == []
        context.close()


@pytest.fixture
def expect(chromium):
    from playwright.sync_api import expect

    expect.set_options(timeout=15_000)
    return expect


@pytest.fixture(scope="module")
def wanted(checkpoint, photos):
    """What the model says of each picture, as `visformer predict` has it."""
    return Predictor(checkpoint, device="cpu").predict(photos)


def send(page, photos, kind="drop"):
    """Drop or paste files."""
    files = [[path.name, f"image/{path.suffix[1:]}", base64.b64encode(path.read_bytes()).decode()] for path in photos]
    page.evaluate(DROP, [kind, files])


def shown(page):
    """[(label, percent)] of the bars."""
    rows = page.locator("#bars li").all()
    labels = [row.locator(".label").evaluate("element => element.firstChild.textContent") for row in rows]
    return list(zip(labels, page.locator("#bars .percent").all_inner_texts(), strict=True))


def strengths(page):
    """How opaque the heat map is at each of its pixels, 0 to 255."""
    return np.array(page.locator("#heat").evaluate(STRENGTHS))


def words(record):
    """The same of a record."""
    best = record["predictions"]
    descriptions = imagenet.describe(CLASSES)
    return [(descriptions.get(one["label"], one["label"]), percent(one["probability"])) for one in best]


def percent(probability):
    return "< 0.1 %" if 0 < probability < 0.001 else f"{100 * probability:.1f} %"


# ---- an image comes in, an answer goes out


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_dropped_image_is_answered(open_page, expect, server, photos, wanted, theme, viewport, tmp_path):
    page = open_page(server, color_scheme=theme, viewport=viewport)
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red + green + blue > 600) == (theme == "light")
    send(page, photos[:1])
    best = words(wanted[0])[0]
    expect(page.locator("#best")).to_have_text(best[0])
    assert shown(page) == words(wanted[0])
    expect(page.get_by_role("status").first).to_contain_text(f"{best[0]}, {best[1]}; then")
    expect(page.locator("#crop")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_files_are_chosen_pasted_and_seen_again(open_page, expect, server, photos, wanted):
    page = open_page(server)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose images").click()
    assert chooser.value.is_multiple()
    chooser.value.set_files(photos)
    gallery = page.locator("#gallery button")
    expect(gallery).to_have_count(3)
    expect(page.locator("#gallery .words .soft")).to_have_count(3)
    expect(page.locator("#gallery img")).to_have_count(3)
    expect(page.locator("#name")).to_have_text(photos[0].name)
    for position, record in zip((2, 1, 0), wanted, strict=True):  # the newest comes first
        gallery.nth(position).click()
        expect(gallery.nth(position)).to_have_attribute("aria-current", "true")
        assert shown(page) == words(record)
    send(page, photos[1:2], "paste")
    expect(gallery).to_have_count(4)
    expect(page.locator("#name")).to_have_text("pasted 1.jpg")
    expect(page.locator("#best")).to_have_text(words(wanted[1])[0][0])
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#result")).to_be_hidden()
    expect(gallery).to_have_count(0)
    expect(page.get_by_role("button", name="Choose images")).to_be_focused()


def test_a_label_is_text_and_never_markup(open_page, expect, server, photos):
    page = open_page(server)
    send(page, photos[:1])
    expect(page.locator("#bars .label", has_text="<b>bold</b>")).to_have_count(1)
    assert page.locator("#bars b").count() == 0


def test_the_camera_gives_a_picture(open_page, expect, server):
    page = open_page(server, permissions=["camera"])
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Take the picture").click()
    expect(page.locator("#name")).to_have_text("camera 1.jpg")
    expect(page.locator("#best")).not_to_be_empty()
    assert page.evaluate("document.getElementById('video').srcObject") is None  # the camera is off again
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_a_camera_that_is_not_allowed_is_said(open_page, expect, server):
    page = open_page(server)
    page.evaluate(
        "() => { const no = new DOMException('no', 'NotAllowedError');"
        " navigator.mediaDevices.getUserMedia = () => Promise.reject(no) }"
    )
    page.get_by_role("button", name="Use the camera").click()
    expect(page.get_by_role("alert")).to_contain_text("The camera was not allowed")
    expect(page.get_by_role("button", name="Choose a file instead")).to_be_visible()
    expect(page.get_by_role("button", name="Take the picture")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


# ---- where the model looked


@pytest.mark.parametrize("which", [0, 1], ids=["wide", "tall"])
def test_the_map_lies_on_the_crop(open_page, expect, server, photos, which):
    page = open_page(server)
    with page.expect_response("**/explain?**") as response:
        send(page, photos[which : which + 1])
    heat = response.value.json()
    expect(page.locator("#crop")).to_be_visible()
    photo, crop = page.locator("#photo").bounding_box(), page.locator("#crop").bounding_box()
    scale = photo["width"] / heat["image"]["width"]
    assert photo["height"] / heat["image"]["height"] == pytest.approx(scale, rel=0.01)
    assert crop["x"] - photo["x"] == pytest.approx(heat["crop"]["left"] * scale, abs=1)
    assert crop["y"] - photo["y"] == pytest.approx(heat["crop"]["top"] * scale, abs=1)
    assert crop["width"] == pytest.approx(heat["crop"]["width"] * scale, abs=1)
    assert crop["height"] == pytest.approx(heat["crop"]["height"] * scale, abs=1)
    canvas = page.locator("#heat").bounding_box()
    assert canvas["width"] == pytest.approx(crop["width"], abs=1)
    drawn, values = strengths(page), np.array(heat["values"])
    values = np.abs(values - np.clip(0, values.min(), values.max()))  # the nearest to 0 has no colour
    values /= values.max()
    fineness = len(drawn) // len(values)
    centres = drawn[fineness // 2 :: fineness, fineness // 2 :: fineness]  # half a pixel beside them
    np.testing.assert_allclose(centres / drawn.max(), values, atol=0.1)


def test_methods_and_classes_can_be_chosen(open_page, expect, server, photos):
    page = open_page(server)
    send(page, photos[:1])
    expect(page.get_by_role("radio", name="Class activation")).to_be_checked()
    expect(page.locator("#heat")).to_have_attribute("aria-label", re.compile("Heat map of class activation: "))
    bars = page.locator("#bars button")
    expect(bars.nth(0)).to_have_attribute("aria-pressed", "true")
    first = page.locator("#heat").evaluate("canvas => canvas.toDataURL()")
    with page.expect_response("**/explain?**") as response:
        bars.nth(2).click()
    index = response.value.json()["index"]
    assert f"index={index}" in response.value.url
    expect(bars.nth(2)).to_have_attribute("aria-pressed", "true")
    assert page.locator("#heat").evaluate("canvas => canvas.toDataURL()") != first
    for name, said in (("Attention", "whatever the class"), ("Occlusion", "is covered")):
        page.get_by_role("radio", name=name).check(force=True)
        expect(page.locator("#explanation")).to_contain_text(said)
        expect(page.locator("#crop")).to_be_visible()
    page.get_by_role("radio", name="None").check(force=True)
    expect(page.locator("#crop")).to_be_hidden()


def test_a_method_is_of_the_image_that_is_shown(open_page, expect, server, photos):
    page = open_page(server)
    send(page, photos[:2])
    expect(page.locator("#gallery .words .soft")).to_have_count(2)
    for position in (0, 1):
        page.locator("#gallery button").nth(position).click()
        expect(page.locator("#crop")).to_be_visible()
        for method, radio in (("attention", "Attention"), ("activation", "Class activation")):
            page.get_by_role("radio", name=radio).check(force=True)
            expect(page.locator("#heat")).to_have_attribute("aria-label", re.compile(f"Heat map of .*{method}"))
            expect(page.locator("#explanation")).not_to_have_text("Looking …")


def test_the_strength_fades_the_map(open_page, expect, server, photos):
    page = open_page(server)
    send(page, photos[:1])
    expect(page.locator("#crop")).to_be_visible()
    strong = strengths(page)
    page.get_by_label("Strength").fill("20")
    assert 0 < strengths(page).max() < strong.max() / 2


# ---- time, curl, models


def test_the_time_is_split(open_page, expect, server, photos):
    page = open_page(server)
    send(page, photos[:1])
    expect(page.locator("#times dd")).to_have_count(6)
    names = page.locator("#times dt").all_inner_texts()
    assert names == ["Decode", "Queue", "Model", "Rest of server", "Network", "In all"]
    times = [float(text.removesuffix(" ms")) for text in page.locator("#times dd").all_inner_texts()]
    assert sum(times[:-1]) == pytest.approx(times[-1], rel=0.03, abs=0.3)


def test_the_curl_command_gives_the_same(open_page, expect, server, photos, wanted, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    page = open_page(server, permissions=["clipboard-read", "clipboard-write"])
    send(page, photos[1:2])
    page.get_by_text("The same from a terminal").click()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    command = page.evaluate("navigator.clipboard.readText()")
    result = subprocess.run(shlex.split(command), capture_output=True, cwd=photos[1].parent, timeout=60, check=True)
    assert f'"{wanted[1]["predictions"][0]["label"]}"'.encode() in result.stdout


def test_models_and_versions_are_chosen(open_page, expect, photos, tmp_path):
    for number, crop_pct in ((1, 1.0), (2, 0.5)):
        (tmp_path / "cats" / str(number)).mkdir(parents=True)
        write_model(tmp_path / "cats" / str(number) / "best.safetensors", crop_pct)
    with served([str(tmp_path / "cats"), f"dogs={write_model(tmp_path / 'dogs.safetensors')}"], versions="all") as url:
        page = open_page(url)
        choice = page.get_by_label("Model")
        expect(choice.locator("option")).to_have_text(["cats, version 1", "cats, version 2 (newest)", "dogs"])
        for option, facts in (("cats, version 1", "cats, version 1"), ("dogs", "dogs, version 1")):
            choice.select_option(label=option)
            send(page, photos[:1])
            expect(page.locator("#facts")).to_contain_text(facts)
        choice.select_option(label="cats, version 2 (newest)")  # asks anew about the picture that is shown
        expect(page.locator("#facts")).to_contain_text("cats, version 2")
        assert "model=cats'" in page.locator("#curl").text_content()


def test_one_model_is_no_choice(open_page, expect, server):
    page = open_page(server)
    expect(page.get_by_role("button", name="Choose images")).to_be_visible()
    expect(page.get_by_label("Model")).to_be_hidden()


# ---- what goes wrong is said in words


def test_what_is_no_image_is_said(open_page, expect, server, photos, tmp_path):
    page = open_page(server, expected=["400"])
    (tmp_path / "notes.png").write_bytes(b"these are no pixels")
    send(page, [tmp_path / "notes.png", photos[0]])
    expect(page.locator("#error-text")).to_contain_text(
        "The server could not use notes.png (400): the image can't be read"
    )
    expect(page.locator("#no-preview")).to_be_visible()
    expect(page.locator("#gallery .failed")).to_have_text(re.compile("No answer"))
    expect(page.locator("#gallery .words .soft")).to_have_count(1)  # the other is answered


def test_a_file_that_is_too_large_is_said(open_page, expect, checkpoint, photos):
    with served([str(checkpoint)], max_bytes=1000) as url:
        page = open_page(url, expected=["413"])
        send(page, photos[:1])
        said = page.locator("#error-text")
        expect(said).to_contain_text(re.compile(r"wide\.jpg \(\d+ kB\) is larger than the server takes: .*1,000 bytes"))


def test_a_busy_server_is_asked_again(open_page, expect, server, photos, wanted):
    page = open_page(server, expected=["503"])
    busy = {"status": 503, "headers": {"Retry-After": "2"}, "body": '{"error": "the server is busy"}'}
    page.route("**/predict", lambda route: route.fulfill(**busy))
    send(page, photos[:1])
    said = "The server can't do it now: the server is busy. It asks to wait 2 seconds."
    expect(page.locator("#error-text")).to_have_text(said)
    expect(page.get_by_role("status").first).to_have_text(said)
    page.unroute("**/predict")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#best")).to_have_text(words(wanted[0])[0][0])
    expect(page.locator("#error")).to_be_hidden()


def test_a_server_that_is_gone_is_said(open_page, expect, server, photos):
    page = open_page(server, expected=["ERR_FAILED"])
    page.route("**/predict", lambda route: route.abort())
    send(page, photos[:1])
    expect(page.locator("#error-text")).to_have_text("The server can't be reached. Is it still running?")


def test_an_answer_without_a_heat_map_is_still_one(open_page, expect, server, photos):
    page = open_page(server, expected=["503"])
    page.route("**/explain?**", lambda route: route.fulfill(status=503, body='{"error": "no result within 1 s"}'))
    send(page, photos[:1])
    expect(page.locator("#explanation")).to_contain_text(
        "No heat map. The server can't do it now: no result within 1 s."
    )
    expect(page.locator("#bars li")).to_have_count(5)


def test_the_key_is_asked_for(open_page, expect, checkpoint, photos):
    import hashlib

    with served([str(checkpoint)], api_keys=(hashlib.sha256(b"open sesame").hexdigest(),)) as url:
        page = open_page(url, expected=["401"])
        field = page.get_by_label("The server asks for an API key.")
        expect(field).to_be_focused()
        send(page, photos[:1])
        expect(page.locator("#error-text")).to_have_text("The server asks for an API key.")
        field.fill("wrong")
        field.press("Enter")
        wrong = page.get_by_label("The server does not know this API key.")
        expect(wrong).to_be_focused()
        wrong.fill("open sesame")
        wrong.press("Enter")
        expect(page.locator("#best")).not_to_be_empty()
        expect(page.locator("#crop")).to_be_visible()
        command = page.locator("#curl").text_content()
        assert "'Authorization: Bearer KEY'" in command
        assert "sesame" not in page.content() + page.evaluate(
            "JSON.stringify([{...localStorage}, {...sessionStorage}])"
        )


# ---- for everybody


def test_the_keyboard_is_enough(open_page, expect, server, photos):
    page = open_page(server)

    def tab_to(target):
        for _ in range(40):
            page.keyboard.press("Tab")
            if target.evaluate("element => element === document.activeElement"):
                outline = target.evaluate("element => getComputedStyle(element).outlineStyle + element.tagName")
                assert outline.startswith("solid") or outline == "noneINPUT"  # a radio's label has it
                return
        raise AssertionError(f"the Tab key does not come to {target}")

    tab_to(page.get_by_role("button", name="Dark theme"))
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    expect(page.get_by_role("button", name="Light theme")).to_be_focused()
    tab_to(page.get_by_role("button", name="Choose images"))
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(photos[:2])
    expect(page.locator("#gallery .words .soft")).to_have_count(2)
    expect(page.locator("#crop")).to_be_visible()
    tab_to(page.locator("#bars button").nth(1))
    page.keyboard.press("Enter")
    expect(page.locator("#bars button").nth(1)).to_have_attribute("aria-pressed", "true")
    tab_to(page.locator("#methods input").nth(0))
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Attention")).to_be_checked()
    tab_to(page.get_by_label("Strength"))
    page.keyboard.press("Home")
    assert strengths(page).max() == 0
    tab_to(page.locator("#gallery button").nth(0))
    page.keyboard.press("Enter")
    expect(page.locator("#name")).to_have_text(photos[1].name)
    expect(page.locator("#result")).to_be_focused()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing(open_page, expect, server, photos, theme, viewport):
    """Contrast, names, roles and the rest of what axe-core tests of WCAG 2.2 AA and good practice."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def problems(page):
        return [f"{found['id']}: {found['help']}" for found in axe.run(page).response["violations"]]

    page = open_page(server, color_scheme=theme, viewport=viewport)
    assert problems(page) == []
    send(page, photos[:2])
    expect(page.locator("#gallery .words .soft")).to_have_count(2)
    expect(page.locator("#crop")).to_be_visible()
    page.get_by_text("The same from a terminal").click()
    assert problems(page) == []
    page.get_by_role("button", name="Use the camera").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert problems(page) == []


def test_what_is_pressed_is_large_and_long_names_wrap_on_a_phone(open_page, expect, server, photos):
    page = open_page(server, viewport=PHONE, has_touch=True)
    send(page, photos[:1])
    expect(page.locator("#crop")).to_be_visible()
    for button in page.locator("button:visible, select:visible").all():
        box = button.bounding_box()
        assert box["height"] >= 40 and box["width"] >= 40, button.text_content()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
    long = page.locator("#bars .label", has_text=LONG)
    assert long.bounding_box()["height"] > 40


def test_without_a_wish_the_theme_is_the_systems_and_changes_with_it(open_page, expect, server):
    page = open_page(server, color_scheme="dark")
    expect(page.get_by_role("button", name="Light theme")).to_be_visible()
    page.emulate_media(color_scheme="light")
    expect(page.get_by_role("button", name="Dark theme")).to_be_visible()


def test_nothing_but_the_pages_own_code_may_run(open_page, expect, server):
    page = open_page(server, expected=["Content Security Policy"])
    page.evaluate(
        "() => { const s = document.createElement('script'); s.text = 'window.ran = 1'; document.body.append(s) }"
    )
    page.evaluate("() => { new Image().src = 'http://127.0.0.2/x.png' }")
    assert page.evaluate("window.ran") is None
    policy = page.request.get(server).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy


def test_a_model_that_has_gone_leaves_the_choice(open_page, expect, checkpoint, photos):
    with served([f"cats={checkpoint}", f"dogs={checkpoint}"]) as url:
        page = open_page(url, expected=["404"])
        choice = page.get_by_label("Model")
        expect(choice.locator("option")).to_have_text(["cats", "dogs"])
        choice.select_option(label="dogs")
        assert page.request.post(f"{url}/v2/repository/models/dogs/unload", data="{}").ok
        send(page, photos[:1])
        expect(page.locator("#error-text")).to_contain_text("The server could not use wide.jpg (404): model dogs")
        expect(choice).to_be_hidden()  # one is left
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#facts")).to_contain_text("cats, version 1")
