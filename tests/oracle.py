"""A vision model's endpoint on loopback that misbehaves on request.

It speaks the protocol's `/chat/completions`, and knows the color of pictures that are
of one color: a description is right if it names it.
"""

import base64
import io
import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Oracle(ThreadingHTTPServer):
    """Answers, and counts every question that it was asked and that it answered.

    `moods` are used up one a request: a status code (with `retry_after`, if that is
    set), "half" a body, "garbage", "silence", a `dict` as the message, or "well".
    When there are none left, it behaves.
    """

    daemon_threads = True

    def __init__(self, *, delay=0.0):
        super().__init__(("127.0.0.1", 0), Talk)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.delay = delay
        self.moods, self.retry_after = [], None
        self.requests, self.asked, self.answered = [], Counter(), Counter()
        self.now, self.at_once = 0, 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def handle_error(self, request, client_address):
        """A client that hung up is no news."""


class Talk(BaseHTTPRequestHandler):
    def log_message(self, format, *args):
        pass

    def do_POST(self):
        oracle = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        questions = read(body)
        with oracle.lock:
            oracle.requests.append((self.path, dict(self.headers), body))
            oracle.asked.update(questions)
            oracle.now += 1
            oracle.at_once = max(oracle.at_once, oracle.now)
            mood = oracle.moods.pop(0) if oracle.moods else "well"
        time.sleep(oracle.delay)
        try:
            self.answer(mood, questions)
        finally:
            with oracle.lock:
                oracle.now -= 1

    def answer(self, mood, questions):
        oracle = self.server
        if mood == "silence":
            oracle.closing.wait(30)
            return
        if isinstance(mood, int):
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            said = json.dumps({"error": {"message": f"no: {key or 'nobody'}"}})
            self.say(mood, said, retry_after=oracle.retry_after)
            return
        if mood == "garbage":
            self.say(200, "<html>\x00 busy</html>")
            return
        matches = [color == words for color, words in questions]
        message = {"content": json.dumps({"matches": matches})}
        if isinstance(mood, dict):
            message = mood
        whole = json.dumps({"choices": [{"message": {"role": "assistant"} | message}]})
        if mood == "half":
            self.say(200, whole[: len(whole) // 2], length=len(whole))
            return
        # Before it is on its way: what is counted here may still be lost, but what is
        # not counted cannot have arrived.
        with oracle.lock:
            oracle.answered.update(questions)
        self.say(200, whole)

    def say(self, status, text, *, length=None, retry_after=None):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(data)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(data)


def read(body):
    """The questions of a request: the color of its picture with each description."""
    text, picture = body["messages"][1]["content"]
    listed = text["text"].removeprefix("<descriptions>\n")
    descriptions = json.loads(listed.removesuffix("\n</descriptions>"))
    kind, _, data = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    pixel = image.getpixel((0, 0))
    color = next((name for name, rgb in COLORS.items() if rgb == pixel), str(pixel))
    return [(color, words) for words in descriptions]


@contextmanager
def oracle(**settings):
    """An endpoint that is there for a while."""
    server = Oracle(**settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
