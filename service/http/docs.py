"""The description of the interface as a page: plain HTML made from the OpenAPI description, without scripts."""

import html
import json
from collections.abc import Sequence
from typing import Any

Described = dict[str, Any]

STYLE = b""":root { color-scheme: light dark; }
:root { --line: light-dark(#d5dae1, #3a414c); --soft: light-dark(#f4f6f9, #1d2127); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.15rem; }
h2 span { font-weight: normal; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; display: block; overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
code, pre { font: .9em ui-monospace, monospace; background: var(--soft); }
pre { padding: .8rem; overflow-x: auto; }
"""


def page(description: Described) -> bytes:
    """The page.

    Args:
        description: The OpenAPI description; see service.http.openapi.
    """
    info = description["info"]
    operations = [
        _operation(path, method, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, schema) for name, schema in description["components"]["schemas"].items()]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>HTTP interface of {_text(info['title'])}</title>",
        "<link rel='stylesheet' href='docs/style.css'></head><body><main>",
        f"<h1>HTTP interface of {_text(info['title'])} {_text(info['version'])}</h1>",
        f"<p>{_text(info['description'])}</p>",
        "<p>The same for programs: <a href='openapi.json'>openapi.json</a>.",
        " A page to try the model: <a href='./'>/</a>.</p>",
        "<pre>curl --data-binary @cat.jpg http://HOST:PORT/v1/classify</pre>",
        *operations,
        "<h2 id='schemas'>Schemas</h2>",
        *schemas,
        "</main></body></html>",
    ]
    return "\n".join(parts).encode()


def _operation(path: str, method: str, operation: Described) -> str:
    heading = f"<code>{method.upper()} {_text(path)}</code> <span>{_text(operation['summary'])}</span>"
    parts = [f"<h2 id='{_text(operation['operationId'])}'>{heading}</h2>"]
    if operation["parameters"]:
        rows = [
            (f"<code>{_text(each['name'])}</code>", _text(each["in"]), _type(each["schema"]), _described(each))
            for each in operation["parameters"]
        ]
        parts.append(_table(("parameter", "in", "type", "meaning"), rows))
    if "requestBody" in operation:
        parts.append(_table(("body", "form"), _contents(operation["requestBody"])))
    answers = [
        (f"<code>{status}</code>", _described(answer), _forms(answer))
        for status, answer in operation["responses"].items()
    ]
    parts.append(_table(("status", "meaning", "form"), answers))
    return "\n".join(parts)


def _contents(holder: Described) -> list[tuple[str, ...]]:
    return [(f"<code>{_text(kind)}</code>", _type(each["schema"])) for kind, each in holder["content"].items()]


def _forms(answer: Described) -> str:
    return "<br>".join(" ".join(content) for content in _contents({"content": answer.get("content", {})}))


def _type(schema: Described) -> str:
    if "$ref" in schema:
        name = _text(schema["$ref"].rpartition("/")[2])
        return f"<a href='#schema-{name}'>{name}</a>"
    return _text(schema.get("format") or schema.get("type", ""))


def _schema(name: str, schema: Described) -> str:
    content = _text(json.dumps(schema, indent=2, ensure_ascii=False))
    name = _text(name)
    return f"<details id='schema-{name}'><summary>{name}</summary><pre>{content}</pre></details>"


def _described(holder: Described) -> str:
    return _text(holder.get("description", ""))


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th scope='col'>{each}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: object) -> str:
    return html.escape(str(value))
