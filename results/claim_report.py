"""Papers with the verdicts of their claims: Markdown, JSON, HTML and a badge each."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from results import text
from results.claims import VERDICTS, Settled, Verdict, counts

FORMATS: Final = ("md", "json", "html")
HEADINGS: Final = ("claim", "metric", "claimed", "against", "verdict", "why", "to settle it")

_COLOURS: Mapping[Verdict, str] = {
    "reproduced": "#2e7d32",
    "direction": "#1565c0",
    "not-reproduced": "#b71c1c",
    "not-reproduced (mechanism)": "#b71c1c",
    "exceeds-bound": "#b45309",
    "protocol-differs": "#6b4fa0",
    "not-testable-here": "#5f6368",
}
# What a badge's colour shows, if a claim has it: trouble before success before silence.
_LOUDEST: tuple[Verdict, ...] = (
    "not-reproduced",
    "exceeds-bound",
    "not-reproduced (mechanism)",
    "reproduced",
    "direction",
    "protocol-differs",
    "not-testable-here",
)
_BADGE_LABEL = "claims"
# Verdana at 11 px, on the average; a badge that is a little wide does no harm.
_CHARACTER_PIXELS = 6.6
# Characters of a claim that a terminal shows.
_SHORT = 44


@dataclass(frozen=True, kw_only=True)
class PaperReport:
    """One paper with its claims and their verdicts, side by side.

    Attributes:
        method: Name of the method.
        title: Of the paper.
        arxiv: Its id, or empty.
        status: `ready`, or `planned` where there is no implementation.
        claims: As the card has them.
        settled: One verdict for each.
    """

    method: str
    title: str
    arxiv: str
    status: str
    claims: Sequence[Mapping[str, Any]]
    settled: Sequence[Settled]

    @property
    def message(self) -> str:
        """How often each verdict was given: `1 reproduced, 3 direction`."""
        return ", ".join(f"{count} {verdict}" for verdict, count in counts(self.settled).items())

    @property
    def colour(self) -> str:
        """Colour of the loudest verdict."""
        given = {each.verdict for each in self.settled}
        return _COLOURS[next((verdict for verdict in _LOUDEST if verdict in given), _LOUDEST[-1])]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of a table with `HEADINGS`."""
        return [
            (
                str(claim["id"]),
                str(claim["metric"]),
                str(claim["value"]),
                str(claim.get("baseline") or ""),
                verdict.verdict,
                verdict.detail,
                verdict.command,
            )
            for claim, verdict in zip(self.claims, self.settled, strict=True)
        ]

    def short_rows(self) -> list[dict[str, str]]:
        """Return rows for a terminal: long claims cut, the command behind the reason."""
        return [
            {
                "method": self.method,
                "claim": name,
                "metric": _short(metric),
                "claimed": _short(claimed),
                "verdict": verdict,
                "why": f"{why} Run: {command}" if command else why,
            }
            for name, metric, claimed, _, verdict, why, command in self.rows()
        ]


def render(reports: Sequence[PaperReport], format: str) -> str:
    """Return the reports as text.

    Raises:
        ValueError: `format` is none of `FORMATS`.
    """
    writers = {"md": _markdown, "json": _json, "html": _html}
    if format not in writers:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    return writers[format](reports)


def summary(reports: Sequence[PaperReport]) -> str:
    """Return one line: papers, claims, and how often each verdict was given."""
    settled = [each for report in reports for each in report.settled]
    given = ", ".join(f"{count} {verdict}" for verdict, count in counts(settled).items())
    return f"{len(reports)} papers, {len(settled)} claims: {given or 'none'}"


def badge_svg(report: PaperReport) -> str:
    """Return a badge as an SVG image; its text is also its title, for those who hear it."""
    message = report.message or "none"
    left, right = (round(len(each) * _CHARACTER_PIXELS) + 12 for each in (_BADGE_LABEL, message))
    words = html.escape(f"{_BADGE_LABEL}: {message}")
    shown = html.escape(message)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{words}">\n<title>{words}</title>\n'
        f'<rect width="{left}" height="20" fill="#3c4043"/>\n'
        f'<rect x="{left}" width="{right}" height="20" fill="{report.colour}"/>\n'
        '<g fill="#fff" text-anchor="middle" font-size="11" '
        'font-family="Verdana,Geneva,DejaVu Sans,sans-serif">\n'
        f'<text x="{left / 2:g}" y="14">{_BADGE_LABEL}</text>\n'
        f'<text x="{left + right / 2:g}" y="14">{shown}</text>\n</g>\n</svg>\n'
    )


