"""The page of chat.py --serve in headless Chromium: a person who chats, compares two checkpoints and looks inside one.

    python tests/test_page.py out/demo/sft out/demo/dpo FOLDER      the same walk on real checkpoints, with two questions; the docs show
                                                                    story/chat.png, sum/compare.png and sum/see.png
"""
import contextlib
import sys
import time

import pytest
from conftest import tiny_lm, tiny_tokenizer
from test_serve import running

from nanollm import checkpoint
from nanollm.serve.app import named_models

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage", "--force-device-scale-factor=1")


@contextlib.contextmanager
def browser(profile):
    """A fresh Chromium; fails at the end if the page wrote an error to its console."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service
    options = Options()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--lang=en"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
    try:
        yield driver
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


class Person:
    """Finds, clicks, types and waits."""

    def __init__(self, driver):
        self.driver = driver

    def all(self, css):
        return [e for e in self.driver.find_elements("css selector", css) if e.is_displayed()]

    def wait(self, condition, seconds=60):
        end = time.time() + seconds
        while not (value := condition()) and time.time() < end:
            time.sleep(0.05)
        assert value
        return value

    def one(self, css):
        return self.wait(lambda: self.all(css))[0]

    def click(self, css):
        self.one(css).click()

    def type(self, css, text):
        self.one(css).clear()
        self.one(css).send_keys(text)

    def shot(self, folder, name):
        """A picture of the whole page at the window's width."""
        width = self.driver.get_window_size()["width"]
        self.driver.set_window_size(width, self.driver.execute_script("return outerHeight - innerHeight + document.documentElement.scrollHeight + 8"))
        self.driver.save_screenshot(str(folder / f"{name}.png"))
        self.driver.set_window_size(width, 800)


def walk(driver, address, folder, questions, text):
    """Chat, regenerate, compare, see, in that order; a picture of each view under `folder`."""
    me = Person(driver)
    driver.set_window_size(1180, 800)
    driver.get(address)
    me.one("body[data-ready]")
    me.type("#seed", "3")

    for n, question in enumerate(questions, 1):              # chat
        me.type("#say", question)
        me.click("#send")
        me.wait(lambda: len(me.all(".turn.assistant [data-t=inside]")) == n and me.all("#send"))
    chips = me.all(".turn.assistant .chip")
    assert len(me.all(".turn.user")) == len(questions) and chips
    min(chips, key=lambda e: float(e.get_attribute("style").split("--p:")[1].split(";")[0])).click()
    assert 2 <= len(me.all("#pop .bar")) <= 7 and len(me.all("#pop .bar.taken")) == 1
    me.shot(folder, "chat")
    me.click("header b")
    assert not me.all("#pop")
    shown = "".join(driver.execute_script("return [...document.querySelectorAll('.turn.assistant:last-child .text')].map(e => e.textContent)"))
    me.click("#as_chips")
    assert not me.all(".chip") and me.one(".turn.assistant:last-child .text").text.split() == shown.split()
    me.click("#as_chips")
    me.type("#seed", "4")
    me.click("#again")
    me.wait(lambda: len(me.all(".turn.assistant [data-t=inside]")) == len(questions) and me.all("#send"))

    me.click("[data-view=compare]")                          # compare
    me.type("#both_say", questions[0])
    me.click("#both_send")
    me.wait(lambda: len([e for e in me.all("#compare .stats") if e.text]) == 2)
    assert all(pane.find_elements("css selector", ".chip") for pane in me.all("#compare .answer"))
    me.shot(folder, "compare")

    me.click("[data-view=chat]")                             # look inside the last answer
    me.all("[data-t=inside]")[0].click()
    me.wait(lambda: len(me.all("#seen .chip")) > 10)
    assert "im_start" in me.one("#seen").text
    me.all("#seen .chip")[-4].click()
    assert me.all("#seen.attention .chip.picked") and "%" in me.one("#see_stats").text
    me.click("header b")                                     # the bubble goes, the attention stays
    before = me.one("#see_stats").text
    me.shot(folder, "see")
    pixels = "return document.getElementById('map').getContext('2d').getImageData(0, 0, 9, 9).data.join()"
    drawn = driver.execute_script(pixels)
    me.click("#layer option:nth-child(2)")
    me.wait(lambda: me.one("#see_stats").text != before or driver.execute_script(pixels) != drawn)
    me.type("#see_text", text)
    me.click("#look")
    me.wait(lambda: "<|endoftext|>" in me.one("#seen").text and "im_start" not in me.one("#seen").text)

    me.click("#language")                                    # the other language, and a telephone
    assert me.one("[data-view=chat]").text == "聊天"
    driver.set_window_size(500, 800)
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    me.click("summary")
    me.shot(folder, "see_narrow")
    me.click("[data-view=chat]")
    me.shot(folder, "chat_narrow")
    return me


@pytest.mark.slow
def test_a_person_chats_compares_and_sees_in_a_browser(tmp_path):
    """Every view works in Chromium, without an error in its console, in English and Chinese, wide and narrow; a conversation that has
    outgrown the context goes on, and the stop button stops the server too."""
    tok = tiny_tokenizer()
    models = named_models([(name, tiny_lm(seed, max_seq_len=512), tok, {"stage": name, "step": 1}) for seed, name in enumerate(("sft", "dpo"))])
    with running(models, most=400) as (address, engine), browser(tmp_path / "profile") as driver:
        me = walk(driver, address, tmp_path, ["What has 小明?", "And Anna?"], "Anna has a red 苹果.")
        assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("chat", "compare", "see", "chat_narrow"))
        driver.set_window_size(1180, 800)
        me.click("summary")
        me.type("#max_tokens", "400")
        me.type("#temperature", "1")
        me.type("#say", "long " * 60)
        me.click("#send")
        me.wait(lambda: len(me.all(".turn.assistant:last-child .chip")) > 2)
        if me.all("#stop"):
            me.click("#stop")
        me.wait(lambda: not engine.active and me.all("#send"))
        me.type("#say", "long " * 70)
        me.click("#send")
        me.wait(lambda: me.all("#send") and "忘掉" in me.one("#note").text)
        before = driver.execute_script("return [messages, document.getElementById('talk').textContent]")
        for text, temperature, error in (("long " * 400, "1", "context"), ("Hi", "9", "temperature")):
            me.type("#temperature", temperature)             # no answer: as if the question had not been asked, and it is not lost
            me.type("#say", text)
            me.click("#send")
            assert error in me.wait(lambda: me.all("#note .error"))[0].text
            me.one("#send")
            assert driver.execute_script("return [messages, document.getElementById('talk').textContent]") == before
            assert me.one("#say").get_attribute("value") == text.strip()
            driver.get_log("browser")                        # that was a 400, which Chromium notes


if __name__ == "__main__":
    import pathlib
    import tempfile
    *paths, out = sys.argv[1:]
    served = named_models([(path, *checkpoint.load(path, "cpu", "lm")) for path in paths])
    with running(served, most=256) as (address, _):
        for name, question in (("story", "请写一个关于小美和鸟宝宝的故事。"), ("sum", "Do you know the sum of six and eight?")):
            with tempfile.TemporaryDirectory() as profile, browser(profile) as driver:
                (folder := pathlib.Path(out, name)).mkdir(parents=True, exist_ok=True)
                walk(driver, address, folder, [question], "Anna is a girl. Anna lives in a house.")
