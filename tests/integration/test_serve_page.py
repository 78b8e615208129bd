"""The web page in a real browser: what a person does with it, by mouse, by keyboard, by camera."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from serving import Server, drawn, encoded, make_model, photograph, serving

from required import needs
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import Enrolment, Gallery
from sphereface2.recognition.service import keys

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
pytestmark = needs(CHROMIUM, "no chromium: install it (apt-get install chromium) or set CHROMIUM")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
ARGUMENTS += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("page") / "m")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    gallery = tmp_path_factory.mktemp("kept") / "gallery.db"
    with serving(model, gallery, "--keep-crops", "--drain-seconds", "0") as server:
        yield server


def watched(browser: Any, **options: Any) -> tuple[Any, list[str], list[str]]:
    """A page, the addresses it asks for, and what its console complains of."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(10_000)
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def heard(message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            complaints.append(message.text)

    page.on("console", heard)
    return page, asked, complaints


def file(content: bytes) -> dict[str, Any]:
    return {"name": "face.jpg", "mimeType": "image/jpeg", "buffer": content}


def nameless(page: Any) -> list[str]:
    """Controls and images that a screen reader could not name; see also the tree itself."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("button,input,select,video,dialog,[role=tabpanel]")]
          .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length
            || document.getElementById(e.getAttribute("aria-labelledby"))?.textContent.trim()))
          .concat([...document.querySelectorAll("img:not([alt])")])
          .map((e) => e.outerHTML.slice(0, 120))"""
    )
    tree = page.locator("body").aria_snapshot()
    unnamed = re.findall(
        r"^\s*- (?:button|textbox|checkbox|combobox|tab|link|dialog):?$", tree, re.M
    )
    return [*found, *unnamed]


def test_verify_enrol_search_and_delete(browser: Any, server: Server) -> None:
    page, asked, complaints = watched(browser, viewport={"width": 1280, "height": 900})
    page.goto(server.url)
    expect(page.locator("#model")).to_contain_text("calibrated")
    assert nameless(page) == []

    # A photograph, whose face is found, against itself; then what is no image.
    for name in ("a", "b"):
        page.set_input_files(f"#verify input[name={name}]", file(photograph()))
    expect(page.get_by_role("heading", name="The same person")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("similarity 1.00"))).to_be_visible()
    expect(page.get_by_alt_text("Aligned face of image 2")).to_be_visible()
    page.set_input_files("#verify input[name=b]", file(b"words"))
    status = page.locator("#verify [role=status]")
    expect(status).to_have_text("Image 2 is no JPEG, PNG or WebP file.")
    page.set_input_files("#verify input[name=b]", file(encoded(np.zeros((99, 99, 3), np.uint8))))
    expect(status).to_contain_text("No face was found")
    page.get_by_text("Settings").click()
    page.get_by_label("aligned face crops").check()
    expect(page.locator("#verify .verdict")).to_be_visible()  # asked again by itself

    # By keyboard alone: the next tab, a name, a image, enrol.
    page.get_by_role("tab", name="Verify").focus()
    page.keyboard.press("End")
    expect(page.get_by_role("tab", name="People")).to_be_focused()
    page.keyboard.press("Tab")
    page.get_by_label("Name").focus()
    page.keyboard.type("Ada <b>Lovelace")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.name") == "images"
    choosers = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    for _ in range(5):  # a browser short of CPU now and then drops the key
        page.keyboard.press("Space")
        page.wait_for_timeout(1000)
        if choosers:
            break
    choosers[0].set_files([file(drawn(1)), file(drawn(1, 1))])
    page.get_by_role("button", name="Enrol").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#people [role=status]")).to_contain_text("enrolled with 2 images")
    row = page.get_by_role("listitem").filter(has_text="Ada <b>Lovelace")
    expect(row.locator("img.portrait")).to_be_visible()

    # The same name again asks, and adds; nothing at all says what is missing.
    page.get_by_role("button", name="Enrol").click()
    expect(page.locator("#people [role=status]")).to_have_text("Give a name.")
    page.get_by_label("Name").fill("Ada <b>Lovelace")
    page.set_input_files("#people input[name=images]", [file(drawn(1, 2))])
    page.get_by_role("button", name="Enrol").click()
    page.get_by_role("button", name="Add", exact=True).click()
    expect(row).to_contain_text("3 images")

    page.get_by_role("tab", name="Search").click()
    page.set_input_files("#search input[name=image]", file(drawn(1)))
    expect(page.get_by_role("heading", name="Ada <b>Lovelace")).to_be_visible()
    expect(page.locator("#search ol img.portrait")).to_be_visible()
    assert nameless(page) == []

    page.get_by_role("tab", name="People").click()
    page.get_by_role("button", name="Delete Ada").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_text("Nobody yet.")).to_be_visible()

    own = (server.url, f"blob:{server.url}", "data:")
    assert [url for url in asked if not url.startswith(own)] == []
    assert complaints == []
    page.context.close()


