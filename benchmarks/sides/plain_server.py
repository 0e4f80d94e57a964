"""What the server is compared with: the same model behind Python's own HTTP server, one request at a time."""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import jax.numpy as jnp
import numpy as np

from train.devices.process import keep_compiled_programs, keep_freed_memory
from train.inference.classify import best_classes, probabilities
from train.inference.model import load_classifier


def main(source: str) -> None:
    """Serves the classifier in a source until it is killed; tells where on stderr."""
    keep_freed_memory()
    keep_compiled_programs()
    classifier = load_classifier(source)
    transform = classifier.task.transform(training=False)
    size = classifier.mesh.size
    shape = jax.ShapeDtypeStruct((size, *classifier.config.image_size, 3), jnp.float32)
    program = classifier.compile(lambda model, batch: probabilities(model, batch["image"]), {"image": shape})
    program({"image": np.zeros(shape.shape, np.float32)})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # with one thread, a connection that stays open would shut out the others

        def do_POST(self) -> None:
            encoded = self.rfile.read(int(self.headers["Content-Length"]))
            image = transform({"image": encoded, "label": 0, "name": "the picture"})["image"]
            row = np.asarray(program({"image": np.broadcast_to(image, shape.shape)}))[0]
            best = best_classes(row, classifier.task.class_names, 5)
            told = [{"class": one.class_name, "index": one.index, "probability": one.probability} for one in best]
            content = json.dumps({"results": [{"predictions": told}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(HTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port} of the plain server: ready", file=sys.stderr, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
