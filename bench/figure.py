"""One figure beside its goal, as the benches print it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured, in words, and whether its goal is reached."""

    title: str
    figure: str
    goal: str
    passed: bool

    def __str__(self) -> str:
        word = "pass" if self.passed else "FAIL"
        return f"{self.title:<52} {self.figure:>26}   {self.goal:<22} {word}"

    @classmethod
    def at_most(cls, title: str, value: float, most: float, unit: str) -> "Figure":
        """One that shall not be above ``most``."""
        figure = f"{value:,.1f} {unit}"
        return cls(title, figure, f"at most {most:g} {unit}", value <= most)