def badge_json(report: PaperReport) -> str:
    """Return a badge in the endpoint form of shields.io."""
    content = {
        "schemaVersion": 1,
        "label": _BADGE_LABEL,
        "message": report.message or "none",
        "color": report.colour,
    }
    return text.json_text(content, indent=1) + "\n"


def write_badges(reports: Sequence[PaperReport], folder: Path) -> list[Path]:
    """Write `METHOD.svg` and `METHOD.json` for each paper; return the paths.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for report in reports:
        for suffix, content in ((".svg", badge_svg(report)), (".json", badge_json(report))):
            path = folder / f"{report.method}{suffix}"
            path.write_text(content, encoding="utf-8")
            paths.append(path)
    return paths


def _short(words: str) -> str:
    return words if len(words) <= _SHORT else words[: _SHORT - 1] + "…"


def _markdown(reports: Sequence[PaperReport]) -> str:
    parts = [f"# Claims\n\n{text.markdown(summary(reports))}"]
    for report in reports:
        lines = [
            f"## {text.markdown(report.method)}",
            "",
            f"{text.markdown(report.title)}{_arxiv_markdown(report)} — "
            f"{text.markdown(report.status)}: {text.markdown(report.message)}",
            "",
            "| " + " | ".join(HEADINGS) + " |",
            "|" + "---|" * len(HEADINGS),
        ]
        lines += ["| " + " | ".join(map(text.markdown, row)) + " |" for row in report.rows()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _arxiv_markdown(report: PaperReport) -> str:
    if not report.arxiv:
        return ""
    return f", [arXiv {report.arxiv}](https://arxiv.org/abs/{report.arxiv})"


def _json(reports: Sequence[PaperReport]) -> str:
    content = [
        {
            "method": report.method,
            "title": report.title,
            "arxiv": report.arxiv,
            "status": report.status,
            "verdicts": counts(report.settled),
            "claims": [
                {**dict(claim), **asdict(verdict)}
                for claim, verdict in zip(report.claims, report.settled, strict=True)
            ],
        }
        for report in reports
    ]
    # Strict JSON: what is no number has become its name.
    return json.dumps(json.loads(text.json_text(content)), indent=1, ensure_ascii=False) + "\n"


_STYLE = (
    "body{font-family:system-ui,sans-serif;margin:2rem;color:#1b1b1b;background:#fff}"
    "table{border-collapse:collapse;width:100%}div{overflow-x:auto;margin-bottom:2rem}"
    "th,td{padding:.3rem .6rem;border-bottom:1px solid #bbb;text-align:left;vertical-align:top}"
    "thead th{border-bottom:2px solid #1b1b1b}code{white-space:nowrap;font-size:.85em}"
    "strong{white-space:nowrap}svg{vertical-align:middle}"
)


def _html(reports: Sequence[PaperReport]) -> str:
    head = "".join(f'<th scope="col">{each}</th>' for each in HEADINGS)
    parts = [_html_section(report, head) for report in reports]
    legend = ", ".join(
        f'<strong style="color:{_COLOURS[verdict]}">{verdict}</strong>' for verdict in VERDICTS
    )
    content = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>tokenmark: claims</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>Claims</h1>\n<p>{_escape(summary(reports))}</p>\n"
        f"<p>Verdicts: {legend}. docs/methodology.md says how each is reached.</p>\n"
        f"{content}\n</main>\n</body>\n</html>\n"
    )


def _html_section(report: PaperReport, head: str) -> str:
    lines = []
    for name, metric, claimed, against, verdict, why, command in report.rows():
        colour = next(colour for known, colour in _COLOURS.items() if known == verdict)
        cells = "".join(f"<td>{_escape(each)}</td>" for each in (metric, claimed, against))
        shown = f"<code>{_escape(command)}</code>" if command else ""
        lines.append(
            f'<tr><th scope="row">{_escape(name)}</th>{cells}'
            f'<td><strong style="color:{colour}">{_escape(verdict)}</strong></td>'
            f"<td>{_escape(why)}</td><td>{shown}</td></tr>"
        )
    link = (
        f', <a href="https://arxiv.org/abs/{_escape(report.arxiv)}">arXiv '
        f"{_escape(report.arxiv)}</a>"
        if report.arxiv
        else ""
    )
    return (
        f'<section id="{_escape(report.method)}">\n<h2>{_escape(report.method)}</h2>\n'
        f"<p>{_escape(report.title)}{link}, {_escape(report.status)} {badge_svg(report)}</p>\n"
        f"<div><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody>\n</table></div>\n</section>"
    )


def _escape(words: str) -> str:
    return html.escape(text.plain(words))
