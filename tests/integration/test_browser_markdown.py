"""Markdown in a real browser: a text's nodes, and how few of them a frame touches."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.conftest import PATIENCE
from tests.integration.browser import Tab, Tabs, expect

RENDERED = [
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("# A\n## B ##\n### C\n#### D\n###### E\n#no", "<h3>A</h3><h4>B</h4><h5>C</h5><h6>D</h6>"
     "<h6>E</h6><p>#no</p>"),
    ("**b** __b__ *i* _i_ ~~d~~", "<p><strong>b</strong> <strong>b</strong> <em>i</em> <em>i</em>"
     " <del>d</del></p>"),
    ("***both*** **a *b***", "<p><strong><em>both</em></strong> <strong>a <em>b</em></strong></p>"),
    ("2 * 3 * 4, a_b_c, **open, * x *", "<p>2 * 3 * 4, a_b_c, **open, * x *</p>"),
    (r"\*no\* \# \\", r"<p>*no* # \</p>"),
    ("`a` ``b`c`` ` `` ` `open", "<p><code>a</code> <code>b`c</code> <code>``</code> `open</p>"),
    ("`**no**` **`yes`**", "<p><code>**no**</code> <strong><code>yes</code></strong></p>"),
    ("- a\n- b\n  - c\n    more\n- d", "<ul><li>a</li><li>b<ul><li>c<br>more</li></ul></li>"
     "<li>d</li></ul>"),
    ("3. a\n4. b\n\n   para\n\n5) c", '<ol start="3"><li>a</li><li>b<p>para</p></li></ol>'
     '<ol start="5"><li>c</li></ol>'),
    ("* a\n\n* b\n\nend", "<ul><li>a</li><li>b</li></ul><p>end</p>"),
    ("text\n2024. no\n- a\n1. b", "<p>text<br>2024. no</p><ul><li>a</li></ul><ol><li>b</li></ol>"),
    ("- a\n\t- b", "<ul><li>a<ul><li>b</li></ul></li></ul>"),
    ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"),
    ("a\n\n---\n\n* * *", "<p>a</p><hr><hr>"),
    ("[a *b*](https://x.example/y?z=1&w=2)", '<p><a href="https://x.example/y?z=1&amp;w=2">'
     "a <em>b</em></a></p>"),
    ("[a](http://x.example/s_(t)) ![alt](https://x.example/i.png)", '<p><a href="'
     'http://x.example/s_(t)">a</a> <a href="https://x.example/i.png">alt</a></p>'),
    ("see https://x.example/a. (http://y.example/b) <https://z.example>", '<p>see <a href="'
     'https://x.example/a">https://x.example/a</a>. (<a href="http://y.example/b">'
     'http://y.example/b</a>) <a href="https://z.example/">https://z.example</a></p>'),
    ("a < b && c > d &amp;", "<p>a &lt; b &amp;&amp; c &gt; d &amp;amp;</p>"),
    ("", ""),
]  # fmt: skip

HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "[a](javascript:window.hit=1)",
    "[a](JaVaScRiPt:window.hit=1)",
    "[a](java\tscript:window.hit=1)",
    "[a](&#106;avascript:window.hit=1)",
    "[a](data:text/html,<script>window.hit=1</script>)",
    "[a](vbscript:x) [b](file:///etc/passwd) [c](//x.example) [d](/api/chat/cancel/x) [e](#)",
    "<javascript:window.hit=1>",
    "![a](javascript:window.hit=1)",
    '[a](https://x.example/"onmouseover="window.hit=1)',
    "[a](https://x.example/ \"t\" onclick=window.hit=1)",
    "```html\n<script>window.hit = 1</script>\n```",
    "```\"><img src=x onerror=window.hit=1>\n```",
    "`<b onclick=x>`",
    "# <svg onload=window.hit=1>",
    "- <iframe srcdoc='<script>parent.hit=1</script>'>",
    "> <style>*{display:none}</style>",
    "[<img src=x onerror=window.hit=1>](https://x.example)",
    "https://x.example/<script>window.hit=1</script>",
]  # fmt: skip

RENDER = """async ([texts, steps]) => {
    const { Rendering } = await import("./api/chat/markdown.js");
    return texts.map((text) => {
        const element = document.createElement("div");
        document.body.append(element);
        const rendering = new Rendering(element);
        for (let n = 0; steps && n < text.length; n += 1) rendering.update(text.slice(0, n));
        while (!rendering.update(text));
        const [html, links] = [element.innerHTML, element.querySelectorAll("a")];
        const fine = [...links].every((a) => /^https?:$/.test(a.protocol)
            && a.rel.includes("noopener") && a.target === "_blank");
        const all = [...element.querySelectorAll("*")];
        const names = all.map((one) => one.localName);
        const attributes = all.flatMap((one) => one.getAttributeNames());
        element.remove();
        return { html, fine, names, attributes };
    });
}"""

FIXED = re.compile(r' (?:dir|target|rel|tabindex|role|aria-label|data-language)="[^"]*"')


def render(tab: Tab, texts: list[str], *, steps: bool = False) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = tab.page.evaluate(RENDER, [texts, steps])
    return made


@pytest.mark.parametrize("steps", [False, True])
def test_markdown(tabs: Tabs, steps: bool) -> None:
    """A text's nodes, the same whether it came at once or character by character."""
    made = render(tabs.open(), [text for text, _ in RENDERED], steps=steps)
    assert [FIXED.sub("", one["html"]) for one in made] == [html for _, html in RENDERED]
    assert all(one["fine"] for one in made)


