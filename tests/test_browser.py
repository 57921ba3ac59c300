"""The explorers as their user has them, in a headless Chromium: notebook 06 in JupyterLab, and `memdfa explore`.

Screenshots go to the test's temporary folder, or to $MEMDFA_SCREENSHOTS if it is set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import memdfa_lab as ml
from memdfa_lab import widgets
from memdfa_lab.widgets import step

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "06_explore.ipynb"
READY = """async () => {
    const context = jupyterapp.shell.currentWidget.context;
    await context.ready;
    await context.sessionContext.ready;
    jupyterapp.commands.execute('notebook:run-all-cells');
}"""
# Run a cell that sleeps, and interrupt it once it prints.
INTERRUPT = """async () => {
    const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const future = kernel.requestExecute({code: "import time; print('asleep', flush=True); time.sleep(600)"});
    await new Promise(awake => { future.onIOPub = message => { if (message.content.text) awake(); } });
    await jupyterapp.commands.execute('notebook:interrupt-kernel');
    await future.done;
}"""
DRAWN = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
RUN_CELL = """async (start) => {
    const notebook = jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = notebook.widgets.findIndex(cell => cell.model.sharedModel.getSource().startsWith(start));
    await jupyterapp.commands.execute('notebook:run-cell');
}"""
# How well text can be read: the ratio of the luminances of its colour and of the first background behind it.
CONTRAST = """(element) => {
    const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b]
        .map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const style = getComputedStyle(element);
    const text = numbers(element instanceof SVGElement ? style.fill : style.color);
    let behind = element, ground = [255, 255, 255];
    for (; behind; behind = behind.parentElement) {
        const color = numbers(getComputedStyle(behind).backgroundColor);
        if (color[3] !== 0) { ground = color; break; }
    }
    const [low, high] = [luminance(text), luminance(ground)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
}"""
LONG = 120_000  # ms: on a machine that is busy with other tests

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")]


@pytest.fixture
def pictures(tmp_path):
    """Return the folder for screenshots."""
    folder = Path(os.environ.get("MEMDFA_SCREENSHOTS", tmp_path / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def lab(tmp_path):
    """Start JupyterLab on a copy of the notebook, with no settings but its own; yield the notebook's address."""
    root = tmp_path / "notebooks"  # with nothing in it that comes and goes: JupyterLab would ask where it is
    root.mkdir()
    shutil.copy(NOTEBOOK, root)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},
        "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    }
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "overrides.json").write_text(json.dumps(settings))
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "RUNTIME", "DATA")}
    options = [
        "--ip=127.0.0.1",
        f"--port={port}",
        "--no-browser",
        "--allow-root",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=explore",
        f"--ServerApp.root_dir={root}",
        "--LabApp.expose_app_in_browser=True",
        f"--LabApp.app_settings_dir={tmp_path / 'settings'}",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "MEMDFA_DATA"} | own
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/api?token=explore").close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        yield f"{address}/doc/tree/{NOTEBOOK.name}?token=explore&reset"
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture
def served(tmp_path):
    """Run `memdfa explore`; yield the address that it says."""
    pytest.importorskip("voila", reason='no Voila: pip install "memdfa_lab[explore]"')
    # Where tests run in the background, Ctrl-C is ignored, and processes inherit that.
    command = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command += "; from memdfa_lab.cli import main; sys.exit(main(['explore', '--no-browser']))"
    environment = {name: value for name, value in os.environ.items() if name != "MEMDFA_DATA"}
    with (tmp_path / "log").open("w") as log:
        done = subprocess.Popen(
            [sys.executable, "-c", command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # with Voila, to be ended as one
        )
    try:
        said = done.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S{16,}", said)
        assert found, said + (tmp_path / "log").read_text()
        yield found[0]
        done.send_signal(signal.SIGINT)
        assert done.wait(timeout=60) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(done.pid, signal.SIGKILL)
        done.communicate()


@contextmanager
def opened(address):
    """Open a page and yield it; nothing may go wrong in it."""
    problems: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 1800})
        page.set_default_timeout(LONG)
        playwright.expect.set_options(timeout=LONG)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.on("requestfailed", lambda request: problems.append(f"{request.url}: {request.failure}"))
        page.goto(address)
        yield page
        assert page.get_by_text("Traceback").count() == 0
        browser.close()
    assert problems == []


def slider(explorer, name):
    row = explorer.locator(".widget-inline-hbox").filter(has=explorer.page.get_by_text(name, exact=True))
    return row.locator(".noUi-handle")


def enter(field, text):
    """Write a text into a field, as someone does who ends with Enter."""
    field.fill(text)
    field.press("Enter")


def press(explorer, name, *keys):
    slider(explorer, name).focus()
    for key in keys:
        explorer.page.keyboard.press(key)


