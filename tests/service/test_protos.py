import itertools
import re
import subprocess
import sys

import pytest

from service.generated.cifar.v1 import image_classifier_pb2 as messages
from tests.conftest import REPOSITORY

PROTO_ROOT = REPOSITORY / "protos"
PROTOS = sorted(PROTO_ROOT.rglob("*.proto"))


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.stem)
def test_the_committed_code_is_what_make_protos_generates(proto, tmp_path):
    source = "service/generated" / proto.relative_to(PROTO_ROOT)
    options = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-Iservice/generated={PROTO_ROOT}", *options, str(source)],
        cwd=REPOSITORY, check=True,
    )  # fmt: skip
    generated = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(generated) == 3
    for path in generated:
        committed = REPOSITORY / path.relative_to(tmp_path)
        assert path.read_text() == committed.read_text(), f"{committed} is out of date: run make protos"


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