def test_camera_small_screens_and_dark(browser: Any, server: Server) -> None:
    backgrounds = set()
    for scheme in ("light", "dark"):
        page, _, complaints = watched(
            browser, viewport={"width": 360, "height": 740}, color_scheme=scheme
        )
        page.goto(server.url)
        expect(page.locator("#model")).to_contain_text("calibrated")
        page.get_by_text("Settings").click()
        page.get_by_label("aligned face crops").check()
        page.set_input_files("#verify input[name=a]", file(drawn(1)))
        page.set_input_files("#verify input[name=b]", file(drawn(2)))
        expect(page.locator("#verify .verdict")).to_be_visible()
        for tab in ("Verify", "Search", "People"):
            page.get_by_role("tab", name=tab).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, tab
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.get_by_role("tab", name="Search").click()
        page.get_by_role("button", name="use the camera").click()
        take = page.get_by_role("button", name="Take a photograph")
        expect(take).to_be_focused()
        take.click()
        expect(page.get_by_alt_text("Image to look for, chosen")).to_be_visible()
        page.get_by_role("button", name="use the camera").click()
        page.keyboard.press("Escape")
        expect(page.locator("#camera")).to_be_hidden()
        assert complaints == []
        page.context.close()
    assert len(backgrounds) == 2


def test_the_page_asks_for_a_key(browser: Any, model: Path, tmp_path: Path) -> None:
    token = keys.add("page", tmp_path / "keys.json")
    options = ["--keys", str(tmp_path / "keys.json"), "--drain-seconds", "0"]
    with serving(model, tmp_path / "g.db", *options) as server:
        page, _, complaints = watched(browser)
        page.goto(server.url)
        field = page.get_by_label("API key")
        field.fill("sf2_wrong")
        field.press("Enter")
        expect(field).to_have_value("")  # asked once more
        field.fill(f"\u200b{token}\u202c\n")  # as copied from a chat
        field.press("Enter")
        expect(page.locator("#model")).to_contain_text("calibrated")
        expect(page.locator("#people [data-empty]")).to_have_count(1)
        page.get_by_text("Settings").click()
        expect(page.get_by_role("button", name="Forget the key")).to_be_visible()

        # A key that no header can hold is asked for again, and one that is kept can be forgotten
        # though the server is silent.
        page.evaluate("sessionStorage.setItem('key', 'sf2_\u200b')")
        page.reload()
        expect(field).to_be_visible()
        field.fill(token)
        field.press("Enter")
        expect(page.locator("#model")).to_contain_text("calibrated")
        page.route("**/v1/**", lambda route: route.abort())
        page.reload()
        expect(page.locator("#model")).to_contain_text("does not answer")
        page.get_by_text("Settings").click()
        expect(page.get_by_role("button", name="Forget the key")).to_be_visible()
        assert complaints == []
        page.context.close()


