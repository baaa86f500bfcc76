import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from service.generated.cifar.v1 import image_classifier_pb2 as messages
from tests.conftest import REPOSITORY

PROTO_ROOT = REPOSITORY / "protos"
PROTOS = sorted(PROTO_ROOT.rglob("*.proto"))
# `make setup` installs it: it is older than the packages of the environment, and does not fit beside them.
GENERATOR = Path(sys.prefix) / "generator"


@pytest.mark.skipif(not GENERATOR.exists(), reason="needs the generator: make setup")
@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.stem)
def test_the_committed_code_is_what_make_protos_generates(proto, tmp_path):
    source = "service/generated" / proto.relative_to(PROTO_ROOT)
    options = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-Iservice/generated={PROTO_ROOT}", *options, str(source)],
        cwd=REPOSITORY, check=True, env={**os.environ, "PYTHONPATH": str(GENERATOR)},
    )  # fmt: skip
    generated = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(generated) == 3
    for path in generated:
        committed = REPOSITORY / path.relative_to(tmp_path)
        assert path.read_text() == committed.read_text(), f"{committed} is out of date: run make protos"


def test_the_generated_code_works_with_the_lowest_versions_that_are_allowed():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lowest = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", text).groups() for text in project["dependencies"])
    for path in (REPOSITORY / "service/generated").rglob("*_pb2_grpc.py"):
        needed = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", path.read_text())[1]
        assert Version(needed) <= Version(lowest["grpcio"]), path
        messages_file = path.with_name(path.name.replace("_grpc", ""))
        needed = re.search(r"Protobuf Python Version: ([\d.]+)", messages_file.read_text())[1]
        assert Version(needed) <= Version(lowest["protobuf"]), messages_file


def test_the_lowest_versions_are_the_ones_that_make_test_oldest_installs():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    lowest = dict(text.split(">=") for text in [*required, *project["optional-dependencies"]["cpu"][1:]])
    pinned = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (REPOSITORY / "constraints-oldest.txt").read_text(), re.MULTILINE)
    )
    assert pinned.pop("grpcio-tools") == pinned["grpcio"]
    assert {name: Version(text) for name, text in lowest.items()} == {
        name: Version(text) for name, text in pinned.items()
    }


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.stem)
def test_every_message_field_and_method_has_a_comment(proto):
    lines = proto.read_text().splitlines()
    declared = re.compile(r"\s*((message|rpc|service) \w+|(repeated )?[\w.]+ \w+ = \d+;)")
    without_comment = [
        line for before, line in itertools.pairwise(lines) if declared.match(line) and "//" not in before
    ]
    assert without_comment == []


def test_a_request_keeps_files_raw_pixels_and_packed_pixels_when_it_is_serialised():
    request = messages.ClassifyRequest(
        request_id="7",
        images=[messages.Image(encoded=b"png"), messages.Image(rgb=bytes(3072))],
        packed_rgb=bytes(6144),
        top_k=3,
    )
    parsed = messages.ClassifyRequest.FromString(request.SerializeToString())
    assert [image.WhichOneof("content") for image in parsed.images] == ["encoded", "rgb"]
    assert parsed == request


def test_the_generated_code_imports_neither_torch_nor_the_training_library():
    script = (
        "import sys; import service.generated.cifar.v1.image_classifier_pb2_grpc\n"
        "print([name for name in ('torch', 'cifar_core') if name in sys.modules])"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert completed.stdout.strip() == "[]"
