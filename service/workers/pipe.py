"""What a worker reports to its supervisor through a pipe."""

# Sent once, when requests are answered; anything else is the reason why the worker cannot start.
READY = b"ready"
PIPE_BYTES = 4096  # a pipe takes so much at once or not at all