def hand_over(page: Any, where: str, kind: str, *images: bytes) -> None:
    """Drop images on an element, or paste them into it."""
    page.evaluate(
        """([where, kind, images]) => {
          const given = new DataTransfer();
          for (const text of images) {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            given.items.add(new File([bytes], "face.jpg", {type: "image/jpeg"}));
          }
          const common = {bubbles: true, cancelable: true};
          document.querySelector(where).dispatchEvent(kind === "drop"
            ? new DragEvent("drop", {...common, dataTransfer: given})
            : new ClipboardEvent("paste", {...common, clipboardData: given}));
        }""",
        [where, kind, [base64.b64encode(image).decode() for image in images]],
    )


def test_images_dropped_together_or_pasted_anywhere(browser: Any, server: Server) -> None:
    page, _, complaints = watched(browser)
    page.goto(server.url)
    expect(page.locator("#model")).to_contain_text("calibrated")
    page.get_by_text("Settings").click()
    page.get_by_label("aligned face crops").check()
    verdict = page.locator("#verify .verdict")
    hand_over(page, "#verify [data-picker=b] .drop", "drop", drawn(1), drawn(2))
    expect(verdict).to_be_visible()
    for picker in ("First", "Second"):
        page.get_by_role("button", name=f"{picker} image: remove").click()
    expect(verdict).to_be_hidden()
    for number in (1, 2):  # the first empty place takes it
        hand_over(page, "body", "paste", drawn(number))
    expect(verdict).to_be_visible()
    page.get_by_role("tab", name="Search").click()
    hand_over(page, "body", "paste", drawn(1))
    expect(page.get_by_alt_text("Image to look for, chosen")).to_be_visible()
    page.get_by_role("tab", name="People").click()
    hand_over(page, "#enrol-name", "paste", drawn(1))
    hand_over(page, "#people fieldset", "paste", drawn(1, 1))
    expect(page.locator("#people .strip li")).to_have_count(2)
    assert complaints == []
    page.context.close()