def play_with_memory(explorer):
    expect, setting = playwright.expect, {}

    def shows(**changes):
        """Wait for the pictures and the numbers of a setting."""
        setting.update(changes)
        expected = widgets.explore(**setting)
        said = re.compile(re.escape(expected.summary()))
        for picture in (0, 1):
            expect(explorer.locator("img").nth(picture)).to_have_attribute("alt", said)
        for peak in expected.table["peak_bytes"]:
            expect(explorer.locator(f"span[title='{peak:,} bytes']").first).to_be_visible()
        for row in expected.table.itertuples():
            expect(explorer.locator("td").get_by_text(f"{row.largest_batch:,}", exact=True).first).to_be_visible()

    shows()
    before = explorer.locator("img").first.get_attribute("src")
    press(explorer, "hidden layers", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight")
    shows(depth=48)  # the slider is logarithmic
    assert explorer.locator("img").first.get_attribute("src") != before
    press(explorer, "units, or filters", *["ArrowLeft"] * 5)
    shows(width=128)
    press(explorer, "batch size", "ArrowLeft")
    shows(batch=100)
    explorer.get_by_label("inputs", exact=True).select_option("3,072 (CIFAR)")
    shows(inputs=3072)
    explorer.get_by_label("optimizer", exact=True).select_option("adam")
    explorer.get_by_label("FA", exact=True).uncheck()
    shows(optimizer="adam", rules=("bp", "dfa", "memdfa"))
    explorer.get_by_label("matrices B", exact=True).select_option("stored")
    explorer.get_by_label("activation", exact=True).select_option("gelu")
    shows(feedback="stored", activation="gelu")
    explorer.get_by_label("BatchNorm").check()
    explorer.get_by_label("draw what rests").check()
    shows(batch_norm=True, count_rest=True)
    explorer.get_by_label("precision", exact=True).select_option("bfloat16")
    explorer.get_by_label("family", exact=True).select_option("3x3 convolutions")
    shows(precision="bfloat16", family="convnet")
    # The line of code says the same, and so does the prediction of the whole network that it makes.
    traces = eval(explorer.locator("pre").inner_text(), {"ml": ml})
    for trace in traces.values():
        expect(explorer.locator(f"span[title='{trace.peak_bytes:,} bytes']").first).to_be_visible()
    budget = explorer.get_by_label("memory")
    enter(budget, "much")
    expect(explorer.get_by_role("alert")).to_contain_text("the budget must be a size")
    enter(budget, "24 GB")
    expect(explorer.get_by_text("What fits into 24 GB")).to_be_visible()
    expect(explorer.get_by_role("alert")).to_have_count(0)
    explorer.get_by_label("family", exact=True).select_option("a model by name")
    name = explorer.get_by_label("model's name")
    enter(name, "resnet1")
    expect(explorer.get_by_role("alert")).to_contain_text("did you mean 'resnet18'")
    enter(name, "resnet18@3x32x32")
    shows(family="model", model="resnet18@3x32x32", budget="24 GB")


def play_with_step(explorer):
    films = {rule: step.film(rule) for rule in ml.RULES}

    def shows(at: int) -> None:
        label = re.search("aria-label='(.*?)'", step.picture(films, at, 6))[1].replace("&#x27;", "'")
        playwright.expect(explorer.locator("div[role=img]")).to_have_attribute("aria-label", label)

    totals = [moment.total_bytes for moment in films["bp"]]
    shows(totals.index(max(totals)))  # it opens at BP's peak
    press(explorer, "moment", "Home", *["ArrowRight"] * 12)
    shows(12)
    press(explorer, "moment", "End")
    shows(max(map(len, films.values())))
    press(explorer, "moment", "Home")
    shows(0)
    explorer.locator(".widget-play button").first.click()
    later = re.compile("MEM-DFA: (recompute|gradient|update|free)")
    playwright.expect(explorer.locator("div[role=img]")).to_have_attribute("aria-label", later)
    explorer.locator(".widget-play button").first.click()
    explorer.get_by_label("optimizer", exact=True).select_option("adam")
    explorer.get_by_label("BP", exact=True).uncheck()
    playwright.expect(explorer.locator("div[role=img]")).to_have_attribute("aria-label", re.compile("^FA: "))


def play_with_training(explorer):
    status, expect = explorer.get_by_role("status"), playwright.expect
    button = {
        name: explorer.get_by_role("button", name=name, exact=True) for name in ("Start", "Pause", "Resume", "Reset")
    }

    expect(status).to_contain_text("not started, step 0 of 3,000, mnist5k")
    button["Start"].dblclick()
    expect(explorer.locator("img")).to_have_attribute("alt", re.compile(r"At step [1-9]\d*: BP loss"))
    expect(status).to_contain_text("training")
    button["Pause"].dblclick()
    expect(status).to_contain_text("paused")
    step = re.search("step [0-9,]+ of", status.inner_text())[0]
    button["Resume"].click()
    expect(status).to_contain_text("training")
    expect(status).not_to_contain_text(step)
    explorer.get_by_label("speed", exact=True).select_option("1 step a second")
    press(explorer, "hidden layers", "ArrowLeft")  # a change starts anew
    expect(status).to_contain_text("not started, step 0 of 3,000")
    explorer.get_by_label("speed", exact=True).select_option("as fast as possible")
    return status, button


def play_with_feedback(explorer):
    expect = playwright.expect
    done = explorer.locator("td").get_by_text("200", exact=True)
    expect(done).to_have_count(3)
    own = widgets.Matrix().singular_values()
    expect(explorer.locator("td").get_by_text(f"{own[0]:.4g}", exact=True).first).to_be_visible()
    explorer.get_by_label("distribution", exact=True).select_option("orthogonal")
    expect(explorer.locator("tr").filter(has_text="in theory").locator("td")).to_have_text(["1", "1"])
    explorer.get_by_label("storage", exact=True).select_option("shared")
    expect(explorer.get_by_role("alert")).to_contain_text("a slice of an orthogonal matrix is not orthogonal")
    explorer.get_by_label("distribution", exact=True).select_option("normal")
    expect(explorer.get_by_role("alert")).to_have_count(0)
    press(explorer, "C, size of e", "ArrowRight")
    own = widgets.Matrix(distribution="normal", storage="shared", outputs=30).singular_values()
    expect(explorer.locator("td").get_by_text(f"{own[0]:.4g}", exact=True).first).to_be_visible()
    explorer.get_by_label("rule", exact=True).select_option("FA")
    expect(explorer.locator("tr").filter(has_text="at each step").locator("td").nth(1)).to_have_text("0.0°")


def look_at(explorers, folder, name):
    """Keep a picture of each, and see that nothing is cut off, unnamed, or hard to read."""
    page, wrong = explorers.first.page, []
    for width in (1280, 800):
        page.set_viewport_size({"width": width, "height": 1800})
        page.evaluate(DRAWN)
        for place, kind in enumerate(("memory", "step", "training", "feedback")):
            explorer, where = explorers.nth(place), f"{name}-{kind}-{width}"
            explorer.screenshot(path=folder / f"{where}.png")
            box = explorer.bounding_box()
            if box["x"] + box["width"] > width:
                wrong.append(f"{where}: wider than the page")
            for picture in explorer.locator("img, div[role=img]").all():
                inner = picture.bounding_box()
                left, right = inner["x"] - box["x"], box["x"] + box["width"] - inner["x"] - inner["width"]
                if inner["width"] < 300 or left < 0 or right < -1:
                    wrong.append(f"{where}: a picture at {inner} of {box}")
            for text in explorer.locator("p, div:has(> table)").all():
                inner = text.bounding_box()
                if inner["x"] + inner["width"] > box["x"] + box["width"] + 1:
                    wrong.append(f"{where}: cut off: {text.inner_text()[:80]}")
            for label in explorer.locator(".widget-label:visible").all():
                if label.evaluate("(element) => element.scrollWidth - element.clientWidth") > 1:
                    wrong.append(f"{where}: cut off: {label.inner_text()}")
            for handle in explorer.locator(".noUi-handle").all():
                if handle.get_attribute("tabindex") != "0":
                    wrong.append(f"{where}: a slider that the keyboard does not reach")
            texts = ".widget-label:visible, th, td, p, b, button:enabled, select, input[type=text]"
            texts += ", div[role=img] div:not(:empty)"
            contrasts = explorer.locator(texts).evaluate_all(f"(all) => all.map(e => [({CONTRAST})(e), e.outerHTML])")
            wrong += [f"{where}: contrast {ratio:.1f} of {text[:200]}" for ratio, text in contrasts if ratio < 4.5]
    assert wrong == []


def test_the_notebook_in_jupyterlab(lab, pictures):
    with opened(lab) as page:
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context")
        page.evaluate(READY)
        explorers = page.locator(".memdfa-explorer")
        playwright.expect(explorers).to_have_count(4)
        play_with_memory(explorers.nth(0))
        play_with_step(explorers.nth(1))
        status, button = play_with_training(explorers.nth(2))
        play_with_feedback(explorers.nth(3))
        button["Start"].click()
        playwright.expect(status).to_contain_text(re.compile("training, step [1-9]"))
        page.evaluate(INTERRUPT)
        playwright.expect(status).to_contain_text("paused")
        button["Resume"].click()
        playwright.expect(status).to_contain_text("training")
        page.evaluate(RUN_CELL, "ml.widgets.live_training(")
        playwright.expect(status).to_contain_text("not started")
        button["Start"].click()
        playwright.expect(explorers.nth(2).locator("img")).to_have_attribute("alt", re.compile("At step [1-9]"))
        button["Pause"].click()
        look_at(explorers, pictures, "light")
        page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
        look_at(explorers, pictures, "dark")


def test_the_page_without_code(served, pictures):
    with opened(served) as page:
        explorers = page.locator(".memdfa-explorer")
        playwright.expect(explorers).to_have_count(4)
        assert page.get_by_text("Exercises").count() == page.get_by_text("check_parameters").count() == 0
        play_with_memory(explorers.nth(0))
        play_with_step(explorers.nth(1))
        play_with_training(explorers.nth(2))
        play_with_feedback(explorers.nth(3))
        look_at(explorers, pictures, "page")
