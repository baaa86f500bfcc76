"""Checks KServe objects with the classes of KServe's SDK; run by an interpreter that has the package kserve.

Reads a list of objects as JSON from standard input and prints each problem on a line. KServe's own function for reading
objects ignores fields that it does not know, so the classes are walked here.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import kserve
from kubernetes import client

SCALARS = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float), "datetime": (str,)}


def problems(value: Any, kind: str, path: str) -> Iterator[str]:
    """What is wrong with a value of a type, which is named as the SDK or the client of Kubernetes names it."""
    if match := re.fullmatch(r"[lL]ist\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{path}: not a list"
            return
        for number, each in enumerate(value):
            yield from problems(each, match[1], f"{path}[{number}]")
    elif match := re.fullmatch(r"(?:dict\(|Dict\[)str, (.+)[)\]]", kind):
        if not isinstance(value, dict):
            yield f"{path}: not a mapping"
            return
        for key, each in value.items():
            yield from problems(each, match[1], f"{path}.{key}")
    elif kind in SCALARS:
        if not isinstance(value, SCALARS[kind]) or (isinstance(value, bool) and kind != "bool"):
            yield f"{path}: {value!r} is not of type {kind}"
    elif kind != "object":
        yield from _problems_of_object(value, _find(kind), path)


def _find(kind: str) -> type[Any]:
    found = getattr(kserve, kind, None) or getattr(kserve.models, kind, None) or getattr(client, kind)
    return found


def _problems_of_object(value: Any, kind: type[Any], path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        # Quantities and the like are strings or numbers in JSON, and have classes without fields.
        if getattr(kind, "openapi_types", None):
            yield f"{path}: not an object of class {kind.__name__}"
        return
    names = {json_name: name for name, json_name in kind.attribute_map.items()}
    for unknown in value.keys() - names.keys():
        yield f"{path}: {kind.__name__} has no field {unknown}"
    try:
        kind(**{names[key]: each for key, each in value.items() if key in names})
    except ValueError as error:  # a field is missing
        yield f"{path}: {error}"
    for key, each in value.items():
        if key in names:
            yield from problems(each, kind.openapi_types[names[key]], f"{path}.{key}")


def main() -> None:
    for manifest in json.load(sys.stdin):
        version = manifest["apiVersion"].rpartition("/")[2]
        name = f"{version[0].upper()}{version[1:]}{manifest['kind']}"
        if not hasattr(kserve, name):
            print(f"KServe has no class {name}")
            continue
        for problem in problems(manifest, name, manifest["kind"]):
            print(problem)


main()