def test_code(tabs: Tabs) -> None:
    """As it was written, tabs and all; also while the fence is open, and in a list."""
    texts = ["```python\n\tif a < b:\n\n# no heading\n```\nafter", "a\n~~~\n```\nopen", "```",
             "1. a\n   ```sh\n   b\n     c\n   ```\n2. d"]  # fmt: skip
    made = [one["html"] for one in render(tabs.open(), texts)]
    whole, opened, empty, listed = (FIXED.sub("", html) for html in made)
    assert whole == "<pre><code>\tif a &lt; b:\n\n# no heading</code></pre><p>after</p>"
    assert 'data-language="python"' in made[0]
    assert 'aria-label="Code, python"' in made[0]
    assert 'tabindex="0"' in made[0]
    assert opened == "<p>a</p><pre><code>```\nopen</code></pre>"
    assert empty == "<pre><code></code></pre>"
    assert listed == "<ol><li>a<pre><code>b\n  c</code></pre></li><li>d</li></ol>"


def test_what_a_model_says_stays_text(tabs: Tabs) -> None:
    """No markup, no handler, no link that leads to anything but http and https."""
    tab = tabs.open()
    known = {"p", "br", "a", "pre", "code", "h3", "ul", "li", "blockquote", "em", "strong"}
    for text, made in zip(HOSTILE, render(tab, HOSTILE), strict=True):
        assert set(made["names"]) <= known, text
        assert made["fine"], text
        assert [name for name in made["attributes"] if name.startswith("on")] == [], text
    assert tab.page.evaluate("window.hit") is None


DRAW = """async (texts) => {
    const { Rendering } = await import("./api/chat/markdown.js");
    return texts.map((text) => {
        const began = performance.now();
        const rendering = new Rendering(document.createElement("div"));
        while (!rendering.update(text));
        return performance.now() - began;
    });
}"""


