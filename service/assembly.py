"""Builds what answers the requests of one process, whatever the transport: model, batches, decode processes."""

from dataclasses import dataclass

from cifar_core.pixels import ImageLimits
from service.core.batcher import Batcher
from service.core.decoding import Decoder
from service.core.inference import Inference, Limits
from service.core.metrics import Metrics
from service.core.model_store import Model, ModelStore
from service.settings import Settings


@dataclass(frozen=True)
class Assembled:
    """The parts behind `inference`."""

    inference: Inference
    models: ModelStore
    batcher: Batcher


def start_decoder(settings: Settings, metrics: Metrics) -> Decoder:
    """Starts the decode processes. Call it in a running event loop, and `close` at the end."""
    return Decoder(
        settings.decoder_processes,
        _image_limits(settings),
        settings.max_decode_seconds,
        on_ended=metrics.on_decoder_ended,
    )


def assemble(settings: Settings, metrics: Metrics, decoder: Decoder, models: ModelStore) -> Assembled:
    """Starts the engine threads. Call it in a running event loop.

    Args:
        settings: All options.
        metrics: Counts what happens.
        decoder: Decodes the images.
        models: The models; the first one is loaded.
    """
    _count_models(models, metrics)
    batcher = Batcher(
        max_batch_size=settings.max_batch_size,
        max_queue_delay=settings.max_queue_delay_ms / 1000,
        max_images=settings.max_queued_images,
        max_bytes=settings.max_queued_bytes,
        observer=metrics,
        threads=models.current.engine.parallel,
        busy_cores=decoder.busy_processes,
    )
    limits = Limits(
        _image_limits(settings), settings.max_images, settings.max_message_bytes, settings.max_queued_images
    )
    return Assembled(Inference(models, batcher, decoder, limits, metrics), models, batcher)


def _image_limits(settings: Settings) -> ImageLimits:
    return ImageLimits(settings.max_image_bytes, settings.max_image_pixels)


def _count_models(models: ModelStore, metrics: Metrics) -> None:
    def on_model(model: Model) -> None:
        metrics.on_model(model.number, model.version, model.variant, model.device, model.sha256)

    def on_reload(model: Model | None) -> None:
        metrics.on_reload(model is not None)
        if model is not None:
            on_model(model)

    models.on_reload = on_reload
    on_model(models.current)
