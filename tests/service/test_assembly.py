"""The parts behind every transport, put together as the server does."""

import asyncio

import pytest

from service.assembly import assemble
from service.core.engine import Engine
from service.core.export_numbers import ExportNumbers
from service.core.metrics import Metrics
from service.settings import Settings
from service.starting import load_models
from tests.service.exports import pictures


class BusyDecoder:
    """Stands in for decode processes of which this many have a file."""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def busy_processes(self) -> int:
        return self.processes


@pytest.mark.parametrize(("busy", "alone"), [(0, True), (1, False)])
def test_a_batch_leaves_the_other_core_to_a_decode_process_that_has_a_file(linear, monkeypatch, busy, alone):
    seen = []
    compute = Engine.compute

    def record(engine, images, *, alone):
        seen.append(alone)
        return compute(engine, images, alone=alone)

    async def test():
        settings = Settings(model=linear, device="cpu", threads=2)
        models = load_models(settings, ExportNumbers())
        assembled = assemble(settings, Metrics(), BusyDecoder(busy), models)
        monkeypatch.setattr(Engine, "compute", record)
        await assembled.inference.compute(pictures(3), None)
        await assembled.batcher.close()

    asyncio.run(test())
    assert seen == [alone]
