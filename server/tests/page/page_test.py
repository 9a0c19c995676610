"""Uses the web page as people do, in headless Chromium, against a real server.

    python page_test.py PROGRAM [--chromium FILE] [--screenshots DIRECTORY]

starts `PROGRAM serve`, which must write its address to standard error, and stops it at the end. Needs what
`server/tests/requirements.txt` lists and a Chromium (Debian: `apt-get install chromium`). Every check is an assertion; the exit code is
0 if all hold. With --screenshots there is a picture of each size, theme and state to look at.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright

SIZES = [(360, 740), (768, 1024), (1280, 800)]
THEMES = ["light", "dark"]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Elements that reach out of the window, other than those within something that scrolls or is hidden on purpose.
OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter((element) => {
  const box = element.getBoundingClientRect();
  if (box.width === 0 || (box.right <= innerWidth + 0.5 && box.left >= -0.5)) return false;
  for (let outer = element; outer; outer = outer.parentElement) {
    const { overflowX, clipPath } = getComputedStyle(outer);
    if (clipPath !== 'none' || (outer !== document.body && overflowX !== 'visible')) return false;
  }
  return true;
}).map((element) => element.outerHTML.slice(0, 120))"""

# Puts the focus before everything, as it is when a page has just been opened.
TO_THE_TOP = "document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')"

# Whether all of an element can be seen, whatever scrolls around it.
IN_SIGHT = """(element) => {
  const box = element.getBoundingClientRect();
  for (let outer = element.parentElement; outer; outer = outer.parentElement) {
    const frame = outer.getBoundingClientRect();
    if (getComputedStyle(outer).overflowY !== 'visible' && (box.top < frame.top || box.bottom > frame.bottom)) return false;
  }
  return box.top >= 0 && box.bottom <= document.querySelector('#composer').getBoundingClientRect().top;
}"""


class Server:
    """`PROGRAM serve` on a port that the system chooses, and only on loopback."""

    def __init__(self, program: str, *options: str):
        command = [program, "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for line in self.process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = found[0]
                return
        raise SystemExit(f"{command} ended with code {self.process.wait()} and no address")

    def stop(self):
        self.process.terminate()
        self.process.stderr.close()
        self.process.wait(timeout=30)


def open_page(context, url: str) -> Page:
    """The page, which must neither complain nor load anything from elsewhere."""
    page = context.new_page()
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(f"error: {error}"))
    page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
    page.on("request", lambda request: request.url.startswith((url, "data:")) or page.complaints.append(request.url))
    page.goto(url)
    expect(page.locator("#connection")).to_have_text("Connected")
    expect(page.locator("#model option")).not_to_have_count(0)
    return page


def say(page: Page, text: str):
    page.fill("#message", text)
    page.keyboard.press("Enter")


def answered(page: Page, count: int):
    expect(page.locator(".turn.assistant")).to_have_count(count)
    expect(page.locator(".turn.busy")).to_have_count(0, timeout=60_000)


def check_layout(page: Page, state: str):
    width = page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], f"{state}: the page is {width[0]} wide in a window of {width[1]}"
    overflowing = page.evaluate(OVERFLOWING)
    assert not overflowing, f"{state}: out of the window: {overflowing}"


def check_access(page: Page, state: str):
    result = Axe().run(page, options={"resultTypes": ["violations", "incomplete"]}).response
    assert not result["violations"], f"{state}: {describe(result['violations'])}"
    # Contrast must be known for all that is in sight; what is scrolled away is looked at in another state.
    unclear = [
        node["html"][:160]
        for rule in result["incomplete"]
        if rule["id"] == "color-contrast"
        for node in rule["nodes"]
        if not all(check["data"]["messageKey"] == "shortTextContent" for check in node["any"])
        and page.locator(node["target"][0]).evaluate(IN_SIGHT)
    ]
    assert not unclear, f"{state}: contrast not known: {unclear}"
    assert any(rule["id"] == "color-contrast" for rule in result["passes"]), f"{state}: contrast was not looked at"


def describe(rules) -> str:
    return "; ".join(f"{rule['id']}: {[node['html'][:160] for node in rule['nodes']]}" for rule in rules)


def looks(context, url: str, name: str, screenshots: Path | None):
    """Empty, answered, refused and with everything open: nothing overflows, all can be read and reached."""
    page = open_page(context, url)
    expect(page.locator("#kernels table").first).to_be_attached()

    def look(state: str):
        page.wait_for_timeout(300)
        if screenshots:
            page.screenshot(path=screenshots / f"{name}-{state}.png")
        check_layout(page, f"{name} {state}")
        check_access(page, f"{name} {state}")

    look("empty")
    say(page, "Tell me a story. " + "Averyveryverylongwordwithoutanyspaceinit" * 3)
    answered(page, 1)
    expect(page.locator(".timing").first).to_contain_text("first token")
    look("answer")
    for panel in ["#live", "#settings", ".kernels"]:
        if page.locator(panel).get_attribute("open") is None:
            page.locator(f"{panel} > summary").click()
    look("open")
    page.locator(".kernels").scroll_into_view_if_needed()
    look("kernels")
    page.fill("#temperature", "")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=503, json={"error": {"message": "too many requests are waiting: try again"}}, headers={"Retry-After": "1"}
    ))
    say(page, "Again")
    answered(page, 2)
    expect(page.locator(".problem")).to_contain_text("too many requests are waiting")
    look("refused")
    complaints = [complaint for complaint in page.complaints if "503" not in complaint]
    assert not complaints, f"{name}: {complaints}"
    page.close()


