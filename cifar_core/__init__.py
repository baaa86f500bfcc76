"""The training library: the networks of a published CIFAR-10 study, and everything from the data to the ONNX file.

Knows torch. Never imports `service`.
"""

__version__ = "0.1.0"
