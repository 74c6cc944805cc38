"""Charts by matplotlib and circuits by schemdraw: hands that drew nothing of the training.

The same scenes, at the same size, in those libraries' own styles and fonts. Needs `duomo[train]`.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from duomo.tasks import charts, circuits
from duomo.tasks.charts import Chart
from duomo.tasks.circuits import Circuit
from duomo.tasks.scene import Pixels

DPI = 100


def chart_by_matplotlib(chart: Chart) -> Pixels:
    """Bars or a line with the axis's own ticks, numbers above where the chart is labelled."""
    from matplotlib.figure import Figure

    height, width = charts.CANVAS_PX
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((0.12, 0.13, 0.86, 0.8))
    axes.tick_params(labelsize=6, length=2, pad=1)
    axes.set_ylim(0, charts.HIGHEST * 1.1)
    axes.set_yticks(range(0, charts.HIGHEST + 1, 5))
    if chart.style == "bar":
        bars = axes.bar(chart.months, chart.values)
        if chart.is_labelled:
            axes.bar_label(bars, fontsize=7)
    else:
        axes.plot(chart.months, chart.values, marker="o", markersize=3, linewidth=1)
        if chart.is_labelled:
            for month, value in zip(chart.months, chart.values, strict=True):
                axes.annotate(
                    str(value), (month, value), (0, 3), textcoords="offset points", ha="center", fontsize=7
                )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return _fitted(stream.getvalue(), charts.CANVAS_PX)


def circuit_by_schemdraw(circuit: Circuit) -> Pixels:
    """Left to right with schemdraw's resistors and labels."""
    import schemdraw
    from matplotlib import pyplot
    from schemdraw import elements

    with schemdraw.Drawing(show=False, canvas="matplotlib", fontsize=22, lw=3) as drawing:
        x = 0.0
        for index, group in enumerate(circuit.groups):
            middle_is_open = circuit.shape == "bridge" and index == 0
            spread = 1.6 if len(group) == 2 else 0.0
            for place, number in enumerate(group):
                y = spread * (1 - 2 * place)
                label = f"R{number} {circuit.ohms[number - 1]}"
                drawing += elements.Resistor().at((x, y)).to((x + 4, y)).label(label)
            if spread:
                starts_open = circuit.shape == "bridge" and index == 1
                for end, is_open in ((x, starts_open), (x + 4, middle_is_open)):
                    if not is_open:
                        drawing += elements.Line().at((end, spread)).to((end, -spread))
            x += 4
        if circuit.shape == "bridge":
            drawing += elements.Resistor().at((4, 1.6)).to((4, -1.6)).label(f"R5 {circuit.ohms[4]}")
        for end in (0.0, x):
            drawing += elements.Dot().at((end, 0))
    png = drawing.get_imagedata("png")
    pyplot.close(drawing.fig.fig)
    return _fitted(png, circuits.CANVAS_PX)


def _fitted(png: bytes, canvas_px: tuple[int, int]) -> Pixels:
    """The drawing in the middle of white paper, as large as it goes."""
    height, width = canvas_px
    with Image.open(io.BytesIO(png)) as opened:
        picture = Image.new("RGB", opened.size, "white")
        picture.paste(opened, mask=opened.getchannel("A") if opened.mode == "RGBA" else None)
    scale = min(height / picture.height, width / picture.width)
    size = round(picture.width * scale), round(picture.height * scale)
    paper = Image.new("RGB", (width, height), "white")
    place = (width - size[0]) // 2, (height - size[1]) // 2
    paper.paste(picture.resize(size, Image.Resampling.LANCZOS), place)
    return np.asarray(paper)
