import base64
import io
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.cifar_core.image_corpus import gradient, saved
from tests.service.exports import CLASSES, expected, pictures
from tests.service.http.web import Raw, Reply, Web, multipart

BROKEN = b"This is not a picture."


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def probabilities(result: dict[str, object]) -> list[float]:
    """Probabilities of one result in the model's order of classes."""
    ranked = {entry["name"]: entry["probability"] for entry in result["classes"]}  # type: ignore[attr-defined]
    return [ranked[name] for name in CLASSES]


def classify(web: Web, files: list[tuple[str | None, bytes]], query: str = "") -> Reply:
    body, kind = multipart(files)
    return web.post(f"/v1/classify{query}", body, kind)


def test_one_image_as_the_body_is_classified(web):
    image = pictures(1)
    reply = web.post("/v1/classify", png(image[0]), "image/png")
    assert (reply.status, reply.kind) == (200, "application/json")
    answer = reply.json
    assert answer["model"] == {"name": "cifar10", "version": answer["model"]["version"], "variant": "fp32"}
    assert 0 < answer["seconds"] < 60
    (result,) = answer["results"]
    assert result["file"] is None
    assert np.abs(np.array(probabilities(result)) - expected(0, image)[0]).max() < 1e-5
    ranked = [entry["probability"] for entry in result["classes"]]
    assert ranked == sorted(ranked, reverse=True)
    assert "pixels" not in result


@pytest.mark.parametrize("kind", ["", "image/jpeg", "application/x-www-form-urlencoded", "application/octet-stream"])
def test_the_body_is_an_image_whatever_its_content_type(web, kind):
    assert web.post("/v1/classify", png(pictures(1)[0]), kind).status == 200


def test_curl_is_all_it_takes(http_server, tmp_path):
    (tmp_path / "picture.jpg").write_bytes(saved(gradient(64, 48), "JPEG"))
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    url = f"{http_server.http_url}/v1/classify?top_k=1"
    done = subprocess.run(
        [curl, "-sS", "--noproxy", "*", "--data-binary", "@picture.jpg", url],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"probability"' in done.stdout


def test_several_images_are_classified_in_their_order_with_their_names(web):
    images = pictures(5)
    names = ["a.png", "b c.png", "ä.png", "a.png", None]
    reply = classify(web, list(zip(names, map(png, images), strict=True)))
    assert reply.status == 200
    assert [result["file"] for result in reply.json["results"]] == names
    given = np.array([probabilities(result) for result in reply.json["results"]])
    assert np.abs(given - expected(0, images)).max() < 1e-5


def test_top_k_limits_the_classes_and_pixels_are_what_the_model_sees(web):
    image = pictures(1)[0]
    (result,) = web.post("/v1/classify?top_k=3&pixels=true", png(image)).json["results"]
    assert len(result["classes"]) == 3
    assert np.array_equal(np.frombuffer(base64.b64decode(result["pixels"]), np.uint8).reshape(32, 32, 3), image)
    assert len(web.post("/v1/classify?top_k=99", png(image)).json["results"][0]["classes"]) == len(CLASSES)


def test_an_image_that_cannot_be_read_has_its_own_error_beside_the_results_of_others(web):
    reply = classify(web, [("good.png", png(pictures(1)[0])), ("bad.txt", BROKEN)])
    assert reply.status == 200
    good, bad = reply.json["results"]
    assert good["classes"]
    assert bad["file"] == "bad.txt"
    assert bad["error"]["code"] == "INVALID_ARGUMENT"
    assert "begins with b'This is " in bad["error"]["message"]


def test_a_request_without_a_readable_image_is_unprocessable_and_says_why_for_each(web):
    reply = classify(web, [("a", BROKEN), ("b", b"")])
    assert (reply.status, reply.kind) == (422, "application/problem+json")
    assert "none of the 2 images can be read" in reply.json["detail"]
    first, second = reply.json["results"]
    assert (first["file"], second["file"]) == ("a", "b")
    assert "the image is empty" in second["error"]["message"]
    assert web.post("/v1/classify", b"").status == 422


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("top_k=0", "top_k is '0'; it must be a whole number of at least 1"),
        ("top_k=-1", "top_k is '-1'"),
        ("top_k=three", "top_k is 'three'"),
        ("top_k=", "top_k is ''"),
        ("top_k=" + "9" * 5000, "top_k is '999"),
        ("top_k=%D9%A3", "top_k is"),
        ("pixels=yes", "pixels is 'yes'; it must be true or false"),
    ],
)
def test_a_wrong_parameter_is_a_bad_request(web, query, message):
    reply = web.post(f"/v1/classify?{query}", png(pictures(1)[0]))
    assert (reply.status, reply.kind) == (400, "application/problem+json")
    assert message in reply.json["detail"]


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "nan", "inf", "1e9", ""])
def test_a_wrong_timeout_is_a_bad_request(web, timeout):
    reply = web.post("/v1/classify", png(pictures(1)[0]), X_Request_Timeout=timeout)
    assert reply.status == 400
    assert "X-Request-Timeout" in reply.json["detail"]


