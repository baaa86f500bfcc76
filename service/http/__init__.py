"""HTTP beside gRPC, over the same `Inference`: REST, the Open Inference Protocol, and a page to try the model.

Needs the packages of the extra `http`. Nothing of this package is imported unless --http-port is given.
"""
