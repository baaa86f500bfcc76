import platform

import pytest

from cifar_core import processor

INFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu sse2 {}\nvmx flags\t: amx_bf16\n"


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Lets the system report these instructions; None for a system that reports nothing."""

    def set_to(instructions):
        file = tmp_path / "cpuinfo"
        if instructions is not None:
            file.write_text(INFO.format(instructions))
        monkeypatch.setattr(processor, "_CPU_INFO", file)
        processor.has_matrix_units.cache_clear()

    yield set_to
    processor.has_matrix_units.cache_clear()


@pytest.mark.parametrize(
    ("instructions", "bf16", "matrix_units", "int8_products"),
    [
        ("avx2 avx512f", False, False, False),
        ("avx_vnni", False, False, True),
        ("avx512_vnni", False, False, True),
        ("avx512_bf16", True, False, False),
        ("amx_tile amx_int8", False, False, True),
        ("amx_bf16", True, True, False),
        (None, False, False, False),
    ],
)
def test_the_instructions_of_the_processor(report, instructions, bf16, matrix_units, int8_products):
    report(instructions)
    found = (processor.has_bf16(), processor.has_matrix_units(), processor.has_int8_products())
    assert found == (bf16, matrix_units, int8_products)


def test_the_instructions_of_an_arm_processor(report, tmp_path):
    report("")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp bf16\n")
    assert (processor.has_bf16(), processor.has_matrix_units(), processor.has_int8_products()) == (True, False, True)


def test_the_name_of_the_processor(report):
    report(None)
    assert processor.processor_name() == platform.machine()
    report("avx2")
    assert processor.processor_name() == "Some CPU @ 2 GHz"
