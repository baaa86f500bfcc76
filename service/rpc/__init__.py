"""gRPC: translates messages to and from `service.core`."""
