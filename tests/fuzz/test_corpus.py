"""Inputs that fuzzing found, and inputs that attacks use, break no promise any more."""

import asyncio
import random
from pathlib import Path

import pytest

from cifar_core.images import FORMATS
from tests.fuzz.mutations import mutate
from tests.fuzz.targets import IMAGE_LIMITS, TARGETS
from tests.service.core.decoders import CpuMeter, running

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as in the server

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(CORPUS.glob("*/*.bin"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_an_input_that_was_found_breaks_no_promise(file):
    TARGETS[file.parent.name].make()(file.read_bytes())


def test_image_files_that_were_found_cost_little_and_end_no_process():
    files = [file.read_bytes() for file in FILES if file.parent.name.upper() in FORMATS]

    async def test():
        ended = []
        async with running(1, IMAGE_LIMITS, on_ended=ended.append) as decoder, CpuMeter(decoder) as meter:
            await decoder.decode(files)
        assert ended == []
        assert meter.peak_mib < 150

    assert files
    asyncio.run(test())


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_and_mutations_of_them_break_no_promise(name):
    generator = random.Random(0)
    check, seeds = TARGETS[name].make(), TARGETS[name].seeds()

    def mutate_bytes(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(generator.randrange(1, 4)):
            if changed:
                changed[generator.randrange(len(changed))] = generator.randrange(256)
        return bytes(changed)

    for seed in seeds:
        check(seed)
    for _ in range(100):
        check(mutate(generator.choice(seeds), seeds, generator, mutate_bytes))
