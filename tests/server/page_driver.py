"""Opens the server's page in Chromium (Qt WebEngine, without a screen), asks something by keyboard, and says what there was to see, as JSON.

python page_driver.py URL QUESTION [PICTURE [SECONDS]]   the picture is taken SECONDS after the question; default: when the answer has ended
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu --force-color-profile=srgb")

try:
    from PySide6.QtCore import QEventLoop, Qt, QTimer, QUrl
    from PySide6.QtTest import QTest
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication
except ImportError:
    from PyQt6.QtCore import QEventLoop, Qt, QTimer, QUrl
    from PyQt6.QtTest import QTest
    from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

WAIT_S = 120
SEEN = """document.getElementById('model') && JSON.stringify({
 model: document.getElementById('model').textContent, plan: document.getElementById('plan').textContent, told: document.getElementById('told').textContent,
 ledger: [...document.querySelectorAll('#ledger tr')].map(row => [...row.cells].map(cell => cell.textContent)), bar: document.querySelectorAll('#bar i').length,
 blocks: document.getElementById('blocks').width * document.getElementById('blocks').height, held: document.getElementById('held').textContent,
 said: [...document.querySelectorAll('.said')].map(one => [one.className, one.lastChild.textContent]), button: document.getElementById('send').textContent,
 down: document.getElementById('down').textContent, focus: document.activeElement.id, running: document.getElementById('running').textContent})"""


class Watched(QWebEnginePage):
    """A page whose console is kept."""

    def __init__(self, profile, parent):
        super().__init__(profile, parent)
        self.said: list[str] = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.said.append(f"{line}: {message}")


class Hosts(QWebEngineUrlRequestInterceptor):
    """Keeps whom the page asks."""

    def __init__(self):
        super().__init__()
        self.asked: set[str] = set()

    def interceptRequest(self, info):
        self.asked.add(info.requestUrl().host())


def main() -> None:
    url, question, *rest = sys.argv[1:]
    application = QApplication(sys.argv[:1])
    profile, hosts, view = QWebEngineProfile(), Hosts(), QWebEngineView()
    profile.setUrlRequestInterceptor(hosts)
    page = Watched(profile, view)
    view.setPage(page)
    view.resize(1280, 800)
    view.show()
    application.processEvents()
    view.load(QUrl(url))

    def look() -> dict:
        found, loop = [], QEventLoop()
        page.runJavaScript(SEEN, lambda value: (found.append(value), loop.quit()))
        QTimer.singleShot(20_000, loop.quit)
        loop.exec()
        return json.loads(found[0]) if found and found[0] else {"model": "…", "ledger": [], "said": [], "button": "", "told": ""}

    def until(holds, what: str) -> dict:
        end = time.monotonic() + WAIT_S
        while not holds(seen := look()):
            if time.monotonic() > end:
                sys.exit(f"not {what} within {WAIT_S} s: {seen} {page.said}")
            QTest.qWait(200)
        return seen

    until(lambda seen: seen["model"] != "…" and seen["ledger"], "loaded")
    keyboard = view.focusProxy() or view
    page.runJavaScript("document.activeElement.blur()")
    QTest.qWait(200)
    QTest.keyClick(keyboard, Qt.Key.Key_Slash)  # "/" goes to the message
    QTest.qWait(200)
    QTest.keyClicks(keyboard, question)
    QTest.keyClick(keyboard, Qt.Key.Key_Return)
    asked = until(lambda seen: any(kind == "said user" for kind, _ in seen["said"]), "asked")
    if len(rest) > 1:
        QTest.qWait(round(1000 * float(rest[1])))
        view.grab().save(rest[0])
    done = until(lambda seen: seen["button"] == "Send" and len(seen["said"]) >= 2, "answered")
    QTest.qWait(1500)  # the next look at the engine
    if len(rest) == 1:
        view.grab().save(rest[0])
    print(json.dumps({"asked": asked, "done": look() or done, "console": page.said, "hosts": sorted(hosts.asked)}))
    sys.stdout.flush()
    os._exit(0)  # Qt's own end may wait for its processes


if __name__ == "__main__":
    main()
