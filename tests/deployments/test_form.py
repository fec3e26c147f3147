"""A person with a browser starts a batch run from the form of a deployment, and sees what came of it."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from infra.local.prefect_server import PrefectServer, PrefectWorker
from tasks.batch.manifest import open_predictions
from tasks.batch.options import BatchOptions
from tasks.common.blocks import BLOCKS
from tests.eventually import eventually

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = Path("/usr/bin/chromium")
SECONDS_MAX = 120.0


@pytest.fixture
def page() -> Generator[Page]:
    """A page of Debian's Chromium."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[dev]' brings playwright")
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox does not start as root, and the pages are those of our own server.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1300, "height": 1600})
        page.set_default_timeout(SECONDS_MAX * 1000)
        yield page
        browser.close()


def show(page: Page, name: str) -> None:
    """Keep a picture of the page where the environment asks for it."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def submit(page: Page) -> None:
    """Press the button until the page takes it: it does not while it still checks what was typed."""
    form = page.url

    def press() -> str:
        page.get_by_role("button", name="Submit").click()
        page.wait_for_timeout(3000)
        return page.inner_text("body") if page.url == form else ""

    eventually(press, lambda left: not left, seconds=SECONDS_MAX)


@pytest.mark.machines
def test_a_run_is_started_from_the_form_which_describes_every_field_and_shows_its_artifacts(
    page: Page,
    deployed: PrefectServer,
    two_workers: list[PrefectWorker],
    doubling: str,
    customers: Path,
    tmp_path: Path,
) -> None:
    deployment = httpx.get(f"{deployed.api_url}/deployments/name/batch-inference/adhoc").json()["id"]
    page.goto(f"{deployed.ui_url}/v2/deployments/deployment/{deployment}/run")
    page.get_by_text("Max Reject Fraction").wait_for()
    form = " ".join(page.inner_text("body").split())
    undescribed = [
        name
        for name, field in BatchOptions.model_fields.items()
        if " ".join(str(field.description).split()) not in form
    ]

    assert [] == undescribed

    page.locator("input[name=name]").fill("from-the-form")
    page.get_by_label("model", exact=True).fill(doubling)
    page.get_by_label("source", exact=True).fill(str(customers))
    page.get_by_label("destination", exact=True).fill(str(tmp_path / "scores"))
    keys = "//*[contains(text(), 'Key Columns')]"
    page.locator(f"xpath=({keys}/following::button[contains(., 'Add item')])[1]").click()
    page.locator(f"xpath=({keys}/following::textarea)[1]").fill("customer")
    show(page, "form")
    submit(page)
    page.get_by_role("link", name="from-the-form").first.click()
    # Of this run: the page before lists others of the deployment.
    page.get_by_role("tab", name="Artifacts").wait_for()
    page.get_by_text("Completed", exact=True).first.wait_for()
    # What the page has asked for while the run was under way it may not ask for again.
    page.reload()
    page.get_by_text("Completed", exact=True).first.wait_for()
    show(page, "run")
    page.get_by_role("tab", name="Artifacts").click()
    for key in ("batch-progress", "batch-summary", "batch-sample", "batch-distributions"):
        page.get_by_text(key).first.wait_for()
    show(page, "artifacts")
    page.get_by_text("batch-distributions").first.click()
    picture = page.locator("img[src^='data:image/svg+xml']").first
    picture.wait_for()
    show(page, "picture")

    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 360
    assert list(range(10_000)) == sorted(open_predictions(str(tmp_path / "scores")).collect()["customer"])


def test_the_types_of_blocks_have_forms_that_describe_every_field(page: Page, deployed: PrefectServer) -> None:
    for block in BLOCKS:
        page.goto(f"{deployed.ui_url}/v2/blocks/catalog/{block.get_block_type_slug()}/create")
        page.get_by_text("Environment").first.wait_for()
        form = " ".join(page.inner_text("body").split())
        show(page, block.get_block_type_slug())

        assert block.get_block_type_name() in form
        assert [] == [
            name for name, field in block.model_fields.items() if field.description and field.description not in form
        ]
