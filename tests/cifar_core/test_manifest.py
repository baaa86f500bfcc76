import json
import math
import subprocess
import sys

import pytest

from cifar_core.manifest import FILE_NAME, Manifest, ManifestError, json_schema, read_manifest
from tests.conftest import REPOSITORY

SHIPPED = REPOSITORY / "exported"
SHA256 = "0123456789abcdef" * 4


def minimal():
    return {
        "schema_version": 1,
        "model_version": "a-model",
        "classes": ["cat", "dog"],
        "variants": {"fp32": {"file": "model.onnx", "sha256": SHA256, "test_accuracy": 0.5}},
    }


def write(folder, content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / FILE_NAME).write_bytes(text)
    return folder


def test_the_shipped_manifest_is_read_and_written_byte_for_byte():
    manifest = read_manifest(SHIPPED)
    assert manifest.to_json() == (SHIPPED / FILE_NAME).read_bytes()
    assert manifest.classes[3] == "cat"
    assert manifest.recipe["name"] == "deep-distilled"
    assert manifest.data.fingerprint == json.loads((SHIPPED / FILE_NAME).read_bytes())["data"]["fingerprint"]
    assert manifest.variant("int8").file == "model.int8.onnx"


def test_only_what_a_server_needs_is_required(tmp_path):
    manifest = read_manifest(write(tmp_path, minimal()))
    assert manifest.variant("fp32").test_accuracy == 0.5
    assert manifest.data.fingerprint == ""
    assert manifest.temperature is None
    assert json.loads(manifest.to_json()) == minimal()


@pytest.mark.parametrize("field", ["schema_version", "model_version", "classes", "variants"])
def test_a_missing_required_field_is_named(tmp_path, field):
    value = minimal()
    del value[field]
    with pytest.raises(ManifestError, match=field):
        read_manifest(write(tmp_path, value))


def test_fields_of_later_versions_are_kept(tmp_path):
    value = minimal() | {"signature": "later"}
    value["variants"]["fp32"] |= {"latency": 1.5}
    manifest = read_manifest(write(tmp_path, value))
    assert json.loads(manifest.to_json()) == value


def test_a_missing_manifest_is_an_error_that_says_how_to_write_one(tmp_path):
    with pytest.raises(ManifestError, match=r"manifest\.json does not exist; write an export with: make export"):
        read_manifest(tmp_path)


def test_a_manifest_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(ManifestError, match=r"manifest\.json cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 100, -3])
def test_a_torn_manifest_is_refused(tmp_path, length):
    content = (SHIPPED / FILE_NAME).read_bytes()[:length]
    with pytest.raises(ManifestError, match="is not JSON"):
        read_manifest(write(tmp_path, content))


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"{'single': 'quotes'}"])
def test_a_file_that_is_not_json_is_refused(tmp_path, content):
    with pytest.raises(ManifestError, match="is not JSON"):
        read_manifest(write(tmp_path, content))


@pytest.mark.parametrize("content", [b"[]", b"1", b"null", b'"text"'])
def test_json_that_is_not_an_object_is_refused(tmp_path, content):
    with pytest.raises(ManifestError, match="must hold a JSON object"):
        read_manifest(write(tmp_path, content))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused_with_advice(tmp_path, version):
    with pytest.raises(ManifestError, match="only 1 is supported: export the model again"):
        read_manifest(write(tmp_path, minimal() | {"schema_version": version}))


@pytest.mark.parametrize(
    "file", ["", ".", "..", "../model.onnx", "/model.onnx", "a/b.onnx", "a\\b.onnx", ".hidden", "model\0.onnx", 7, None]
)
def test_a_file_name_that_leads_out_of_the_folder_or_is_no_name_is_refused(tmp_path, file):
    value = minimal()
    value["variants"]["fp32"]["file"] = file
    with pytest.raises(ManifestError, match=r"variants\.fp32\.file"):
        read_manifest(write(tmp_path, value))


@pytest.mark.parametrize("sha256", ["", SHA256[:-1], SHA256.upper(), SHA256 + "0", SHA256 + "\n", 5])
def test_a_digest_in_another_form_is_refused(tmp_path, sha256):
    value = minimal()
    value["variants"]["fp32"]["sha256"] = sha256
    with pytest.raises(ManifestError, match=r"variants\.fp32\.sha256"):
        read_manifest(write(tmp_path, value))


@pytest.mark.parametrize("accuracy", ["0.5", -0.1, 1.1, None, math.nan, True, [0.5]])
def test_an_accuracy_that_is_not_a_number_from_0_to_1_is_refused(tmp_path, accuracy):
    value = minimal()
    value["variants"]["fp32"]["test_accuracy"] = accuracy
    with pytest.raises(ManifestError, match=r"variants\.fp32\.test_accuracy"):
        read_manifest(write(tmp_path, value))


@pytest.mark.parametrize("classes", [[], "cat", ["cat", "cat"], ["cat", ""], ["cat", 1], None])
def test_impossible_classes_are_refused(tmp_path, classes):
    with pytest.raises(ManifestError, match="classes"):
        read_manifest(write(tmp_path, minimal() | {"classes": classes}))


@pytest.mark.parametrize("variants", [{}, [], {"": {}}, {"fp32": None}, {"fp32": "model.onnx"}])
def test_impossible_variants_are_refused(tmp_path, variants):
    with pytest.raises(ManifestError, match="variants"):
        read_manifest(write(tmp_path, minimal() | {"variants": variants}))


@pytest.mark.parametrize(("field", "value"), [("temperature", 0), ("seed", "0"), ("epoch", 0), ("data", [])])
def test_an_optional_field_with_an_impossible_value_is_refused(tmp_path, field, value):
    with pytest.raises(ManifestError, match=field):
        read_manifest(write(tmp_path, minimal() | {field: value}))


def test_the_error_for_an_unknown_variant_lists_the_variants():
    with pytest.raises(ManifestError, match="there is no variant 'int4'; the variants are: fp32, int8"):
        read_manifest(SHIPPED).variant("int4")


def test_a_manifest_cannot_be_changed():
    manifest = Manifest(**minimal())
    with pytest.raises(ValueError, match="frozen"):
        manifest.seed = 1


def test_the_committed_json_schema_is_that_of_the_model():
    committed = json.loads((REPOSITORY / "docs/manifest.schema.json").read_text())
    assert committed == json_schema(), "write it again: python -m cifar_core.manifest > docs/manifest.schema.json"


def test_the_command_prints_the_committed_json_schema(command):
    done = command("cifar_core.manifest")
    assert done.stdout == (REPOSITORY / "docs/manifest.schema.json").read_text()


def test_reading_a_manifest_does_not_import_torch():
    script = "import sys, cifar_core.manifest; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
