"""Builds what answers the requests of one process, whatever the transport: model, batches, decode processes."""

from dataclasses import dataclass

from cifar_core.images import ImageLimits
from service.core.batcher import Batcher
from service.core.decoding import Decoder
from service.core.export_numbers import ExportNumbers
from service.core.inference import Inference, Limits
from service.core.metrics import Metrics
from service.core.model_store import Model, ModelStore
from service.settings import Settings


@dataclass(frozen=True)
class Assembled:
    """The parts behind `inference`. Call `decoder.close` at the end."""

    inference: Inference
    models: ModelStore
    batcher: Batcher
    decoder: Decoder


def assemble(settings: Settings, metrics: Metrics, numbers: ExportNumbers) -> Assembled:
    """Starts the engine threads and the decode processes, and loads the model. Call it in a running event loop.

    Args:
        settings: All options.
        metrics: Counts what happens.
        numbers: Numbers of the exports; see service.core.export_numbers.

    Raises:
        StartError: The model cannot be served.
    """
    image_limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
    # Created first, so that its processes start while the model is loaded.
    decoder = Decoder(
        settings.decoder_processes, image_limits, settings.max_decode_seconds, on_ended=metrics.on_decoder_ended
    )
    try:
        models = _model_store(settings, metrics, numbers)
        batcher = Batcher(
            max_batch_size=settings.max_batch_size,
            max_queue_delay=settings.max_queue_delay_ms / 1000,
            max_images=settings.max_queued_images,
            max_bytes=settings.max_queued_bytes,
            observer=metrics,
            threads=models.current.engine.parallel,
        )
    except BaseException:
        decoder.close()
        raise
    limits = Limits(image_limits, settings.max_images, settings.max_message_bytes, settings.max_queued_images)
    return Assembled(Inference(models, batcher, decoder, limits, metrics), models, batcher, decoder)


def _model_store(settings: Settings, metrics: Metrics, numbers: ExportNumbers) -> ModelStore:
    def on_model(model: Model) -> None:
        metrics.on_model(model.number, model.version, model.variant, model.device, model.sha256)

    def on_reload(model: Model | None) -> None:
        metrics.on_reload(model is not None)
        if model is not None:
            on_model(model)

    models = ModelStore(
        settings.model,
        settings.variant,
        device=settings.device,
        threads=settings.engine_threads,
        max_batch_size=settings.max_batch_size,
        on_reload=on_reload,
        name=settings.model_name,
        numbers=numbers,
    )
    on_model(models.current)
    return models
