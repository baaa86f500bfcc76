"""The environment variables that stand for options of the server."""

ENVIRONMENT_PREFIX = "CIFAR_SERVICE_"
"""Each option is also an environment variable: --max-batch-size is CIFAR_SERVICE_MAX_BATCH_SIZE."""
