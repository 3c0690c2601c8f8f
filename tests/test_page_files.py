"""What the page's files promise before any browser reads them.

``test_page.py`` drives the page itself.
"""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "inferencia" / "web"
FILES = sorted(path for path in PAGE.rglob("*") if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]

IMPORT = re.compile(r"""^(?:import|export)\s[^;]*?from\s+["']([^"']+)["']""", re.M)
EXPORT = re.compile(r"^export (?:async )?(?:function\*?|const|let|class) (\w+)", re.M)
NAMES = re.compile(r'^import \{([^}]*)\} from "([^"]+)"', re.M)
# Addresses that are names and never asked for.
NAMESPACES = {"http://www.w3.org/2000/svg"}


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(PAGE).as_posix() for path in paths]


def test_the_whole_page_is_smaller_than_150_kib() -> None:
    assert sum(path.stat().st_size for path in FILES) < 150 * 1024


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_no_file_names_an_outside_address(path: Path) -> None:
    found = set(re.findall(r"""(?:https?:)?//[\w.-]+\.\w[^\s"'`)]*""", text(path)))
    comments = set(re.findall(r"^\s*//.*$", text(path), re.M))
    outside = {one for one in found if not any(one in line for line in comments)}
    assert outside <= NAMESPACES


def test_the_html_holds_no_script_style_or_handler_of_its_own() -> None:
    """The page's policy refuses them, and each would be a blank page."""
    html = text(PAGE / "index.html")
    assert re.findall(r"<script(?![^>]*\ssrc=)", html) == []
    assert "<style" not in html
    assert re.findall(r"\s(?:on\w+|style)=", html) == []
    assert "javascript:" not in html


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_no_script_makes_markup_or_code_out_of_text(path: Path) -> None:
    made = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\("
        r"|new Function|createContextualFragment|setTimeout\([\"']"
    )
    assert re.findall(made, text(path)) == []
    # A style attribute is refused; the classes of style.css do it all.
    assert re.findall(r"""["']style["']|\.style\b|\bstyle:""", text(path)) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_every_module_that_is_imported_exists_and_has_what_is_taken(
    path: Path,
) -> None:
    for wanted in IMPORT.findall(text(path)):
        assert (path.parent / wanted).is_file(), f"{path.name} imports {wanted}"
    for taken, wanted in NAMES.findall(text(path)):
        offered = set(EXPORT.findall(text(path.parent / wanted)))
        asked = {one.strip().split(" as ")[0] for one in taken.split(",")}
        assert asked <= offered, f"{path.name} takes {asked - offered} from {wanted}"


def test_nothing_is_imported_and_not_used() -> None:
    unused = []
    for path in SCRIPTS:
        source = text(path)
        for taken, _ in NAMES.findall(source):
            for one in taken.split(","):
                name = one.strip().split(" as ")[-1]
                if len(re.findall(rf"\b{name}\b", source)) < 2:
                    unused.append(f"{path.name}: {name}")
    assert unused == []


def test_every_module_is_reached_from_the_page() -> None:
    reached: set[Path] = set()
    ahead = [PAGE / "main.js"]
    while ahead:
        path = ahead.pop()
        if path not in reached:
            reached.add(path)
            ahead += [
                (path.parent / one).resolve() for one in IMPORT.findall(text(path))
            ]
    assert reached == set(SCRIPTS)


def test_what_the_html_refers_to_exists() -> None:
    html = text(PAGE / "index.html")
    wanted = re.findall(r"""(?:src|href)="([^"#]+)\"""", html)
    assert wanted
    for one in wanted:
        assert (PAGE / one).is_file(), one


# --- colours --------------------------------------------------------------------------

# Text on ground. Fills and lines are no text; 1.4.11 of WCAG asks 3 of those that mean
# something.
TEXTS = ("text", "dim", "accent", "good", "wait", "bad", "off")
GROUNDS = ("ground", "raised", "sunk")
FILLS = ("good-fill", "wait-fill", "bad-fill", "edge")


def schemes() -> dict[str, dict[str, str]]:
    """The colours of both schemes, by name."""
    css = text(PAGE / "style.css")
    blocks = re.findall(r":root \{(.*?)\}", css, re.S)
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks
    )
    return {"light": light, "dark": light | dark}


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_on_every_ground(scheme: str) -> None:
    colours = schemes()[scheme]
    pairs = [(text, ground) for text in TEXTS for ground in GROUNDS]
    pairs.append(("on-accent", "accent"))
    faint = {
        pair: round(found, 2)
        for pair in pairs
        if (found := contrast(colours[pair[0]], colours[pair[1]])) < 4.5
    }
    assert faint == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shapes_that_mean_something_stand_out(scheme: str) -> None:
    colours = schemes()[scheme]
    faint = {
        (fill, ground): round(found, 2)
        for fill in FILLS
        for ground in GROUNDS
        if (found := contrast(colours[fill], colours[ground])) < 3
    }
    assert faint == {}


def test_both_schemes_name_the_same_colours() -> None:
    css = text(PAGE / "style.css")
    light, dark = (
        set(re.findall(r"--([\w-]+): #", block))
        for block in re.findall(r":root \{(.*?)\}", css, re.S)
    )
    assert light == dark


def test_each_view_has_its_pictures_and_all_are_small() -> None:
    """``docs/screenshots.py`` takes them."""
    pictures = list((PAGE.parent.parent / "docs" / "screenshots").glob("*.png"))
    views = {path.stem for path in (PAGE / "views").iterdir()} - {"entrance"}
    looks = ("light", "dark", "phone")
    assert {p.stem for p in pictures} == {
        f"{v}-{look}" for v in views for look in looks
    }
    assert sum(path.stat().st_size for path in pictures) < 1_500_000
