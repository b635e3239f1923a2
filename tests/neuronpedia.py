"""Exports and an API in Neuronpedia's layouts, small and made up."""

import gzip
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from vlm_probe.analysis.descriptions import SaeIdentity

MODEL, SOURCE = "gemma-2-2b", "20-gemmascope-res-16k"
ID = f"{MODEL}/{SOURCE}"
WIDTH = 16384


def identity(layer=20, *, hook="resid_post", width=WIDTH, model=MODEL, id=None):
    return SaeIdentity(layer, hook, width, model, id)


def line(index, description, *, model=MODEL, source=SOURCE, explainer="gpt-4o-mini"):
    """A line of `explanations/batch-*.jsonl.gz`; its index is written as text."""
    return {
        "id": f"c{index}",
        "modelId": model,
        "layer": source,
        "index": str(index),
        "authorId": "a",
        "description": description,
        "embedding": "[0.1,0.2]",
        "typeName": "oai_token-act-pair",
        "explanationModelName": explainer,
        "umap_x": 0,
        "umap_y": 0,
        "umap_cluster": 0,
        "umap_log_feature_sparsity": 0,
    }


def feature(index, *explanations, model=MODEL, source=SOURCE):
    """An entry of the older files, and an answer of the API."""
    return {
        "modelId": model,
        "layer": source,
        "index": str(index),
        "frac_nonzero": 0.01,
        "pos_str": ["red"],
        "explanations": list(explanations),
        "activations": [{"tokens": ["a", "red"], "values": [0, 1.5]}],
    }


def said(description, *, scores=(), created=None, explainer="gpt-4o-mini"):
    """An explanation among those of a feature."""
    found = {
        "description": description,
        "typeName": "oai_token-act-pair",
        "explanationModelName": explainer,
        "scores": [{"value": value} for value in scores],
    }
    return found | ({"createdAt": created} if created else {})


def write_batch(root, number, lines, *, model=MODEL, source=SOURCE, part=""):
    folder = root / "v1" / model / source / f"explanations{part}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"batch-{number}.jsonl.gz"
    text = "".join(
        (one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines
    )
    file.write_bytes(gzip.compress(text.encode(), 1))
    return file


@contextmanager
def server(answer):
    """An HTTP server on loopback.

    `answer` gets the path, how often it was asked before, and the headers; it returns
    a status, a body (JSON if it is no bytes) and headers, or None to never answer.
    """
    asked = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            before = asked.count(self.path)
            asked.append(self.path)
            found = answer(self.path, before, dict(self.headers.items()))
            if found is None:
                over.wait(20)
                return
            status, body, headers = found
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}", asked
    finally:
        over.set()
        running.shutdown()
        thread.join()
        running.server_close()
