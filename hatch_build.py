"""Puts the shipped model and the demo's pictures into the wheel; an editable installation has them in the checkout."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShippedFiles(BuildHookInterface[Any]):
    """Called by hatchling, as pyproject.toml says."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the folders, unless the build is an editable one."""
        if version != "editable":
            build_data["force_include"].update({"exported": "service/exported", "samples": "service/samples"})