def test_the_model_the_limits_and_the_samples_are_described(web):
    model = web.get("/v1/model").json
    assert model["classes"] == list(CLASSES)
    assert (model["name"], model["variant"], model["device"], model["image_size"]) == ("cifar10", "fp32", "cpu", 32)
    assert 0 <= model["accuracy"] <= 1
    assert model["limits"] == {
        "max_images": 400, "max_message_bytes": 8 * 2**20, "max_image_bytes": 8_000_000, "max_image_pixels": 32_000_000,
    }  # fmt: skip
    assert "cat.jpg" in model["samples"]
    for name in model["samples"]:
        sample = web.get(f"/samples/{name}")
        assert (sample.status, sample.kind.partition("/")[0]) == (200, "image")


def test_a_chunked_body_is_read(web):
    content = saved(gradient(64, 48), "JPEG")
    parts = (content[start : start + 100] for start in range(0, len(content), 100))
    reply = web.request("POST", "/v1/classify", parts, {"Transfer-Encoding": "chunked"})
    assert reply.status == 200


def test_files_of_the_docs_are_ours_and_name_no_other_host(web):
    page = web.get("/docs")
    assert (page.status, page.kind) == (200, "text/html; charset=utf-8")
    assert b"//" not in page.body.replace(b"http://HOST:PORT", b"")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert b"<script" not in page.body
    for path in web.get("/openapi.json").json["paths"]:
        assert path.encode() in page.body
    assert web.get("/docs/style.css").kind == "text/css; charset=utf-8"
    assert web.get("/docs", If_None_Match=page.headers["etag"]).status == 304


def test_files_for_browsers_allow_no_other_host_no_frames_and_no_stale_copies(web):
    for path in ("/", "/static/app.js", "/samples/cat.jpg", "/docs"):
        headers = web.get(path).headers
        directives = (directive.split() for directive in headers["content-security-policy"].split(";"))
        policy = {name: set(sources) for name, *sources in directives}
        assert policy.pop("img-src") == {"'self'", "blob:", "data:"}
        assert {name for name, sources in policy.items() if sources == {"'self'"}} == {
            "script-src", "style-src", "connect-src",
        }  # fmt: skip
        assert {name for name, sources in policy.items() if sources == {"'none'"}} == {
            "default-src", "base-uri", "form-action", "frame-ancestors",
        }  # fmt: skip
        assert len(policy) == 7
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/samples/..%2f..%2fpyproject.toml", "/samples/README.md", "/docs/x", "/x", "/../x"])
def test_other_files_are_not_found(web, path):
    reply = web.get(path)
    assert (reply.status, reply.kind) == (404, "application/problem+json")


def test_a_method_that_a_path_does_not_have_is_refused(web):
    reply = web.get("/v1/classify")
    assert (reply.status, reply.headers["allow"], reply.kind) == (405, "POST", "application/problem+json")
    assert web.request("HEAD", "/healthz").status == 200


def test_of_a_repeated_header_the_first_counts(http_server):
    body = png(pictures(1)[0])
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode()
    for values, status in (((b"10", b"soon"), 200), ((b"soon", b"10"), 400)):
        lines = b"".join(b"X-Request-Timeout: " + value + b"\r\n" for value in values)
        with Raw(http_server.http_url) as raw:
            assert raw.send(head + lines + b"\r\n" + body).reply().status == status


def test_the_longest_timeout_is_a_day(web):
    for timeout, status in (("86400", 200), ("86401", 400)):
        assert web.post("/v1/classify", png(pictures(1)[0]), X_Request_Timeout=timeout).status == status
