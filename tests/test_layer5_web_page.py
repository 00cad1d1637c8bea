"""Layer 5: the page of web/ in a real browser, without any network."""

import functools
import http.server
import io
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage import data

from conftest import ROOT
from experiment.tiling import denoise
from small_vit import load_model

playwright = pytest.importorskip("playwright.sync_api", reason="takes: pip install playwright")
WEB = ROOT / "web"
VERSION = re.search(r'VERSION = "(.*)"', (WEB / "denoise.js").read_text("utf-8"))[1]
RUNTIME = WEB / "onnxruntime-web" / "dist"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PLACES = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)
BROWSER = next(filter(None, map(shutil.which, NAMES + PLACES)), None)
SECONDS = 120_000  # to wait at most, in thousandths
playwright.expect.set_options(timeout=SECONDS)

pytestmark = [
    pytest.mark.skipif(not BROWSER, reason="takes Chromium or Chrome"),
    pytest.mark.skipif(
        not RUNTIME.is_dir(), reason=f"takes a copy of onnxruntime-web {VERSION} (web/README.md)"
    ),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    """Address of web/, served as `python -m http.server` does it."""
    handler = functools.partial(Quiet, directory=WEB)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    sandbox = ("--no-sandbox",) if os.name == "posix" and os.geteuid() == 0 else ()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=[*quiet, *sandbox])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def open_page(browser, site):
    """Opens the page; afterwards no request has left this computer and no script has failed."""
    contexts, hosts, errors = [], set(), []

    def open_one(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_default_timeout(SECONDS)
        page.goto(site)
        while options.get("service_workers") != "block" and not has_threads(page):
            page.wait_for_timeout(100)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert hosts == {site.split("/")[2]} and not errors


@pytest.fixture(scope="module")
def shared(open_page):
    """A page for many tests: loading the runtime takes longer than a small photograph."""
    return open_page(viewport={"width": 1000, "height": 700})


@pytest.fixture
def page(shared):
    yield shared
    for name, value in (("#strength", 100), ("#split", 50)):
        set_range(shared, name, value)


def has_threads(page):
    """Whether the page has loaded itself again, which it does once."""
    try:
        return page.evaluate("crossOriginIsolated")
    except playwright.Error:  # while it is loading
        return False


@pytest.fixture(scope="module")
def photo():
    """Part of a photograph with noise, uint8 [150, 230, 3]: two by three tiles, odd edges."""
    clean = data.astronaut()[100:250, 60:290]
    noise = np.random.default_rng(0).normal(0, 12, clean.shape)
    return (clean + noise).clip(0, 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def expected(photo):
    return denoise(load_model("photo"), photo)


def in_file(image, name, **settings):
    """An upload: a PIL image or an array as a file of a name."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format=Image.registered_extensions()[Path(name).suffix], **settings)
    return {"name": name, "mimeType": "image/x-any", "buffer": buffer.getvalue()}


def give(page, *files, number=None):
    """Chooses files and waits until one, the last by default, has an end; returns its words."""
    page.set_input_files("#files", list(files))
    before = page.locator("#list small").count() - len(files)
    state = page.locator("#list small").nth(before + (number or len(files)) - 1)
    playwright.expect(state).not_to_have_text(re.compile("waiting|running"))
    return state.inner_text()


def choose(page, number=-1):
    """Shows one of the photographs, the last by default."""
    button = page.locator("#list button").nth(number)
    button.click()
    name = button.locator("b").inner_text()
    view = page.locator("#view")
    playwright.expect(view).to_have_attribute("aria-label", f"{name} before and after")


def saved(page, kind="png"):
    """The file that the button saves, as PIL reads it, and its name."""
    with page.expect_download() as download:
        page.click(f"#{kind}")
    return Image.open(download.value.path()), download.value.suggested_filename


def differences(image, array):
    return np.abs(np.asarray(image)[..., :3].astype(int) - array)


def set_range(page, name, value):
    page.locator(name).fill(str(value))


DROP_OR_PASTE = """([how, name, bytes]) => {
    const dataTransfer = new DataTransfer();
    if (name) dataTransfer.items.add(new File([Uint8Array.from(bytes)], name));
    else dataTransfer.setData("text/plain", "words");
    if (how === "drop") dispatchEvent(new DragEvent(how, { dataTransfer, cancelable: true }));
    else document.dispatchEvent(new ClipboardEvent(how, { clipboardData: dataTransfer }));
}"""


def test_page_gives_what_python_gives(page, open_page, photo, expected):
    """Of a photograph in tiles, with threads and without, of any strength."""
    for one, engine in (
        (open_page(service_workers="block"), "threads: 1"),
        (page, r"threads: \d+"),
    ):
        assert give(one, in_file(photo, "noisy.png")) == "done, 230×150"
        choose(one)
        assert re.search(engine, one.inner_text("#engine"))
        image, name = saved(one)
        assert name == "noisy_denoised.png" and image.size == (230, 150)
        assert differences(image, expected).max() <= 1
        assert np.asarray(image)[..., 3].min() == 255
    set_range(page, "#strength", 40)
    assert page.inner_text("#percent") == "40 %"
    mixed = denoise(load_model("photo"), photo, strength=0.4)
    assert differences(saved(page)[0], mixed).max() <= 1


def test_slider_shows_before_and_after(page, photo):
    give(page, in_file(photo, "a.png"))
    choose(page)
    result = page.locator("#stack canvas").nth(1)

    def hidden():  # pixels of the result, from the left
        found = result.evaluate("canvas => canvas.style.clipPath")
        return float(re.search(r"([\d.]+)px\)", found)[1])

    set_range(page, "#split", 50)
    half = hidden()
    assert half == pytest.approx(115, abs=2)
    box = page.locator("#grip").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + 20
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1])
    page.mouse.up()
    assert hidden() == pytest.approx(half + 60, abs=6)
    page.locator("#split").focus()
    page.keyboard.press("Home")
    assert hidden() == 0
    shadow = "getComputedStyle(document.getElementById('zoom')).boxShadow"
    before = page.evaluate(shadow)
    page.click("#zoom")
    assert page.get_attribute("#zoom", "aria-pressed") == "true"
    assert page.evaluate(shadow) != before  # so that eyes know, too
    assert result.bounding_box()["width"] == pytest.approx(230, abs=1)
    page.click("#zoom")


def test_saved_jpeg_keeps_exif_and_profile(page, photo):
    """JPEG and PNG upright, and their EXIF says so; WebP, which browsers do not turn, as it was."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "A camera"  # a quarter turn; its maker
    exif[0x010E] = "words" * 13_050  # the longest EXIF that a JPEG file can have, nearly
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(70_000)
    settings = {"exif": exif, "icc_profile": profile, "quality": 95}
    for name in ("turned.jpg", "turned.webp", "turned.png"):
        turned = not name.endswith("webp")
        size = (100, 120) if turned else (120, 100)
        part = in_file(photo[:100, :120], name, **settings)
        assert give(page, part) == f"done, {size[0]}×{size[1]}"
        choose(page)
        for kind in ("jpeg", "png"):
            image, file = saved(page, kind)
            image.load()  # with all checksums
            assert image.format == kind.upper()
            assert file == f"turned_denoised.{'jpg' if kind == 'jpeg' else 'png'}"
            assert image.size == size
            assert image.getexif()[0x0112] == (1 if turned else 6)
            assert image.getexif()[0x010F] == "A camera"
            assert image.info["icc_profile"] == profile


def test_transparent_and_grey_photographs(page, photo, tmp_path):
    photo = photo[:, :120]
    alpha = np.full(photo.shape[:2], 255, np.uint8)
    alpha[:60], alpha[60:90] = 0, 128
    clear = in_file(np.dstack([photo, alpha]), "clear.png")
    give(page, clear)
    choose(page)
    shown = """canvas => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, 1, canvas.height);
        return [...data].filter((_, i) => i % 4 === 3);
    }"""
    assert page.locator("#stack canvas").nth(1).evaluate(shown) == alpha[:, 0].tolist()
    image, _ = saved(page)
    assert np.array_equal(np.asarray(image)[..., 3], alpha)
    model = load_model("photo")
    (tmp_path / "clear.png").write_bytes(clear["buffer"])
    restored = denoise(model, tmp_path / "clear.png")[..., :3]
    assert differences(image, restored)[60:].mean() < 1  # what is hidden is filled in another way
    white, _ = saved(page, "jpeg")
    assert np.asarray(white)[:50].min() > 250
    grey = photo[..., 1]
    give(page, in_file(grey, "grey.png"))
    choose(page)
    image, _ = saved(page)
    assert differences(image, denoise(model, grey)[..., None]).max() <= 1
    assert np.ptp(np.asarray(image)[..., :3], axis=2).max() == 0


def test_what_is_no_image_is_refused_with_a_sentence(page, photo):
    """Nor does it keep the next one from being restored."""
    bad = {"name": "notes.jpg", "mimeType": "image/jpeg", "buffer": b"not an image at all"}
    assert "cannot read it as an image" in give(page, bad, in_file(photo[:50], "a.png"), number=1)
    states = page.locator("#list small")
    playwright.expect(states.last).to_contain_text("done")
    assert page.locator("#list button").nth(-2).is_disabled()
    for shape in ((10001, 10001), (1, 70000)):
        large = in_file(np.zeros(shape, np.uint8), "large.png")
        assert "more than 100 megapixels or 65535 pixels a side; take" in give(page, large)
    page.evaluate(DROP_OR_PASTE, ["drop", "", []])
    assert page.inner_text("#status") == "There is no photograph in it."
    pasted = in_file(photo[:20], "pasted.png")
    page.evaluate(DROP_OR_PASTE, ["paste", pasted["name"], list(pasted["buffer"])])
    playwright.expect(states.last).to_have_text("done, 230×20")


def test_stopping_and_dropping_more_meanwhile(page, photo):
    before = page.locator("#list li").count()
    large, small = (page.locator("#list small").nth(before + i) for i in (0, 1))
    page.set_input_files("#files", [in_file(np.tile(photo, (1, 2, 1)), "large.png")])
    playwright.expect(page.locator("#status")).to_contain_text("part 1 of")
    top = page.locator("#list").bounding_box()["y"]
    file = in_file(photo[:50], f"small_{'<b>' * 40}.png")
    page.evaluate(DROP_OR_PASTE, ["drop", file["name"], list(file["buffer"])])
    playwright.expect(small).to_have_text("waiting")
    page.click("#stop")
    playwright.expect(large).to_have_text("stopped")
    playwright.expect(small).to_have_text("stopped")
    assert page.locator("#bar").is_hidden()
    page.click("#stop")  # now it starts again
    for state in (large, small):
        playwright.expect(state).to_contain_text("done")
    assert page.locator("#list").bounding_box()["y"] == top  # nothing has jumped
    assert page.inner_text("#status") == f"small_{'<b>' * 11}<…: done, 230×50"
    choose(page)
    assert saved(page)[0].size == (230, 50)


def test_page_works_without_a_network_once_it_was_there(open_page, photo, expected):
    """Its service worker keeps the files of the page, and no others of the same place."""
    page = open_page()
    page.evaluate("fetch('onnxruntime-web/package.json').then(() => fetch('tags.js?2'))")
    give(page, in_file(photo[:50], "a.png"))
    page.context.set_offline(True)
    page.reload()
    give(page, in_file(photo, "a.png"))
    assert differences(saved(page)[0], expected).max() <= 1
    kept = f"caches.open('{VERSION}').then(c => c.keys()).then(all => all.map(r => r.url))"
    names = {url.rsplit("/", 1)[1] for url in page.evaluate(kept)}
    files = {"", "index.html", "style.css", "denoise.js", "tags.js", "photo.onnx"}
    assert names - files == {"ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"}
    assert files <= names


def test_without_the_model_or_a_server_a_sentence_tells(open_page, browser, photo):
    page = open_page(service_workers="block")
    page.route("**/photo.onnx", lambda route: route.abort())
    small = in_file(photo[:20, :20], "a.png")
    assert give(page, small) == "the model, photo.onnx, cannot be loaded from beside the page"
    page.unroute("**/photo.onnx")
    assert "done" in give(page, small)
    page = browser.new_page()
    page.goto((WEB / "index.html").as_uri())
    assert "python -m http.server" in page.inner_text("#status")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_on_a_telephone(page, photo, scheme):
    """Nothing is wider than the screen; the colours follow the system's."""
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)
    names = ["a_long_name_of_a_photograph_from_last_summer_at_the_sea_1234.png", "b.png"]
    give(page, *(in_file(photo[:20, :20], name) for name in names))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    back = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (int(re.search(r"\d+", back)[0]) < 100) == (scheme == "dark")
    for name in page.locator("button, input, progress, #view").all():
        label = name.evaluate("e => e.labels?.[0]?.innerText || e.ariaLabel || e.textContent")
        assert label.strip(), name
