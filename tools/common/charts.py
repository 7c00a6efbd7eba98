"""Charts: polylines in a box of fixed size; chart.html.j2 and chart.css draw them."""

import math
from collections.abc import Mapping, Sequence

LEFT, TOP, WIDTH, HEIGHT = 48, 18, 262, 140


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, list[tuple[float, float]]],
    marks: Sequence[tuple[float, str]] = (),
) -> dict | None:
    """Scales series of (x, y) and the x of vertical marks to the box; None without a point."""
    series = {name: line for name, line in series.items() if line}
    everything = [p for line in series.values() for p in line]
    if not everything:
        return None
    xs, ys = zip(*everything, strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def x_at(x: float) -> float:
        return round(LEFT + WIDTH * (x - x_low) / (x_high - x_low), 1)

    def y_at(y: float) -> float:
        return round(TOP + HEIGHT * (y_high - y) / (y_high - y_low), 1)

    ends = (f"{name} from {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in series.items())
    return {
        "title": title,
        "labels": (x_label, y_label),
        "lines": {
            name: " ".join(f"{x_at(x)},{y_at(y)}" for x, y in line) for name, line in series.items()
        },
        "x_ticks": [(x_at(t), f"{t:g}") for t in x_ticks if x_low <= t <= x_high],
        "y_ticks": [(y_at(t), f"{t:g}") for t in y_ticks],
        "marks": [(x_at(x), text) for x, text in marks if x_low <= x <= x_high],
        "summary": f"{title}: {'; '.join(ends)}",  # for screen readers
    }


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round values that enclose [low, high]."""
    span = max(high - low, 1e-6, 1e-3 * abs(high))
    raw = span / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]
