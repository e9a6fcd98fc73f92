"""The report of `trtc eval`: one HTML page with inline SVG and no outside assets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template

import numpy as np

from .perplexity import Comparison, Float64Array

MAX_POINTS = 400
"""Points of a plot; longer texts are drawn as the mean and the maximum of groups of positions."""
MAX_ROWS = 20
"""Rows of the table of the largest distances."""
MAX_TEXT_TOKENS = 1200
"""Tokens of the text that are shown."""

_WIDTH, _HEIGHT = 860, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 24, 12, 30


@dataclass(frozen=True)
class Continuation:
    """What both sides write after the same piece of the text."""

    prompt: str
    reference: str
    engine: str


@dataclass(frozen=True, eq=False)
class ReportData:
    """All that the page shows.

    facts:             name -> value, for the table at its top
    tokens:            text of every token of the evaluated text, the first included
    engine_choices,
    reference_choices: text of the token that each side would have chosen, for every scored token
    continuations:     greedy texts side by side
    """

    engine_name: str
    reference_name: str
    facts: dict[str, str]
    tokens: Sequence[str]
    engine_choices: Sequence[str]
    reference_choices: Sequence[str]
    comparison: Comparison
    continuations: Sequence[Continuation]


def render(data: ReportData) -> str:
    """The page, as text."""
    comparison = data.comparison
    distance = comparison.distance
    nll_lines = [
        ("transformers", comparison.reference.nll, "b"),
        ("engine", comparison.engine.nll, "a dashed"),
    ]
    return _PAGE.substitute(
        title=escape(f"{data.engine_name}: distance to {data.reference_name}"),
        engine=escape(data.engine_name),
        reference=escape(data.reference_name),
        facts="".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in data.facts.items()),
        kl=_plot(_envelope(distance.kl), log=True, label="KL divergence per position in nats"),
        logits=_plot(_envelope(distance.max_abs), log=True, label="largest logit difference per position"),
        nll=_plot(
            [(name, *_grouped(values)[:2], style) for name, values, style in nll_lines],
            log=False,
            label="negative log-likelihood of the text in nats",
        ),
        grouping=_grouping_note(len(distance.kl)),
        continuations="".join(map(_continuation, data.continuations)),
        worst=_worst_rows(data),
        text=_marked_text(data),
        shown=_shown_note(len(data.tokens)),
    )


Line = tuple[str, Float64Array, Float64Array, str]
"""Name, x, y and style of one line of a plot."""


def _grouped(values: Float64Array) -> tuple[Float64Array, Float64Array, Float64Array]:
    """x (token positions), means and maxima of at most MAX_POINTS groups of neighbours."""
    groups = np.array_split(values, min(MAX_POINTS, len(values)))
    starts = np.cumsum([0, *map(len, groups[:-1])])
    x = np.array([1 + start + (len(group) - 1) / 2 for start, group in zip(starts, groups, strict=True)])
    return x, np.array([g.mean() for g in groups]), np.array([g.max() for g in groups])


def _envelope(values: Float64Array) -> list[Line]:
    x, mean, largest = _grouped(values)
    if len(x) == len(values):
        return [("each position", x, values, "a")]
    return [("maximum", x, largest, "b"), ("mean", x, mean, "a")]


def _grouping_note(count: int) -> str:
    size = math.ceil(count / MAX_POINTS)
    return "" if size == 1 else f"Every point stands for up to {size} neighbouring positions."


def _plot(lines: Sequence[Line], *, log: bool, label: str) -> str:
    """An SVG of lines over token positions. On a logarithmic axis zeros are drawn at the bottom."""
    right = max(float(x[-1]) for _, x, _, _ in lines)
    low, high = _limits(np.concatenate([y for _, _, y, _ in lines]), log)

    def px(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (x - 1) / max(right - 1, 1)

    def py(y: float) -> float:
        value = (math.log10(max(y, low)) if log else y) - (math.log10(low) if log else low)
        span = (math.log10(high) - math.log10(low)) if log else high - low
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / span

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in _ticks(low, high, log):
        y = py(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in [1, *(tick for tick in _round_ticks(1, right, 8) if tick > 1)]:
        parts.append(f'<text x="{px(tick):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{tick:.10g}</text>')
    for _, x, y_values, style in lines:
        points = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(x, y_values, strict=True))
        parts.append(f'<polyline class="{style}" points="{points}"/>')
    parts.append("</svg>")
    names = "".join(f'<span class="key {style}">{escape(name)}</span>' for name, _, _, style in lines)
    return f"<figure>{''.join(parts)}<figcaption>{names} over the position in the text</figcaption></figure>"


def _limits(values: Float64Array, log: bool) -> tuple[float, float]:
    if not log:
        return 0.0, float(values.max()) * 1.05 or 1.0
    positive = values[values > 0]
    if not len(positive):
        return 1e-12, 1.0
    low = 10 ** math.floor(math.log10(positive.min()))
    return low, max(10 ** math.ceil(math.log10(positive.max())), 10 * low)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if not log:
        return _round_ticks(low, high, 5)
    first, last = round(math.log10(low)), round(math.log10(high))
    return [10.0**power for power in range(first, last + 1, math.ceil((last - first) / 6))]


def _round_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten from low to high."""
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if raw <= power * factor * (1 + 1e-9))
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _continuation(text: Continuation) -> str:
    """Both texts; from the first word at which they part they stand out."""
    same = text.reference == text.engine
    pairs = enumerate(zip(text.reference, text.engine, strict=False))
    parted = next((i for i, (a, b) in pairs if a != b), min(len(text.reference), len(text.engine)))
    start = parted if same else text.reference.rfind(" ", 0, parted) + 1
    verdict = '<span class="same">equal</span>' if same else '<span class="differs">different</span>'
    return (
        f'<article><p class="prompt">… {escape(text.prompt)}</p><div class="pair">'
        f"<div><h4>transformers</h4><p>{_from(text.reference, start)}</p></div>"
        f"<div><h4>engine {verdict}</h4><p>{_from(text.engine, start)}</p></div></div></article>"
    )


