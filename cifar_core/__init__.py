"""The training library: the networks of a published CIFAR-10 study, and everything from the data to the ONNX file.

The only part of the service that it imports is the client, in `predictors`, to evaluate a running server. The server
imports only the modules `pixels`, `images`, `openvino`, `manifest` and `errors`, which do not import torch.
"""

__version__ = "0.1.0"