def test_hostile_lengths(tabs: Tabs) -> None:
    """Nothing that is long or deep takes long, or is too much."""
    size = 20_000
    texts = [
        mark * size for mark in ("*", "**a ", "_a ", "`a``", "[", "[a](", "![", "> ", "- ", "<")
    ]
    texts += ["".join(f"{'  ' * n}- a\n" for n in range(200)), "*" * size + "a" + "*" * size]
    texts += ["https://" * (size // 8), "(" * size, "a\n" * size, "1. a\n\n" * (size // 10)]
    gap, long = " " * 3000, " " * 100_000
    texts += [f"#{gap}x\u2028x", f"# a{long}b", f"-{long}x\u2028x", f"```{long}`", f"` {long}x`"]
    texts += ["~" * len(long) + "`", "\\*" * 130_000, "---\n" * 130_000]
    slow = PATIENCE * 1000  # what grows with the square of its length takes minutes
    took = tabs.open().page.evaluate(DRAW, texts)
    assert [text[:9] for text, ms in zip(texts, took, strict=True) if ms > slow] == []


def test_only_what_has_changed_is_drawn_anew(tabs: Tabs) -> None:
    """What is selected, or read aloud, stays when more comes below it."""
    same = tabs.open().page.evaluate(
        """async () => {
            const { Rendering } = await import("./api/chat/markdown.js");
            const element = document.createElement("div");
            const rendering = new Rendering(element);
            rendering.update("# One\\n\\ntwo\\n\\nthr");
            const before = [...element.children];
            rendering.update("# One\\n\\ntwo\\n\\nthree\\n\\nfour");
            return before.map((node, index) => node === element.children[index]);
        }"""
    )
    assert same == [True, True, False]


LONG_BLOCKS = {
    "a list": "".join(f"- item {n} is **one** of `many`\n" for n in range(4000)),
    "numbers": "".join(f"{n}. an [item](https://x.example/{n})\n" for n in range(1, 8000)),
    "a table": "| n | is |\n|---|---|\n" + "| row | **one** |\n" * 25_000,
    "a paragraph": "a line of *one* paragraph\n" * 8000,
    "a line": "words of *one* line, " * 10_000,
    "a word": "word" * 50_000,
    "code": "```c\n" + "call();\n" * 25_000,
    "a line of code": "```\n" + "call();" * 30_000,
    "a list in an item": "- one\n" + "  - item of **one** item\n" * 4000,
    "a quote": "> line of **one** quote\n" * 4000,
    "a heading": "# " + "words of *one* heading, " * 8000,
}

TOUCHED = """async ([text, step]) => {
    const { Rendering } = await import("./api/chat/markdown.js");
    const element = document.createElement("div");
    const rendering = new Rendering(element);
    const observer = new MutationObserver(() => {});
    observer.observe(element, { childList: true, subtree: true });
    const size = (node) => {
        const all = document.createTreeWalker(node, NodeFilter.SHOW_ALL);
        let count = 1 + node.textContent.length;
        while (all.nextNode()) count += 1;
        return count;
    };
    const touched = () => observer.takeRecords()
        .flatMap((record) => [...record.addedNodes, ...record.removedNodes])
        .reduce((count, node) => count + size(node), 0);
    let most = 0;
    for (let [at, done] = [0, false]; !done || at < text.length; ) {
        at = Math.min(at + step, text.length);
        done = rendering.update(text.slice(0, at));
        most = Math.max(most, touched());
    }
    return [most, element.innerHTML];
}"""

A_FRAME = 6000
"""Nodes that come and go in a frame, at most: it reads 8,000 characters, and some may be open."""


@pytest.mark.parametrize("block", LONG_BLOCKS)
def test_a_long_block_costs_no_more_than_a_short_one(tabs: Tabs, block: str) -> None:
    """What has been drawn of it stays, also within it; and much at once is drawn in many frames."""
    page, text = tabs.open().page, LONG_BLOCKS[block]
    grown, html = page.evaluate(TOUCHED, [text, 1000])
    at_once, same = page.evaluate(TOUCHED, [text, len(text)])
    assert max(grown, at_once) < 60_000  # nodes and characters that come or go
    assert same == html


COUNT = """() => {
    window.counted = { most: 0, now: 0, frames: 0 };
    const count = (nodes) => [...nodes].reduce(
        (sum, node) => sum + 1 + (node.querySelectorAll?.("*").length ?? 0), 0);
    new MutationObserver((records) => {
        for (const { addedNodes, removedNodes } of records) {
            counted.now += count(addedNodes) + count(removedNodes);
        }
    }).observe(document.getElementById("turns"), { childList: true, subtree: true });
    const frame = () => {
        if (counted.now > 0) counted.frames += 1;
        counted.most = Math.max(counted.most, counted.now);
        counted.now = 0;
        requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
}"""


@pytest.mark.parametrize("end", ["completed", "broken off"])
def test_a_long_list_that_comes_at_once(tabs: Tabs, end: str) -> None:
    """No frame draws much of it, also at its end, which is said before all of it is drawn."""
    text = LONG_BLOCKS["a list"]
    tokens = len(text.split())
    tab = tabs.open(anew=True)
    again = tab.failure.get_by_role("button", name="Try again")
    tab.page.evaluate(COUNT)
    cut = {"truncate_after": tokens - 1} if end == "broken off" else {}
    tab.ask(text=text, tokens=tokens, rate=0, **cut)
    if end == "completed":
        expect(tab.state).to_have_text("The answer is complete.")
    else:
        again.focus()
    whole = tab.turns.last.locator(".answer[aria-busy=false]")
    expect(whole.locator("li")).to_have_count(4000)
    expect(tab.answer.locator("li").last).to_contain_text("item 3999 is one of")
    counted = tab.page.evaluate("counted")
    assert counted["most"] < A_FRAME
    assert counted["frames"] > len(text) / 10_000
    if end == "completed":
        tab.page.reload()
        tab.ready()
        expect(whole.locator("li")).to_have_count(4000)
    else:
        expect(again).to_be_focused()  # what was drawn meanwhile has left it alone


def test_long_thoughts(tabs: Tabs) -> None:
    """They are drawn as they come, not all of them each time."""
    tab = tabs.open(anew=True)
    tab.page.evaluate(COUNT)
    tab.ask(text="a thought\n", tokens=8000, reasoning=8000, rate=0)
    thoughts = tab.turns.last.locator(".answer[aria-busy=false] .thoughts")
    expect(thoughts.locator(":scope > span")).to_have_count(40)
    assert thoughts.evaluate("(e) => e.textContent") == "a thought\n" * 4000
    assert tab.page.evaluate("counted.most") < 300


def test_markdown_while_it_streams(tabs: Tabs) -> None:
    """Code is code before its fence is closed; what follows is not."""
    text = "Look:\n\n```python\nstop( now )\n```\n\n**Done** now. "
    tab = tabs.open()
    tab.ask(text=text, tokens=7, rate=100, silent_after=4, silent_for=0.5)
    code = tab.answer.get_by_role("group", name="Code, python")
    expect(code).to_have_text("stop( now", use_inner_text=True)
    expect(tab.state).to_have_text("The answer is complete.")
    expect(code).to_have_text("stop( now )", use_inner_text=True)
    expect(tab.answer.locator("strong")).to_have_text("Done")