def _from(text: str, start: int) -> str:
    rest = f'<span class="parted">{escape(text[start:])}</span>' if start < len(text) else ""
    return escape(text[:start]) + rest


def _worst_rows(data: ReportData) -> str:
    distance, agrees = data.comparison.distance, data.comparison.agrees
    rows = []
    for i in np.argsort(-distance.kl, kind="stable")[:MAX_ROWS].tolist():
        context = "".join(data.tokens[max(0, i - 11) : i + 1])
        cells = (
            f"<td>{i + 1}</td><td class='context'>… {escape(context)}</td><td>{_token(data.tokens[i + 1])}</td>"
            f"<td>{_token(data.reference_choices[i])}</td><td>{_token(data.engine_choices[i])}</td>"
            f"<td class='number'>{distance.kl[i]:.3g}</td><td class='number'>{distance.max_abs[i]:.3g}</td>"
        )
        rows.append(f"<tr{'' if agrees[i] else ' class=differs-row'}>{cells}</tr>")
    return "".join(rows)


def _token(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _marked_text(data: ReportData) -> str:
    """The text; tokens in whose place the sides would have chosen differently are marked, with both choices as a hint."""
    parts = [escape(data.tokens[0])]
    agrees = data.comparison.agrees
    for i, token in enumerate(data.tokens[1:MAX_TEXT_TOKENS]):
        if agrees[i]:
            parts.append(escape(token))
        else:
            hint = f"transformers: {data.reference_choices[i]!r}, engine: {data.engine_choices[i]!r}"
            parts.append(f'<mark title="{escape(hint)}">{escape(token)}</mark>')
    return "".join(parts)


def _shown_note(count: int) -> str:
    return "" if count <= MAX_TEXT_TOKENS else f"The first {MAX_TEXT_TOKENS} of {count} tokens."


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1b1f24; --soft: #59636e; --line: #d5dae0; --page: #fff; --box: #f5f7f9;
  --a: #0b62c4; --b: #c4570b; --mark: #ffe08a; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ec; --soft: #9aa4af; --line: #3a424b; --page: #14181c;
  --box: #1d2329; --a: #6cb0ff; --b: #ffa061; --mark: #6b5200; } }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
h4 { font-size: .85rem; margin: 0; color: var(--soft); } p { margin: .3rem 0; }
p.note, figcaption { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); }
.number { white-space: nowrap; } .scroll { overflow-x: auto; } .context { color: var(--soft); } code { white-space: pre; }
figure { margin: .3rem 0; } svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--soft); } svg .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 1.3; stroke-linejoin: round; }
polyline.dashed { stroke-dasharray: 4 3; stroke-width: 1.6; }
polyline.a { stroke: var(--a); } polyline.b { stroke: var(--b); }
.key::before { content: ""; display: inline-block; width: 1.2em; height: .2em; margin-right: .4em; vertical-align: .25em; }
.key { margin-right: 1em; } .key.a::before { background: var(--a); } .key.b::before { background: var(--b); }
article { background: var(--box); border-radius: .4rem; padding: .7rem .9rem; margin: .6rem 0; }
.prompt { margin-bottom: .5rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; } .prompt { color: var(--soft); }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } }
.same { color: var(--a); } .differs { color: var(--b); font-weight: 600; }
.parted { background: color-mix(in srgb, var(--mark) 55%, transparent); }
tr.differs-row { background: color-mix(in srgb, var(--mark) 45%, transparent); }
mark { background: var(--mark); color: inherit; } .text { white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$engine<br><small>beside $reference</small></h1>
<div class="scroll"><table>$facts</table></div>
<h2>KL divergence</h2>
<p class="note">KL(transformers || engine) of the next-token distributions, in nats, at every position. $grouping</p>
$kl
<h2>Logit distance</h2>
<p class="note">The largest |engine - transformers| over the vocabulary at every position. $grouping</p>
$logits
<h2>Likelihood of the text</h2>
<p class="note">Negative log-likelihood of each token in nats; the exponential of its mean is the perplexity. $grouping</p>
$nll
<h2>Texts side by side</h2>
<p class="note">Greedy continuations of the same pieces of the text, marked from where they part.</p>
$continuations
<h2>Largest distances</h2>
<p class="note">Positions with the largest divergence; marked rows are those where the two sides choose different tokens.</p>
<div class="scroll"><table><thead><tr><th>position</th><th>context</th><th>text</th><th>transformers</th><th>engine</th>
<th>KL</th><th>max |&Delta; logit|</th></tr></thead><tbody>$worst</tbody></table></div>
<h2>Where the choices differ</h2>
<p class="note">Marked: tokens in whose place the two sides would have chosen differently (point at one to see both). $shown</p>
<p class="text">$text</p>
</body>
</html>
""")
