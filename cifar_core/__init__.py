"""The training library: the networks of a published CIFAR-10 study, and everything from the data to the ONNX file.

Of the service it uses only the client, in `predictors`, to evaluate a running server. The server uses only the modules
`images`, `manifest` and `errors`, which do not import torch.
"""

__version__ = "0.1.0"