def streams_stops_and_retries(context, url: str):
    page = open_page(context, url)
    page.locator("#settings").evaluate("(panel) => { panel.open = true; }")
    page.fill("#max_tokens", "200")
    page.fill("#seed", "11")
    # The model is faster than anyone can press a key: a slow line makes time.
    slow = context.new_cdp_session(page)
    slow.send("Network.enable")

    def throughput(bytes_per_second: int):
        slow.send("Network.emulateNetworkConditions", {
            "offline": False, "latency": 0, "uploadThroughput": -1, "downloadThroughput": bytes_per_second,
        })

    throughput(8_000)
    say(page, "Tell me a story.")
    text = page.locator(".turn.assistant .text").first
    expect(page.locator("#stop")).to_be_focused()
    expect(page.locator("#announcer")).to_have_text("Answering")
    lengths = set()
    for _ in range(200):
        lengths.add(len(text.inner_text()))
        if len(lengths) > 3:
            break
        page.wait_for_timeout(50)
    assert len(lengths) > 3, f"the text came in {len(lengths)} pieces"
    assert page.locator(".turn.busy").count() == 1, "the text was there before its end was"
    page.keyboard.press("Escape")
    answered(page, 1)
    expect(page.locator(".timing")).to_contain_text("stopped")
    expect(page.locator("#message")).to_be_focused()
    part = text.inner_text().strip()
    assert part, "what had come was thrown away"

    throughput(-1)
    page.get_by_role("button", name="Ask again from here").click()
    answered(page, 1)
    whole = page.locator(".turn.assistant .text").first.inner_text().strip()
    assert whole.startswith(part) and len(whole) > len(part), f"the same seed went on differently: {part!r}, {whole!r}"
    expect(page.locator(".timing")).to_contain_text("tokens/s")
    assert whole[:40] in page.locator("#announcer").text_content(), "a screen reader does not hear the answer"

    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy this answer").click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").split()[:5] == whole.split()[:5]

    # What was said is still there after a reload, until a new chat begins.
    page.reload()
    expect(page.locator(".turn")).to_have_count(2)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert not page.complaints, page.complaints
    page.close()


def sends_its_settings(context, url: str):
    page = open_page(context, url)
    page.locator("#settings").evaluate("(panel) => { panel.open = true; }")
    chosen = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "seed": 3, "max_tokens": 5}
    for name, value in chosen.items():
        page.fill(f"#{name}", str(value))
    page.fill("#system", "You are a poet.")
    page.fill("#key", "secret")
    with page.expect_request("**/v1/chat/completions") as caught:
        say(page, "Hello")
    sent = caught.value.post_data_json
    assert {name: sent[name] for name in chosen} == chosen, sent
    assert sent["messages"] == [{"role": "system", "content": "You are a poet."}, {"role": "user", "content": "Hello"}], sent
    assert sent["model"] == page.locator("#model").input_value()
    assert caught.value.headers["authorization"] == "Bearer secret"
    answered(page, 1)
    expect(page.locator(".timing")).to_contain_text("5 tokens")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)"), "the key outlives the tab"
    assert "secret" in page.evaluate("JSON.stringify(sessionStorage)"), "the key does not outlive a reload"

    page.get_by_label("Continue text").check()
    with page.expect_request("**/v1/completions") as caught:
        say(page, "Once upon a time")
    assert caught.value.post_data_json["prompt"] == "Once upon a time"
    answered(page, 2)
    assert page.locator(".turn.assistant .text").last.inner_text().startswith("Once upon a time")

    # A value out of its range is not sent, and the field says so.
    page.fill("#top_p", "7")
    say(page, "Hello again")
    expect(page.locator("#top_p")).to_be_focused()
    expect(page.locator(".turn.assistant")).to_have_count(2)
    page.get_by_role("button", name="Back to the defaults").click()
    expect(page.locator("#top_p")).to_have_value("")
    assert not page.complaints, page.complaints
    page.close()


def forgets_what_was_not_answered(context, url: str):
    page = open_page(context, url)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=500, json={"error": {"message": "no"}}), times=1)
    say(page, "One")
    answered(page, 1)
    with page.expect_request("**/v1/chat/completions") as caught:
        say(page, "Two")
    assert caught.value.post_data_json["messages"] == [{"role": "user", "content": "Two"}]
    answered(page, 2)
    page.close()