def test_many_people_at_a_low_rate(browser: Any, model: Path, tmp_path: Path) -> None:
    """A list of two pages, on a server that lets ten requests in at once."""
    embedder = FaceEmbedder.from_pretrained(model, device="cpu")
    rows = embedder.embed([drawn(seed) for seed in range(3)], aligned=True)
    names = [f"Person {number:02}" for number in range(61)]
    with Gallery.open(tmp_path / "g.db", embedder=embedder) as gallery:
        list(gallery.add_many(Enrolment(name, rows[at % 3]) for at, name in enumerate(names)))
        gallery.add("R&D/Ada", rows[0])
    with serving(model, tmp_path / "g.db", "--rate", "5", "--drain-seconds", "0") as server:
        page, _, complaints = watched(browser)
        page.goto(f"{server.url}/#people")
        rows_shown = page.locator("#people li")
        shown = page.locator("#people .name")
        expect(rows_shown).to_have_count(50)
        expect(page.locator("#model")).to_contain_text("calibrated")
        page.get_by_role("button", name="Show more").dblclick()
        expect(rows_shown).to_have_count(62)
        expect(rows_shown.nth(50)).to_be_focused()
        page.get_by_label("Filter").fill("ERSON 4")
        expect(rows_shown).to_have_count(10)
        expect(page.locator("[data-count]")).to_have_text("10")
        page.get_by_label("Filter").fill("nobody")
        expect(page.get_by_text("Nobody of that name.")).to_be_visible()
        page.get_by_label("Filter").fill("")
        expect(rows_shown).to_have_count(50)
        page.get_by_role("button", name="Show more").click()
        expect(rows_shown).to_have_count(62)
        assert shown.all_inner_texts() == sorted([*names, "R&D/Ada"])
        expect(page.get_by_role("button", name="Show more")).to_be_hidden()

        # The row goes, the others stay, and a second Enter deletes nobody.
        page.get_by_role("button", name="Delete Person 55").click()
        page.get_by_role("button", name="Delete", exact=True).click()
        expect(rows_shown).to_have_count(61)
        expect(rows_shown.filter(has_text="Person 56")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#confirm")).to_be_hidden()
        expect(page.locator("[data-count]")).to_have_text("61")
        page.get_by_role("button", name="Delete R&D/Ada").click()
        page.get_by_role("button", name="Delete", exact=True).click()
        expect(rows_shown).to_have_count(60)
        page.reload()
        expect(rows_shown).to_have_count(50)
        page.get_by_role("button", name="Delete Person 00").click()
        page.get_by_role("button", name="Delete", exact=True).click()
        expect(rows_shown).to_have_count(49)
        page.get_by_role("button", name="Show more").click()
        expect(rows_shown).to_have_count(59)
        assert shown.all_inner_texts() == [name for name in names[1:] if name != "Person 55"]

        # What the figures of a candidate mean is told to those who do not see them.
        page.get_by_role("tab", name="Search").click()
        page.get_by_text("Settings").click()
        page.get_by_label("aligned face crops").check()
        page.set_input_files("#search input[name=image]", file(drawn(1)))
        words = page.locator("#search ol").aria_snapshot()
        assert "similarity 1.00, at or above the threshold" in words, words
        expect(page.locator("#search [data-result]")).to_contain_text("In a gallery of this size")

        # Every face of a photograph gets its answer, and a box on it.
        page.get_by_label("aligned face crops").uncheck()
        page.get_by_label("every face").check()
        face = np.asarray(Image.open(io.BytesIO(photograph())))
        two = encoded(np.concatenate([face, face[:, ::-1]], 1))
        page.set_input_files("#search input[name=image]", file(two))
        expect(page.locator("#search ol")).to_have_count(2)
        boxes = page.locator("#search .faces rect")
        expect(boxes).to_have_count(2)
        image = page.locator("#search .drop > img").bounding_box()
        places = [boxes.nth(at).bounding_box() for at in range(2)]
        assert all(image["width"] / 10 < one["width"] < image["width"] / 3 for one in places)
        middle = image["x"] + image["width"] / 2
        assert len({one["x"] < middle for one in places}) == 2  # mirrored: one on each side
        page.get_by_role("tab", name="People").click()
        page.get_by_label("Name").fill("Two")
        page.set_input_files("#people input[name=images]", [file(two)])
        page.get_by_role("button", name="Enrol").click()
        expect(page.locator("#confirm")).to_contain_text("2 faces")
        page.get_by_role("button", name="Take the largest").click()
        expect(page.locator("#confirm")).to_contain_text("looks like Person")
        page.get_by_role("button", name="Enrol all the same").click()
        expect(page.locator("#people [role=status]")).to_contain_text("enrolled with 1 image")
        assert complaints == []
        page.context.close()


def test_one_person_s_images_and_name(browser: Any, server: Server) -> None:
    """The dialog of a person, and the question about a face under a second name."""

    def sent(method: str, path: str, **options: Any) -> Any:
        answer = httpx.request(method, f"{server.url}/v1/{path}", timeout=60, **options)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    person = {"name": "Grace", "metadata": '{"room": 7}', "aligned": "1"}
    images = [("images", ("x.jpg", drawn(1, number))) for number in range(2)]
    sent("POST", "people", data=person, files=images)
    page, asked, complaints = watched(browser, viewport={"width": 390, "height": 800})
    page.goto(f"{server.url}/#people")
    page.get_by_text("Settings").click()
    page.get_by_label("aligned face crops").check()
    page.get_by_role("button", name="Grace", exact=True).click()
    dialog = page.get_by_role("dialog", name="Grace")
    shown = dialog.locator(".images img")
    expect(shown).to_have_count(2)
    expect(dialog.locator("dl")).to_have_text("room7")
    assert nameless(page) == []
    assert page.evaluate("document.querySelector('#person').scrollWidth") <= 390

    dialog.get_by_role("button", name="Remove image 2").click()
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(shown).to_have_count(1)
    expect(dialog.get_by_role("button", name="Remove image 1")).to_be_hidden()  # the last stays
    page.set_input_files("#person input[name=more-images]", file(drawn(1, 2)))
    dialog.get_by_role("button", name="Add").click()
    expect(dialog.get_by_role("status")).to_contain_text("Grace has 2 images now")
    dialog.get_by_label("Name").fill("Grace Hopper")
    page.keyboard.press("Enter")
    renamed = page.get_by_role("dialog", name="Grace Hopper")
    expect(renamed.get_by_role("status")).to_have_text("The name is now Grace Hopper.")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Grace Hopper", exact=True)).to_be_visible()
    assert sent("GET", "people/Grace%20Hopper")["images"] == 2

    page.get_by_label("Name").fill("Amazing Grace")
    page.set_input_files("#people input[name=images]", file(drawn(1)))
    page.get_by_role("button", name="Enrol").click()
    expect(page.locator("#confirm")).to_contain_text("Image 1 looks like Grace Hopper")
    page.get_by_role("button", name="Cancel").click()
    assert sent("GET", "people")["total"] == 1
    page.get_by_role("button", name="Enrol").click()
    page.get_by_role("button", name="Enrol all the same").click()
    expect(page.locator("#people [data-enrol] [role=status]")).to_contain_text("is enrolled with")
    assert sent("GET", "people")["total"] == 2
    for name in ("Grace Hopper", "Amazing Grace"):
        sent("DELETE", f"people/{name}")

    # The API's page works without any other host, under the same policy.
    page.goto(f"{server.url}/docs")
    expect(page.locator("#operations-people-list_people_v1_people_get")).to_be_visible()
    expect(page.get_by_text("/v1/search")).to_be_visible()
    own = (server.url, f"blob:{server.url}", "data:")
    assert [url for url in asked if not url.startswith(own)] == []
    assert complaints == []
    page.context.close()


def test_every_text_of_a_search_stands_out_enough(browser: Any, server: Server) -> None:
    """4.5:1 at least, in both colour schemes, also of candidates below the threshold."""
    match = {"name": "Ada", "similarity": 0.3, "same": False, "metadata": {}, "thumbnail": False}
    face = {"face": None, "known": False, "matches": [match], "crop": "data:,"}
    found = {"threshold": 0.5, "far": 0.1, "people": 1, "fpir": 0.1, "faces": [face]}
    page, _, _ = watched(browser)
    page.route("**/v1/search", lambda route: route.fulfill(json=found))
    page.goto(f"{server.url}/#search")
    page.set_input_files("#search input[name=image]", file(drawn(1)))
    expect(page.locator("#search ol")).to_contain_text("similarity 0.30, below")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ratios = page.evaluate(
            """() => {
              const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
              const luminance = (rgb) => rgb.map((v) => v / 255)
                .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
                .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
              const list = document.querySelector("#search ol");
              const back = numbers(getComputedStyle(list).backgroundColor).slice(0, 3);
              return [...list.querySelectorAll(".name, .figure")].map((element) => {
                let opacity = 1;
                for (let at = element; at !== list; at = at.parentElement) {
                  opacity *= getComputedStyle(at).opacity;
                }
                const mixed = numbers(getComputedStyle(element).color).slice(0, 3)
                  .map((v, at) => v * opacity + back[at] * (1 - opacity));
                const [dark, light] = [luminance(mixed), luminance(back)].sort((a, b) => a - b);
                return (light + 0.05) / (dark + 0.05);
              });
            }"""
        )
        assert len(ratios) == 2 and min(ratios) >= 4.5, (scheme, ratios)
    page.context.close()
