# The server with the shipped model: no torch, no compiler, not as root.
#
#   docker build -t cifar-classifier .
#   docker run --rm -p 127.0.0.1:50051:50051 cifar-classifier
#
# Another model: -v /path/to/exported:/exported:ro -e CIFAR_SERVICE_MODEL=/exported
# TLS:           -v /path/to/tls:/tls:ro -e CIFAR_SERVICE_TLS_CERT=/tls/server.pem -e CIFAR_SERVICE_TLS_KEY=/tls/key.pem
# Hardened:      --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges
#                The server writes only to /tmp.
#
# Set options by environment variables, as here, rather than by arguments: the health check reads the same variables, and
# so finds the port, trusts the server's certificate (CIFAR_SERVICE_TLS_CERT) and sends a token (CIFAR_SERVICE_TOKEN_FILE).
# With mutual TLS (CIFAR_SERVICE_TLS_CLIENT_CA) it presents the server's own certificate. If your client authority did not
# sign that certificate, set CIFAR_PROBE_CERTIFICATE and CIFAR_PROBE_KEY to another one.

FROM python:3.11-slim AS build
WORKDIR /source
COPY . .
RUN python -m venv /server \
 && /server/bin/pip install --no-cache-dir -c constraints.txt '.[cpu,http]'

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home server
COPY --from=build /server /server
USER server
EXPOSE 50051 9090
# Inside a container the server must listen on all addresses to be reached. CIFAR_SERVICE_INSECURE allows that without
# TLS, for images and metrics: publish the ports on the loopback interface of the host, as above, or turn TLS on.
ENV CIFAR_SERVICE_HOST=0.0.0.0 \
    CIFAR_SERVICE_INSECURE=true \
    CIFAR_SERVICE_METRICS_PORT=9090 \
    CIFAR_SERVICE_METRICS_HOST=0.0.0.0 \
    CIFAR_SERVICE_LOG_FORMAT=json
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["/server/bin/python", "-m", "service.probe"]
ENTRYPOINT ["/server/bin/python", "-m", "service"]
