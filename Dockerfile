# The server with the shipped model: no torch, no compiler, no root.
#   docker build -t cifar-classifier .
#   docker run --rm -p 127.0.0.1:50051:50051 cifar-classifier
# Another model: -v /path/to/exported:/exported:ro, and --model /exported at the end.

FROM python:3.11-slim AS build
WORKDIR /source
COPY . .
RUN python -m venv /server \
 && /server/bin/pip install --no-cache-dir -c constraints.txt '.[cpu]'

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home server
COPY --from=build /server /server
USER server
EXPOSE 50051 9090
# Inside a container the address that others reach is not the loopback. Give --tls-cert and --tls-key to encrypt, or keep
# the published port on the host's loopback as above.
ENV CIFAR_SERVICE_HOST=0.0.0.0 \
    CIFAR_SERVICE_INSECURE=true \
    CIFAR_SERVICE_METRICS_PORT=9090 \
    CIFAR_SERVICE_METRICS_HOST=0.0.0.0 \
    CIFAR_SERVICE_LOG_FORMAT=json
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD ["/server/bin/python", "-m", "service.probe"]
ENTRYPOINT ["/server/bin/python", "-m", "service"]
