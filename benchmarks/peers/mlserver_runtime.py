"""A runtime for MLServer that uses onnxruntime; mlserver_start.py has its settings."""

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from session import open_session


class Classifier(MLModel):
    """Images in, probabilities out."""

    async def load(self) -> bool:
        """Opens the session."""
        self.session = open_session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answers a request, or the batch that adaptive batching has made from several requests."""
        images = NumpyCodec.decode_input(payload.inputs[0])
        (probabilities,) = self.session.run(["probabilities"], {"images": images.astype(np.uint8, copy=False)})
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("probabilities", probabilities)]
        )
