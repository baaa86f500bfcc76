"""The gRPC service. Never imports torch or `cifar_core`: it starts without them, and knows a model by its manifest.

So far it holds the code generated from the protocol, `service.generated`.
"""
