"""The report in a real browser, headless: what a reader does with mouse, finger and keys."""

import json
import shutil
from pathlib import Path

import pytest
from invented_run import NAMES, make_run

from core.config import make_parser, parse
from core.pipeline import Run
from tools.report.make_report import write_report

api = pytest.importorskip("playwright.sync_api", reason="needs playwright: requirements-dev.txt")
pytestmark = pytest.mark.xdist_group("browser")  # one browser and one report serve all

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = """<img src=x onerror="alert(1)">'&"""  # a class and an evaluation are called so
PATIENCE = 20_000  # milliseconds; a busy machine is slow
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)} in the PATH")
    api.expect.set_options(timeout=PATIENCE)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """The report of a made-up run, and the scores that it shows, by evaluation."""
    names = tuple(HOSTILE if name == "car" else name for name in NAMES)
    arguments = make_run(tmp_path_factory.mktemp("browser"), names)
    config, _ = parse(make_parser("test", ""), arguments)
    folder = Run(config).folder / "evaluation"
    shutil.copytree(folder / "mars", folder / HOSTILE)
    content = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/scores.json")}
    return write_report(config, arguments), content


@pytest.fixture
def open_page(browser, scores):
    """Opens the report with options of a browser context; no page may complain or call out."""
    problems, contexts = [], []

    def opened(**options):
        contexts.append(browser.new_context(**{"viewport": DESKTOP, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: r.url.startswith("data:") or requests.append(r.url))
        page.goto(scores[0].as_uri())
        return page

    requests = []
    yield opened
    for context in contexts:
        context.close()
    assert problems == []
    assert requests == [scores[0].as_uri()] * len(contexts)


@pytest.fixture
def page(open_page):
    return open_page()


def column(page, k: int) -> list[str]:
    """Texts of the k-th column of the table of classes, from above."""
    return page.locator(f"#iou tbody tr > :nth-child({k + 1})").all_inner_texts()


def gains(scores: dict[str, dict], over: str, base: str) -> dict[str, float]:
    """By class, the differences of the percentages as they are printed, the greatest first."""
    columns = [
        [float(f"{100 * v:.1f}") for v in scores[n]["per_class"]["iou"]] for n in (over, base)
    ]
    rows = zip(scores[over]["classes"], *columns, strict=True)
    values = {name: round(a - b, 1) for name, a, b in rows}
    return dict(sorted(values.items(), key=lambda item: -item[1]))


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def shown(page) -> str:
    """Which image the viewer shows, without the space around it."""
    return page.locator("#viewer small").inner_text().split(",")[0]


def choose(page, name: str, label: str) -> None:
    page.locator(f"[name={name}]").select_option(label=label)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page_fits_the_screen_in_either_scheme(open_page, size, scheme):
    page = open_page(viewport=size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    page.locator("#viewer [name=enlarge]").click()
    viewer = page.locator("#viewer")
    assert viewer.evaluate("v => v.scrollWidth <= v.clientWidth")
    assert viewer.evaluate("v => v.scrollHeight <= v.clientHeight")


def test_scheme_is_the_systems_until_it_is_chosen(open_page):
    page = open_page(color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.locator("#theme").click()
    light = page.evaluate(colour)
    page.keyboard.press("d")
    assert light == "rgb(255, 255, 255)" != dark == page.evaluate(colour)


def test_heads_of_columns_sort_the_classes(page, scores):
    expected = list(gains(scores[1], "mars", "wsss_best").values())
    assert list(map(number, column(page, 1))) == expected
    head = page.locator("#iou thead button", has_text="Gain")
    head.click()
    assert list(map(number, column(page, 1))) == expected[::-1]
    assert head.locator("..").get_attribute("aria-sort") == "ascending"
    page.locator("#iou thead button", has_text="MARS").focus()
    page.keyboard.press("Enter")
    iou = [number(row.inner_text()) for row in page.locator("#iou tbody td[data-run=mars]").all()]
    assert iou == sorted(iou, reverse=True)
    page.locator("#iou thead button", has_text="Class").click()
    names = page.locator("#iou tbody tr").evaluate_all("rows => rows.map(r => r.dataset.class)")
    assert names[1:] == sorted(names[1:]) and set(names) == set(scores[1]["mars"]["classes"])


def test_gain_is_that_of_the_chosen_evaluations(page, scores):
    choose(page, "over", "Fully supervised")
    choose(page, "base", "MARS")
    expected = gains(scores[1], "supervised", "mars")
    assert list(map(number, column(page, 1))) == list(expected.values())
    assert "Fully supervised over MARS" in page.locator("#gains figcaption").inner_text()
    bars = page.locator("#gains .bars p")
    assert bars.locator("b").all_inner_texts() == list(expected)
    widths = bars.locator("i").evaluate_all("bars => bars.map(b => b.offsetWidth)")
    assert widths[0] == max(widths) > 50
    assert page.locator("#lists").is_hidden()
    choose(page, "base", "Debiased labels")
    assert page.locator("#lists").is_visible()


def test_columns_of_the_table_are_chosen(page):
    head = page.locator("#iou thead th", has_text="Complement")
    assert head.is_hidden()
    page.get_by_role("checkbox", name="Complement").check()
    assert head.is_visible()
    assert page.locator("#iou td[data-run=complement]").first.is_visible()
    page.get_by_role("checkbox", name="MARS").uncheck()
    assert page.locator("#iou td[data-run=mars]").first.is_hidden()


def test_arrow_keys_step_through_the_images_and_round(page):
    strips = page.locator(".gallery").first.locator(".strip small").all_text_contents()
    ids = [text.split(",")[0] for text in strips]
    seen = []
    for _ in range(len(ids) + 1):
        seen.append(shown(page))
        page.keyboard.press("ArrowRight")
    assert seen == [*ids, ids[0]]
    page.keyboard.press("ArrowLeft")
    assert shown(page) == ids[0]
    assert page.locator("#viewer output").inner_text() == f"1 of {len(ids)}"
    page.locator("[name=next]").click()
    assert shown(page) == ids[1]


def test_keys_that_a_control_uses_do_not_step(page):
    before = shown(page)
    page.locator("[name=wipe]").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("[name=wipe]").input_value() == "51"
    page.keyboard.press("Control+l")
    assert shown(page) == before
    assert page.locator(".stage span.left").inner_text() == "Pseudo label"


def test_images_are_filtered_by_class(page):
    everything = page.locator("#viewer output").inner_text()
    choose(page, "class", "train")
    assert page.locator("#viewer output").inner_text() != everything
    count = int(page.locator("#viewer output").inner_text().split()[-1])
    for _ in range(count):
        assert "train" in page.locator("#viewer h4").inner_text()
        page.keyboard.press("ArrowRight")


def test_drag_and_slider_wipe_between_two_layers(page):
    page.locator(".stage").scroll_into_view_if_needed()
    box = page.locator(".stage").bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, y, steps=4)
    page.mouse.up()
    assert page.locator("[name=wipe]").input_value() == "25"
    api.expect(page.locator("#viewer:modal")).not_to_be_attached()
    edge = page.locator(".stage .edge").bounding_box()
    assert edge["x"] - box["x"] == pytest.approx(box["width"] / 4, abs=3)
    page.keyboard.press(".")
    assert page.locator("[name=wipe]").input_value() == "30"
    page.locator("[name=wipe]").fill("80")
    clip = page.locator(".stage img.right").evaluate("i => getComputedStyle(i).clipPath")
    assert clip == "inset(0px 0px 0px 80%)"


def test_layers_are_those_of_the_image(page):
    assert page.locator(".stage span.right").inner_text() == "Debiased label"
    page.keyboard.press("r")
    assert page.locator(".stage span.right").inner_text() == "Network, plain labels"
    choose(page, "left", "Image")
    assert page.locator(".stage img.left").is_hidden()
    choose(page, "gallery", "Validation images")
    names = [page.locator(f".stage span.{side}").inner_text() for side in ("left", "right")]
    assert names == ["WSSS, best threshold", "MARS"]
    strip = page.locator(".gallery").nth(1).locator(".strip").first
    source = strip.locator("figure", has_text="MARS").locator("img").get_attribute("src")
    assert page.locator(".stage img.right").get_attribute("src") == source


def test_click_enlarges_and_escape_goes_back(page):
    stage = page.locator(".stage")
    stage.scroll_into_view_if_needed()
    small, place = stage.bounding_box(), page.evaluate("scrollY")
    stage.click(position={"x": 10, "y": 10})
    assert stage.bounding_box()["width"] > 1.3 * small["width"]
    page.keyboard.press("ArrowRight")
    assert page.locator("#viewer output").inner_text().startswith("2 of")
    page.keyboard.press("Escape")
    api.expect(page.locator("#viewer:modal")).not_to_be_attached()
    assert stage.bounding_box() == small and page.evaluate("scrollY") == place


def test_finger_enlarges_and_wipes_on_a_phone(open_page):
    page = open_page(viewport=PHONE, has_touch=True, is_mobile=True)
    page.locator(".stage").tap()
    api.expect(page.locator("#viewer:modal")).to_be_attached()
    page.locator("[name=enlarge]").tap()
    api.expect(page.locator("#viewer:modal")).not_to_be_attached()
    page.locator(".stage").scroll_into_view_if_needed()
    box = page.locator(".stage").bounding_box()
    screen = page.context.new_cdp_session(page)
    for kind, share in {"touchStart": 0.5, "touchMove": 0.25, "touchEnd": None}.items():
        points = (
            [] if share is None else [{"x": box["x"] + share * box["width"], "y": box["y"] + 9}]
        )
        screen.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    api.expect(page.locator("[name=wipe]")).to_have_value("25")
    api.expect(page.locator("#viewer:modal")).not_to_be_attached()


def test_click_on_a_picture_of_a_strip_opens_it(page):
    choose(page, "class", "train")
    figure = page.locator(".gallery").nth(1).locator(".strip").nth(1).locator("figure").nth(1)
    image_id = figure.locator("xpath=ancestor::section").locator("small").inner_text()
    figure.locator(".pane").click()
    api.expect(page.locator("#viewer:modal")).to_be_attached()
    assert shown(page) == image_id.split(",")[0]
    assert page.locator(".stage span.right").inner_text() == "Ground truth"


def test_names_are_text_everywhere(page):
    assert page.locator("[onerror]").count() == 0
    assert HOSTILE in page.locator("#iou thead").text_content()
    assert HOSTILE in page.locator("#gains b").all_inner_texts()
    choose(page, "class", HOSTILE)
    assert HOSTILE in page.locator("#viewer h4").inner_text()
    page.get_by_role("checkbox", name=HOSTILE).check()
    choose(page, "over", HOSTILE)
    assert page.locator("#lists").is_visible()  # nobody knows its list


def test_injected_scripts_do_not_run(browser, scores):
    context = browser.new_context()
    page = context.new_page()
    page.goto(scores[0].as_uri())
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.injected = true'}))"
    )
    assert page.evaluate("window.injected") is None
    context.close()


def test_analyses_show_figure_table_and_command_in_order(page):
    articles = page.locator("article.analysis")
    assert articles.locator("h3").all_inner_texts() == ["First", "Last"]
    figure = articles.first.locator("img")
    assert figure.evaluate("i => [i.naturalWidth, i.naturalHeight]") == [320, 160]
    cells = articles.first.locator("tbody tr").first
    assert cells.is_hidden()
    articles.first.locator("summary").click()
    assert cells.locator("th, td").all_inner_texts() == ["a", "61.23"]
    assert articles.nth(1).locator("tbody tr").first.is_visible()
    assert "python tools/some.py" in articles.first.inner_text()


def test_page_reads_well_without_scripts(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("#iou tbody td[data-run=mars]").first.is_visible()
    assert page.locator(".strip img").first.is_visible()
    for part in ("#viewer", "#theme", "#gains", "#pair"):
        assert page.locator(part).is_hidden()
