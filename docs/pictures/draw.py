"""Draws iteration.svg: the four engines of step 3 and what each does in the phases of one PPO iteration.

    python docs/pictures/draw.py      writes docs/pictures/iteration.svg; a test checks that it is up to date
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

# class -> (light, dark); the picture brings its own background, so that it is readable on any page.
COLOURS = {
    "page": ("#ffffff", "#0d1117"),
    "lane": ("#f3f4f6", "#161b22"),
    "trained": ("#dbeafe", "#1e3a5f"),
    "frozen": ("#e5e7eb", "#30363d"),
    "ranks": ("#dcfce7", "#173d2a"),
    "text": ("#111827", "#e6edf3"),
    "small": ("#4b5563", "#9aa4af"),
}
LINE = ("#6b7280", "#8b949e")

LABELS, COLUMN, GAP = 170, 190, 18  # widths
TOP, LANE = 74, 76  # heights
LEFT = 20
PHASES = ["1  rollout", "2  score", "3  advantages", "4  update"]
GIVES = [
    ["sequences [B,P+R]", "mask [B,R], EOS included"],
    ["logprobs, ref_logprobs,", "values [B,R], scores [B]"],
    ["advantages, returns [N,R]", "of the rows of all ranks"],
    ["new weights for the", "next rollout, in place"],
]
LANES = [
    ("actor", "trained, ZeRO 0-3", "trained"),
    ("critic", "trained, ZeRO 0-3", "trained"),
    ("reference", "frozen, ZeRO 0 or 3", "frozen"),
    ("reward", "frozen, ZeRO 0 or 3", "frozen"),
]
# (lane, phase) -> lines
WORK = {
    (0, 0): ["samples responses,", "gathered once at ZeRO 3"],
    (0, 1): ["log-probabilities of", "what was sampled"],
    (1, 1): ["value of every state"],
    (2, 1): ["log-probabilities of", "the same tokens"],
    (3, 1): ["one score per response"],
    (0, 3): ["clipped policy loss,", "one step per minibatch"],
    (1, 3): ["clipped value loss,", "steps with the actor"],
}
BETWEEN = [
    *("on every rank, no engine", "", "reward per token:", "- kl_coef x KL,", "score on the last token"),
    *("", "GAE, then whitened", "over all ranks"),
]


def left_of(phase: int) -> int:
    return LEFT + LABELS + phase * (COLUMN + GAP)


def box(x: int, y: int, width: int, height: int, kind: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="{kind}"/>'


def words(x: int, y: int, lines: list[str], kind: str = "text", anchor: str = "middle", size: int = 14) -> list[str]:
    """Lines of text around the height `y`."""
    first = y - (len(lines) - 1) * 9 + 5
    font = f'class="{kind}" text-anchor="{anchor}" font-size="{size}"'
    rows = [(first + 18 * number, escape(line)) for number, line in enumerate(lines) if line]
    return [f'<text x="{x}" y="{row}" {font}>{line}</text>' for row, line in rows]


def arrow(path: str) -> str:
    return f'<path d="{path}" class="line" marker-end="url(#head)"/>'


def style() -> str:
    rules = ["", ""]
    for mode in (0, 1):
        rules[mode] = "".join(f".{name}{{fill:{colours[mode]}}}" for name, colours in COLOURS.items())
        rules[mode] += f".line{{stroke:{LINE[mode]};fill:none;stroke-width:1.5}}.head{{fill:{LINE[mode]}}}"
    return f"<style>{rules[0]}@media (prefers-color-scheme:dark){{{rules[1]}}}</style>"


def picture() -> str:
    width = left_of(3) + COLUMN + 10 + LEFT
    bottom = TOP + len(LANES) * LANE
    height = bottom + 126
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img">',
        "<title>One PPO iteration on four engines</title>",
        style(),
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0,0 L10,5 L0,10 z" class="head"/></marker></defs>',
        f'<rect width="{width}" height="{height}" class="page"/>',
        *words(LEFT, 26, ["Every rank holds its part of all four engines, in one process group"], "small", "start"),
    ]
    for phase, name in enumerate(PHASES):
        middle = left_of(phase) + COLUMN // 2
        parts += words(middle, TOP - 18, [name], size=17)
        parts += words(middle, bottom + 40, GIVES[phase], "small", size=13)
        if phase:
            parts.append(arrow(f"M{left_of(phase) - GAP - 24},{TOP - 18} H{left_of(phase) + 16}"))
    for lane, (name, what, kind) in enumerate(LANES):
        y = TOP + lane * LANE
        parts.append(box(LEFT, y + 4, width - 2 * LEFT, LANE - 8, "lane"))
        parts += words(LEFT + 16, y + LANE // 2 - 10, [name], "text", "start", 17)
        parts += words(LEFT + 16, y + LANE // 2 + 12, [what], "small", "start", 13)
        for phase in range(len(PHASES)):
            if (lane, phase) in WORK:
                parts.append(box(left_of(phase), y + 10, COLUMN, LANE - 20, kind))
                parts += words(left_of(phase) + COLUMN // 2, y + LANE // 2, WORK[lane, phase])
    parts.append(box(left_of(2), TOP + 10, COLUMN, len(LANES) * LANE - 20, "ranks"))
    parts += words(left_of(2) + COLUMN // 2, TOP + len(LANES) * LANE // 2, BETWEEN)
    parts += words(LEFT + 16, bottom + 40, ["gives"], "small", "start")
    start, end, under = left_of(3) + COLUMN // 2, left_of(0) + COLUMN // 2, height - 32
    parts.append(arrow(f"M{start},{bottom + 66} V{under} H{end} V{bottom + 68}"))
    label = "next iteration; a checkpoint every save_every iterations, an evaluation every evaluate_every"
    parts += words((start + end) // 2, under + 16, [label], "small", size=13)
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("iteration.svg").write_text(picture(), encoding="utf-8")
