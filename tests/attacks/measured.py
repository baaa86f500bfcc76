"""A measured figure with the limit that it must keep."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """One measured figure and its limit."""

    name: str
    value: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the limit holds."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def text(self) -> str:
        """The figure, for the table."""
        return f"{self.name}: {self.value:,.4g} {self.unit}".strip()

    @property
    def limit_text(self) -> str:
        """The limit, for the table."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:,.4g} {self.unit}".strip()
