"""Horizontal bars as SVG, for light and dark pages, drawn from numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

# class -> (light, dark); a picture brings its own background, so that it is readable on any page.
COLOURS = {
    "page": ("#ffffff", "#0d1117"),
    "text": ("#111827", "#e6edf3"),
    "small": ("#4b5563", "#9aa4af"),
    "line": ("#d1d5db", "#30363d"),
}
PARTS = [("#2563eb", "#60a5fa"), ("#f59e0b", "#fbbf24"), ("#10b981", "#34d399"), ("#9ca3af", "#6b7280")]
WIDTH, LABELS, NUMBERS, LEFT = 860, 230, 150, 20
BAR, GAP, GROUP, TOP = 18, 6, 34, 92


@dataclass(frozen=True)
class Bar:
    label: str
    parts: dict[str, float]  # what it is made of, from left to right
    number: str  # written at its end


def style(parts: list[str]) -> str:
    colours = COLOURS | {f"part{number}": PARTS[number] for number in range(len(parts))}
    light, dark = ("".join(f".{name}{{fill:{pair[mode]}}}" for name, pair in colours.items()) for mode in (0, 1))
    return f"<style>{light}@media (prefers-color-scheme:dark){{{dark}}}</style>"


def words(x: float, y: float, text: str, kind: str = "text", size: int = 13, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" font-size="{size}"{more}>{escape(text)}</text>'


def draw(title: str, unit: str, groups: dict[str, list[Bar]]) -> str:
    """An SVG of groups of bars on one scale."""
    parts = list(dict.fromkeys(part for bars in groups.values() for bar in bars for part in bar.parts))
    longest = max(sum(bar.parts.values()) for bars in groups.values() for bar in bars)
    scale, y = (WIDTH - LABELS - NUMBERS - 2 * LEFT) / longest, TOP
    body = [words(LEFT, 30, title, size=17), words(LEFT, 50, unit, "small")]
    for number, part in enumerate(parts if len(parts) > 1 else []):
        x = LEFT + LABELS + 110 * number
        body += [_box(x, 60, 12, 12, number), words(x + 18, 71, part, "small")]
    for group, bars in groups.items():
        body.append(words(LEFT, y + 13, group, size=14, more=' font-weight="600"'))
        y += 24
        for bar in bars:
            body += _bar(bar, parts, scale, y)
            y += BAR + GAP
        y += GROUP - 24
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        style(parts),
        f'<rect width="{WIDTH}" height="{y}" class="page"/>',
        *body,
        "</svg>\n",
    ])  # fmt: skip


def _bar(bar: Bar, parts: list[str], scale: float, y: int) -> list[str]:
    x, found = float(LEFT + LABELS), [words(LEFT + 12, y + 14, bar.label, "small")]
    for part, value in bar.parts.items():
        found.append(_box(x, y, value * scale, BAR, parts.index(part)))
        x += value * scale
    return [*found, words(x + 8, y + 14, bar.number, "text")]


def _box(x: float, y: float, width: float, height: float, part: int) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" class="part{part}"/>'
