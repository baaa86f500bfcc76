"""The JSON schemas of the HTTP interface: the forms of requests and answers."""

from typing import Any, Final

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_SHARE: Final[Schema] = {"type": "number", "minimum": 0, "maximum": 1}
_YES_OR_NO: Final[Schema] = {"type": "boolean"}


def _object(properties: Schema, *, optional: tuple[str, ...] = ()) -> Schema:
    """An object whose members are all required, except those named by `optional`, and which has no others."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_DURATION: Final = _object({"count": _COUNT, "ns": _COUNT})
_RESULT: Final[Schema] = {
    "oneOf": [
        _object(
            {
                "file": {"type": ["string", "null"], "description": "Name of the file, if the client gave one."},
                "classes": {
                    **_list(_object({"name": _TEXT, "probability": _SHARE})),
                    "description": "The most probable class first.",
                },
                "pixels": {
                    "type": "string",
                    "contentEncoding": "base64",
                    "description": "What the model sees: 32 x 32 pixels, RGB, row by row. Only if asked for.",
                },
            },
            optional=("pixels",),
        ),
        _object(
            {
                "file": {"type": ["string", "null"]},
                "error": _object({"code": {"enum": ["INVALID_ARGUMENT", "INTERNAL"]}, "message": _TEXT}),
            }
        ),
    ]
}
_PROBLEM: Final[Schema] = {
    "type": _TEXT,
    "title": _TEXT,
    "status": {"type": "integer", "minimum": 400, "maximum": 599},
    "detail": {"type": "string", "description": "What is wrong, and the way out."},
    "error": {"type": "string", "description": "The same as `detail`, for clients of the Open Inference Protocol."},
    "retry_after": {"type": "number", "description": "Seconds after which a repeated request may succeed."},
}
_TENSOR: Final = _object({"name": _TEXT, "datatype": _TEXT, "shape": _list({"type": "integer"})})
_PARAMETERS: Final[Schema] = {"type": "object"}

SCHEMAS: Final[Schema] = {
    "Problem": _object(_PROBLEM, optional=("retry_after",)),
    "Unreadable": _object({**_PROBLEM, "results": _list(_RESULT)}, optional=("retry_after",)),
    "Result": _RESULT,
    "Classification": _object(
        {
            "model": _object({"name": _TEXT, "version": _TEXT, "variant": _TEXT}),
            "seconds": {"type": "number", "minimum": 0, "description": "Time in the server."},
            "results": _list({"$ref": "#/components/schemas/Result"}),
        }
    ),
    "Model": _object(
        {
            "name": _TEXT,
            "version": _TEXT,
            "variant": _TEXT,
            "device": {"enum": ["cpu", "cuda", "openvino"]},
            "classes": _list(_TEXT),
            "image_size": _COUNT,
            "accuracy": {**_SHARE, "description": "Share of the test images that this variant classifies correctly."},
            "limits": _object(
                dict.fromkeys(("max_images", "max_message_bytes", "max_image_bytes", "max_image_pixels"), _COUNT)
            ),
            "samples": {**_list(_TEXT), "description": "Names of files under /samples/."},
        }
    ),
    "Health": _object({"status": {"const": "ok"}}),
    "Live": _object({"live": {"const": True}}),
    "Ready": _object({"ready": _YES_OR_NO}),
    "ModelReady": _object({"name": _TEXT, "ready": _YES_OR_NO}),
    "Server": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
    "Metadata": {
        **_object(
            {
                "name": _TEXT,
                "versions": _list(_TEXT),
                "platform": _TEXT,
                "inputs": _list(_TENSOR),
                "outputs": _list(_TENSOR),
                "parameters": _PARAMETERS,
            },
            optional=("parameters",),
        )
    },
    "Config": {"type": "object", "required": ["name", "max_batch_size", "input", "output"]},
    "Statistics": _object(
        {
            "model_stats": _list(
                _object(
                    {
                        "name": _TEXT,
                        "version": _TEXT,
                        "last_inference": _COUNT,
                        "inference_count": _COUNT,
                        "execution_count": _COUNT,
                        "inference_stats": _object(
                            dict.fromkeys(
                                ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"),
                                _DURATION,
                            )
                        ),
                        "batch_stats": _list(_object({"batch_size": _COUNT, "compute_infer": _DURATION})),
                    }
                )
            )
        }
    ),
    "InferRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": ["string", "null"], "maxLength": 1024},
            "parameters": {
                "type": ["object", "null"],
                "properties": {
                    "timeout": {
                        "type": ["integer", "null"],
                        "minimum": 0,
                        "maximum": 2**63 - 1,
                        "description": "Microseconds; 0 for none.",
                    },
                    "binary_data_output": {"type": ["boolean", "null"]},
                },
            },
            "inputs": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1,
                "items": {
                    "type": "object",
                    "required": ["name", "datatype", "shape"],
                    "properties": {
                        "name": {"const": "images"},
                        "datatype": {"const": "UINT8"},
                        "shape": {
                            "type": "array",
                            "prefixItems": [{"type": "integer", "minimum": 1}, *({"const": n} for n in (32, 32, 3))],
                            "minItems": 4,
                            "maxItems": 4,
                        },
                        "data": {
                            "type": "array",
                            "description": "The elements, row by row, flat or nested: whole numbers from 0 to 255.",
                        },
                        "parameters": {
                            "type": ["object", "null"],
                            "properties": {"binary_data_size": {"type": ["integer", "null"], "minimum": 0}},
                        },
                    },
                },
            },
            "outputs": {
                "type": ["array", "null"],
                "maxItems": 2,
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"enum": ["logits", "probabilities"]},
                        "parameters": {
                            "type": ["object", "null"],
                            "properties": {
                                "binary_data": {"type": ["boolean", "null"]},
                                "classification": {"type": ["integer", "null"], "minimum": 0, "maximum": 2**63 - 1},
                            },
                        },
                    },
                },
            },
        },
    },
    "InferResponse": _object(
        {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "id": _TEXT,
            "parameters": _PARAMETERS,
            "outputs": _list(
                _object(
                    {
                        "name": _TEXT,
                        "datatype": {"enum": ["FP32", "BYTES"]},
                        "shape": _list(_COUNT),
                        "data": {"type": "array"},
                        "parameters": _PARAMETERS,
                    },
                    optional=("data", "parameters"),
                )
            ),
        },
        optional=("id", "parameters"),
    ),
}
