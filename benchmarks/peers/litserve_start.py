"""LitServe over HTTP: clients POST JSON with the pixels in base64 to /predict, and receive JSON."""

import base64
import os

import litserve
import numpy as np
from session import open_session


class Classifier(litserve.LitAPI):
    """Decodes requests, computes batches and encodes answers."""

    def setup(self, device: str) -> None:
        """Opens the session."""
        del device
        self.session = open_session()

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        """The images of a request, uint8 [n, 32, 32, 3]."""
        return np.frombuffer(base64.b64decode(request["images"]), np.uint8).reshape(-1, 32, 32, 3)

    def predict(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Probabilities of each request's images, float32 [n, 10]."""
        sizes = [len(each) for each in images]
        (probabilities,) = self.session.run(["probabilities"], {"images": np.concatenate(images)})
        return np.split(probabilities, np.cumsum(sizes)[:-1])

    def encode_response(self, output: np.ndarray) -> dict[str, list[list[float]]]:
        """The answer as JSON."""
        return {"probabilities": output.tolist()}


if __name__ == "__main__":
    api = Classifier(max_batch_size=64, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False, log_level="error")
