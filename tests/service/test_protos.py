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
def test_the_generated_code_is_that_of_the_protocol(proto, tmp_path):
    source = "service/generated" / proto.relative_to(PROTO_ROOT)
    options = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-Iservice/generated={PROTO_ROOT}", *options, str(source)],
        cwd=REPOSITORY, check=True,
    )  # fmt: skip
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 3
    for path in made:
        committed = REPOSITORY / path.relative_to(tmp_path)
        assert path.read_text() == committed.read_text(), f"{committed} is out of date: make protos"


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.stem)
def test_every_message_field_and_method_is_commented(proto):
    lines = proto.read_text().splitlines()
    declared = re.compile(r"\s*((message|rpc|service) \w+|(repeated )?[\w.]+ \w+ = \d+;)")
    bare = [line for before, line in itertools.pairwise(lines) if declared.match(line) and "//" not in before]
    assert bare == []


def test_a_request_holds_files_raw_pixels_and_packed_pixels():
    request = messages.ClassifyRequest(
        request_id="7",
        images=[messages.Image(encoded=b"png"), messages.Image(rgb=bytes(3072))],
        packed_rgb=bytes(6144),
        top_k=3,
    )
    again = messages.ClassifyRequest.FromString(request.SerializeToString())
    assert [image.WhichOneof("content") for image in again.images] == ["encoded", "rgb"]
    assert again == request


def test_the_protocol_needs_neither_torch_nor_the_training_library():
    script = (
        "import sys; import service.generated.cifar.v1.image_classifier_pb2_grpc\n"
        "print([name for name in ('torch', 'cifar_core') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"