def markup_stays_text(context, url: str):
    page = open_page(context, url)
    evil = "<img src=x onerror=alert(1)> **bold** <script>alert(2)</script>\n```\n<b>code</b>\n```\n- [x](javascript:alert(3))"
    pieces = "".join(f"data: {piece}\n\n" for piece in [
        f'{{"choices": [{{"index": 0, "delta": {{"content": {json.dumps(evil)}}}, "finish_reason": "stop"}}]}}', "[DONE]",
    ])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=200, content_type="text/event-stream", body=pieces
    ))
    say(page, "<i>me</i>")
    answered(page, 1)
    assert page.locator(".turn :is(img, script, a, b, i)").count() == 0
    assert page.locator(".turn strong").inner_text() == "bold"
    assert "<b>code</b>" in page.locator(".turn pre").inner_text()
    assert "<i>me</i>" in page.locator(".turn.user .text").inner_text()
    assert not page.complaints, page.complaints
    page.close()


def works_by_keyboard(context, url: str):
    page = open_page(context, url)
    expect(page.locator("#message")).to_be_focused()
    page.evaluate(TO_THE_TOP)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    assert page.locator(".skip").bounding_box()["y"] >= 0, "the skip link stays out of sight"
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_be_focused()

    # Round the whole page: each stop has a name, can be seen, and shows that it has the focus; the order is that of reading.
    page.evaluate(TO_THE_TOP)
    stops = []
    for _ in range(60):
        page.keyboard.press("Tab")
        stop = page.evaluate("""() => {
          const element = document.activeElement;
          const box = element.getBoundingClientRect();
          const style = getComputedStyle(element);
          return { id: element.id || element.className || element.textContent, outline: style.outlineStyle + style.outlineWidth,
                   seen: box.width > 0 && box.bottom > 0 && box.top < innerHeight, body: element === document.body };
        }""")
        if stop["body"] or stop["id"] in [known["id"] for known in stops]:
            break
        stops.append(stop)
    names = [stop["id"] for stop in stops]
    for needed in ["new", "theme", "model", "system", "temperature", "key", "defaults", "scroll", "message", "send"]:
        assert needed in names, f"{needed} cannot be reached: {names}"
    assert names.index("theme") < names.index("model") < names.index("key") < names.index("message") < names.index("send"), names
    unseen = [stop["id"] for stop in stops if not stop["seen"] or stop["outline"].startswith("none")]
    assert not unseen, f"the focus cannot be seen at {unseen}"

    theme = page.locator("#theme")
    theme.focus()
    for name, scheme in [("light", "light"), ("dark", "dark"), ("auto", "light dark")]:
        page.keyboard.press("Enter")
        expect(theme).to_have_text(f"Theme: {name}")
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == scheme
    page.locator("#message").focus()
    page.keyboard.type("One line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    page.keyboard.press("Enter")
    answered(page, 1)
    assert page.locator(".turn.user .text").inner_text() == "One line\nand another"
    assert not page.complaints, page.complaints
    page.close()


def panel_is_alive(context, url: str):
    page = open_page(context, url)
    page.locator("#live").evaluate("(panel) => { panel.open = true; }")
    expect(page.locator("#memory")).to_have_text(re.compile(r"^[\d.]+ [MG]B$"))
    expect(page.locator("#running")).to_have_text(re.compile(r"^0 of \d+$"))
    say(page, "Tell me a story.")
    answered(page, 1)
    expect(page.locator("#speed")).not_to_have_text(re.compile("^(0|–)$"), timeout=10_000)
    assert float(page.locator("#speed").inner_text()) > 0
    page.locator(".kernels > summary").click()
    rows = page.locator("#kernels tr").all_inner_texts()
    assert rows and all(row.strip() for row in rows), rows
    page.close()


def says_when_the_server_is_gone(context, server: Server):
    page = open_page(context, server.url)
    server.stop()
    expect(page.locator("#connection")).to_have_text("No connection", timeout=10_000)
    say(page, "Anyone?")
    answered(page, 1)
    expect(page.locator(".problem")).to_contain_text("does not answer")
    page.close()


CHECKS = [
    streams_stops_and_retries, sends_its_settings, forgets_what_was_not_answered, markup_stays_text, works_by_keyboard, panel_is_alive,
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--screenshots", type=Path)
    arguments = parser.parse_args()
    if arguments.screenshots:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
    # One person who does in a minute what others do in an hour.
    server = Server(arguments.program, "--rate-limit", "0")
    done = 0
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=arguments.chromium, args=FLAGS)

            def run(name: str, check, *rest, size=(1280, 800), theme="light"):
                nonlocal done
                context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=theme)
                check(context, *rest)
                context.close()
                done += 1
                print(f"ok {name}", flush=True)

            for size in SIZES:
                for theme in THEMES:
                    name = f"{size[0]}-{theme}"
                    run(f"looks {name}", looks, server.url, name, arguments.screenshots, size=size, theme=theme)
            for check in CHECKS:
                run(check.__name__, check, server.url)
            run("says_when_the_server_is_gone", says_when_the_server_is_gone, server)
            browser.close()
    finally:
        if server.process.poll() is None:
            server.stop()
    print(f"{done} passed, 0 failed")


if __name__ == "__main__":
    sys.exit(main())
