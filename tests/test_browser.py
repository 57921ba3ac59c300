"""The explorer as its user has it: JupyterLab in a headless Chromium, moved by the keyboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from memdfa_lab import widgets

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "06_explore.ipynb"
READY = """async () => {
    const context = jupyterapp.shell.currentWidget.context;
    await context.ready;
    await context.sessionContext.ready;
    jupyterapp.commands.execute('notebook:run-all-cells');
}"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")]


@pytest.fixture
def lab(tmp_path):
    """Start JupyterLab on a copy of the notebook, with no settings but its own; yield the notebook's address."""
    shutil.copy(NOTEBOOK, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}
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
        f"--ServerApp.root_dir={tmp_path}",
        "--LabApp.expose_app_in_browser=True",
        f"--LabApp.app_settings_dir={tmp_path / 'settings'}",
    ]
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
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


def test_the_explorer_in_jupyterlab(lab, tmp_path):
    problems: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.set_default_timeout(60_000)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.goto(lab)
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context")
        page.evaluate(READY)

        def shows(**setting) -> None:
            """Wait for the pictures and the numbers of a setting."""
            expected = widgets.explore(**setting)
            said = re.compile(re.escape(expected.summary()))
            playwright.expect(page.locator(".widget-html img").first).to_have_attribute("alt", said, timeout=60_000)
            playwright.expect(page.locator(".widget-html img").nth(1)).to_have_attribute("alt", said)
            for peak in expected.table["peak_bytes"]:
                playwright.expect(page.locator(f".widget-html span[title='{peak:,} bytes']").first).to_be_visible()

        shows()
        before = page.locator(".widget-html img").first.get_attribute("src")
        depth = page.locator(".noUi-handle").first
        depth.focus()
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"):
            page.keyboard.press(key)
        shows(depth=34)
        assert page.locator(".widget-html img").first.get_attribute("src") != before
        page.get_by_label("optimizer").select_option("adam")
        page.get_by_label("FA", exact=True).uncheck()
        shows(depth=34, optimizer="adam", rules=("bp", "dfa", "memdfa"))
        budget = page.get_by_label("memory")
        budget.fill("much")
        budget.press("Enter")
        playwright.expect(page.get_by_role("alert")).to_contain_text("the budget must be a size")
        budget.fill("24 GB")
        budget.press("Enter")
        playwright.expect(page.get_by_text("What fits into 24 GB")).to_be_visible()
        playwright.expect(page.get_by_role("alert")).to_have_count(0)
        for width in (1280, 800):  # nothing is wider than the page
            page.set_viewport_size({"width": width, "height": 1400})
            box = page.locator(".widget-vbox").first.bounding_box()
            assert box["x"] + box["width"] <= width
            for image in page.locator(".widget-html img").all():
                picture = image.bounding_box()
                assert box["x"] <= picture["x"]
                assert picture["x"] + picture["width"] <= box["x"] + box["width"] + 1
        browser.close()
    assert problems == []
