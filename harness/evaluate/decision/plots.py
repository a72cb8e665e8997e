"""The page's plots: inline SVG whose places are percentages, so that they are as wide as the page lets them be.

Colours come from the page's style sheet, so that they follow its light and its dark theme, and print.
"""

from __future__ import annotations

from harness.page import svg

ROW_PX = 22


def interval_plot(rate: float | None, interval: tuple[float, float] | None, target: float, *, state: str, chosen: bool = False) -> str:
    """One rate between 0 and 100 %: its interval, its point, and the target as a line."""
    middle = ROW_PX / 2
    parts = [
        f'<line class="axis" x1="0%" x2="100%" y1="{middle}" y2="{middle}"/>',
        f'<line class="target" x1="{target:.1%}" x2="{target:.1%}" y1="2" y2="{ROW_PX - 2}"/>',
    ]
    if interval is not None:
        low, high = interval
        parts.append(f'<line class="interval {state}" x1="{low:.1%}" x2="{high:.1%}" y1="{middle}" y2="{middle}"/>')
        parts.append(f'<circle class="point {state}{" chosen" if chosen else ""}" cx="{rate:.1%}" cy="{middle}" r="{5 if chosen else 4}"/>')
        said = f"{rate:.0%}, {low:.0%} to {high:.0%}"
    else:
        said = "no item"
    return svg(ROW_PX, said, parts)


def token_bar(prompt: float, answer: float, longest: float) -> str:
    """Tokens of a prompt and, behind them, of the answer, as shares of the longest of all arms."""
    of_prompt, of_answer = prompt / longest, answer / longest
    parts = [
        f'<rect class="prompt" x="0%" y="5" width="{of_prompt:.1%}" height="{ROW_PX - 10}" rx="2"/>',
        f'<rect class="answer" x="{of_prompt:.1%}" y="5" width="{max(of_answer, 0.004):.1%}" height="{ROW_PX - 10}" rx="2"/>',
    ]
    return svg(ROW_PX, f"{prompt:.0f} tokens of prompt, {answer:.0f} of answer", parts)


def fall_plot(before: float, after: float) -> str:
    """From one rate to another: an arrow's shaft, with a ring where it began and a point where it ended."""
    middle = ROW_PX / 2
    parts = [
        f'<line class="axis" x1="0%" x2="100%" y1="{middle}" y2="{middle}"/>',
        f'<line class="fall" x1="{after:.1%}" x2="{before:.1%}" y1="{middle}" y2="{middle}"/>',
        f'<circle class="ring" cx="{before:.1%}" cy="{middle}" r="4"/>',
        f'<circle class="point misses" cx="{after:.1%}" cy="{middle}" r="5"/>',
    ]
    return svg(ROW_PX, f"from {before:.0%} to {after:.0%}", parts)
