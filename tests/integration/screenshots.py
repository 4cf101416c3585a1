"""Pictures of the page before, during and after a stop: `python -m tests.integration.screenshots`.

They are taken of the real thing: the standalone service, the built-in provider, Chromium.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.integration.browser import Chromium, Standalone, Tab, Tabs, expect
from tests.integration.processes import ROOT

FOLDER = ROOT / "docs" / "screenshots"
QUESTION = "What makes a good stop button?"


def take(tab: Tab, name: str) -> None:
    tab.page.screenshot(path=FOLDER / f"{name}.png", animations="disabled", caret="hide")


def a_stop(tabs: Tabs) -> None:
    """The three moments, in a window."""
    tab = tabs.open()
    tab.page.set_viewport_size({"width": 1080, "height": 600})
    tab.message.fill(QUESTION)
    take(tab, "before")
    tab.ask(QUESTION)
    tab.eventually(lambda: len(tab.words()) >= 60, "words")
    take(tab, "during")
    tab.stop.click()
    tab.figure("Stop time")
    expect(tab.mark).to_be_visible()
    take(tab, "after")


def on_a_phone(tabs: Tabs) -> None:
    """Small, dark, with Markdown, and a provider that asks for a pause."""
    tab = tabs.open()
    tab.page.emulate_media(color_scheme="dark")
    tab.page.set_viewport_size({"width": 390, "height": 760})
    tab.page.get_by_label("The next answer").select_option(label="uses Markdown")
    tab.ask("Show me some code.")
    expect(tab.answer.locator("blockquote")).to_contain_text("paid for.")
    take(tab, "dark")
    tab.stop.click()
    tab.page.get_by_label("The next answer").select_option(label="is refused for 10 s")
    tab.ask("And more?")
    expect(tab.failure).to_be_visible()
    take(tab, "pause")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rig = Standalone.start(Path(folder) / "server.log")
        chromium = Chromium(device_scale_factor=1.5)
        try:
            tabs = Tabs(chromium.profile, rig)
            a_stop(tabs)
            on_a_phone(tabs)
        finally:
            chromium.close()
            rig.stop()


if __name__ == "__main__":
    main()
