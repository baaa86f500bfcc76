"""The description of the interface is true: requests made from it by schemathesis, and each status by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from service.http.schemas import SCHEMAS
from tests.conftest import REPOSITORY
from tests.service.exports import pictures
from tests.service.http.test_classify import classify, png
from tests.service.http.test_open_inference import infer, infer_binary
from tests.service.http.web import Web


@pytest.fixture
def description(web: Web) -> dict[str, object]:
    return web.get("/openapi.json").json


def test_the_schemas_are_schemas():
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)


def test_each_path_of_the_server_is_described_and_each_described_path_is_answered(web, description):
    for path, operations in description["paths"].items():
        for method in operations:
            named = path.replace("{name}", "cifar10").replace("{version}", "1")
            named = named.replace("/samples/{file}", "/samples/cat.jpg").replace("/docs/{file}", "/docs/style.css")
            if "{file}" in named or named == "/":  # the page: see its own tests
                continue
            body = b"" if method == "post" else None
            reply = web.request(method.upper(), named, body)
            assert str(reply.status) in operations[method]["responses"], (path, reply.status)
            assert (reply.status == 200) == (method == "get"), (path, reply.body)


def test_answers_have_their_schemas(web, description):
    def check(schema: str, content: object) -> None:
        components = {"components": description["components"], "$ref": f"#/components/schemas/{schema}"}
        Draft202012Validator(components).validate(content)

    image = png(pictures(1)[0])
    check("Classification", classify(web, [("a", image), ("b", b"x")], "?pixels=true").json)
    check("Unreadable", web.post("/v1/classify", b"x").json)
    check("Model", web.get("/v1/model").json)
    check("InferResponse", infer(web, pictures(1), id="1").json)
    binary = infer_binary(web, pictures(1), parameters={"binary_data_output": True})
    check("InferResponse", json.loads(binary.body[: int(binary.headers["inference-header-content-length"])]))
    check("Statistics", web.get("/v2/models/cifar10/stats").json)
    check("Metadata", web.get("/v2/models/cifar10").json)
    for path in ("/v1/classify", "/none", "/v2/models/resnet"):
        check("Problem", web.get(path).json)


def fuzz(url: str, examples: int, folder: Path) -> None:
    """Lets schemathesis send this many requests to each path, in a process of its own."""
    # A deadline that passes is no error of the server: some requests have deadlines of nanoseconds.
    settings = folder / "schemathesis.toml"
    settings.write_text('[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 504]\n')
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), "run", f"{url}/openapi.json",
            "--max-examples", str(examples), "--seed", "1", "--workers", "1", "--no-color",
            "--phases", "examples,coverage,fuzzing", "--mode", "all",
            # The schema cannot say that an image must be readable and that shape and data must agree. Tokens are off.
            "--exclude-checks", "positive_data_acceptance,ignored_auth",
            # The page and files of other packages: nothing to find, and large answers.
            "--exclude-path-regex", "^/(docs|static|samples)?(/.*)?$",
        ],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5000:]


def test_no_request_made_from_the_description_gets_another_answer_than_described(http_server, tmp_path):
    fuzz(http_server.http_url, 5, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_requests_made_from_the_description_get_no_other_answer_than_described(http_server, tmp_path):
    fuzz(http_server.http_url, 300, tmp_path)
